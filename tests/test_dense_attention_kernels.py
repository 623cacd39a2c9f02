"""Dense attention: our portable kernels on a GPU."""

import pytest

from dsa_bench.baselines.dense_attention import DenseAttentionShape
from tests import hostile

MUTATIONS = {"plain": hostile.plain, "loud": hostile.loud(40), "loudest": hostile.loud(112)}


def prefill_shape(seq_len_q, seq_len_kv, num_heads):
    return DenseAttentionShape(
        phase="prefill", seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, num_heads=num_heads,
        head_dim_qk=192, head_dim_v=128,
    )  # fmt: skip


def decode_shape(batch_size, seq_len_q, seq_len_kv, num_heads, lengths="equal"):
    return DenseAttentionShape(
        phase="decode", batch_size=batch_size, seq_len_q=seq_len_q, seq_len_kv=seq_len_kv,
        num_heads=num_heads, head_dim_qk=576, head_dim_v=512, lengths=lengths,
    )  # fmt: skip


SHAPES = {
    "prefill-1": prefill_shape(1, 1, 1),
    "prefill": prefill_shape(130, 333, 3),
    "prefill-16-heads": prefill_shape(1024, 4096, 16),
    "decode-1": decode_shape(1, 1, 1, 16),
    "decode-split": decode_shape(2, 1, 3000, 70),
    "decode-whole": decode_shape(132, 2, 300, 64),
    "decode-ragged": decode_shape(5, 2, 700, 40, lengths="spread"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_triton_on_a_gpu(shape, mutation):
    hostile.assert_implementation("dense_attention", "triton", shape, MUTATIONS[mutation])
