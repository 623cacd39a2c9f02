"""FlashAttention-3 and -4, FlexAttention, FlashInfer, torch's efficient kernel at the border.

A fake computes the answer in torch from exactly what it was handed, by the library's own layout,
base of lse and alignment of the causal mask, so that a mistake of ours is a wrong number here.
FlexAttention is its own fake: uncompiled it runs on a CPU.
"""

import dataclasses
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_bench import registry
from dsa_bench.accuracy import Check
from dsa_bench.baselines import flash_attn_3, flash_attn_4, flashinfer, flex_attention, sdpa
from dsa_bench.baselines.dense_attention import OPERATOR, DenseAttentionShape
from dsa_bench.kernels import topk
from dsa_bench.library import Library
from dsa_bench.operator import Machine
from dsa_bench.record import LENGTH_KINDS

HOPPER = Machine(device="cuda", name="H100", capability=(9, 0))
AMPERE = Machine(device="cuda", name="A100", capability=(8, 0))
CPU = Machine(device="cpu", name="CPU")
PREFILL_SIZES = [(1, 1), (5, 5), (1, 40), (7, 40), (39, 40), (40, 300)]


def prefill_shape(seq_len_q: int, seq_len_kv: int, num_heads: int = 3) -> DenseAttentionShape:
    return DenseAttentionShape(
        phase="prefill",
        seq_len_q=seq_len_q,
        seq_len_kv=seq_len_kv,
        num_heads=num_heads,
        head_dim_qk=192,
        head_dim_v=128,
    )


def decode_shape(
    batch_size: int, seq_len_q: int, seq_len_kv: int, num_heads: int = 4, lengths: str = "equal"
) -> DenseAttentionShape:
    return DenseAttentionShape(
        phase="decode",
        batch_size=batch_size,
        seq_len_q=seq_len_q,
        seq_len_kv=seq_len_kv,
        num_heads=num_heads,
        head_dim_qk=576,
        head_dim_v=512,
        lengths=lengths,
    )


def sharp_inputs(shape: DenseAttentionShape, seed: int = 0, device: str = "cpu") -> Any:
    """Queries 30 times larger: with weak scores every key counts alike."""
    inputs = OPERATOR.make_inputs(shape, seed=seed, device=device)
    return dataclasses.replace(inputs, q=(inputs.q.float() * 30).bfloat16())


def failed(checks: tuple[Check, ...]) -> list[Check]:
    return [c for c in checks if not c.passed]


def attend(q: Any, k: Any, v: Any, scale: float, causal: bool) -> tuple[Any, Any]:
    """[rows, heads, width] -> out, natural lse [rows, heads]; causal to the last key."""
    logits = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    if causal:
        sees = torch.ones(logits.shape[1:], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
        logits = logits.masked_fill(~sees, float("-inf"))
    out = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.float())
    return out.bfloat16(), logits.logsumexp(-1).T


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    fake = types.ModuleType(name)
    fake.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, fake)


def fake_flash_attn_func(q, k, v, *, softmax_scale, causal, return_lse):
    """[batch, rows, heads, width]; lse [batch, heads, rows], natural."""
    assert causal and return_lse
    parts = [attend(*one, softmax_scale, causal) for one in zip(q, k, v, strict=True)]
    return torch.stack([out for out, _ in parts]), torch.stack([lse.T for _, lse in parts])


def fake_flash_attn_with_kvcache(
    q, k_cache, v_cache, *, qv, cache_seqlens, page_table, softmax_scale, causal, num_splits,
    return_softmax_lse,
):  # fmt: skip
    """Rope columns in q and k, the others in qv and v; lse [batch, heads, rows], natural."""
    assert causal and return_softmax_lse and num_splits == 0
    assert q.shape[-1] == k_cache.shape[-1] == 64 and qv.shape[-1] == v_cache.shape[-1] == 512
    parts = []
    for b, query in enumerate(torch.cat([qv, q], -1)):
        if page_table is None:
            assert cache_seqlens is None
            values, rope = v_cache[b], k_cache[b]
        else:
            assert page_table.dtype == cache_seqlens.dtype == torch.int32
            length = int(cache_seqlens[b])
            pages = page_table[b, : -(-length // v_cache.shape[1])].long()
            assert (pages >= 0).all()
            values, rope = (x[pages].flatten(0, 1)[:length] for x in (v_cache, k_cache))
        keys = torch.cat([values, rope], -1).expand(-1, q.shape[2], -1)
        parts.append(attend(query, keys, keys[..., :512], softmax_scale, causal))
    return torch.stack([out for out, _ in parts]), torch.stack([lse.T for _, lse in parts]), None


@pytest.mark.parametrize("kind", LENGTH_KINDS)
@pytest.mark.parametrize("seq_len_q", [1, 3])
def test_flash_attn_3_decode(monkeypatch, seq_len_q: int, kind: str) -> None:
    fake = types.SimpleNamespace(flash_attn_with_kvcache=fake_flash_attn_with_kvcache)
    monkeypatch.setattr(flash_attn_3, "load", lambda: fake)
    inputs = sharp_inputs(decode_shape(4, seq_len_q, 131, lengths=kind))
    assert not failed(OPERATOR.check(inputs, flash_attn_3.run(inputs)))


@pytest.mark.parametrize(("seq_len_q", "seq_len_kv"), PREFILL_SIZES)
def test_flash_attn_4_prefill(monkeypatch, seq_len_q: int, seq_len_kv: int) -> None:
    module(monkeypatch, "flash_attn.cute", flash_attn_func=fake_flash_attn_func)
    flash_attn_4.load.cache_clear()
    inputs = sharp_inputs(prefill_shape(seq_len_q, seq_len_kv))
    assert not failed(OPERATOR.check(inputs, flash_attn_4.run(inputs)))
    flash_attn_4.load.cache_clear()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("seq_len_q", "seq_len_kv"), [*PREFILL_SIZES, (200, 300), (256, 256)])
def test_flex_attention_prefill_uncompiled(monkeypatch, seq_len_q: int, seq_len_kv: int) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    flex_attention.prepare.cache_clear()
    inputs = sharp_inputs(prefill_shape(seq_len_q, seq_len_kv))
    assert not failed(OPERATOR.check(inputs, flex_attention.run(inputs)))
    flex_attention.prepare.cache_clear()


@pytest.mark.parametrize(
    ("seq_len_q", "seq_len_kv"),
    [(1, 1), (1, 129), (1, 128), (128, 128), (128, 384), (130, 130), (300, 1000), (256, 257)],
)
def test_flex_attention_table_is_that_of_every_pair(seq_len_q: int, seq_len_kv: int) -> None:
    """A block that counts as full is not masked, one that is missing is not read."""
    mask = flex_attention.causal_block_mask(seq_len_q, seq_len_kv, "cpu")
    sees = torch.ones(seq_len_q, seq_len_kv, dtype=torch.bool).tril(seq_len_kv - seq_len_q)
    for row in range(mask.kv_num_blocks.shape[-1]):
        full = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist()
        partial = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist()
        rows = sees[row * 128 : row * 128 + 128]
        seen = [tile.any().item() for tile in rows.split(128, dim=1)]
        whole = [tile.all().item() and tile.shape[1] == 128 for tile in rows.split(128, dim=1)]
        assert full == [j for j, w in enumerate(whole) if w]
        assert partial == [j for j, (s, w) in enumerate(zip(seen, whole, strict=True)) if s > w]


def fake_efficient(q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout, mask_type, *rest, **named):
    """[batch, rows, heads, width]; lse [batch, heads, rows padded to 32], natural."""
    assert (bias, cu_q, cu_k, max_q, max_k, dropout) == (None, None, None, None, None, 0.0)
    assert mask_type == 2
    out, lse = attend(q[0], k[0], v[0], named["scale"], True)
    padding = -q.shape[1] % 32
    padded = torch.nn.functional.pad(lse.T[None], (0, padding), value=float("inf"))
    nothing = torch.empty((), dtype=torch.int64)
    return out[None], padded, nothing, nothing, q.shape[1], k.shape[1]


@pytest.mark.parametrize(("seq_len_q", "seq_len_kv"), PREFILL_SIZES)
def test_sdpa_efficient_prefill(seq_len_q: int, seq_len_kv: int) -> None:
    inputs = sharp_inputs(prefill_shape(seq_len_q, seq_len_kv))
    with torch.library._scoped_library("aten", "IMPL") as fakes:
        fakes.impl("_efficient_attention_forward", fake_efficient, "CPU")
        outputs = sdpa.run_efficient(inputs)
    assert not failed(OPERATOR.check(inputs, outputs))


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


@pytest.mark.parametrize(
    ("name", "shape", "machine", "says"),
    [
        ("flash_attn_4", prefill_shape(4, 8), HOPPER, None),
        ("flash_attn_4", prefill_shape(4, 8), AMPERE, "Hopper"),
        ("flash_attn_4", decode_shape(1, 1, 64), HOPPER, "up to 256"),
        ("flex_attention", prefill_shape(4, 8), AMPERE, None),
        ("flex_attention", prefill_shape(4, 8), CPU, "CUDA"),
        ("flex_attention", decode_shape(1, 1, 64), HOPPER, "power of 2"),
        ("flex_attention", prefill_shape(4, 2**31 // 192 // 128, 128), AMPERE, None),
        ("flex_attention", prefill_shape(4, 2**31 // 192 // 128 + 1, 128), AMPERE, "32 bits"),
        ("sdpa_efficient", prefill_shape(4, 2**31 // 192 // 128, 128), AMPERE, None),
        ("sdpa_efficient", prefill_shape(4, 2**31 // 192 // 128 + 1, 128), AMPERE, "32 bits"),
        ("sdpa_efficient", prefill_shape(4, 8), AMPERE, None),
        ("sdpa_efficient", prefill_shape(4, 8), CPU, "CUDA"),
        ("sdpa_efficient", decode_shape(1, 1, 64), HOPPER, "only its prefill"),
        ("flashinfer", prefill_shape(4, 8), HOPPER, None),
        ("flashinfer", decode_shape(2, 1, 65, num_heads=80), HOPPER, None),
        ("flashinfer", decode_shape(2, 2, 65, num_heads=80), HOPPER, "divides 128"),
        ("flashinfer", prefill_shape(4, 8), AMPERE, "Hopper"),
        ("flashinfer", decode_shape(2, 1, 65, lengths="spread"), HOPPER, None),
        ("flash_attn_3", decode_shape(2, 1, 65, lengths="spread"), HOPPER, None),
        ("triton", decode_shape(2, 1, 65, lengths="spread"), HOPPER, None),
        ("gluon", decode_shape(2, 1, 65), HOPPER, None),
        ("gluon", decode_shape(2, 1, 65, lengths="spread"), HOPPER, "sequences of one length"),
        ("sdpa", decode_shape(2, 1, 65, lengths="spread"), CPU, None),
    ],
)
def test_each_says_what_it_takes(monkeypatch, name: str, shape: Any, machine: Any, says) -> None:
    monkeypatch.setattr(Library, "obstacle", lambda self: None)
    reason = registry.implementation("dense_attention", name).supports(shape, machine)
    assert reason is None if says is None else says in str(reason)


def test_a_module_below_a_missing_package_is_missing() -> None:
    library = dataclasses.replace(flash_attn_4.LIBRARY, modules=("no_such_package.part",))
    assert "is not installed" in str(library.obstacle())


def on_this_gpu(op: str, name: str, shape: Any) -> Any:
    """The implementation, or the test is skipped with its reason."""
    part = registry.implementation(op, name)
    machine = Machine(device="cuda", name="this one", capability=torch.cuda.get_device_capability())
    reason = part.supports(shape, machine)
    if reason is not None:
        pytest.skip(reason)
    return part


@pytest.mark.gpu
# torch's own compiler gives it, on its first use
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("seq_len_q", "seq_len_kv"), [(1, 1), (1, 300), (128, 128), (100, 1000), (513, 1025)]
)
@pytest.mark.parametrize("name", ["flash_attn_4", "flex_attention", "sdpa_efficient", "flashinfer"])
def test_prefill_on_a_gpu(name: str, seq_len_q: int, seq_len_kv: int) -> None:
    shape = prefill_shape(seq_len_q, seq_len_kv, num_heads=16)
    part = on_this_gpu("dense_attention", name, shape)
    inputs = sharp_inputs(shape, device="cuda")
    assert not failed(OPERATOR.check(inputs, part.run(inputs)))


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
@pytest.mark.parametrize("kind", ["spread", "one-long"])
@pytest.mark.parametrize(("batch_size", "seq_len_q"), [(2, 1), (40, 1), (7, 3)])
@pytest.mark.parametrize("name", ["flash_attn_3", "flash_mla", "flashinfer", "triton"])
def test_decode_of_different_lengths_on_a_gpu(
    name: str, batch_size: int, seq_len_q: int, kind: str
) -> None:
    shape = decode_shape(batch_size, seq_len_q, 8200, 128, kind)
    part = on_this_gpu("dense_attention", name, shape)
    inputs = sharp_inputs(shape, device="cuda")
    assert not failed(OPERATOR.check(inputs, part.run(inputs)))


@pytest.mark.gpu
@pytest.mark.parametrize("lay", [lambda inputs: inputs, strided], ids=["contiguous", "strided"])
def test_flashinfer_lists_columns_on_a_gpu(lay) -> None:
    shape = topk.TopkShape(num_rows=5, num_cols=4096, topk=2048, valid=5 * 4096)
    part = on_this_gpu("topk", "flashinfer", shape)
    inputs = lay(ragged_rows("cuda"))
    assert not failed(topk.check(inputs, part.run(inputs)))
