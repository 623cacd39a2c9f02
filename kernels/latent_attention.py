"""What the sparse and the dense layer share: from h_t to latents and queries, from heads to u_t.

    c^Q = RMSNorm(W_DQ h)            q = W_UQ c^Q                  per head [nope 128 | rope 64]
    c^KV = RMSNorm((W_DKV h)[:512])  k^R = RoPE((W_DKV h)[512:])   cached; one for all heads
    u = W_O [o_1; …; o_H]

Two forms of the same attention:
    MQA (absorbed)  Q_i = [W_UK,iᵀ q^C_i ; q^R_i], 576 wide, over the latents; o_i = W_UV,i o^lat_i
    MHA             k_i = [W_UK,i c ; k^R], 192 wide, v_i = W_UV,i c, 128 wide

Precision follows the tensors: bf16 weights give bf16 products; e4m3 weights with a scale of each
128 x 128 block take activations in e4m3 with a scale of each 128; fp32 rounds nothing. The softmax
scale is that of 192 columns with YaRN's mscale in both forms. Positions beyond the rotation's table
are refused. A sum over the ranks of a tensor-parallel group is the caller's.

Source: DeepSeek-V3.2 report, section 2.1 and appendix A; its published inference code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from dsa_bench.kernels import (
    cache_read,
    cache_write,
    head_linear,
    linear,
    quantize,
    query_rope,
    rms_norm,
    sparse_prefill,
)
from dsa_bench.kernels.layer_cache import LayerCache
from dsa_bench.kernels.layer_weights import LayerWeights, Matrix
from dsa_bench.kernels.paging import HEAD_DIM_QK, HEAD_DIM_V
from dsa_bench.kernels.rope import rope_table
from dsa_bench.operator import Implementation

MAX_POSITIONS = 163840
"""Of the published model."""
GLUE = {
    module.OPERATOR.name: module.OPERATOR
    for module in (linear, head_linear, quantize, rms_norm, query_rope, cache_write, cache_read)
}
"""Operators of the layer that are no attention."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one sequence (prefill) or of several (decode), and where they belong."""

    hidden: Tensor
    """[tokens, hidden_size]; behind the block's RMSNorm."""
    positions: Tensor
    """[tokens] int32."""
    slots: Tensor
    """[tokens] int32, rows of the caches; -1: not written."""
    seq_lens: Tensor
    """[tokens] int32: position + 1, the keys that each sees."""
    no_start: Tensor
    """[tokens] int32 zeros: where the keys of each begin."""
    block_table: Tensor
    """[sequences, max_pages] int32; the tokens belong to them in order, equally many to each."""
    num_keys: int
    """Of the longest of the sequences, the new ones included."""
    sequence: int = 0
    """The first of the sequences, by its row of the caches' block table."""

    def select(self, rows: Tensor) -> Self:
        """The tokens in `rows`, of one sequence."""
        return replace(
            self,
            hidden=self.hidden[rows],
            positions=self.positions[rows],
            slots=self.slots[rows],
            seq_lens=self.seq_lens[rows],
            no_start=self.no_start[rows],
        )


class LayerOutputs(NamedTuple):
    out: Tensor
    """[tokens, hidden_size], or [batch_size, seq_len_q, hidden_size]."""
    topk_indices: Tensor | None
    """[tokens, topk] int32 positions; None where every key was attended to."""


class LatentAttention(nn.Module):
    """Projections, rotation and cache of a layer of multi-head latent attention, inference alone.

    Args:
        weights: of the whole layer, or of one rank's heads.
        stages: operator -> implementation of each that the layer calls.
        rope: the table of rotations, if there is one already (`rope.rope_table`).
    """

    rope_table: Tensor

    def __init__(
        self,
        weights: LayerWeights,
        *,
        stages: Mapping[str, Implementation],
        rope: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weights, self.stages = weights, stages
        self.preset, self.num_heads = weights.preset, weights.num_heads
        if rope is None:
            rope = rope_table(weights.preset, MAX_POSITIONS, weights.q_norm.device)
        self.register_buffer("rope_table", rope, persistent=False)

    def call(self, stage: str, inputs: Any) -> Any:
        """Run a stage, marked for the profiler."""
        with record_function(f"stage:{stage}"):
            return self.stages[stage].run(inputs)

    @property
    def is_quantized(self) -> bool:
        return self.weights.down.scale is not None

    def chunk(self, hidden: Tensor, cache: LayerCache, start: int, sequence: int) -> Tokens:
        """Tokens `start` … of one sequence."""
        end = start + hidden.shape[0]
        self._expect_room(end, cache)
        positions = torch.arange(start, end, dtype=torch.int32, device=hidden.device)
        owner = torch.full_like(positions, sequence)
        table = cache.block_table[sequence : sequence + 1]
        slots = cache.slots(owner, positions)
        return make_tokens(hidden, positions, slots, table, end, sequence)

    def batch(self, hidden: Tensor, cache: LayerCache, seq_lens: Tensor) -> Tokens:
        """The last tokens of each sequence; `seq_lens` [batch_size] counts them in."""
        batch_size, seq_len_q, _ = hidden.shape
        longest = int(seq_lens.max())
        self._expect_room(longest, cache)
        if int(seq_lens.min()) < seq_len_q:
            raise ValueError(f"seq_lens must count the {seq_len_q} new tokens in, got {seq_lens}")
        back = torch.arange(seq_len_q - 1, -1, -1, device=hidden.device)
        positions = (seq_lens[:, None] - 1 - back).flatten().to(torch.int32)
        owner = torch.arange(batch_size, device=hidden.device).repeat_interleave(seq_len_q)
        slots = cache.slots(owner, positions)
        return make_tokens(hidden.flatten(0, 1), positions, slots, cache.block_table, longest)

    def _expect_room(self, end: int, cache: LayerCache) -> None:
        room = min(cache.max_tokens, self.rope_table.shape[0])
        if end > room:
            raise ValueError(f"position {end - 1} is beyond the {room} there is room for")

    def project(self, x: Tensor, weight: Matrix, dtype: torch.dtype) -> Tensor:
        """x · weightᵀ in `dtype`; activations are quantised where the weights are."""
        scale = None
        if weight.scale is not None:
            x, scale = self.call("quantize", quantize.QuantizeInputs(x))
        return self.product(x, scale, weight, dtype)

    def product(
        self, x: Tensor, scale: Tensor | None, weight: Matrix, dtype: torch.dtype
    ) -> Tensor:
        out: Tensor = self.call("linear", linear.LinearInputs(x, scale, weight, dtype)).out
        return out

    def project_up(self, down: Tensor, dtype: torch.dtype) -> Tensor:
        """c^Q, normalised, then W_UQ c^Q, and in a sparse layer W^I_UQ c^Q behind it."""
        x, weights = down[:, : self.preset.q_lora_rank], self.weights
        inputs = rms_norm.RmsNormInputs(x, weights.q_norm, self.preset.norm_eps, self.is_quantized)
        latents = self.call("rms_norm", inputs)
        return self.product(latents.out, latents.scale, weights.up, dtype)

    def write(
        self, down: Tensor, index_k: Tensor | None, tokens: Tokens, cache: LayerCache
    ) -> None:
        """Latents, rotated keys and index keys of the tokens into their slots."""
        kv = down[:, -HEAD_DIM_QK:]
        weights = self.weights
        self.call(
            "cache_write",
            cache_write.CacheWriteInputs(
                kv,
                weights.kv_norm,
                index_k,
                weights.index_k_norm_weight,
                weights.index_k_norm_bias,
                self.preset.norm_eps,
                tokens.positions,
                self.rope_table,
                tokens.slots,
                cache.kv_cache,
                cache.index_cache if index_k is not None else None,
                cache.page_size,
            ),
        )

    def heads(self, up: Tensor) -> Tensor:
        """[tokens, num_heads, 192] of the product with W_UQ."""
        width = self.preset.head_dim_qk_mha
        return up[:, : self.num_heads * width].view(up.shape[0], self.num_heads, width)

    def latent_queries(self, up: Tensor, positions: Tensor) -> Tensor:
        """MQA form: Q = [q^C · W_UK | RoPE(q^R)], [tokens, num_heads, 576]."""
        q = self.heads(up)
        out = q.new_empty(*q.shape[:2], HEAD_DIM_QK)
        nope = self.preset.head_dim_nope
        self.per_head(q[..., :nope], self.weights.w_uk, out[..., :HEAD_DIM_V])
        self.rotate(q[..., nope:], positions, out[..., HEAD_DIM_V:])
        return out

    def head_queries(self, up: Tensor, positions: Tensor) -> Tensor:
        """MHA form: [q^C | RoPE(q^R)], [tokens, num_heads, 192], rotated in place."""
        q = self.heads(up)
        rope = q[..., self.preset.head_dim_nope :]
        self.rotate(rope, positions, rope)
        return q

    def rotate(self, x: Tensor, positions: Tensor, out: Tensor) -> None:
        self.call("query_rope", query_rope.QueryRopeInputs(x, positions, self.rope_table, out))

    def per_head(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """x [tokens, num_heads, in] · weight [num_heads, in, out]."""
        made: Tensor = self.call("head_linear", head_linear.HeadLinearInputs(x, weight, out)).out
        return made

    def head_keys(self, kv: Tensor, k: Tensor, v: Tensor) -> None:
        """MHA form: fill k [keys, num_heads, 192] and v [keys, num_heads, 128] from the latents."""
        latents = kv[:, None, :HEAD_DIM_V].expand(-1, self.num_heads, -1)
        nope = self.preset.head_dim_nope
        self.per_head(latents, self.weights.w_uk.mT, k[..., :nope])
        self.per_head(latents, self.weights.w_uv.mT, v)
        with record_function("stage:head_linear"):
            k[..., nope:] = kv[:, None, HEAD_DIM_V:]

    def head_values(self, latent_out: Tensor) -> Tensor:
        """MQA form: o_i = W_UV,i o^lat_i, [tokens, num_heads, 128]."""
        return self.per_head(latent_out, self.weights.w_uv.mT)

    def attend_everywhere(self, up: Tensor, kv: Tensor, tokens: Tokens) -> Tensor:
        """Dense attention of a few tokens over every key that each sees: a reference, MQA form."""
        places = torch.arange(tokens.num_keys, dtype=torch.int32, device=kv.device)
        every = places.where(places < tokens.seq_lens[:, None], -1)
        q = self.latent_queries(up, tokens.positions)
        inputs = sparse_prefill.SparsePrefillInputs(q, kv, every, self.preset.sm_scale)
        return self.head_values(sparse_prefill.reference(inputs).out.to(up.dtype))

    def output(self, o: Tensor) -> Tensor:
        """u = W_O [o_1; …; o_H]; of one rank's heads its share of the sum."""
        return self.project(o.flatten(1), self.weights.out, o.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the weights too; their precision is chosen when they are made."""
        self.weights = self.weights.map(lambda tensor: _moved(fn, tensor))
        super()._apply(lambda tensor: _moved(fn, tensor), recurse)
        return self


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    return tensor.to(fn(tensor).device)


def make_tokens(
    hidden: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor,
    num_keys: int,
    sequence: int = 0,
) -> Tokens:
    """Tokens that each see their sequence up to their own position."""
    return Tokens(
        hidden,
        positions,
        slots,
        positions + 1,
        torch.zeros_like(positions),
        block_table,
        num_keys,
        sequence,
    )
