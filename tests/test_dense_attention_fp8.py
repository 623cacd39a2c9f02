"""Dense attention in fp8: reference, what the check lets through and what not, counts."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_bench import registry
from dsa_bench.baselines import dense_attention, dense_attention_fp8
from dsa_bench.baselines.dense_attention import DenseAttentionShape, DenseOutputs
from dsa_bench.baselines.dense_attention_fp8 import (
    OPERATOR,
    Fp8Inputs,
    Fp8PrefillInputs,
    quantize,
)
from dsa_bench.operator import Machine, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests.fp8_attention import decode_shape, make, online, prefill_shape

CPU = Machine(device="cpu", name="CPU")
V32 = PRESETS["v3.2"]

SHAPES = [
    *(prefill_shape(*sizes, heads) for sizes in [(1, 1), (5, 5), (1, 40), (7, 40)]
      for heads in (1, 3)),
    *(decode_shape(*sizes) for sizes in [(2, 1, 20), (1, 3, 20), (3, 2, 2)]),
    decode_shape(2, 1, 20, num_heads=1),
]  # fmt: skip


def in_fp64(inputs: Fp8Inputs) -> tuple[Tensor, Tensor]:
    """The formula a query at a time in fp64, the mask by slicing; prefill as a batch of heads."""
    if isinstance(inputs, Fp8PrefillInputs):
        q, k, v = (
            x.double() * scale[:, None]
            for x, scale in [
                (inputs.q, inputs.q_scale), (inputs.k, inputs.k_scale), (inputs.v, inputs.v_scale)
            ]
        )  # fmt: skip
        q, k, v = q[None], k[None], v[None]
    else:
        q = inputs.q.double() * inputs.q_scale
        k = (inputs.kv.double() * inputs.kv_scale)[:, :, None].expand(-1, -1, q.shape[2], -1)
        v = k[..., : inputs.head_dim_v]
    outs, lses = [], []
    for i in range(q.shape[1]):
        end = k.shape[1] - q.shape[1] + i + 1
        scores = (k[:, :end] * q[:, i, None]).sum(-1) * inputs.sm_scale
        outs.append((scores.softmax(1)[..., None] * v[:, :end]).sum(1))
        lses.append(scores.logsumexp(1))
    out, lse = torch.stack(outs, 1), torch.stack(lses, 1)
    return (out[0], lse[0]) if isinstance(inputs, Fp8PrefillInputs) else (out, lse)


@pytest.mark.parametrize("sharp", [1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_the_formula_in_fp64(shape: DenseAttentionShape, sharp: float) -> None:
    inputs = make(shape, sharp=sharp)
    out, lse = in_fp64(inputs)
    found = OPERATOR.reference(inputs)
    torch.testing.assert_close(found.out.double(), out, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(found.lse.double(), lse, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("shape", [prefill_shape(9, 30), decode_shape(4, 2, 30)], ids=str)
def test_reference_of_some_rows(shape: DenseAttentionShape) -> None:
    inputs, rows = make(shape, sharp=30.0), torch.tensor([3, 0, 2])
    whole, some = OPERATOR.reference(inputs), OPERATOR.reference(inputs, rows=rows)
    torch.testing.assert_close(some.out, whole.out[rows])
    torch.testing.assert_close(some.lse, whole.lse[rows])
    assert OPERATOR.num_rows(shape) == whole.out.shape[0]


@pytest.mark.parametrize("shape", [prefill_shape(6, 10), decode_shape(3, 2, 10)], ids=str)
def test_inputs_are_those_of_dense_attention_rounded(
    shape: DenseAttentionShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = dense_attention.make_inputs(shape, seed=3, device="cpu")
    # one row a part
    monkeypatch.setattr(dense_attention_fp8, "INPUT_CHUNK_ELEMENTS", 1)
    inputs = make(shape)
    for name in ("q", "k", "v") if shape.is_prefill else ("q", "kv"):
        values, scale = getattr(inputs, name), getattr(inputs, f"{name}_scale")
        x = getattr(exact, name).float()
        assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
        assert scale.shape == ((shape.num_heads,) if shape.is_prefill else (1,))
        wide = values.float()
        largest = wide.abs().amax((0, 2)) if shape.is_prefill else wide.abs().max()
        assert (largest == 448).all()
        wide = wide * (scale[:, None] if shape.is_prefill else scale)
        # half a step of three bits, or of the least step 2^-9
        step = torch.maximum(x.abs() / 16, scale.max() * 2**-10)
        assert ((wide - x).abs() <= step * 1.001).all()


def test_zeros_are_rounded_to_zeros() -> None:
    values, scale = quantize(torch.zeros(2, 3, 4, dtype=torch.bfloat16), per_head=True)
    assert (values.float() == 0).all() and (scale > 0).all()


CHECKED = [prefill_shape(40, 400), prefill_shape(64, 64, 1), decode_shape(2, 2, 400)]
LARGE = 1000.0


def enlarged(inputs: Any) -> Any:
    """Values of decode are its keys too: there the queries shrink in turn."""
    if isinstance(inputs, Fp8PrefillInputs):
        return dataclasses.replace(inputs, v_scale=inputs.v_scale * LARGE)
    return dataclasses.replace(
        inputs, kv_scale=inputs.kv_scale * LARGE, q_scale=inputs.q_scale / LARGE
    )


@pytest.mark.parametrize("up", [1.0, 256.0])
@pytest.mark.parametrize("sharp", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("shape", [*SHAPES, *CHECKED], ids=str)
def test_check_passes_a_kernel_that_rounds_its_weights(
    shape: DenseAttentionShape, sharp: float, up: float
) -> None:
    for inputs in (make(shape, sharp=sharp), enlarged(make(shape, sharp=sharp))):
        for check in OPERATOR.check(inputs, online(inputs, up=up)):
            assert check.passed, check


def without_mask(inputs: Fp8Inputs) -> DenseOutputs:
    """Every query sees every key: each is the last of a sequence of its own."""
    if isinstance(inputs, Fp8PrefillInputs):
        parts = [dataclasses.replace(inputs, q=q[None]) for q in inputs.q]
        made = [online(part) for part in parts]
        return DenseOutputs(torch.cat([o.out for o in made]), torch.cat([o.lse for o in made]))
    made = [online(dataclasses.replace(inputs, q=q[:, None])) for q in inputs.q.unbind(1)]
    return DenseOutputs(torch.cat([o.out for o in made], 1), torch.cat([o.lse for o in made], 1))


def without_keys(inputs: Fp8Inputs) -> DenseOutputs:
    """16 keys of the first 400 are lost."""
    kept = [*range(64), *range(80, 400)]

    def drop(x: Tensor, dim: int) -> Tensor:
        return x.float().index_select(dim, torch.tensor(kept)).to(x.dtype)

    if isinstance(inputs, Fp8PrefillInputs):
        return online(dataclasses.replace(inputs, k=drop(inputs.k, 0), v=drop(inputs.v, 0)))
    return online(dataclasses.replace(inputs, kv=drop(inputs.kv, 1)))


def scaled(name: str, factor: float) -> Any:
    def run(inputs: Any) -> DenseOutputs:
        name_here = name if hasattr(inputs, name) else "kv_scale"
        return online(
            dataclasses.replace(inputs, **{name_here: getattr(inputs, name_here) * factor})
        )

    return run


CORRUPTED = {
    "no mask": without_mask,
    "lost block": without_keys,
    "q scale": scaled("q_scale", 2.0),
    "k scale": scaled("k_scale", 0.5),
    "no q scale": lambda inputs: online(
        dataclasses.replace(inputs, q_scale=torch.ones_like(inputs.q_scale))
    ),
}


@pytest.mark.parametrize("sharp", [1.0, 30.0])
@pytest.mark.parametrize("name", CORRUPTED)
@pytest.mark.parametrize("shape", [prefill_shape(40, 400), decode_shape(2, 2, 400)], ids=str)
def test_check_fails_what_is_wrong(shape: DenseAttentionShape, name: str, sharp: float) -> None:
    inputs = make(shape, sharp=sharp)
    assert all(check.passed for check in OPERATOR.check(inputs, online(inputs)))
    found = {c.name: c.passed for c in OPERATOR.check(inputs, CORRUPTED[name](inputs))}
    assert list(found) == ["out", "out_budget", "lse", "lse_budget"]
    assert not found["lse_budget"]


@pytest.mark.parametrize("shape", [prefill_shape(40, 400), decode_shape(2, 2, 400)], ids=str)
def test_out_alone_is_held_to_its_scale_and_its_place(shape: DenseAttentionShape) -> None:
    inputs = make(shape, sharp=30.0)
    right = online(inputs)

    def failed(out: Tensor) -> set[str]:
        checks = OPERATOR.check(inputs, DenseOutputs(out, None))
        assert [c.name for c in checks] == ["out", "out_budget"]
        return {c.name for c in checks if not c.passed}

    assert failed(right.out) == set()
    assert "out_budget" in failed(right.out * 1.25)
    assert failed(right.out * 2) == {"out", "out_budget"}
    turned = right.out.roll(1, -2)
    assert failed(turned) == {"out", "out_budget"}
    # one head of one query of many
    spoiled = right.out.clone()
    spoiled.flatten(0, -2)[7] *= 1.5
    assert "out_budget" in failed(spoiled)


def test_check_of_some_rows_sees_those_alone() -> None:
    inputs = make(prefill_shape(9, 30))
    out, lse = online(inputs)
    out[5] = 7.0
    rows = torch.tensor([1, 8])
    assert all(c.passed for c in OPERATOR.check(inputs, DenseOutputs(out, lse), rows=rows))
    assert not all(c.passed for c in OPERATOR.check(inputs, DenseOutputs(out, lse)))


def test_cost_counted_by_hand() -> None:
    # queries 3 of 5 keys see 3, 4 and 5 of them: 12 pairs
    cost = OPERATOR.cost(prefill_shape(3, 5, num_heads=2))
    assert cost.flops == 2 * 2 * (192 + 128) * 12
    assert cost.bytes_read == 3 * 2 * 192 + 5 * 2 * (192 + 128) + 3 * 2 * 4
    assert cost.bytes_written == 3 * 2 * (2 * 128 + 4)
    cost = OPERATOR.cost(decode_shape(2, 2, 4, num_heads=8))
    assert cost.flops == 2 * 8 * (576 + 512) * 14
    assert cost.bytes_read == 2 * 2 * 8 * 576 + 2 * 4 * 576 + 2 * 4


@pytest.mark.parametrize("shape", [prefill_shape(4, 9), decode_shape(3, 2, 11)], ids=str)
def test_memory_is_what_the_tensors_take(shape: DenseAttentionShape) -> None:
    inputs = make(shape)
    tensors = [x for name in inputs.__slots__ if torch.is_tensor(x := getattr(inputs, name))]
    out, lse = online(inputs)
    memory = OPERATOR.memory(shape)
    assert memory.input_bytes == sum(x.nbytes for x in tensors)
    assert memory.output_bytes == out.nbytes + lse.nbytes


def test_memory_of_pieces_counted_by_hand() -> None:
    assert OPERATOR.memory(prefill_shape(4, 4096)).workspace_bytes == 0
    assert OPERATOR.memory(prefill_shape(4, 4097)).workspace_bytes == 2 * 4 * 3 * (128 + 1) * 4
    whole = OPERATOR.memory(decode_shape(32, 1, 4096, num_heads=128)).workspace_bytes
    assert whole == (32 + 132) * 128 * (512 + 1) * 4
    # fp32 results as they are, then in bf16, and a copy of the query for each of 8 pieces
    cut = OPERATOR.memory(decode_shape(128, 1, 32768, num_heads=128)).workspace_bytes
    assert cut == (1024 + 132) * 128 * (512 + 1) * 4 + 1024 * 128 * (2 * 512 + 576)
    # measured on an H100: 479,691,776
    assert cut == pytest.approx(479_691_776, rel=0.1)


def case(**fields: Any) -> Case:
    fields = {"phase": "prefill", "seq_len_q": 64, "seq_len_kv": 128, "precision": "fp8"} | fields
    return Case(op="dense_attention_fp8", impl="reference", **fields)


def test_shape_of_a_case() -> None:
    shape = OPERATOR.shape(case(phase="decode", seq_len_q=2, batch_size=5, num_heads=16), V32)
    assert (shape.head_dim_qk, shape.head_dim_v, shape.batch_size) == (576, 512, 5)
    with pytest.raises(Unsupported, match="computes in fp8, got precision bf16"):
        OPERATOR.shape(case(precision="bf16"), V32)
    with pytest.raises(Unsupported, match="seq_len_q 129 must be 1"):
        OPERATOR.shape(case(seq_len_q=129), V32)


def test_a_cpu_has_the_reference() -> None:
    assert registry.choose("dense_attention_fp8", case(), V32, CPU) == "reference"
    inputs = make(prefill_shape(5, 9))
    outputs = registry.implementation("dense_attention_fp8", "reference").run(inputs)
    assert all(c.passed for c in OPERATOR.check(inputs, outputs))
