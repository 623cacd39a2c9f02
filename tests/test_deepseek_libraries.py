"""FlashMLA, DeepGEMM and SGLang at the border: fakes answer in their own words, in torch.

A fake computes the answer from exactly what it was handed and lays it out as the library does, so
that a wrong order, a missing transpose or a lost argument is a wrong number here.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch

from dsa_bench import registry
from dsa_bench.baselines import deep_gemm, dense_attention, flash_mla, sglang
from dsa_bench.kernels import (
    indexer,
    paged_indexer,
    sparse_decode,
    sparse_prefill,
    topk,
    topk_torch,
)
from dsa_bench.operator import Machine

HOPPER = Machine(device="cuda", name="H100", capability=(9, 0))


class FakeFlashMla:
    """Their three calls; decode gives lse as [batch, heads, seq_len_q] and makes a schedule."""

    def __init__(self, base: float) -> None:
        self.base = base
        self.heads: list[int] = []
        self.schedules_seen: list[object] = []

    def sparse_prefill_fwd(self, q, kv, indices, sm_scale, d_v, attn_sink, topk_length):
        assert kv.shape[1] == indices.shape[1] == 1 and q.shape[1] in flash_mla.HEADS_TAKEN
        self.heads.append(q.shape[1])
        inputs = sparse_prefill.SparsePrefillInputs(
            q, kv[:, 0], indices[:, 0], sm_scale, d_v, attn_sink, topk_length
        )
        out, max_logits, lse = sparse_prefill.reference(inputs)
        return [out, max_logits / math.log(self.base), lse / math.log(self.base)]

    def sparse_decode_fwd(
        self, q, kv, indices, topk_length, sink, metadata, splits, k2, i2, l2, d_v, sm_scale
    ):
        assert kv.shape[2] == 1 and q.shape[2] in flash_mla.HEADS_TAKEN
        assert (k2, i2, l2, d_v) == (None, None, None, 512)
        self.schedules_seen.append(metadata)
        lens = None if topk_length is None else topk_length[:, None]
        if lens is not None:
            assert q.shape[1] == 1 and lens.min() >= 0 and lens.max() <= indices.shape[-1]
        inputs = sparse_decode.SparseDecodeInputs(q, kv[:, :, 0], indices, sm_scale, sink, lens)
        out, lse = sparse_decode.reference(inputs)
        return out, lse.transpose(1, 2), "made", "splits"

    def dense_decode_fwd(
        self, q, cache, d_v, seq_lens, block_table, sm_scale, causal, metadata, splits
    ):
        assert causal and cache.shape[1:3] == (64, 1)
        assert seq_lens.dtype == block_table.dtype == torch.int32
        self.schedules_seen.append(metadata)
        parts = []
        for query, row, length in zip(q, block_table, seq_lens.tolist(), strict=True):
            pages = row[: -(-length // 64)].long()
            assert (pages >= 0).all()
            kv = cache[pages].flatten(0, 2)[:length]
            one = dense_attention.DenseDecodeInputs(query[None], kv[None], sm_scale, d_v)
            parts.append(dense_attention.reference(one))
        out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
        return out, lse.transpose(1, 2), f"made for {seq_lens.tolist()}", "splits"


@pytest.fixture(params=[2.0, math.e])
def fake_mla(monkeypatch, request) -> FakeFlashMla:
    fake = FakeFlashMla(request.param)
    monkeypatch.setattr(flash_mla, "gives_base_2", lambda: request.param == 2.0)
    monkeypatch.setattr(flash_mla, "ops", lambda: fake)
    monkeypatch.setattr(flash_mla, "_schedules", {})
    return fake


@pytest.mark.parametrize("num_heads, taken", [(16, 64), (64, 64), (80, 128), (128, 128)])
def test_flash_mla_prefill_with_sink_and_lengths(fake_mla, num_heads: int, taken: int) -> None:
    shape = sparse_prefill.SparsePrefillShape(
        seq_len_q=5, seq_len_kv=40, topk=16, num_heads=num_heads
    )
    made = sparse_prefill.make_inputs(shape, seed=3, device="cpu")
    inputs = sparse_prefill.SparsePrefillInputs(
        made.q,
        made.kv,
        made.topk_indices,
        made.sm_scale,
        attn_sink=torch.randn(num_heads),
        topk_lens=torch.tensor([0, 1, 7, 16, 9], dtype=torch.int32),
    )
    assert all(c.passed for c in sparse_prefill.check(inputs, flash_mla.sparse_prefill(inputs)))
    assert fake_mla.heads == [taken]


@pytest.mark.parametrize("num_heads, seq_len_q", [(16, 2), (128, 1)])
def test_flash_mla_decode_keeps_the_schedule_of_a_shape(
    fake_mla, num_heads: int, seq_len_q: int
) -> None:
    shape = sparse_decode.SparseDecodeShape(
        batch_size=2, seq_len_kv=100, topk=64, seq_len_q=seq_len_q, num_heads=num_heads
    )
    for seed in (1, 2):
        inputs = sparse_decode.make_inputs(shape, seed=seed, device="cpu")
        outputs = flash_mla.sparse_decode(inputs)
        assert all(c.passed for c in sparse_decode.check(inputs, outputs))
    assert fake_mla.schedules_seen == [None, "made"]


def test_flash_mla_decode_leaves_lengths_aside_that_say_nothing_new(fake_mla) -> None:
    shape = sparse_decode.SparseDecodeShape(batch_size=2, seq_len_kv=100, topk=64, seq_len_q=2)
    made = sparse_decode.make_inputs(shape, seed=1, device="cpu")
    lens = torch.tensor([[3, 100], [64, 0]], dtype=torch.int32)
    slots = made.topk_slots.masked_fill(torch.arange(64) >= lens[..., None], -1)
    for _ in range(2):
        inputs = dataclasses.replace(made, topk_slots=slots, topk_lens=lens, is_padded=True)
        outputs = flash_mla.sparse_decode(inputs)
        assert all(c.passed for c in sparse_decode.check(inputs, outputs))
    assert fake_mla.schedules_seen == [None, "made"]


@pytest.mark.parametrize(
    "all_lens",
    [([[3], [64]], [[64], [0]]), ([[3, 2**31 - 1, 0], [64, 65, -1]], [[1, 2, 3], [4, 5, 6]])],
    ids=["one-token", "three-tokens"],
)
def test_flash_mla_decode_makes_a_schedule_for_lengths_each_time(fake_mla, all_lens) -> None:
    shape = sparse_decode.SparseDecodeShape(
        batch_size=2, seq_len_kv=100, topk=64, seq_len_q=len(all_lens[0][0]), num_heads=16
    )
    made = sparse_decode.make_inputs(shape, seed=1, device="cpu")
    for lens in all_lens:
        inputs = sparse_decode.SparseDecodeInputs(
            made.q,
            made.kv_cache,
            made.topk_slots,
            made.sm_scale,
            topk_lens=torch.tensor(lens, dtype=torch.int32),
        )
        outputs = flash_mla.sparse_decode(inputs)
        assert all(c.passed for c in sparse_decode.check(inputs, outputs))
    assert fake_mla.schedules_seen == [None, None]


@pytest.mark.parametrize("seq_len_q", [1, 3])
def test_flash_mla_dense_decode(fake_mla, seq_len_q: int) -> None:
    """A schedule is that of a shape and its lengths."""
    kinds = [("equal", 192), ("spread", 192), ("one-long", 192), ("spread", 131)]
    wanted = []
    for lengths, seq_len_kv in kinds * 2:
        shape = dense_attention.DenseAttentionShape(
            phase="decode",
            seq_len_q=seq_len_q,
            seq_len_kv=seq_len_kv,
            batch_size=3,
            num_heads=4,
            head_dim_qk=576,
            head_dim_v=512,
            lengths=lengths,
        )
        inputs = dense_attention.make_inputs(shape, seed=5, device="cpu")
        outputs = flash_mla.dense_decode(inputs)
        assert all(c.passed for c in dense_attention.check(inputs, outputs))
        wanted.append(f"made for {list(shape.seq_lens)}")
    assert len(set(wanted)) == 4
    # the first calls have none, the second ones their own
    assert fake_mla.schedules_seen == [None] * 4 + wanted[4:]


def test_flash_mla_says_what_it_cannot_take(monkeypatch) -> None:
    monkeypatch.setattr(flash_mla.Library, "obstacle", lambda self: None)
    by_op = {op: offer[0] for op, offer in flash_mla.IMPLEMENTATIONS.items()}

    def prefill(**sizes: int) -> str | None:
        shape = sparse_prefill.SparsePrefillShape(seq_len_q=4, seq_len_kv=4096, **sizes)
        return by_op["sparse_prefill"].supports(shape, HOPPER)

    def decode(**sizes: object) -> str | None:
        shape = sparse_decode.SparseDecodeShape(batch_size=1, seq_len_kv=4096, **sizes)
        return by_op["sparse_decode"].supports(shape, HOPPER)

    def dense(phase: str, seq_len_kv: int, **batch: Any) -> str | None:
        shape = dense_attention.DenseAttentionShape(
            phase=phase,
            seq_len_q=1,
            seq_len_kv=seq_len_kv,
            head_dim_qk=576,
            head_dim_v=512,
            **batch,
        )
        return by_op["dense_attention"].supports(shape, HOPPER)

    assert prefill() is None and decode() is None and dense("decode", 4096) is None
    assert "multiple of 128" in str(prefill(topk=64))
    assert "multiple of 64" in str(decode(topk=32))
    assert "up to 128 heads" in str(prefill(num_heads=192))
    assert "fp8 cache only" in str(decode(precision="bf16"))
    assert "pages of 64" in str(decode(page_size=32))
    assert "no dense prefill" in str(dense("prefill", 4096))
    assert "no whole number" in str(dense("decode", 4097))
    # sequences of different lengths begin with a page each
    assert dense("decode", 4097, batch_size=2, lengths="spread") is None


class FakeDeepGemm:
    """Their logits: [rows, keys] with anything in the columns outside the range."""

    def get_num_sms(self) -> int:
        return 132

    def fp8_mqa_logits(self, q, kv, weights, start, end, clean_logits):
        assert clean_logits is False
        inputs = indexer.IndexerInputs(q, *kv, weights, start, end)
        (logits,) = indexer.reference(inputs)
        return logits.masked_fill(~indexer.visible(inputs), float("nan"))

    def get_paged_mqa_logits_metadata(self, context_lens, page_size, num_sms):
        assert (page_size, num_sms) == (64, 132)
        return context_lens.sum()

    def fp8_paged_mqa_logits(
        self, q, cache, weights, context_lens, block_table, schedule, longest, clean_logits
    ):
        assert clean_logits is False and cache.shape[1:] == (64, 1, 132)
        assert schedule == context_lens.sum() and longest == block_table.shape[1] * 64
        inputs = paged_indexer.PagedIndexerInputs(
            q, cache.flatten(1), weights.view(q.shape[:3]), context_lens, block_table, 64
        )
        logits = paged_indexer.reference(inputs).index_logits
        outside = torch.arange(longest) >= context_lens.unsqueeze(-1)
        return logits.masked_fill(outside, float("nan")).flatten(0, 1)


def test_deep_gemm_logits(monkeypatch) -> None:
    monkeypatch.setattr(deep_gemm, "load", FakeDeepGemm)
    shape = indexer.IndexerShape(seq_len_q=7, seq_len_kv=50)
    inputs = indexer.make_inputs(shape, seed=1, device="cpu")
    assert all(c.passed for c in indexer.check(inputs, deep_gemm.indexer(inputs)))


@pytest.mark.parametrize("seq_len_q", [1, 2])
def test_deep_gemm_paged_logits(monkeypatch, seq_len_q: int) -> None:
    monkeypatch.setattr(deep_gemm, "load", FakeDeepGemm)
    shape = paged_indexer.PagedIndexerShape(batch_size=3, seq_len_kv=150, seq_len_q=seq_len_q)
    inputs = paged_indexer.make_inputs(shape, seed=1, device="cpu")
    assert all(c.passed for c in paged_indexer.check(inputs, deep_gemm.paged_indexer(inputs)))


def test_deep_gemm_says_what_it_cannot_take(monkeypatch) -> None:
    monkeypatch.setattr(deep_gemm.Library, "obstacle", lambda self: None)
    paged = deep_gemm.IMPLEMENTATIONS["paged_indexer"][0].supports

    def reason(**sizes: object) -> str | None:
        return paged(paged_indexer.PagedIndexerShape(batch_size=1, seq_len_kv=64, **sizes), HOPPER)

    assert reason() is None
    assert "2 new tokens" in str(reason(seq_len_q=3))
    assert "fp8 keys only" in str(reason(precision="bf16"))
    assert "32 or 64 indexer heads" in str(reason(index_heads=8))
    assert "pages of 64" in str(reason(page_size=16))


class FakeSglang:
    """The fused top-k: lists of exactly 2048, relative to the start of the row plus an offset."""

    def fast_topk_transform_ragged_fused(self, score, lengths, out, offset, row_starts):
        for i, (length, start) in enumerate(
            zip(lengths.tolist(), row_starts.tolist(), strict=True)
        ):
            assert length >= 0
            section = score[i, start : start + length]
            best = section.topk(min(2048, int(length))).indices
            out[i] = -1
            out[i, : len(best)] = best + offset[i]


def ragged_rows() -> topk.TopkInputs:
    """Rows that start late, end early, are shorter than topk, empty or turned round; NaN outside
    the range."""
    torch.manual_seed(0)
    start = torch.tensor([0, 300, 17, 50, 0, 9], dtype=torch.int32)
    end = torch.tensor([4096, 4000, 117, 50, 2048, -(2**31)], dtype=torch.int32)
    logits = torch.randn(6, 4096)
    columns = torch.arange(4096)
    logits[(columns < start[:, None]) | (columns >= end[:, None])] = float("nan")
    return topk.TopkInputs(logits, start, end, 2048)


def test_sglang_lists_columns(monkeypatch) -> None:
    monkeypatch.setattr(sglang, "ops", FakeSglang)
    inputs = ragged_rows()
    assert all(c.passed for c in topk.check(inputs, sglang.run(inputs)))


def test_torch_topk_keeps_to_the_range_and_takes_nan_for_the_least() -> None:
    inputs = ragged_rows()
    inputs.index_logits[0, :100] = float("nan")
    inputs.index_logits[2, 20:60] = float("-inf")
    inputs.index_logits[1, 400] = float("inf")
    assert all(c.passed for c in topk.check(inputs, topk_torch.run(inputs)))


@pytest.mark.parametrize(
    "op, name",
    [
        ("sparse_prefill", "flash_mla"),
        ("sparse_decode", "flash_mla"),
        ("dense_attention", "flash_mla"),
        ("indexer", "deep_gemm"),
        ("paged_indexer", "deep_gemm"),
        ("topk", "sglang"),
    ],
)
def test_each_is_known_with_its_library(op: str, name: str) -> None:
    part = registry.implementation(op, name)
    assert part.library is not None
    assert part.library.install.startswith("pip install ")


def test_attention_reference_is_what_the_fakes_rest_on() -> None:
    """The fakes share the reference; this pins it by hand: one query, one head, two keys."""
    kv = torch.zeros(2, 576)
    kv[0, 0], kv[1, 0] = 1.0, 3.0
    q = torch.zeros(1, 1, 576)
    q[0, 0, 0] = 0.5
    inputs = sparse_prefill.SparsePrefillInputs(
        q.bfloat16(), kv.bfloat16(), torch.tensor([[1, 0]], dtype=torch.int32), 1.0
    )
    out, largest, lse = sparse_prefill.reference(inputs)
    weights = torch.tensor([0.5, 1.5]).softmax(0)
    assert float(out[0, 0, 0]) == pytest.approx(float(weights[0] + 3 * weights[1]), rel=1e-6)
    assert float(largest[0, 0]) == 1.5
    assert float(lse[0, 0]) == pytest.approx(float(torch.tensor([0.5, 1.5]).logsumexp(0)), rel=1e-6)
