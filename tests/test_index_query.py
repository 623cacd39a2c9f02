"""Queries and head weights of the indexer: the reference, its check, and every implementation."""

import math
from dataclasses import replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import index_query_triton
from dsa_bench.kernels.index_query import (
    OPERATOR,
    IndexQueryInputs,
    IndexQueryOutputs,
    IndexQueryShape,
)
from dsa_bench.kernels.index_query_triton import IndexQueryConfig, choose_config
from dsa_bench.kernels.rope import rope_table
from dsa_bench.operator import Machine
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import aot, hostile

V32 = PRESETS["v3.2"]
LAST = 163839
"""The last position of the model."""
CPU = Machine(device="cpu", name="a CPU")
A100 = Machine(device="cuda", name="an A100", capability=(8, 0))
H100 = Machine(device="cuda", name="an H100", capability=(9, 0))
PRECISIONS = pytest.mark.parametrize("precision", ["bf16", "fp8"])


def shape_of(num_rows, index_heads, precision="fp8"):
    return IndexQueryShape(
        num_rows=num_rows, index_heads=index_heads, precision=precision, num_positions=40
    )


def small(precision="fp8", seed=0, num_rows=5, index_heads=6):
    shape = shape_of(num_rows, index_heads, precision)
    return OPERATOR.make_inputs(shape, seed=seed, device="cpu")


def far(inputs):
    """Positions up to the last one, unsorted, some twice."""
    positions = hostile._ints(0, LAST, inputs.positions.shape, inputs.x.device, 3)
    positions[:1], positions[1:2], positions[2:3], positions[3:4] = LAST, 0, LAST - 1, LAST
    table = rope_table(V32, LAST + 1, inputs.x.device)
    return replace(inputs, positions=positions, rope_table=table)


def changed(inputs, change):
    """The same strides, other values."""
    x = inputs.x.clone()
    change(x)
    return replace(inputs, x=x)


def extreme(inputs):
    """Zeros, denormals, large vectors, one large value in each vector, a constant; weights of 0."""

    def change(x):
        x[:1] = 0
        x[1:2] = 1e-40
        x[2:3] *= 1e34
        x[3:4] = 0
        x[3:4, :, 7] = 1e30
        x[4:5] = 3.0

    weights = inputs.head_weights.clone()
    weights[:, ::3] = 0
    return replace(changed(inputs, change), head_weights=weights)


def strided(inputs):
    x = hostile._inside_larger(inputs.x, 1, 3, 0)
    weights = hostile._inside_larger(inputs.head_weights, 1, 5)
    return replace(inputs, x=x, head_weights=weights)


MUTATIONS = {"plain": hostile.plain, "far": far, "extreme": extreme, "strided": strided}


def loops(inputs, t, h):
    """y of one vector in fp64, by the definition: angles from the table, signs from bit counts."""
    x = inputs.x[t, h].double().tolist()
    cos, sin = inputs.rope_table[int(inputs.positions[t])].double().view(2, 32).tolist()
    turned = [x[i] * cos[i] - x[i + 32] * sin[i] for i in range(32)]
    turned += [x[i] * sin[i] + x[i + 32] * cos[i] for i in range(32)]
    r = turned + x[64:]
    return [
        sum(v * (-1) ** (i & j).bit_count() for i, v in enumerate(r)) / math.sqrt(128)
        for j in range(128)
    ]


@pytest.mark.parametrize("mutate", [hostile.plain, far, strided])
def test_reference_matches_loops(mutate):
    inputs = mutate(small("bf16"))
    exact = OPERATOR.reference(replace(inputs, x=inputs.x.float()))
    rounded = OPERATOR.reference(inputs)
    assert rounded.index_q.dtype == torch.bfloat16 and exact.index_q.dtype == torch.float32
    for t, h in ((0, 0), (1, 5), (4, 3)):
        wanted = torch.tensor(loops(inputs, t, h))
        size = wanted.abs().max().item()
        assert (exact.index_q[t, h] - wanted).abs().max().item() < 1e-5 * size
        assert 0 < (rounded.index_q[t, h].double() - wanted).abs().max().item() < 2**-7 * size
    assert torch.equal(exact.index_weights, inputs.head_weights * inputs.weight_scale)


def test_quantised_is_the_quantisation_of_the_rounded_query():
    inputs = extreme(small())
    y = OPERATOR.reference(replace(inputs, precision="bf16")).index_q
    values, weights = OPERATOR.reference(inputs)
    assert values.dtype == torch.float8_e4m3fn and weights.dtype == torch.float32
    for t in range(5):
        for h in range(6):
            amax = max(y[t, h].abs().max().item(), 1e-4)
            scale = 2.0 ** math.ceil(math.log2(amax / 448))
            rounded = (y[t, h].double() / scale).float().to(torch.float8_e4m3fn)
            assert torch.equal(values[t, h].float(), rounded.float())
            wanted = float(inputs.head_weights[t, h]) * inputs.weight_scale * scale
            assert weights[t, h].item() == pytest.approx(wanted, rel=1e-6)


def test_rotations_keep_the_products_of_queries_at_one_position():
    inputs = replace(small("bf16"), positions=torch.full((5,), 39, dtype=torch.int32))
    x = inputs.x.float()
    y = OPERATOR.reference(replace(inputs, x=x)).index_q
    before, after = (torch.einsum("thd,shd->ths", a, a) for a in (x, y))
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-3)


@PRECISIONS
def test_reference_takes_rows(precision):
    inputs, rows = small(precision), torch.tensor([4, 1])
    whole, some = OPERATOR.reference(inputs), OPERATOR.reference(inputs, rows=rows)
    assert torch.equal(some.index_q.float(), whole.index_q[rows].float())
    assert torch.equal(some.index_weights, whole.index_weights[rows])


def remade(**changes):
    """The reference on inputs of which something was changed."""
    return lambda inputs: OPERATOR.reference(
        replace(inputs, **{name: change(inputs) for name, change in changes.items()})
    )


def without_hadamard(inputs):
    """Multiplied by the symmetric matrix twice: what is left is the rotation."""
    y = OPERATOR.reference(replace(inputs, precision="bf16", x=inputs.x.float())).index_q
    still = torch.tensor([1.0] * 32 + [0.0] * 32).expand_as(inputs.rope_table)
    again = replace(inputs, x=y.bfloat16(), rope_table=still)
    return OPERATOR.reference(again)


WRONG = {
    "not-turned": remade(
        rope_table=lambda i: torch.tensor([1.0] * 32 + [0.0] * 32).expand_as(i.rope_table)
    ),
    "turned-at-the-end": lambda i: OPERATOR.reference(replace(i, x=i.x.roll(64, -1))),
    "interleaved": lambda i: OPERATOR.reference(
        replace(i, x=torch.cat([i.x[..., :64:2], i.x[..., 1:64:2], i.x[..., 64:]], -1))
    ),
    "one-position-on": remade(positions=lambda i: (i.positions + 1) % 40),
    "no-hadamard": without_hadamard,
    "sign-of-a-weight": remade(head_weights=lambda i: i.head_weights.abs()),
    "no-weight-scale": remade(weight_scale=lambda i: 1.0),
    "stale": lambda i: OPERATOR.reference(small(i.precision, seed=9)),
    "heads-swapped": lambda i: IndexQueryOutputs(
        *(x.view(torch.uint8).view(5, 6, -1).flip(1).view(x.dtype).view(x.shape)
          for x in OPERATOR.reference(i))
    ),
    "weights-twice": lambda i: OPERATOR.reference(i)._replace(
        index_weights=OPERATOR.reference(i).index_weights * 2
    ),
}  # fmt: skip


@PRECISIONS
@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name, precision):
    inputs = small(precision)
    assert hostile.passes(OPERATOR.check(inputs, OPERATOR.reference(inputs)))
    assert not hostile.passes(OPERATOR.check(inputs, WRONG[name](inputs)))


def test_check_sees_the_scale_left_out_of_the_weights():
    inputs = small()
    right = OPERATOR.reference(inputs)
    wrong = right._replace(index_weights=inputs.head_weights * inputs.weight_scale)
    assert not hostile.passes(OPERATOR.check(inputs, wrong))


@PRECISIONS
def test_check_sees_one_nan_and_the_rows_it_was_given(precision):
    inputs = small(precision)
    q, weights = OPERATOR.reference(inputs)
    bits = q.view(torch.uint8).clone()
    bits[2, 3, 6:8] = 0x7F if precision == "fp8" else 0xFF
    wrong = IndexQueryOutputs(bits.view(q.dtype), weights)
    assert wrong.index_q[2, 3].float().isnan().any()
    assert not hostile.passes(OPERATOR.check(inputs, wrong))
    assert hostile.passes(OPERATOR.check(inputs, wrong, rows=torch.tensor([0, 1, 4])))


@PRECISIONS
def test_cost_and_memory_counted_by_hand(precision):
    shape, inputs = shape_of(5, 6, precision), small(precision)
    made = sum(x.nbytes for x in OPERATOR.reference(inputs))
    cost, memory = OPERATOR.cost(shape), OPERATOR.memory(shape)
    assert cost.bytes_written == memory.output_bytes == made
    read = 5 * 6 * (128 * 2 + 4)
    assert read + 5 * 64 * 4 <= cost.bytes_read <= read + 5 * 65 * 4
    rest = inputs.head_weights.nbytes + inputs.positions.nbytes + inputs.rope_table.nbytes
    assert memory.input_bytes == inputs.x.untyped_storage().nbytes() + rest


@PRECISIONS
def test_shape_of_a_case(precision):
    case = Case(
        op="index_query", impl="reference", phase="decode", seq_len_kv=64, seq_len_q=2,
        batch_size=3, precision=precision,
    )  # fmt: skip
    shape = OPERATOR.shape(case, PRESETS["v3.2-cpu"])
    assert (shape.num_rows, shape.index_heads, shape.precision) == (6, 8, precision)
    full = OPERATOR.make_inputs(OPERATOR.shape(case, V32), seed=0, device="cpu")
    assert full.x.shape == (6, 64, 128)
    assert full.weight_scale == pytest.approx(0.0110485, rel=1e-5)


MISTAKES = [
    (lambda i: replace(i, x=i.x.float()), TypeError, "x must be bfloat16"),
    (lambda i: replace(i, x=i.x[..., :64]), ValueError, "x must be .*index_dim=128"),
    (lambda i: replace(i, head_weights=i.head_weights[:, 1:]), ValueError, "head_weights must be"),
    (lambda i: replace(i, positions=i.positions.long()), TypeError, "positions must be int32"),
    (lambda i: replace(i, positions=i.positions[1:]), ValueError, "positions must be .*rows=5"),
    (lambda i: replace(i, rope_table=i.rope_table.double()), TypeError, "rope_table must be float"),
]


@pytest.mark.parametrize(("change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES))
def test_triton_refuses(change, kind, sentence):
    with pytest.raises(kind, match=sentence):
        index_query_triton.run(change(small()))


def test_triton_supports_says_why_not():
    assert index_query_triton.supports(shape_of(1, 64), H100) is None
    assert index_query_triton.supports(shape_of(1, 64, "bf16"), A100) is None
    assert "an A100" in index_query_triton.supports(shape_of(1, 64), A100)
    assert "a CPU" in index_query_triton.supports(shape_of(1, 64, "bf16"), CPU)


CONFIGS = {
    f"{method}-{block_h}": IndexQueryConfig(method=method, block_h=block_h, num_warps=num_warps)
    for method, block_h, num_warps in (
        ("products", 16, 1), ("products", 32, 2), ("products", 64, 4),
        ("shuffles", 16, 4), ("shuffles", 64, 4),
    )
}  # fmt: skip


def test_config_checks_itself():
    with pytest.raises(ValueError, match="method must be products or shuffles, got dot"):
        IndexQueryConfig(method="dot", block_h=16, num_warps=1)
    with pytest.raises(ValueError, match="16 heads a warp, got block_h 64 and num_warps 2"):
        IndexQueryConfig(method="products", block_h=64, num_warps=2)


def test_config_follows_the_rows():
    assert choose_config(1, 64).method == choose_config(4096, 16).method == "shuffles"
    assert choose_config(4096, 64).method == choose_config(512, 17).method == "products"
    assert {choose_config(rows, 64) for rows in (1, 4096)} <= set(CONFIGS.values())


@PRECISIONS
def test_products_exchange_nothing_between_threads(precision, tmp_path, monkeypatch):
    """But the maxima of rows, and the signs and scales through shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (case,) = (
        case for case in index_query_triton.compile_cases() if f"products, {precision}" in case.name
    )
    code = aot.compile_case(case)
    assert code.count("SHFL") <= (8 if precision == "fp8" else 0)
    assert code.shared_bytes <= 512
    # F2F rounds one element at a time, at a quarter of the rate of F2FP
    assert code.count("F2F.") <= 2


def run_triton(inputs, config=None):
    if config is None:
        return registry.implementation("index_query", "triton").run(inputs)
    tensors = (inputs.x, inputs.head_weights, inputs.positions, inputs.rope_table)
    scale, precision = inputs.weight_scale, inputs.precision
    made = index_query_triton.index_query(
        *tensors, precision=precision, weight_scale=scale, config=config
    )
    return IndexQueryOutputs(*made)


def assert_near_the_reference(inputs, config=None):
    with hostile.poisoned_outputs():
        outputs = run_triton(inputs, config)
    hostile.assert_right("index_query", inputs, outputs)
    wanted = OPERATOR.reference(inputs)
    # one rounding may fall the other way here and there, a weight's scale nearly never
    same = outputs.index_q.float() == wanted.index_q.float()
    assert not same.numel() or same.float().mean().item() > 0.99
    assert torch.allclose(outputs.index_weights, wanted.index_weights, rtol=1e-6, atol=0)


@pytest.mark.interpret
@PRECISIONS
@pytest.mark.parametrize(("num_rows", "index_heads"), [(0, 4), (1, 64), (6, 21)])
@pytest.mark.parametrize("kind", MUTATIONS)
def test_triton_interpreted(precision, num_rows, index_heads, kind):
    assert_near_the_reference(MUTATIONS[kind](small(precision, num_rows, num_rows, index_heads)))


@pytest.mark.interpret
@PRECISIONS
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_config_interpreted(precision, config):
    inputs = small(precision, 3, num_rows=5, index_heads=20)
    assert_near_the_reference(far(strided(inputs)), config)
    assert_near_the_reference(extreme(inputs), config)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's maximum of a vector of NaN
@PRECISIONS
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["products-16", "shuffles-16"])
def test_triton_interpreted_shows_what_is_not_finite(precision, value, name):
    inputs: IndexQueryInputs = changed(small(precision), lambda x: x[2, 3, 100:101].fill_(value))
    q, weights = run_triton(inputs, CONFIGS[name])
    product = q.float() * weights.unsqueeze(-1)
    assert not product[2, 3].isfinite().any()
    product[2, 3] = 0
    assert product.isfinite().all()


SHAPES = [shape_of(1, 64), shape_of(32, 64), shape_of(4096, 64), shape_of(600, 24)]
SHAPES += [replace(shape, precision="bf16") for shape in SHAPES]


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("index_query"))
@pytest.mark.parametrize("shape", SHAPES, ids=hostile.label)
@pytest.mark.parametrize("kind", MUTATIONS)
def test_index_query_matches_reference(name, shape, kind):
    hostile.assert_implementation("index_query", name, shape, MUTATIONS[kind])


@pytest.mark.gpu
@PRECISIONS
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", MUTATIONS)
def test_every_config_matches_reference(precision, config, kind):
    inputs = OPERATOR.make_inputs(shape_of(700, 37, precision), seed=1, device="cuda")
    assert_near_the_reference(MUTATIONS[kind](inputs), config)
