"""The portable sparse prefill kernel, interpreted on the CPU."""

import dataclasses

import pytest
import torch

from dsa_bench.kernels import listed_attention
from dsa_bench.kernels import sparse_prefill_triton as kernels
from dsa_bench.kernels.sparse_prefill import OPERATOR, SparsePrefillShape
from dsa_bench.operator import Machine
from tests import hostile
from tests.triton_interpreter import fused_products

pytestmark = pytest.mark.interpret

A100 = Machine(device="cuda", name="A100", capability=(8, 0), num_sms=108)
T4 = Machine(device="cuda", name="T4", capability=(7, 5), num_sms=40)
CPU = Machine(device="cpu", name="a CPU")


def make(seq_len_q=5, seq_len_kv=150, topk=70, num_heads=20, head_dim_qk=576):
    shape = SparsePrefillShape(
        seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, topk=topk, num_heads=num_heads,
        head_dim_qk=head_dim_qk,
    )  # fmt: skip
    return OPERATOR.make_inputs(shape, seed=0, device="cpu")


def assert_right(inputs):
    with hostile.poisoned_outputs():
        outputs = kernels.run(inputs)
    hostile.assert_right("sparse_prefill", inputs, outputs)
    return outputs


@pytest.mark.parametrize("head_dim_qk", [576, 512])
@pytest.mark.parametrize("num_heads", [1, 16, 20, 64, 70])
def test_matches_the_reference(num_heads, head_dim_qk):
    assert_right(make(seq_len_q=2, num_heads=num_heads, head_dim_qk=head_dim_qk))


@pytest.mark.parametrize("topk", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("mutation", ["wild", "strided"])
def test_hostile_inputs(mutation, topk):
    assert_right(hostile.MUTATIONS["sparse_prefill"][mutation](make(topk=topk)))


def test_peaked_softmax():
    assert_right(hostile.peaked(make()))


@pytest.mark.parametrize("exponent", [40, 112])
def test_logits_of_any_size(exponent):
    """Products are fused as the compiler does it."""
    with fused_products():
        assert_right(hostile.loud(exponent)(make()))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_tiles_of_smaller_gpus(capability, monkeypatch):
    monkeypatch.setattr(kernels, "ask_device", lambda _: (capability, 108))
    assert_right(hostile.sparse_prefill_wild(make(num_heads=70)))


def test_rows_without_a_key():
    inputs = dataclasses.replace(make(), attn_sink=torch.zeros(20))
    inputs.topk_indices[0], inputs.topk_indices[1, 64:] = -1, -1
    out, max_logits, lse = assert_right(inputs)
    assert not out[0].any()
    assert (max_logits[0] == -hostile.INF).all()
    assert (lse[0] == hostile.INF).all()
    assert lse[1:].isfinite().all()


def test_a_length_ends_the_list():
    """Entries behind it are not read: they name a row of NaN."""
    inputs = make(topk=130, seq_len_kv=200)
    inputs.topk_indices[inputs.topk_indices == 7] = 8
    inputs.kv[7] = hostile.NAN
    inputs.topk_indices[:, 65:] = 7
    lens = torch.tensor([65, 64, 1, 0, -5], dtype=torch.int32)
    assert_right(dataclasses.replace(inputs, topk_lens=lens))


def test_nan_of_a_listed_row_shows():
    inputs = hostile.nan_in_query(1, make())
    inputs.topk_indices[0] = -1
    hostile.assert_nan_shows("sparse_prefill", inputs, kernels.run(inputs))


def test_no_heads_or_queries():
    inputs = make()
    empty = dataclasses.replace(inputs, q=inputs.q[:0], topk_indices=inputs.topk_indices[:0])
    assert kernels.run(empty).out.shape == (0, 20, 512)
    no_keys = dataclasses.replace(inputs, topk_indices=inputs.topk_indices[:, :0])
    assert not kernels.run(no_keys).out.any()


def test_widths_are_checked():
    inputs = make()
    with pytest.raises(ValueError, match=r"q must be bfloat16 .*head_dim_qk=576"):
        kernels.run(dataclasses.replace(inputs, q=inputs.q[..., :560]))
    with pytest.raises(ValueError, match=r"kv must be bfloat16 .*head_dim_qk=576"):
        kernels.run(dataclasses.replace(inputs, kv=inputs.kv[..., :512]))


def test_supports_says_why_not():
    shape = SparsePrefillShape(seq_len_q=4, seq_len_kv=4096)
    assert kernels.supports(shape, A100) is None
    assert "needs sm_80 or newer, this is T4" in kernels.supports(shape, T4)
    assert "needs sm_80 or newer, this is a CPU" in kernels.supports(shape, CPU)
    wide = dataclasses.replace(shape, head_dim_qk=640)
    assert "this case has 640/512" in kernels.supports(wide, A100)
    assert kernels.supports(dataclasses.replace(shape, head_dim_qk=512), A100) is None


@pytest.mark.parametrize(
    ("num_heads", "capability", "block_h", "block_kv"),
    [
        (1, (9, 0), 16, 64), (20, (9, 0), 32, 64), (128, (9, 0), 64, 64), (128, (8, 0), 64, 32),
        (128, (8, 9), 32, 32), (16, (8, 6), 16, 32), (128, (10, 0), 32, 32), (128, (12, 0), 32, 32),
    ],
)  # fmt: skip
def test_tiling(num_heads, capability, block_h, block_kv):
    tiling = listed_attention.choose_tiling(num_heads, capability)
    assert (tiling.block_h, tiling.block_kv) == (block_h, block_kv)
