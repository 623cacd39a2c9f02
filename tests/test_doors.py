"""What host functions do with sizes and strides at the edge, before any launch."""

import json
from pathlib import Path

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import sparse_decode_gluon, sparse_decode_triton, sparse_prefill_gluon
from dsa_bench.operator import Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case

RESULTS = Path(__file__).parent.parent / "docs/results/h100/v3.2/records.jsonl"


def test_sparse_prefill_with_an_empty_list_is_an_empty_row():
    q, kv = torch.ones(3, 8, 576).bfloat16(), torch.ones(5, 576).bfloat16()
    nothing = torch.empty(3, 0, dtype=torch.int32)
    out, max_logits, lse = sparse_prefill_gluon.sparse_prefill(q, kv, nothing, sm_scale=0.1)
    assert torch.equal(out, torch.zeros(3, 8, 512).bfloat16())
    assert (max_logits == float("-inf")).all() and (lse == float("inf")).all()


def test_sparse_decode_with_an_empty_list_is_an_empty_row():
    q = torch.ones(2, 1, 8, 576).bfloat16()
    cache = torch.zeros(4, 16, 656, dtype=torch.uint8)
    nothing = torch.empty(2, 1, 0, dtype=torch.int32)
    out, lse = sparse_decode_gluon.sparse_decode(q, cache, nothing, sm_scale=0.1)
    assert torch.equal(out, torch.zeros(2, 1, 8, 512).bfloat16())
    assert (lse == float("inf")).all()


@pytest.mark.parametrize("backend", [sparse_decode_gluon, sparse_decode_triton])
def test_sparse_decode_refuses_lengths_with_gaps(backend):
    q = torch.ones(2, 1, 8, 576).bfloat16()
    cache = torch.zeros(4, 16, 656, dtype=torch.uint8)
    slots = torch.zeros(2, 1, 4, dtype=torch.int32)
    lens = torch.ones(2, 2, dtype=torch.int32)[:, :1]
    with pytest.raises(ValueError, match="topk_lens must be contiguous"):
        backend.sparse_decode(q, cache, slots, sm_scale=0.1, topk_lens=lens)


def test_sparse_prefill_refuses_heads_beyond_32_bit_addresses():
    q = torch.empty_strided((2, 128, 576), (576, 2**24, 1), dtype=torch.bfloat16, device="meta")
    kv = torch.empty(5, 576, dtype=torch.bfloat16, device="meta")
    indices = torch.empty(2, 4, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="q must have its heads within"):
        sparse_prefill_gluon.sparse_prefill(q, kv, indices, sm_scale=0.1)


@pytest.mark.parametrize("op", ["paged_indexer", "sparse_decode", "topk", "dsa"])
def test_more_new_tokens_than_context_make_no_case(op: str):
    case = Case(op=op, impl="x", phase="decode", seq_len_kv=2, seq_len_q=4, topk=1)
    with pytest.raises(Unsupported, match="seq_len_q 4"):
        registry.operator(op).shape(case, PRESETS["v3.2"])


def test_predicted_memory_covers_what_the_h100_measured():
    """For the peaks on record; the guard before a case rests on the prediction."""
    checked = 0
    for line in RESULTS.read_text().splitlines():
        record = json.loads(line)
        if record["case"]["op"] != "dsa" or record["case"]["phase"] != "decode":
            continue
        case = Case.from_json(record["case"])
        operator = registry.operator("dsa")
        need = operator.memory(operator.shape(case, PRESETS[case.preset])).total_bytes
        # allocations are rounded up to 512 bytes, block tables to 2 MiB
        assert need + 2**21 >= record["memory"]["peak_bytes"], record["case"]
        checked += 1
    assert checked == 36
