"""Masked MHA prefill: the reference, its check, and the kernel, interpreted and on a GPU."""

import dataclasses
import math

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import masked_prefill_triton as kernels
from dsa_bench.kernels.masked_prefill import OPERATOR, MaskedPrefillShape
from dsa_bench.operator import Machine, Unsupported
from tests import hostile
from tests.triton_interpreter import fused_products

H100 = Machine(device="cuda", name="H100", capability=(9, 0), num_sms=132)
CPU = Machine(device="cpu", name="a CPU")


def shape_of(seq_len_q=5, seq_len_kv=40, topk=12, num_heads=2):
    return MaskedPrefillShape(
        seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, topk=topk, num_heads=num_heads
    )


def make(device="cpu", seed=0, **sizes):
    return OPERATOR.make_inputs(shape_of(**sizes), seed=seed, device=device)


def wild(inputs):
    """Keys of every kind: twice, none, later than the query, out of range; a query without any."""
    indices = inputs.topk_indices.clone()
    rows, topk = indices.shape
    indices[0] = -1
    for i, value in enumerate((*hostile.INVALID_INDICES, inputs.k.shape[0])):
        indices[1 % rows, i % topk] = value
    indices[-1, : topk // 2] = indices[-1, topk - topk // 2 :].clone()
    indices[2 % rows, 0] = inputs.k.shape[0] - 1
    return dataclasses.replace(inputs, topk_indices=indices)


def strided(inputs):
    """q, k and v as slices of wider tensors."""
    wide = [torch.cat([x, x], -1) for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = (w[..., w.shape[-1] // 2 :] for w in wide)
    return dataclasses.replace(inputs, q=q, k=k, v=v)


def causal(inputs):
    return dataclasses.replace(inputs, topk_indices=None)


MUTATIONS = {
    "plain": hostile.plain,
    "wild": wild,
    "strided": strided,
    "causal": causal,
    "loud": hostile.loud(40),
    "loudest": hostile.loud(112),
}


def by_hand(inputs):
    """out and lse of every query and head, key by key, in fp64."""
    q, k, v = (x.double() for x in (inputs.q, inputs.k, inputs.v))
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    lse = torch.full(q.shape[:2], math.inf, dtype=torch.float64)
    for i in range(q.shape[0]):
        if inputs.topk_indices is None:
            keys = list(range(k.shape[0] - q.shape[0] + i + 1))
        else:
            listed = set(inputs.topk_indices[i].tolist())
            keys = sorted(n for n in listed if 0 <= n < k.shape[0])
        for h in range(q.shape[1]) if keys else ():
            logits = torch.stack([q[i, h] @ k[n, h] for n in keys]) * inputs.sm_scale
            lse[i, h] = logits.logsumexp(0)
            out[i, h] = (logits - lse[i, h]).exp() @ v[keys, h]
    return out, lse


@pytest.mark.parametrize("name", MUTATIONS)
def test_reference_by_hand(name):
    inputs = MUTATIONS[name](make())
    wide = dataclasses.replace(inputs, **{x: getattr(inputs, x).float() for x in ("q", "k", "v")})
    out, lse = by_hand(inputs)
    actual = OPERATOR.reference(wide)
    torch.testing.assert_close(actual.out.double(), out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.lse.double(), lse, rtol=1e-5, atol=1e-6)
    rows = torch.tensor([3, 0])
    some = OPERATOR.reference(wide, rows=rows)
    torch.testing.assert_close(some.out, actual.out[rows])


def test_all_keys_listed_is_causal_attention():
    inputs = make(seq_len_q=6, seq_len_kv=9, topk=9)
    expected = OPERATOR.reference(causal(inputs))
    actual = OPERATOR.reference(inputs)
    torch.testing.assert_close(actual.out, expected.out)
    torch.testing.assert_close(actual.lse, expected.lse)


WRONG = {
    "zeros": lambda inputs, right: right._replace(out=torch.zeros_like(right.out)),
    "unmasked": lambda inputs, right: OPERATOR.reference(causal(inputs)),
    "another-scale": lambda inputs, right: OPERATOR.reference(
        dataclasses.replace(inputs, sm_scale=576**-0.5)
    ),
    "heads-swapped": lambda inputs, right: right._replace(out=right.out.flip(1)),
    "base-2": lambda inputs, right: right._replace(lse=right.lse / math.log(2)),
    "nan": lambda inputs, right: right._replace(out=right.out * math.nan),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_tells_right_from_wrong(name):
    inputs = make(seq_len_q=8, seq_len_kv=60)
    right = OPERATOR.reference(inputs)
    hostile.assert_right("masked_prefill", inputs, right)
    wrong = WRONG[name](inputs, right)
    assert not all(check.passed for check in OPERATOR.check(inputs, wrong))


def test_cost_counts_valid_pairs():
    shape = shape_of(seq_len_q=5, seq_len_kv=5, topk=3, num_heads=128)
    assert OPERATOR.cost(shape).flops == 2 * 128 * (192 + 128) * (1 + 2 + 3 + 3 + 3)
    with pytest.raises(Unsupported, match="seq_len_q"):
        shape_of(seq_len_q=6, seq_len_kv=5)


def test_supports_says_why_not():
    supports = registry.implementation("masked_prefill", "triton").supports
    assert supports(shape_of(num_heads=128), H100) is None
    assert "needs a Hopper GPU" in supports(shape_of(num_heads=128), CPU)


SIZES = [
    {"seq_len_q": 5, "seq_len_kv": 40, "topk": 12},
    {"seq_len_q": 1, "seq_len_kv": 1, "topk": 1},
    {"seq_len_q": 70, "seq_len_kv": 131, "topk": 64, "num_heads": 1},
    {"seq_len_q": 130, "seq_len_kv": 130, "topk": 33, "num_heads": 1},
]


@pytest.mark.interpret
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: str(sizes["seq_len_kv"]))
def test_kernel_interpreted(sizes, mutation):
    """Products are fused as the compiler does it: only then has a step that rounds the scaled
    maximum, and not the scaled score, a weight of 2^(2^16) for 'loud'."""
    inputs = MUTATIONS[mutation](make(**sizes))
    with hostile.poisoned_outputs(), fused_products():
        outputs = kernels.run(inputs)
    hostile.assert_right("masked_prefill", inputs, outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("heads", [128, 16, 3])
@pytest.mark.parametrize(
    ("seq_len_q", "seq_len_kv", "topk"), [(1, 1, 1), (257, 700, 300), (1000, 4321, 2048)]
)
def test_kernel_on_a_gpu(seq_len_q, seq_len_kv, topk, heads, mutation):
    shape = shape_of(seq_len_q, seq_len_kv, topk, heads)
    hostile.assert_implementation("masked_prefill", "triton", shape, MUTATIONS[mutation])
