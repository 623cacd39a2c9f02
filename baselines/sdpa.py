"""torch's own attention kernels: cuDNN, flash, memory-efficient on CUDA, flash of the CPU.

torch's `is_causal` is aligned to the first key where a chunk of queries wants it aligned to the
last, and its kernels differ in what they do about it:

`sdpa_cudnn`  prefill. Causal to the first key only: the keys before the chunk are attended without
              a mask, those of the chunk causally, and `merge.py` joins the two; one call where
              there are no keys before.
`sdpa_flash`  prefill. Causal to the last key, but one head width for all: values are padded from
              128 to 192 columns inside the timed call, a third of the value product is wasted.
`sdpa_efficient`
              prefill. Takes both widths and, by its inner operator, the mask to the last key; made
              of instructions older than Hopper's. Its lse has rows up to a multiple of 32.
              Keys of more than 2^31 elements end in wrong rows or an illegal access (torch 2.11).
`sdpa`        both phases on a CPU, one head width too. Prefill pads as `sdpa_flash` and splits as
              `sdpa_cudnn`. In decode all heads are queries of one head whose keys are also its
              values; the last 64 columns of its output are dropped.

The kernels are called by their own operators, not through F.scaled_dot_product_attention: that one
returns no lse and takes another kernel in silence where the one meant cannot run.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_bench.baselines.dense_attention import (
    DenseAttentionShape,
    DenseDecodeInputs,
    DenseInputs,
    DenseOutputs,
    DensePrefillInputs,
)
from dsa_bench.baselines.key_pages import keys_of
from dsa_bench.operator import Implementation, Machine

MIN_CAPABILITY = (8, 0)
"""Compute capability that torch's flash kernel needs, and bf16 in the memory-efficient one."""
CAUSAL_TO_THE_END = 2
"""`custom_mask_type` of the memory-efficient kernel."""

Attend = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
"""(q, k, v of [rows, heads, width], is_causal to the first key, sm_scale) -> out, lse."""


def _batched(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[rows, heads, width] -> [1, heads, rows, width], a view."""
    return tuple(x.transpose(0, 1).unsqueeze(0) for x in tensors)


def _unbatched(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """[1, heads, rows, width] and [1, heads, rows] or [1, heads, rows, 1] -> [rows, heads, …]."""
    return out[0].transpose(0, 1), lse.reshape(out.shape[1:3]).transpose(0, 1)


def _attend_cudnn(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, sm_scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_batched(q, k, v),
        None,
        compute_log_sumexp=True,
        is_causal=is_causal,
        scale=sm_scale,
    )
    return _unbatched(out, lse)


def _attend_cpu(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, sm_scale: float
) -> tuple[Tensor, Tensor]:
    padded = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_batched(q, k, padded), is_causal=is_causal, scale=sm_scale
    )
    return _unbatched(out[..., : v.shape[-1]], lse)


def _prefill_in_two_parts(inputs: DensePrefillInputs, attend: Attend) -> DenseOutputs:
    """Keys before the chunk without a mask, keys of the chunk causally."""
    q, k, v = inputs.q, inputs.k, inputs.v
    before = k.shape[0] - q.shape[0]
    own = attend(q, k[before:], v[before:], True, inputs.sm_scale)
    if before == 0:
        return DenseOutputs(*own)
    from dsa_bench.baselines.merge import merge_by_lse

    earlier = attend(q, k[:before], v[:before], False, inputs.sm_scale)
    return DenseOutputs(*merge_by_lse(*earlier, *own))


@torch.no_grad()
def run_cudnn(inputs: DensePrefillInputs, /) -> DenseOutputs:
    return _prefill_in_two_parts(inputs, _attend_cudnn)


@torch.no_grad()
def run_flash(inputs: DensePrefillInputs, /) -> DenseOutputs:
    """Unlike F.scaled_dot_product_attention, this operator is causal to the last key."""
    q, v = inputs.q, inputs.v
    padded = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *_batched(q, inputs.k, padded), is_causal=True, scale=inputs.sm_scale
    )
    return DenseOutputs(*_unbatched(out[..., : v.shape[-1]], lse))


@torch.no_grad()
def run_efficient(inputs: DensePrefillInputs, /) -> DenseOutputs:
    """`_scaled_dot_product_efficient_attention` can only be causal to the first key."""
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        inputs.q.unsqueeze(0),
        inputs.k.unsqueeze(0),
        inputs.v.unsqueeze(0),
        None,
        None,
        None,
        None,
        None,
        0.0,
        CAUSAL_TO_THE_END,
        compute_log_sumexp=True,
        scale=inputs.sm_scale,
    )
    return DenseOutputs(out[0], lse[0, :, : inputs.q.shape[0]].transpose(0, 1))


@torch.no_grad()
def run_cpu(inputs: DenseInputs, /) -> DenseOutputs:
    if isinstance(inputs, DensePrefillInputs):
        return _prefill_in_two_parts(inputs, _attend_cpu)
    if inputs.pages is None:
        return DenseOutputs(*_decode_cpu(inputs, inputs.q, inputs.kv))
    parts = [
        _decode_cpu(inputs, inputs.q[b : b + 1], keys_of(inputs.kv, inputs.pages, b).unsqueeze(0))
        for b in range(inputs.q.shape[0])
    ]
    return DenseOutputs(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _decode_cpu(inputs: DenseDecodeInputs, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences of one length."""
    batched, width = q.shape[:3], q.shape[3]
    rows, keys = q.reshape(batched[0], 1, -1, width), kv.unsqueeze(1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, keys, keys, attn_mask=_decode_mask(q, kv.shape[1]), scale=inputs.sm_scale
    )
    return out.view(*batched, width)[..., : inputs.head_dim_v], lse.view(batched)


def _decode_mask(q: Tensor, seq_len_kv: int) -> Tensor | None:
    """[seq_len_q · num_heads, seq_len_kv], added to the scores; None for one query: it sees all."""
    seq_len_q, num_heads = q.shape[1:3]
    if seq_len_q == 1:
        return None
    hidden = torch.ones(seq_len_q, seq_len_kv, dtype=torch.bool)
    hidden = hidden.triu_(seq_len_kv - seq_len_q + 1).repeat_interleave(num_heads, 0)
    return torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))


def _supports_cudnn(shape: DenseAttentionShape, machine: Machine) -> str | None:
    before = shape.seq_len_kv - shape.seq_len_q
    if machine.device != "cuda" or not machine.is_hopper:
        return "sdpa_cudnn needs a Hopper GPU for head widths of 192 and 128"
    if not shape.is_prefill:
        return f"sdpa_cudnn takes head widths up to 256, decode has {shape.head_dim_qk}"
    if shape.seq_len_q == 1 or before == 1:
        return (
            "sdpa_cudnn takes no sequences of length 1 (neither the chunk nor the keys before it)"
        )
    return None


def _supports_flash(shape: DenseAttentionShape, machine: Machine) -> str | None:
    if machine.device != "cuda" or (machine.capability or (0, 0)) < MIN_CAPABILITY:
        return "sdpa_flash needs a CUDA GPU of compute capability 8.0 or higher"
    if not shape.is_prefill:
        return f"sdpa_flash takes head widths up to 256, decode has {shape.head_dim_qk}"
    return None


def _supports_efficient(shape: DenseAttentionShape, machine: Machine) -> str | None:
    if machine.device != "cuda" or (machine.capability or (0, 0)) < MIN_CAPABILITY:
        return "sdpa_efficient needs a CUDA GPU of compute capability 8.0 or higher"
    if not shape.is_prefill:
        return (
            "sdpa_efficient gives all keys of 64 rows to one program, which leaves most of a GPU"
            " idle in decode: only its prefill is here"
        )
    if shape.exceeds_int32:
        return (
            "sdpa_efficient counts elements in 32 bits and k has more than 2^31 of them"
            " (take fewer heads or keys)"
        )
    return None


def _supports_cpu(shape: DenseAttentionShape, machine: Machine) -> str | None:
    if machine.device != "cpu":
        return "sdpa runs on the CPU (on CUDA take sdpa_cudnn or sdpa_flash)"
    return None


IMPLEMENTS = "dense_attention"
IMPLEMENTATIONS = (
    Implementation(name="sdpa_cudnn", run=run_cudnn, supports=_supports_cudnn, priority=30),
    Implementation(name="sdpa_flash", run=run_flash, supports=_supports_flash, priority=10),
    Implementation(
        name="sdpa_efficient", run=run_efficient, supports=_supports_efficient, priority=5
    ),
    Implementation(name="sdpa", run=run_cpu, supports=_supports_cpu, priority=10),
)
