"""The Triton kernels of dense attention and of the merge, interpreted on the CPU."""

import dataclasses

import pytest
import torch

from dsa_bench.baselines import dense_attention_triton as kernels
from dsa_bench.baselines import merge
from dsa_bench.baselines.dense_attention import OPERATOR, DenseAttentionShape, DenseOutputs
from tests import hostile
from tests.triton_interpreter import fused_products

pytestmark = pytest.mark.interpret


def make(phase, seq_len_q, seq_len_kv, num_heads, batch_size=1, sharpness=1, lengths="equal"):
    width = (192, 128) if phase == "prefill" else (576, 512)
    shape = DenseAttentionShape(
        phase=phase, seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, batch_size=batch_size,
        num_heads=num_heads, head_dim_qk=width[0], head_dim_v=width[1], lengths=lengths,
    )  # fmt: skip
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    return dataclasses.replace(inputs, q=(inputs.q.float() * sharpness).bfloat16())


def assert_right(inputs, outputs):
    for check in OPERATOR.check(inputs, outputs):
        assert check.passed, check


@pytest.mark.parametrize("sharpness", [1, 30])
@pytest.mark.parametrize(
    ("seq_len_q", "seq_len_kv", "num_heads"),
    [(1, 1, 1), (1, 200, 2), (100, 100, 1), (128, 256, 1), (130, 333, 3), (65, 64 + 65, 1)],
)
def test_prefill_matches_the_reference(seq_len_q, seq_len_kv, num_heads, sharpness):
    inputs = make("prefill", seq_len_q, seq_len_kv, num_heads, sharpness=sharpness)
    config = kernels.PrefillConfig(heads_together=2)
    outputs = kernels.prefill(inputs.q, inputs.k, inputs.v, sm_scale=inputs.sm_scale, config=config)
    assert_right(inputs, outputs)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    ("batch_size", "seq_len_q", "seq_len_kv", "num_heads"),
    [(1, 1, 1, 16), (2, 1, 200, 70), (1, 4, 70, 40), (2, 2, 128, 16)],
)
def test_decode_matches_the_reference(batch_size, seq_len_q, seq_len_kv, num_heads, num_splits):
    inputs = make("decode", seq_len_q, seq_len_kv, num_heads, batch_size, sharpness=10)
    config = kernels.DecodeConfig(num_splits=num_splits)
    outputs = kernels.decode(inputs.q, inputs.kv, sm_scale=inputs.sm_scale, config=config)
    assert_right(inputs, outputs)


@pytest.mark.parametrize("exponent", [40, 112])
@pytest.mark.parametrize(
    ("phase", "seq_len_q", "seq_len_kv", "num_heads", "num_splits"),
    [
        ("prefill", 1, 1, 1, None),
        ("prefill", 130, 333, 2, None),
        ("decode", 1, 1, 1, 1),
        ("decode", 2, 200, 16, 1),
        ("decode", 2, 200, 16, 3),
    ],
)
def test_logits_of_any_size(phase, seq_len_q, seq_len_kv, num_heads, num_splits, exponent):
    """Products are fused as the compiler does it: only then has a step that rounds the scaled
    maximum, and not the scaled score, a weight of 2^(2^16). `test_dense_attention_kernels.py` runs
    the same on a GPU."""
    inputs = hostile.loud(exponent)(make(phase, seq_len_q, seq_len_kv, num_heads))
    with fused_products():
        if phase == "prefill":
            outputs = kernels.prefill(inputs.q, inputs.k, inputs.v, sm_scale=inputs.sm_scale)
        else:
            config = kernels.DecodeConfig(num_splits=num_splits)
            outputs = kernels.decode(inputs.q, inputs.kv, sm_scale=inputs.sm_scale, config=config)
    assert_right(inputs, outputs)


@pytest.mark.parametrize("num_splits", [1, 3, 7])
@pytest.mark.parametrize("kind", ["spread", "one-long"])
@pytest.mark.parametrize(("batch_size", "seq_len_q", "seq_len_kv"), [(5, 1, 330), (3, 4, 200)])
def test_decode_of_different_lengths(batch_size, seq_len_q, seq_len_kv, kind, num_splits):
    """Of the shortest sequences most parts have no key at all."""
    inputs = make("decode", seq_len_q, seq_len_kv, 40, batch_size, sharpness=10, lengths=kind)
    config = kernels.DecodeConfig(num_splits=num_splits)
    outputs = kernels.decode(
        inputs.q, inputs.kv, sm_scale=inputs.sm_scale, pages=inputs.pages, config=config
    )
    assert_right(inputs, outputs)


@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_pages_of_other_sequences_do_not_leak():
    inputs = make("decode", 1, 330, 16, batch_size=5, lengths="spread")
    own = inputs.pages.block_table[1]
    inputs.kv[[n for n in range(len(inputs.kv)) if n not in own.tolist()]] = float("nan")
    outputs = kernels.run(inputs)
    assert all(check.passed for check in OPERATOR.check(inputs, outputs, rows=torch.tensor([1])))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # in that next one
def test_keys_of_the_next_sequence_do_not_leak():
    inputs = make("decode", 1, 70, 16, batch_size=2)
    inputs.kv[1] = float("nan")
    outputs = kernels.decode(inputs.q, inputs.kv, sm_scale=inputs.sm_scale)
    rows = torch.tensor([0])
    assert all(check.passed for check in OPERATOR.check(inputs, outputs, rows=rows))


@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("num_splits", [1, 3])
def test_nan_of_a_key_shows(num_splits):
    """A part of the keys that gives NaN must not be taken for one without a key."""
    inputs = make("decode", 1, 200, 16, batch_size=2)
    inputs.kv[1, 150] = float("nan")
    config = kernels.DecodeConfig(num_splits=num_splits)
    outputs = kernels.decode(inputs.q, inputs.kv, sm_scale=inputs.sm_scale, config=config)
    assert outputs.out[1].isnan().all()
    assert outputs.lse[1].isnan().all()
    assert all(check.passed for check in OPERATOR.check(inputs, outputs, rows=torch.tensor([0])))


def test_run_takes_both_forms():
    ragged = make("decode", 1, 90, 16, batch_size=3, lengths="spread")
    for inputs in (make("prefill", 5, 9, 1), make("decode", 1, 9, 16), ragged):
        assert_right(inputs, kernels.run(inputs))


def test_merge_kernel_matches_torch():
    generator = torch.Generator().manual_seed(0)
    # strides as cuDNN leaves them: heads before rows
    parts = [torch.randn(3, 11, 128, generator=generator).bfloat16() for _ in range(2)]
    out_a, out_b = (x.transpose(0, 1) for x in parts)
    lse_a, lse_b = torch.randn(2, 3, 11, generator=generator).mul(3).transpose(1, 2)
    expected_out, expected_lse = merge.merge_by_lse(out_a, lse_a, out_b, lse_b)
    actual = DenseOutputs(torch.empty(11, 3, 128).bfloat16(), torch.empty(11, 3))
    merge.launch_merge(out_a, lse_a, out_b, lse_b, *actual)
    torch.testing.assert_close(actual.out, expected_out, rtol=1 / 128, atol=1e-6)
    torch.testing.assert_close(actual.lse, expected_lse)


def test_arguments_are_checked():
    inputs = make("decode", 1, 9, 16)
    with pytest.raises(TypeError, match="kv must be bfloat16"):
        kernels.decode(inputs.q, inputs.kv.float(), sm_scale=1.0)
    with pytest.raises(ValueError, match=r"kv must be contiguous, got strides"):
        kernels.decode(inputs.q, inputs.kv.repeat(1, 2, 1)[:, ::2], sm_scale=1.0)
    inputs = make("prefill", 4, 9, 2)
    with pytest.raises(ValueError, match=r"v must be bfloat16 \[seq_len_kv=9, num_heads=2"):
        kernels.prefill(inputs.q, inputs.k, inputs.v[:8], sm_scale=1.0)


def test_pages_are_checked():
    inputs = make("decode", 2, 90, 16, batch_size=3, lengths="spread")
    pages = inputs.pages

    def decode(kv=inputs.kv, **changed):
        kernels.decode(inputs.q, kv, sm_scale=1.0, pages=dataclasses.replace(pages, **changed))

    with pytest.raises(ValueError, match=r"kv must be bfloat16 \[num_pages, page_size=64, head"):
        decode(inputs.kv.view(-1, 32, 576))
    with pytest.raises(TypeError, match="seq_lens must be int32"):
        decode(seq_lens=pages.seq_lens.long())
    with pytest.raises(ValueError, match=r"seq_lens must be int32 \[batch_size=3\]"):
        decode(seq_lens=pages.seq_lens[:2])
    with pytest.raises(ValueError, match=r"block_table must be int32 \[batch_size=3, max_pages\]"):
        decode(block_table=pages.block_table[:2])
    with pytest.raises(ValueError, match="block_table must be contiguous"):
        decode(block_table=pages.block_table.repeat(1, 2)[:, ::2])
    with pytest.raises(ValueError, match=r"seq_len_q 2 must be at most seq_len_kv 1$"):
        decode(lengths=(1, 60, 90))


def test_arguments_of_another_rank_are_refused_in_a_sentence():
    inputs = make("decode", 1, 9, 16)
    with pytest.raises(ValueError, match=r"q must be bfloat16 \[batch_size, seq_len_q"):
        kernels.decode(inputs.q[0], inputs.kv, sm_scale=1.0)
    inputs = make("prefill", 4, 9, 2)
    with pytest.raises(ValueError, match=r"q must be bfloat16 \[seq_len_q, num_heads"):
        kernels.prefill(inputs.q[0], inputs.k, inputs.v, sm_scale=1.0)
    with pytest.raises(ValueError, match=r"k must be bfloat16 \[seq_len_kv, num_heads=2"):
        kernels.prefill(inputs.q, inputs.k.sum().bfloat16(), inputs.v, sm_scale=1.0)


def test_more_queries_than_keys_are_refused():
    inputs = make("decode", 2, 9, 16)
    with pytest.raises(ValueError, match=r"seq_len_q 2 must be at most seq_len_kv 1$"):
        kernels.decode(inputs.q, inputs.kv[:, :1], sm_scale=1.0)
    inputs = make("prefill", 4, 9, 2)
    with pytest.raises(ValueError, match=r"seq_len_q 4 must be at most seq_len_kv 3$"):
        kernels.prefill(inputs.q, inputs.k[:3], inputs.v[:3], sm_scale=1.0)


def test_no_queries_give_empty_outputs():
    inputs = make("decode", 1, 9, 16, batch_size=2)
    out, lse = kernels.decode(inputs.q[:, :0], inputs.kv, sm_scale=1.0)
    assert (out.shape, lse.shape) == ((2, 0, 16, 512), (2, 0, 16))
    out, lse = kernels.decode(inputs.q[:0], inputs.kv[:0], sm_scale=1.0)
    assert (out.shape, lse.shape) == ((0, 1, 16, 512), (0, 1, 16))
    inputs = make("prefill", 4, 9, 2)
    out, lse = kernels.prefill(inputs.q[:0], inputs.k, inputs.v, sm_scale=1.0)
    assert (out.shape, lse.shape) == ((0, 2, 128), (0, 2))
