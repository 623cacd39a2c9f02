"""The portable sparse decode kernel and the merge of its splits, interpreted on the CPU."""

import dataclasses

import pytest
import torch

from dsa_bench.kernels import sparse_decode_triton as kernels
from dsa_bench.kernels.listed_attention import Tiling
from dsa_bench.kernels.sparse_decode import OPERATOR, SparseDecodeShape
from dsa_bench.operator import Machine
from tests import hostile

pytestmark = pytest.mark.interpret

A100 = Machine(device="cuda", name="A100", capability=(8, 0), num_sms=108)
L4 = Machine(device="cuda", name="L4", capability=(8, 9), num_sms=58)
CPU = Machine(device="cpu", name="a CPU")
TILING = Tiling(block_h=32, block_kv=64)


def make(precision="fp8", batch_size=3, seq_len_q=2, seq_len_kv=200, topk=140, num_heads=20):
    shape = SparseDecodeShape(
        batch_size=batch_size, seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, topk=topk,
        num_heads=num_heads, page_size=17, precision=precision,
    )  # fmt: skip
    return OPERATOR.make_inputs(shape, seed=0, device="cpu")


def split_in(monkeypatch, num_splits, tiling=TILING):
    config = kernels.SparseDecodeConfig(tiling=tiling, num_splits=num_splits)
    monkeypatch.setattr(kernels, "choose_config", lambda *_: config)


def assert_right(inputs):
    with hostile.poisoned_outputs():
        outputs = kernels.run(inputs)
    hostile.assert_right("sparse_decode", inputs, outputs)
    return outputs


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_hostile_inputs(precision, num_splits, monkeypatch):
    split_in(monkeypatch, num_splits)
    assert_right(hostile.sparse_decode_wild(make(precision)))


@pytest.mark.parametrize("num_heads", [1, 16, 64, 70])
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_matches_the_reference(precision, num_heads):
    assert_right(make(precision, batch_size=1, seq_len_q=2, num_heads=num_heads))


@pytest.mark.parametrize("topk", [1, 63, 65, 129])
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_any_topk(precision, topk):
    assert_right(hostile.peaked(make(precision, batch_size=1, topk=topk)))


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_tiles_of_smaller_gpus(precision, monkeypatch):
    split_in(monkeypatch, 2, Tiling(block_h=32, block_kv=32))
    assert_right(hostile.sparse_decode_wild(make(precision, num_heads=40)))


def test_splits_behind_the_length_are_empty(monkeypatch):
    """The second and third split have no entry, or none that counts."""
    split_in(monkeypatch, 3)
    lens = torch.tensor([[64, 65], [1, 128], [-(2**31), 2**31 - 1]], dtype=torch.int32)
    outputs = assert_right(dataclasses.replace(make(), topk_lens=lens))
    assert not outputs.out[2, 0].any()
    assert (outputs.lse[2, 0] == hostile.INF).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_nan_of_a_listed_row_shows(precision, num_splits, monkeypatch):
    split_in(monkeypatch, num_splits)
    inputs = hostile.nan_in_query(1, make(precision))
    inputs.topk_slots[0, 0] = -1
    hostile.assert_nan_shows("sparse_decode", inputs, kernels.run(inputs))


def test_no_queries_or_entries():
    inputs = make()
    empty = dataclasses.replace(inputs, q=inputs.q[:0], topk_slots=inputs.topk_slots[:0])
    assert kernels.run(empty).out.shape == (0, 2, 20, 512)
    no_entries = dataclasses.replace(inputs, topk_slots=inputs.topk_slots[..., :0])
    assert not kernels.run(no_entries).out.any()


def test_few_queries_are_split_and_many_are_not():
    assert kernels.choose_config(1, 128, 2048, 132, (9, 0)).num_splits == 32
    assert kernels.choose_config(132, 128, 2048, 132, (9, 0)).num_splits == 1
    assert kernels.choose_config(1, 128, 64, 132, (9, 0)).num_splits == 1


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_no_split_is_without_entries(capability):
    for num_queries in (1, 2, 5, 16, 40, 300):
        for topk in (1, 64, 65, 300, 1000, 2048, 4096):
            config = kernels.choose_config(num_queries, 128, topk, 132, capability)
            blocks = -(-topk // config.tiling.block_kv)
            span = -(-blocks // config.num_splits)
            assert (config.num_splits - 1) * span < blocks, (num_queries, topk)


def test_supports_says_why_not():
    fp8 = SparseDecodeShape(batch_size=1, seq_len_kv=4096)
    assert kernels.supports(fp8, L4) is None
    assert "needs sm_89 or newer, which convert e4m3, this is A100" in kernels.supports(fp8, A100)
    assert kernels.supports(dataclasses.replace(fp8, precision="bf16"), A100) is None
    assert "needs sm_80 or newer, this is a CPU" in kernels.supports(fp8, CPU)
