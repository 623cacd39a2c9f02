"""The dense layer of DeepSeek-V3.1, from h_t to u_t: the opponent of the sparse layer.

The same weights without the indexer; attention to every earlier key, in the form that costs least:
MHA (192/128) in prefill, MQA (576/512, absorbed) in decode, as V3.1 was deployed.

    prefill  keys and values of each head are made of the latents once, when their chunk comes, and
             kept beside the cache until the prompt ends (84 kB a token and layer): chunks then cost
             no more than the whole prompt would
    decode   over the latents as they lie, [batch_size, seq_len, 576]

The cache is bf16 at every precision: no dense kernel here reads fp8 latents. `fp8` is that of the
projections. Source: DeepSeek-V3.2 report, appendix A.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_bench.baselines import dense_attention
from dsa_bench.kernels.latent_attention import GLUE, LatentAttention, LayerOutputs, Tokens
from dsa_bench.kernels.layer_cache import CACHE_DTYPES, LayerCache
from dsa_bench.kernels.layer_weights import LayerWeights
from dsa_bench.kernels.paging import HEAD_DIM_QK
from dsa_bench.operator import Implementation
from dsa_bench.preset import Preset

STAGE_OPERATORS = {
    **{name: operator for name, operator in GLUE.items() if name != "cache_read"},
    "dense_attention": dense_attention.OPERATOR,
}


def reference_stages() -> dict[str, Implementation]:
    """Every stage in plain torch, on any device."""
    return {
        name: Implementation(name="reference", run=operator.reference)
        for name, operator in STAGE_OPERATORS.items()
    }


@dataclass(frozen=True, slots=True)
class HeadKeys:
    """Keys and values of each head of one prompt, for its later chunks."""

    k: Tensor
    """[max_tokens, num_heads, 192]."""
    v: Tensor
    """[max_tokens, num_heads, 128]."""

    @classmethod
    def allocate(
        cls,
        preset: Preset,
        num_heads: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "HeadKeys":
        widths = (preset.head_dim_qk_mha, preset.head_dim_v_mha)
        return cls(
            *(torch.empty(max_tokens, num_heads, n, dtype=dtype, device=device) for n in widths)
        )


def dense_cache(
    batch_size: int, max_tokens: int, precision: str, device: torch.device | str
) -> LayerCache:
    """A page as long as a sequence: latents lie contiguous, as dense kernels want them."""
    kv_cache = torch.zeros(
        batch_size, max_tokens, HEAD_DIM_QK, dtype=CACHE_DTYPES[precision], device=device
    )
    table = torch.arange(batch_size, dtype=torch.int32, device=device)[:, None]
    return LayerCache(kv_cache, None, table, max_tokens)


class DenseLatentAttention(LatentAttention):
    """`prefill` a prompt, whole or in chunks, and `decode` new tokens.

    Sequences of one decode batch have one length: dense kernels for the MQA form take no other.
    `stages`: operator -> implementation; plain torch references where it is None.
    """

    def __init__(
        self,
        weights: LayerWeights,
        *,
        stages: Mapping[str, Implementation] | None = None,
        rope: Tensor | None = None,
    ) -> None:
        own = weights.without_index() if weights.index_head_weights is not None else weights
        super().__init__(own, stages=stages or reference_stages(), rope=rope)

    @torch.no_grad()
    def prefill(
        self,
        hidden: Tensor,
        cache: LayerCache,
        *,
        start: int = 0,
        sequence: int = 0,
        head_keys: HeadKeys | None = None,
    ) -> LayerOutputs:
        """Tokens `start` … of one sequence, whose earlier ones are in the cache.

        Args:
            hidden: [tokens, hidden_size], behind the block's RMSNorm.
            cache: of `dense_cache`.
            head_keys: holds keys and values up to `start` and takes those of the new tokens; all
                are made anew where it is None.
        """
        tokens = self.chunk(hidden, cache, start, sequence)
        first = start
        if head_keys is None:
            first = 0
            head_keys = HeadKeys.allocate(
                self.preset, self.num_heads, tokens.num_keys, hidden.dtype, hidden.device
            )
        return self.prefill_tokens(tokens, cache, head_keys, first)

    @torch.no_grad()
    def decode(self, hidden: Tensor, cache: LayerCache, seq_lens: Tensor) -> LayerOutputs:
        """The newest tokens of each sequence.

        Args:
            hidden: [batch_size, seq_len_q, hidden_size].
            seq_lens: [batch_size] integers that count the new tokens in, all equal.
        """
        if int(seq_lens.min()) != int(seq_lens.max()):
            raise ValueError("dense decode takes sequences of one length; decode them one by one")
        return self.decode_tokens(self.batch(hidden, cache, seq_lens), cache)

    def forward(
        self,
        hidden: Tensor,
        cache: LayerCache,
        *,
        start: int = 0,
        seq_lens: Tensor | None = None,
    ) -> LayerOutputs:
        """`decode` where `seq_lens` is given, else `prefill` of the first sequence."""
        if seq_lens is None:
            return self.prefill(hidden, cache, start=start)
        return self.decode(hidden, cache, seq_lens)

    def prefill_tokens(
        self, tokens: Tokens, cache: LayerCache, head_keys: HeadKeys, first: int
    ) -> LayerOutputs:
        """Make keys and values of the positions `first` … and attend."""
        up = self.queries_up(tokens, cache)
        kv = cache.kv_cache[tokens.sequence, : tokens.num_keys]
        k, v = head_keys.k[: tokens.num_keys], head_keys.v[: tokens.num_keys]
        self.head_keys(kv[first:], k[first:], v[first:])
        q = self.head_queries(up, tokens.positions)
        inputs = dense_attention.DensePrefillInputs(q, k, v, self.preset.sm_scale)
        o = self.call("dense_attention", inputs).out.to(up.dtype)
        return LayerOutputs(self.output(o), None)

    def decode_tokens(self, tokens: Tokens, cache: LayerCache) -> LayerOutputs:
        up = self.queries_up(tokens, cache)
        batch = (tokens.block_table.shape[0], -1)
        q = self.latent_queries(up, tokens.positions).unflatten(0, batch)
        kv = cache.kv_cache[:, : tokens.num_keys]
        inputs = dense_attention.DenseDecodeInputs(q, kv, self.preset.sm_scale)
        o = self.call("dense_attention", inputs).out.to(up.dtype)
        u = self.output(self.head_values(o.flatten(0, 1)))
        return LayerOutputs(u.unflatten(0, batch), None)

    def queries_up(self, tokens: Tokens, cache: LayerCache) -> Tensor:
        """Write the latents of the tokens; return the product of their c^Q with W_UQ."""
        down = self.project(tokens.hidden, self.weights.down, tokens.hidden.dtype)
        self.write(down, None, tokens, cache)
        return self.project_up(down, tokens.hidden.dtype)
