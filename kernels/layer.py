"""The sparse attention layer of DeepSeek-V3.2, whole: from the hidden state h_t to the output u_t.

    query, key-value and index branch → lightning indexer → top-k → attention → u

    q^I = W^I_UQ c^Q            64 heads, per head [rope 64 | nope 64]
    k^I = LayerNorm(W^I_K h)    one for all heads; both: RoPE (half-split) → Hadamard → (e4m3)
    I[t, s] = Σ_j w[t, j] · relu(q^I[t, j] · k^I[s]) · 64^-1/2 · 128^-1/2,  w = W_w h in fp32
    S_t = the topk keys s ≤ t of the largest I[t, s]

Attention over S_t runs in the MQA form, or for short prompts in the MHA form under a mask (`form`):
the same function, in which a key costs 3.4 times less, but every key of the prompt is computed.
Where every prompt position sees at most topk keys nothing is selected: that is dense attention.

Every key is read back from the paged caches, as a deployment would, so a prompt gives the same
outputs whole, in chunks, and token by token, up to the rounding of the products.

Source: DeepSeek-V3.2 report, sections 2.1 and 3 (masked MHA for short prompts); its published
inference code, with the rotation of the indexer as corrected in November 2025.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dsa_bench.kernels import cache_read, dsa, index_query, linear, masked_prefill
from dsa_bench.kernels.dsa_inputs import DsaDecodeInputs
from dsa_bench.kernels.indexer import IndexerInputs
from dsa_bench.kernels.latent_attention import GLUE, LatentAttention, LayerOutputs, Tokens
from dsa_bench.kernels.layer_cache import LayerCache
from dsa_bench.kernels.layer_weights import LayerWeights, Matrix
from dsa_bench.kernels.sparse_prefill import SparsePrefillInputs
from dsa_bench.operator import Implementation

FORMS = ("auto", "mqa", "mha")
STAGE_OPERATORS = {
    **GLUE,
    **dsa.STAGE_OPERATORS,
    **{module.OPERATOR.name: module.OPERATOR for module in (index_query, masked_prefill)},
}


def reference_stages() -> dict[str, Implementation]:
    """Every stage in plain torch, on any device."""
    return {
        name: Implementation(name="reference", run=operator.reference)
        for name, operator in STAGE_OPERATORS.items()
    }


class DeepSeekSparseAttention(LatentAttention):
    """DSA under MLA: `prefill` a prompt, whole or in chunks, and `decode` new tokens.

    Args:
        form: of the attention in prefill: `mqa` (sparse), `mha` (masked), or `auto`: `mha` for
            prompts of up to `mha_up_to` tokens, or topk if that is more, and `mqa` beyond.
        mha_up_to: the switch point; `dsa_bench.layers.tune` measures it.
        stages: operator -> implementation; plain torch references where it is None
            (`dsa_bench.layers.load_layer` chooses the fastest on a machine).
        workspace_bytes: of the index logits; longer chunks are taken in parts.
    """

    def __init__(
        self,
        weights: LayerWeights,
        *,
        topk: int = 2048,
        form: str = "auto",
        mha_up_to: int = 0,
        stages: Mapping[str, Implementation] | None = None,
        rope: Tensor | None = None,
        workspace_bytes: int = dsa.WORKSPACE_BYTES,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if weights.index_head_weights is None:
            raise ValueError("these weights have no indexer; a dense layer takes them")
        super().__init__(weights, stages=stages or reference_stages(), rope=rope)
        self.topk, self.form, self.mha_up_to = topk, form, mha_up_to
        self.workspace_bytes = workspace_bytes

    @torch.no_grad()
    def prefill(
        self, hidden: Tensor, cache: LayerCache, *, start: int = 0, sequence: int = 0
    ) -> LayerOutputs:
        """Tokens `start` … of one sequence, whose earlier ones are in the cache.

        Args:
            hidden: [tokens, hidden_size], behind the block's RMSNorm.
        Returns:
            out [tokens, hidden_size]; topk_indices [tokens, topk] int32, -1 = none, or None where
            no selection was needed.
        """
        return self.prefill_tokens(self.chunk(hidden, cache, start, sequence), cache)

    @torch.no_grad()
    def decode(self, hidden: Tensor, cache: LayerCache, seq_lens: Tensor) -> LayerOutputs:
        """The newest tokens of each sequence.

        Args:
            hidden: [batch_size, seq_len_q, hidden_size].
            seq_lens: [batch_size] integers, lengths that count the new tokens in.
        Returns:
            out [batch_size, seq_len_q, hidden_size]; topk_indices [batch_size, seq_len_q, topk].
        """
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
        self,
        tokens: Tokens,
        cache: LayerCache,
        *,
        rows: Tensor | None = None,
        topk_indices: Tensor | None = None,
    ) -> LayerOutputs:
        """Write the keys of all tokens; attend for those in `rows` alone, where it is given.

        `topk_indices` (of these rows): use this selection instead of making one.
        """
        up, tokens, keys = self.prepare_prefill(tokens, cache, rows)
        as_mha = self.uses_mha(tokens.num_keys)
        if topk_indices is None and not (as_mha and tokens.num_keys <= self.topk):
            inputs = self.indexer_inputs(up, keys, tokens, cache)
            topk_indices = dsa.select_prefill(inputs, self.topk, self.workspace_bytes, self.stages)
        attend = self.attend_mha if as_mha else self.attend_mqa
        return LayerOutputs(self.output(attend(up, keys.kv, tokens, topk_indices)), topk_indices)

    def prepare_prefill(
        self, tokens: Tokens, cache: LayerCache, rows: Tensor | None = None
    ) -> tuple[Tensor, Tokens, cache_read.CacheReadOutputs]:
        """Up to the indexer: W_UQ c^Q and W^I_UQ c^Q of the rows, and all keys so far."""
        down, index_k = self.project_down(tokens.hidden)
        self.write(down, index_k, tokens, cache)
        if rows is not None:
            down, tokens = down[rows], tokens.select(rows)
        up = self.project_up(down, tokens.hidden.dtype)
        return up, tokens, self.read(tokens, cache)

    def decode_tokens(
        self, tokens: Tokens, cache: LayerCache, *, topk_indices: Tensor | None = None
    ) -> LayerOutputs:
        inputs = self.prepare_decode(tokens, cache)
        outputs = dsa.run_decode(inputs, self.stages, topk_indices=topk_indices)
        o = self.head_values(outputs.out.flatten(0, 1).to(tokens.hidden.dtype))
        u = self.output(o).unflatten(0, outputs.out.shape[:2])
        return LayerOutputs(u, outputs.topk_indices)

    def uses_mha(self, num_keys: int) -> bool:
        if self.form == "auto":
            return num_keys <= max(self.topk, self.mha_up_to)
        return self.form == "mha"

    def project_down(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """W_DQ, W^I_K and W_DKV in one product; the index keys are a view of it."""
        down = self.project(hidden, self.weights.down, hidden.dtype)
        first = self.preset.q_lora_rank
        return down, down[:, first : first + self.preset.index_dim]

    def index_queries(
        self, up: Tensor, tokens: Tokens, precision: str
    ) -> index_query.IndexQueryOutputs:
        """Index queries and the weights of their heads; W_w h is made in fp32."""
        preset, head_weights = self.preset, self.weights.index_head_weights
        x = up[:, self.num_heads * preset.head_dim_qk_mha :]
        x = x.unflatten(1, (preset.index_heads, preset.index_dim))
        assert head_weights is not None
        matrix = Matrix(head_weights)
        inputs = linear.LinearInputs(tokens.hidden, None, matrix, torch.float32)
        outputs: index_query.IndexQueryOutputs = self.call(
            "index_query",
            index_query.IndexQueryInputs(
                x,
                self.call("linear", inputs).out,
                tokens.positions,
                self.rope_table,
                precision,
                float((preset.index_heads * preset.index_dim) ** -0.5),
            ),
        )
        return outputs

    def read(self, tokens: Tokens, cache: LayerCache) -> cache_read.CacheReadOutputs:
        """All keys of the sequence so far, contiguous."""
        outputs: cache_read.CacheReadOutputs = self.call(
            "cache_read",
            cache_read.CacheReadInputs(
                cache.kv_cache,
                cache.index_cache,
                tokens.block_table[0],
                tokens.num_keys,
                cache.page_size,
            ),
        )
        return outputs

    def indexer_inputs(
        self,
        up: Tensor,
        keys: cache_read.CacheReadOutputs,
        tokens: Tokens,
        cache: LayerCache,
    ) -> IndexerInputs:
        queries = self.index_queries(up, tokens, cache.precision)
        assert keys.index_k is not None
        assert keys.index_k_scale is not None
        return IndexerInputs(
            queries.index_q,
            keys.index_k,
            keys.index_k_scale,
            queries.index_weights,
            tokens.no_start,
            tokens.seq_lens,
        )

    def attend_mqa(
        self, up: Tensor, kv: Tensor, tokens: Tokens, topk_indices: Tensor | None
    ) -> Tensor:
        """[tokens, num_heads, 128] by way of the latents."""
        assert topk_indices is not None
        q = self.latent_queries(up, tokens.positions)
        inputs = SparsePrefillInputs(q, kv, topk_indices, self.preset.sm_scale)
        return self.head_values(self.call("sparse_prefill", inputs).out.to(up.dtype))

    def attend_mha(
        self, up: Tensor, kv: Tensor, tokens: Tokens, topk_indices: Tensor | None
    ) -> Tensor:
        """[tokens, num_heads, 128] with keys and values of each head on their own."""
        q = self.head_queries(up, tokens.positions)
        k = kv.new_empty(kv.shape[0], self.num_heads, self.preset.head_dim_qk_mha)
        v = kv.new_empty(kv.shape[0], self.num_heads, self.preset.head_dim_v_mha)
        self.head_keys(kv, k, v)
        inputs = masked_prefill.MaskedPrefillInputs(q, k, v, topk_indices, self.preset.sm_scale)
        o: Tensor = self.call("masked_prefill", inputs).out.to(up.dtype)
        return o

    def prepare_decode(self, tokens: Tokens, cache: LayerCache) -> DsaDecodeInputs:
        """Up to the indexer: everything that selection and attention need."""
        down, index_k = self.project_down(tokens.hidden)
        self.write(down, index_k, tokens, cache)
        up = self.project_up(down, tokens.hidden.dtype)
        batch = (tokens.block_table.shape[0], -1)
        queries = self.index_queries(up, tokens, cache.precision)
        assert cache.index_cache is not None
        return DsaDecodeInputs(
            index_q=queries.index_q.unflatten(0, batch),
            index_cache=cache.index_cache,
            index_weights=queries.index_weights.unflatten(0, batch),
            seq_lens=tokens.seq_lens.view(batch),
            block_table=tokens.block_table,
            q=self.latent_queries(up, tokens.positions).unflatten(0, batch),
            kv_cache=cache.kv_cache,
            no_start=tokens.no_start,
            sm_scale=self.preset.sm_scale,
            topk=self.topk,
            page_size=cache.page_size,
        )
