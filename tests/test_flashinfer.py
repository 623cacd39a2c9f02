"""FlashInfer at the border: dense attention and top-k by a fake that computes the answer in torch
from exactly what it was handed, by the library's own layout and base of lse; and on a GPU."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_bench.baselines import flashinfer
from dsa_bench.baselines.dense_attention import OPERATOR
from dsa_bench.kernels import topk
from tests.dense_library_cases import (
    PREFILL_SIZES,
    attend,
    decode_shape,
    failed,
    module,
    on_this_gpu,
    prefill_shape,
    sharp_inputs,
)


class FakeRagged:
    """Prompts in a row; lse to base 2."""

    plans = 0

    def __init__(self, workspace, kv_layout="NHD", *, backend):
        assert kv_layout == "NHD" and backend == "fa3" and workspace.dtype == torch.uint8

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo,
        *,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
    ):
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        assert q_data_type == kv_data_type == torch.bfloat16
        assert num_qo_heads == num_kv_heads
        self.widths = (num_qo_heads, head_dim_qk), (num_kv_heads, head_dim_vo)
        self.planned = (qo_indptr, kv_indptr, causal, sm_scale)
        FakeRagged.plans += 1

    def run(self, q, k, v, *, return_lse):
        qo_indptr, kv_indptr, causal, sm_scale = self.planned
        assert return_lse and (q.shape[1:], v.shape[1:]) == self.widths
        assert qo_indptr.tolist() == [0, len(q)] and kv_indptr.tolist() == [0, len(k)]
        out, lse = attend(q, k, v, sm_scale, causal)
        return out, (lse / math.log(2)).contiguous()


@dataclasses.dataclass
class FakeMetadata:
    qo_indptr: Any
    kv_indptr: Any
    kv_indices: Any
    kv_len_arr: Any

    @classmethod
    def csr(cls, *, qo_indptr, kv_indptr, kv_indices, kv_len_arr):
        for table in (qo_indptr, kv_indptr, kv_indices, kv_len_arr):
            assert table.dtype == torch.int32
        return cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr)


class FakeLatent:
    """Queries of all sequences in a row, keys in pages; lse as the plan and the call agree."""

    plans = 0

    def __init__(self, workspace, *, backend):
        assert backend == "fa3"

    def plan(self, *, metadata, lse_mode, q_data_type, kv_data_type, **sizes):
        assert q_data_type == kv_data_type == torch.bfloat16 and lse_mode == "basee"
        self.metadata, self.sizes = metadata, sizes
        FakeLatent.plans += 1

    def run(self, *, query, kv_cache, return_lse, return_lse_base_on_e):
        assert return_lse and return_lse_base_on_e
        sizes, tables = self.sizes, self.metadata
        width = sizes["head_dim_ckv"] + sizes["head_dim_kpe"]
        assert query.shape[1:] == (sizes["num_heads"], width)
        assert kv_cache.shape[1:] == (sizes["page_size"], width)
        parts = []
        for b, length in enumerate(tables.kv_len_arr.tolist()):
            pages = tables.kv_indices[tables.kv_indptr[b] : tables.kv_indptr[b + 1]].long()
            keys = kv_cache[pages].flatten(0, 1)[:length]
            assert len(keys) == length
            keys = keys.unsqueeze(1).expand(-1, sizes["num_heads"], -1)
            q = query[tables.qo_indptr[b] : tables.qo_indptr[b + 1]]
            values = keys[..., : sizes["head_dim_ckv"]]
            parts.append(attend(q, keys, values, sizes["sm_scale"], sizes["causal"]))
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def fake_top_k_ragged_transform(logits, offsets, lengths, k, *, row_starts):
    """Indices relative to row_starts, plus offsets; -1 after the end of a short row."""
    assert logits.is_contiguous()
    tables = (offsets, lengths, row_starts)
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in tables)
    out = torch.full((len(logits), k), -1, dtype=torch.int32)
    for i, (offset, length, start) in enumerate(zip(*(t.tolist() for t in tables), strict=True)):
        best = logits[i, start : start + length].topk(min(k, length)).indices
        out[i, : len(best)] = best + offset
    return out


@pytest.fixture
def fake_flashinfer(monkeypatch, tmp_path: Path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    module(
        monkeypatch,
        "flashinfer",
        BatchPrefillWithRaggedKVCacheWrapper=FakeRagged,
        top_k_ragged_transform=fake_top_k_ragged_transform,
    )
    latent = {"MLAPlanMetadata": FakeMetadata, "BatchMLAPagedAttentionWrapper": FakeLatent}
    module(monkeypatch, "flashinfer.mla", **latent)
    module(monkeypatch, "flashinfer.jit.cpp_ext", get_cuda_path=lambda: str(tmp_path))
    monkeypatch.setattr(flashinfer.shutil, "which", lambda program: f"/bin/{program}")
    monkeypatch.setattr(FakeRagged, "plans", 0)
    monkeypatch.setattr(FakeLatent, "plans", 0)
    cached = (flashinfer.load, flashinfer.plan_prefill, flashinfer.plan_decode)
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(("seq_len_q", "seq_len_kv"), PREFILL_SIZES)
def test_flashinfer_prefill_plans_once_a_shape(
    fake_flashinfer, seq_len_q: int, seq_len_kv: int
) -> None:
    for seed in (1, 2):
        inputs = sharp_inputs(prefill_shape(seq_len_q, seq_len_kv), seed)
        assert not failed(OPERATOR.check(inputs, flashinfer.run(inputs)))
    assert FakeRagged.plans == 1


@pytest.mark.parametrize(
    ("seq_len_q", "seq_len_kv", "page_size"), [(1, 128, 64), (3, 128, 64), (1, 65, 1), (3, 50, 1)]
)
def test_flashinfer_decode_plans_once_a_shape(
    fake_flashinfer, seq_len_q: int, seq_len_kv: int, page_size: int
) -> None:
    for seed in (1, 2):
        inputs = sharp_inputs(decode_shape(3, seq_len_q, seq_len_kv), seed)
        assert not failed(OPERATOR.check(inputs, flashinfer.run(inputs)))
    assert FakeLatent.plans == 1
    assert flashinfer.page_size_of(seq_len_kv) == page_size


@pytest.mark.parametrize("kind", ["spread", "one-long"])
@pytest.mark.parametrize("seq_len_q", [1, 3])
def test_flashinfer_decode_of_different_lengths(fake_flashinfer, kind: str, seq_len_q: int) -> None:
    for seq_len_kv in (131, 200, 131):
        inputs = sharp_inputs(decode_shape(5, seq_len_q, seq_len_kv, lengths=kind))
        assert not failed(OPERATOR.check(inputs, flashinfer.run(inputs)))
    assert FakeLatent.plans == 2


def ragged_rows(device: str = "cpu") -> topk.TopkInputs:
    """Rows that start late, end early, are shorter than topk or empty; NaN outside the range."""
    torch.manual_seed(0)
    start = torch.tensor([0, 300, 17, 50, 0], dtype=torch.int32)
    end = torch.tensor([4096, 4000, 117, 50, 2048], dtype=torch.int32)
    logits = torch.randn(5, 4096)
    columns = torch.arange(4096)
    logits[(columns < start[:, None]) | (columns >= end[:, None])] = float("nan")
    return topk.TopkInputs(logits.to(device), start.to(device), end.to(device), 2048)


def strided(inputs: topk.TopkInputs) -> topk.TopkInputs:
    """The same logits in rows that are 64 columns apart."""
    wide = torch.nn.functional.pad(inputs.index_logits, (0, 64))
    return dataclasses.replace(inputs, index_logits=wide[:, : inputs.index_logits.shape[1]])


@pytest.mark.parametrize("lay", [lambda inputs: inputs, strided], ids=["contiguous", "strided"])
def test_flashinfer_lists_columns(fake_flashinfer, lay) -> None:
    inputs = lay(ragged_rows())
    assert not failed(topk.check(inputs, flashinfer.topk(inputs)))


def test_flashinfer_says_what_it_compiles_with(fake_flashinfer, monkeypatch) -> None:
    (fake_flashinfer / "bin" / "nvcc").unlink()
    with pytest.raises(ImportError, match="nvcc"):
        flashinfer.load()
    monkeypatch.setattr(flashinfer.shutil, "which", lambda program: None)
    with pytest.raises(ImportError, match="ninja"):
        flashinfer.load()


def test_flashinfer_of_another_age_is_named(fake_flashinfer) -> None:
    del sys.modules["flashinfer.mla"].MLAPlanMetadata  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="no MLAPlanMetadata"):
        flashinfer.load()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("seq_len_q", "seq_len_kv", "num_heads"), [(1, 4096, 128), (2, 4096, 128), (2, 1001, 16)]
)
def test_flashinfer_decode_on_a_gpu(seq_len_q: int, seq_len_kv: int, num_heads: int) -> None:
    shape = decode_shape(3, seq_len_q, seq_len_kv, num_heads)
    part = on_this_gpu("dense_attention", "flashinfer", shape)
    inputs = sharp_inputs(shape, device="cuda")
    assert not failed(OPERATOR.check(inputs, part.run(inputs)))


@pytest.mark.gpu
@pytest.mark.parametrize("lay", [lambda inputs: inputs, strided], ids=["contiguous", "strided"])
def test_flashinfer_lists_columns_on_a_gpu(lay) -> None:
    shape = topk.TopkShape(num_rows=5, num_cols=4096, topk=2048, valid=5 * 4096)
    part = on_this_gpu("topk", "flashinfer", shape)
    inputs = lay(ragged_rows("cuda"))
    assert not failed(topk.check(inputs, part.run(inputs)))
