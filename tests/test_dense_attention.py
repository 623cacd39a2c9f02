"""Dense attention: reference, cost and memory, torch's own kernels, the choice of parts."""

import dataclasses
import importlib.util

import pytest
import torch
import torch.nn.functional as F

from dsa_bench import registry
from dsa_bench.accuracy import compare_tensors
from dsa_bench.baselines import dense_attention, flash_attn_3, sdpa
from dsa_bench.baselines.dense_attention import (
    OPERATOR,
    DenseAttentionShape,
    DenseOutputs,
    DensePrefillInputs,
)
from dsa_bench.baselines.dense_attention_triton import BLOCK_H, MAX_SPLITS, choose_config
from dsa_bench.baselines.merge import merge_by_lse
from dsa_bench.kernels.attention import LSE_TOLERANCE, OUT_TOLERANCE
from dsa_bench.operator import Machine, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case

H100 = Machine(device="cuda", name="H100", capability=(9, 0), num_sms=132)
CPU = Machine(device="cpu", name="CPU")
V32 = PRESETS["v3.2"]


def prefill_shape(seq_len_q, seq_len_kv, num_heads=3):
    return DenseAttentionShape(
        phase="prefill", seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, num_heads=num_heads,
        head_dim_qk=192, head_dim_v=128,
    )  # fmt: skip


def decode_shape(batch_size, seq_len_q, seq_len_kv, num_heads=3):
    return DenseAttentionShape(
        phase="decode", batch_size=batch_size, seq_len_q=seq_len_q, seq_len_kv=seq_len_kv,
        num_heads=num_heads, head_dim_qk=576, head_dim_v=512,
    )  # fmt: skip


def case(**fields):
    fields = {"phase": "prefill", "seq_len_q": 64, "seq_len_kv": 128} | fields
    return Case(op="dense_attention", impl="reference", **fields)


def sharp(inputs):
    """Queries 30 times larger: with make_inputs' weak scores every key counts alike."""
    return dataclasses.replace(inputs, q=(inputs.q.float() * 30).bfloat16())


def sdpa_fp64(q, k, v, sm_scale):
    """[rows, heads, width] through torch's attention in fp64, the mask written out."""
    rows, num_keys = q.shape[0], k.shape[0]
    sees = [[n <= num_keys - rows + i for n in range(num_keys)] for i in range(rows)]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, torch.tensor(sees), scale=sm_scale)
    return out.transpose(0, 1).float()


PREFILL_SIZES = [(1, 1), (5, 5), (1, 40), (7, 40), (40, 40), (39, 40)]


@pytest.mark.parametrize(("seq_len_q", "seq_len_kv"), PREFILL_SIZES)
def test_prefill_reference_matches_torch_in_fp64(seq_len_q, seq_len_kv):
    shape = prefill_shape(seq_len_q, seq_len_kv)
    inputs = sharp(OPERATOR.make_inputs(shape, seed=0, device="cpu"))
    expected = sdpa_fp64(inputs.q, inputs.k, inputs.v, inputs.sm_scale)
    torch.testing.assert_close(OPERATOR.reference(inputs).out, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("seq_len_q", [1, 3])
def test_decode_is_mha_with_the_key_given_to_every_head(seq_len_q):
    shape = decode_shape(2, seq_len_q, 20)
    inputs = sharp(OPERATOR.make_inputs(shape, seed=1, device="cpu"))
    actual = OPERATOR.reference(inputs)
    for b in range(2):
        k = inputs.kv[b].unsqueeze(1).expand(-1, 3, -1)
        mha = DensePrefillInputs(inputs.q[b], k, k[..., :512], inputs.sm_scale)
        expected = sdpa_fp64(mha.q, mha.k, mha.v, mha.sm_scale)
        torch.testing.assert_close(actual.out[b], expected, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(actual.lse[b], OPERATOR.reference(mha).lse)


def test_lse_is_natural_and_scaled():
    inputs = OPERATOR.make_inputs(prefill_shape(1, 2, num_heads=1), seed=2, device="cpu")
    scores = (inputs.k[:, 0].double() @ inputs.q[0, 0].double()) * inputs.sm_scale
    expected = scores.exp().sum().log().item()
    assert OPERATOR.reference(inputs).lse.item() == pytest.approx(expected, abs=1e-6)


def test_a_query_sees_no_later_key():
    inputs = OPERATOR.make_inputs(prefill_shape(4, 10), seed=3, device="cpu")
    before = OPERATOR.reference(inputs).out
    inputs.v[8:] = 7.0
    after = OPERATOR.reference(inputs).out
    assert torch.equal(before[:2], after[:2])
    assert (before[2:] - after[2:]).abs().amin() > 0.1


@pytest.mark.parametrize(
    "shape", [prefill_shape(9, 30), decode_shape(4, 2, 30)], ids=["prefill", "decode"]
)
def test_reference_of_some_rows_in_small_chunks(shape, monkeypatch):
    inputs = sharp(OPERATOR.make_inputs(shape, seed=4, device="cpu"))
    whole = OPERATOR.reference(inputs)
    rows = torch.tensor([3, 0, 2])
    monkeypatch.setattr(dense_attention, "REFERENCE_CHUNK_ELEMENTS", 1)
    some = OPERATOR.reference(inputs, rows=rows)
    torch.testing.assert_close(some.out, whole.out[rows])
    torch.testing.assert_close(some.lse, whole.lse[rows])
    assert OPERATOR.num_rows(shape) == whole.out.shape[0]


def test_inputs_are_made_in_parts(monkeypatch):
    monkeypatch.setattr(dense_attention, "INPUT_CHUNK_ELEMENTS", 4 * 3 * 192)
    inputs = OPERATOR.make_inputs(prefill_shape(10, 10), seed=5, device="cpu")
    again = OPERATOR.make_inputs(prefill_shape(10, 10), seed=5, device="cpu")
    assert torch.equal(inputs.k, again.k)
    assert inputs.k.dtype == torch.bfloat16
    assert 0.09 < inputs.k.float().std().item() < 0.12
    assert len(inputs.k.flatten(1).unique(dim=0)) == 10


def test_check_passes_the_reference_and_fails_a_mask_aligned_to_the_first_key():
    inputs = OPERATOR.make_inputs(prefill_shape(8, 24), seed=6, device="cpu")
    right = OPERATOR.reference(inputs)
    assert all(check.passed for check in OPERATOR.check(inputs, right))
    early = dataclasses.replace(inputs, k=inputs.k[:8], v=inputs.v[:8])
    wrong = OPERATOR.reference(early)
    assert not any(check.passed for check in OPERATOR.check(inputs, wrong))


@pytest.mark.parametrize("shift", [-1, 1])
def test_check_fails_a_mask_that_is_off_by_one(shift):
    inputs = OPERATOR.make_inputs(prefill_shape(8, 24), seed=7, device="cpu")
    visible = torch.arange(17, 25) + shift
    part = dense_attention._attend(inputs.q, inputs.k, inputs.v, visible, inputs.sm_scale)
    checks = OPERATOR.check(inputs, DenseOutputs(part.out, part.lse))
    assert [check.name for check in checks] == ["out", "lse", "out_budget", "lse_budget"]
    assert not any(check.passed for check in checks)


@pytest.mark.parametrize(
    "shape", [prefill_shape(9, 400), decode_shape(3, 2, 400)], ids=["prefill", "decode"]
)
def test_one_dropped_key_of_many_breaks_the_budget_of_lse_alone(shape):
    inputs = OPERATOR.make_inputs(shape, seed=12, device="cpu")
    right = sdpa.run_cpu(inputs)
    assert all(check.passed for check in OPERATOR.check(inputs, right))
    # as if one key of 5000 were missing
    short = DenseOutputs(right.out, right.lse - 2e-4)
    passed = {check.name: check.passed for check in OPERATOR.check(inputs, short)}
    assert passed == {"out": True, "lse": True, "out_budget": True, "lse_budget": False}


@pytest.mark.parametrize(
    "shape", [prefill_shape(9, 30), decode_shape(4, 2, 30)], ids=["prefill", "decode"]
)
def test_plain_in_small_chunks(shape, monkeypatch):
    inputs = sharp(OPERATOR.make_inputs(shape, seed=4, device="cpu"))
    whole, exact = dense_attention.plain(inputs), OPERATOR.reference(inputs)
    assert whole.out.dtype == torch.bfloat16
    assert 1e-3 < (whole.out.float() - exact.out).norm() / exact.out.norm() < 2e-2
    rows = torch.tensor([3, 0, 2])
    monkeypatch.setattr(dense_attention, "REFERENCE_CHUNK_ELEMENTS", 1)
    some = dense_attention.plain(inputs, rows=rows)
    torch.testing.assert_close(some.out, whole.out[rows], rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(some.lse, whole.lse[rows], rtol=1e-3, atol=1e-3)


def test_check_leaves_lse_out_only_where_there_is_none():
    inputs = OPERATOR.make_inputs(decode_shape(2, 1, 9), seed=8, device="cpu")
    out, lse = OPERATOR.reference(inputs)
    names = [check.name for check in OPERATOR.check(inputs, DenseOutputs(out, None))]
    assert names == ["out", "out_budget"]
    rows = torch.tensor([1])
    checks = OPERATOR.check(inputs, DenseOutputs(out, lse + 0.01), rows=rows)
    passed = {check.name: check.passed for check in checks}
    assert passed == {"out": True, "out_budget": True, "lse": False, "lse_budget": False}


def test_cost_counted_by_hand():
    # queries 3 of 5 keys see 3, 4 and 5 of them: 12 pairs
    shape = prefill_shape(3, 5, num_heads=2)
    assert shape.pairs == 12
    cost = OPERATOR.cost(shape)
    assert cost.flops == 2 * 2 * (192 + 128) * 12
    assert cost.bytes_read == 2 * (3 * 2 * 192 + 5 * 2 * (192 + 128))
    assert cost.bytes_written == 3 * 2 * (2 * 128 + 4)
    # two sequences, queries 2 of 4 keys see 3 and 4
    shape = decode_shape(2, 2, 4, num_heads=8)
    assert shape.pairs == 14
    cost = OPERATOR.cost(shape)
    assert cost.flops == 2 * 8 * (576 + 512) * 14
    assert cost.bytes_read == 2 * (2 * 2 * 8 * 576 + 2 * 4 * 576)
    assert cost.bytes_written == 2 * 2 * 8 * (2 * 512 + 4)


@pytest.mark.parametrize(
    "shape", [prefill_shape(4, 9), decode_shape(3, 2, 11)], ids=["prefill", "decode"]
)
def test_memory_is_what_the_tensors_take(shape):
    inputs = OPERATOR.make_inputs(shape, seed=9, device="cpu")
    tensors = [x for name in inputs.__slots__ if torch.is_tensor(x := getattr(inputs, name))]
    out, lse = sdpa.run_cpu(inputs)
    memory = OPERATOR.memory(shape)
    assert memory.input_bytes == sum(x.nbytes for x in tensors)
    assert memory.output_bytes == out.numel() * 2 + lse.numel() * 4
    if shape.is_prefill:
        padded = F.pad(inputs.v, (0, 64))
        assert memory.workspace_bytes == padded.nbytes + inputs.q.nbytes


def test_workspace_holds_the_partial_results_of_any_choice():
    for batch_size in (1, 3, 32, 66, 128):
        for num_rows in (16, 128, 512):
            config = choose_config(
                batch_size=batch_size, num_rows=num_rows, seq_len_kv=131072, num_sms=132
            )
            if config.num_splits > 1:
                used = config.num_splits * batch_size * num_rows * (512 + 1) * 4
                assert used <= dense_attention.DECODE_WORKSPACE_BYTES


def test_shape_of_a_case():
    prefill = OPERATOR.shape(case(num_heads=16), V32)
    assert (prefill.head_dim_qk, prefill.head_dim_v, prefill.num_heads) == (192, 128, 16)
    decode = OPERATOR.shape(case(phase="decode", seq_len_q=2, batch_size=5), V32)
    assert (decode.head_dim_qk, decode.head_dim_v, decode.batch_size) == (576, 512, 5)
    assert prefill.sm_scale == decode.sm_scale == pytest.approx(0.1352338, abs=1e-7)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"precision": "fp8"}, "computes in bf16, got precision fp8"),
        ({"seq_len_q": 129}, "seq_len_q 129 must be 1 … seq_len_kv 128"),
        ({"seq_len_q": 0}, "seq_len_q 0 must be 1"),
        ({"batch_size": 4}, "batch_size must be 1, got 4"),
    ],
)
def test_a_case_that_makes_no_sense(fields, sentence):
    with pytest.raises(Unsupported, match=sentence):
        OPERATOR.shape(case(**fields), V32)


SUPPORT = [
    ("sdpa_cudnn", H100, prefill_shape(64, 128), None),
    ("sdpa_cudnn", CPU, prefill_shape(64, 128), "needs a Hopper GPU"),
    ("sdpa_cudnn", H100, prefill_shape(127, 128), "no sequences of length 1"),
    ("sdpa_cudnn", H100, decode_shape(1, 1, 128), "head widths up to 256, decode has 576"),
    ("sdpa_flash", H100, prefill_shape(1, 128), None),
    ("sdpa_flash", CPU, prefill_shape(64, 128), "needs a CUDA GPU"),
    ("sdpa_flash", H100, decode_shape(1, 1, 128), "head widths up to 256, decode has 576"),
    ("sdpa", CPU, decode_shape(1, 2, 128), None),
    ("sdpa", H100, prefill_shape(64, 128), "runs on the CPU"),
    ("triton", H100, decode_shape(1, 1, 128), None),
    ("triton", CPU, prefill_shape(64, 128), "needs a Hopper GPU"),
    ("flash_attn_3", CPU, prefill_shape(64, 128), "needs a Hopper GPU"),
]


@pytest.mark.parametrize(("name", "machine", "shape", "sentence"), SUPPORT)
def test_supports_says_why_not(name, machine, shape, sentence):
    reason = registry.implementation("dense_attention", name).supports(shape, machine)
    assert reason is None if sentence is None else sentence in reason


def test_flash_attn_3_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = flash_attn_3.supports(prefill_shape(64, 128), H100)
    assert reason == "FlashAttention-3 is not installed (pip install fa3-fwd)"
    monkeypatch.setattr(type(flash_attn_3.LIBRARY), "obstacle", lambda self: None)
    assert flash_attn_3.supports(prefill_shape(64, 128), H100) is None


@pytest.mark.parametrize(
    ("shape", "best"), [(prefill_shape(64, 128), "sdpa"), (decode_shape(1, 1, 64), "sdpa")]
)
def test_torch_runs_on_a_cpu(shape, best):
    phase = "prefill" if shape.is_prefill else "decode"
    chosen = registry.choose("dense_attention", case(phase=phase), V32, CPU)
    assert chosen == best


SHAPES_FOR_TORCH = [prefill_shape(*sizes) for sizes in PREFILL_SIZES] + [
    decode_shape(2, 1, 33), decode_shape(3, 4, 70), decode_shape(1, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES_FOR_TORCH, ids=str)
def test_sdpa_on_the_cpu_matches_the_reference(shape):
    inputs = OPERATOR.make_inputs(shape, seed=10, device="cpu")
    outputs = registry.implementation("dense_attention", "sdpa").run(inputs)
    assert outputs.out.dtype == torch.bfloat16
    for check in OPERATOR.check(inputs, outputs):
        assert check.passed, check


def test_merge_joins_two_halves_of_the_keys():
    inputs = sharp(OPERATOR.make_inputs(prefill_shape(1, 30), seed=11, device="cpu"))
    whole = OPERATOR.reference(inputs)
    halves = [
        OPERATOR.reference(dataclasses.replace(inputs, k=inputs.k[part], v=inputs.v[part]))
        for part in (slice(0, 7), slice(7, 30))
    ]
    out, lse = merge_by_lse(*halves[0], *halves[1])
    assert compare_tensors("out", out, whole.out, OUT_TOLERANCE).passed
    assert compare_tensors("lse", lse, whole.lse, LSE_TOLERANCE).passed


def test_choice_of_parts():
    def splits(batch_size, num_rows, seq_len_kv=32768):
        return choose_config(
            batch_size=batch_size, num_rows=num_rows, seq_len_kv=seq_len_kv, num_sms=132
        ).num_splits

    assert splits(1, 128) == 64  # 2 tiles: 128 programs on 132 SMs, 8 blocks each
    assert splits(1, 128, seq_len_kv=64) == 1
    assert splits(32, 128) == 2  # 64 tiles: 128 programs instead of 64
    assert splits(66, 128) == 1  # 132 tiles fill the GPU
    assert splits(128, 128) == 1  # 256 tiles are 1.94 waves
    for batch_size in range(1, 140, 7):
        tiles = batch_size * -(-256 // BLOCK_H)
        assert 1 <= splits(batch_size, 256) <= min(MAX_SPLITS, max(1, 2 * 132 // tiles))
