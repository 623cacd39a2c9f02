"""Layouts of the caches, byte by byte."""

import struct
from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels import paged_indexer, sparse_decode
from dsa_bench.kernels.paging import (
    index_row_bytes,
    make_block_table,
    make_cache,
    mla_row_bytes,
    pack_index_pages,
    pack_mla_rows,
    split_index_pages,
    unpack_index_pages,
    unpack_mla_rows,
)

ONE, TWO, MINUS_HALF, NOT_A_NUMBER = 0x38, 0x40, 0xB0, 0x7F
"""e4m3: 4 bits of exponent with bias 7, then 3 of mantissa."""


def test_mla_row_by_hand():
    row = bytearray(656)
    row[0], row[127], row[128], row[511] = ONE, TWO, MINUS_HALF, TWO
    row[512:528] = struct.pack("<4f", 0.5, 4.0, 1.0, 16.0)
    row[528:530], row[654:656] = bytes([0x80, 0x3F]), bytes([0x00, 0xC0])  # bf16 1 and -2
    key = unpack_mla_rows(torch.tensor(list(row), dtype=torch.uint8).view(1, 656))[0]
    found = {i: x for i, x in enumerate(key.tolist()) if x}
    assert found == {0: 0.5, 127: 1.0, 128: -2.0, 511: 32.0, 512: 1.0, 575: -2.0}


def test_index_page_is_block_major_by_hand():
    """Values of all tokens first, then all scales: byte 132 is token 1's value 4."""
    page = bytearray(3 * 132)
    page[0], page[132], page[2 * 128 + 127] = ONE, TWO, MINUS_HALF
    page[384:396] = struct.pack("<3f", 1.0, 8.0, 0.25)
    cache = torch.tensor(list(page), dtype=torch.uint8).view(1, 396)
    values, scales = unpack_index_pages(cache, 3)
    assert values.shape == (1, 3, 128)
    assert scales.tolist() == [[1.0, 8.0, 0.25]]
    assert values[0].nonzero().tolist() == [[0, 0], [1, 4], [2, 127]]
    assert values[0][values[0] != 0].tolist() == [1.0, 2.0, -0.5]


def test_index_pages_are_packed_where_the_layout_says():
    k = torch.randn(2, 17, 128, generator=torch.Generator().manual_seed(0))
    pages = pack_index_pages(k, "fp8")
    assert (pages.shape, pages.dtype) == ((2, 17 * 132), torch.uint8)
    for page, offset, dim in ((0, 0, 0), (1, 16, 127), (1, 3, 40)):
        value = pages[page, offset * 128 + dim].view(torch.float8_e4m3fn).float()
        first = 17 * 128 + offset * 4
        scale = pages[page, first : first + 4].clone().view(torch.float32)
        assert (value * scale).item() == pytest.approx(k[page, offset, dim].item(), rel=1 / 16)


def test_nan_bytes_unpack_to_nan():
    row = torch.full((1, 656), 0xFF, dtype=torch.uint8)
    assert unpack_mla_rows(row).isnan().all()
    page = torch.full((1, 132), NOT_A_NUMBER, dtype=torch.uint8)
    assert unpack_index_pages(page, 1)[0].isnan().all()


@pytest.mark.parametrize(("precision", "limit"), [("fp8", 1 / 16), ("bf16", 1 / 256)])
def test_mla_rows_survive_the_round_trip(precision, limit):
    kv = torch.randn(3, 5, 576, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = pack_mla_rows(kv, precision)
    assert rows.shape[-1] * rows.element_size() == mla_row_bytes(precision)
    back = unpack_mla_rows(rows)
    assert ((back - kv.float()).abs() <= kv.float().abs() * limit + 0.02).all()
    assert torch.equal(back[..., 512:], kv[..., 512:].float())
    # what has been packed once does not change any more
    assert torch.equal(unpack_mla_rows(pack_mla_rows(back, precision)), back)


def test_fp32_caches_round_nothing():
    g = torch.Generator().manual_seed(5)
    kv, k = torch.randn(4, 3, 576, generator=g), torch.randn(4, 3, 128, generator=g)
    rows, pages = pack_mla_rows(kv, "fp32"), pack_index_pages(k, "fp32")
    assert (rows.dtype, pages.dtype) == (torch.float32, torch.float32)
    assert torch.equal(unpack_mla_rows(rows), kv)
    values, scales = unpack_index_pages(pages, 3)
    assert torch.equal(values, k) and (scales == 1).all()


def test_split_index_pages_are_views():
    """What is written to them lies in the cache: token 2's value 5 and scale of page 1."""
    cache = torch.zeros(2, 3 * 132, dtype=torch.uint8)
    values, scale = split_index_pages(cache, 3)
    values[1, 2, 5], scale[1, 2] = 1.0, 8.0
    page = cache[1].tolist()
    assert page[2 * 128 + 5] == ONE
    assert bytes(page[384 + 8 : 384 + 12]) == struct.pack("<f", 8.0)
    assert cache.count_nonzero() == 2 and not cache[0].any()


def test_sparse_decode_and_paged_indexer_refer_to_fp32_caches():
    """Of values that bf16 holds the results are those of a bf16 cache; of others they differ."""
    shape = sparse_decode.SparseDecodeShape(
        batch_size=2, seq_len_kv=50, topk=9, num_heads=4, page_size=7, precision="bf16"
    )
    inputs = sparse_decode.make_inputs(shape, seed=0, device="cpu")
    same = replace(inputs, kv_cache=inputs.kv_cache.float())
    finer = replace(inputs, kv_cache=inputs.kv_cache.float() * 1.001)
    bf16, fp32, other = (sparse_decode.reference(x) for x in (inputs, same, finer))
    assert torch.equal(bf16.out, fp32.out) and torch.equal(bf16.lse, fp32.lse)
    assert (other.out != fp32.out).all()
    shape = paged_indexer.PagedIndexerShape(
        batch_size=2, seq_len_kv=20, seq_len_q=2, index_heads=8, page_size=7, precision="bf16"
    )
    inputs = paged_indexer.make_inputs(shape, seed=0, device="cpu")
    same = replace(inputs, index_q=inputs.index_q.float(), index_cache=inputs.index_cache.float())
    finer = replace(same, index_cache=same.index_cache * 1.001)
    bf16, fp32, other = (paged_indexer.reference(x).index_logits for x in (inputs, same, finer))
    assert torch.equal(bf16, fp32)
    seen = fp32.isfinite()
    assert torch.allclose(other[seen], fp32[seen] * 1.001, rtol=1e-4, atol=1e-5)


def test_scales_of_the_mla_cache_are_powers_of_two():
    kv = torch.randn(64, 576, generator=torch.Generator().manual_seed(2)) * 37
    scales = pack_mla_rows(kv, "fp8")[:, 512:528].contiguous().view(torch.float32)
    assert scales.shape == (64, 4)
    assert (torch.frexp(scales).mantissa == 0.5).all()


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_index_pages_survive_the_round_trip(precision):
    k = torch.randn(2, 17, 128, generator=torch.Generator().manual_seed(3))
    pages = pack_index_pages(k, precision)
    assert pages.shape[1] * pages.element_size() == 17 * index_row_bytes(precision)
    values, scales = unpack_index_pages(pages, 17)
    back = values * scales.unsqueeze(-1)
    assert ((back - k).abs() <= k.abs() / 16 + 0.01).all()


def test_bytes_a_token():
    assert [mla_row_bytes(p) for p in ("fp8", "bf16", "fp32")] == [656, 1152, 2304]
    assert [index_row_bytes(p) for p in ("fp8", "bf16", "fp32")] == [132, 256, 512]
    # one sequence of 128K tokens through 61 layers
    gib = 61 * (mla_row_bytes("fp8") + index_row_bytes("fp8")) * 131072 / 2**30
    assert gib == pytest.approx(5.87, abs=0.01)


def test_block_table_uses_each_page_once():
    table = make_block_table(4, 7, torch.Generator().manual_seed(0))
    assert table.dtype == torch.int32
    assert sorted(table.flatten().tolist()) == list(range(28))
    assert table.flatten().tolist() != list(range(28))


def test_cache_is_filled_in_parts():
    """65536 tokens a part: with pages of 32768, two pages."""
    counts = []

    def rows_of(pages):
        first = sum(counts)
        counts.append(pages)
        numbers = torch.arange(first, first + pages, dtype=torch.float32)
        return numbers[:, None].expand(pages, 3), numbers.to(torch.int32)

    wide, flat = make_cache(5, 32768, rows_of, device="cpu")
    assert counts == [2, 2, 1]
    assert wide.shape == (5, 3)
    assert wide[:, 2].tolist() == flat.tolist() == [0, 1, 2, 3, 4]
    assert flat.dtype == torch.int32
