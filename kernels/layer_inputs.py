"""Shape and inputs of a whole layer: weights, new tokens, and caches that hold the context.

Indexer and main attention look for the same keys, as training makes them: a token has a content
vector z as a key and y as a query (`content.py`), its hidden state holds both, and the weights take
them out again (`layer_weights.make_weights`). For tokens of the context, of which only the keys
matter, the product W h is made from z directly: the hidden states of 32 sequences of 128K tokens
would be 60 GB.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsa_bench.kernels import cache_write, dsa
from dsa_bench.kernels.content import make_content
from dsa_bench.kernels.latent_attention import Tokens, make_tokens
from dsa_bench.kernels.layer_cache import LayerCache
from dsa_bench.kernels.layer_checkpoint import load_weights
from dsa_bench.kernels.layer_weights import (
    LayerWeights,
    Matrix,
    embedding,
    make_hidden,
    make_weights,
)
from dsa_bench.kernels.paging import make_block_table
from dsa_bench.kernels.rope import rope_table
from dsa_bench.operator import Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import INPUT_KINDS, split_weights

SUFFIX = ".safetensors"
CONTENT_WIDTH = 64
CONTEXT_NOISE = 0.05
CONTEXT_CHUNK = 65536
"""Tokens of the context that are made at once: 180 MB in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """Prefill: a chunk of seq_len_q tokens that ends at seq_len_kv; decode: the last seq_len_q
    tokens of batch_size sequences of seq_len_kv.
    """

    phase: str
    seq_len_kv: int
    seq_len_q: int
    topk: int = 2048
    precision: str = "bf16"
    batch_size: int = 1
    num_heads: int = 128
    """Of the whole model."""
    tensor_parallel: int = 1
    """Ranks that share the heads; one of them is computed."""
    inputs: str = "random"
    weights: str = ""
    preset: Preset
    workspace_bytes: int = dsa.WORKSPACE_BYTES

    def __post_init__(self) -> None:
        if not 0 < self.seq_len_q <= self.seq_len_kv:
            raise Unsupported(
                f"seq_len_q {self.seq_len_q} must be 1 … seq_len_kv {self.seq_len_kv}"
                " (the new tokens end at L)"
            )
        if self.inputs not in INPUT_KINDS and not self.inputs.endswith(SUFFIX):
            known = ", ".join((*INPUT_KINDS, f"FILE{SUFFIX}"))
            raise Unsupported(f"unknown inputs {self.inputs!r} of a layer; known: {known}")
        if self.num_heads % self.tensor_parallel:
            raise Unsupported(
                f"{self.num_heads} heads do not divide among {self.tensor_parallel} ranks (--tp)"
            )
        if self.is_prefill and self.batch_size != 1:
            raise Unsupported(
                f"prefill takes one prompt at a time, batch_size must be 1, got {self.batch_size}"
            )

    @property
    def is_prefill(self) -> bool:
        return self.phase == "prefill"

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.seq_len_q

    @property
    def start(self) -> int:
        """Tokens of each sequence that came before."""
        return self.seq_len_kv - self.seq_len_q

    @property
    def rank_heads(self) -> int:
        return self.num_heads // self.tensor_parallel


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What one call works on; the new tokens' keys are written into the caches in place."""

    weights: LayerWeights
    rope_table: Tensor
    tokens: Tokens
    cache: LayerCache
    topk: int
    workspace_bytes: int
    phase: str

    def select(self, rows: Tensor) -> "LayerInputs":
        """Decode: the same caches, only the sequences in `rows`."""
        tokens = self.tokens
        batch_size = tokens.block_table.shape[0]
        every = torch.arange(tokens.positions.shape[0], device=rows.device)
        part = tokens.select(every.view(batch_size, -1)[rows].flatten())
        return replace(self, tokens=replace(part, block_table=tokens.block_table[rows]))


def make_layer_weights(shape: LayerShape, *, seed: int, device: torch.device | str) -> LayerWeights:
    """Of the first rank: from the file that the case names, or made up."""
    if shape.weights:
        path, layer = split_weights(shape.weights)
        return load_weights(
            path,
            shape.preset,
            layer=layer,
            precision=shape.precision,
            device=device,
            rank=0,
            num_ranks=shape.tensor_parallel,
        )
    return make_weights(
        shape.preset,
        num_heads=shape.rank_heads,
        precision=shape.precision,
        seed=seed,
        device=device,
    )


def make_inputs(
    shape: LayerShape, *, seed: int, device: torch.device | str, cache: LayerCache | None = None
) -> LayerInputs:
    """Weights, context and new tokens; `cache` None: paged caches, pages randomly permuted."""
    g = torch.Generator(device=device).manual_seed(seed)
    weights = make_layer_weights(shape, seed=seed, device=device)
    rope = rope_table(shape.preset, shape.seq_len_kv, device)
    if cache is None:
        cache = permuted_cache(shape, g)
    make = captured_prompt if shape.inputs.endswith(SUFFIX) else made_up_prompt
    hidden = []
    for sequence in range(shape.batch_size):
        context, new = make(shape, weights, seed, g)
        write_context(context, sequence, weights, rope, cache)
        hidden.append(new)
    tokens = place_tokens(torch.cat(hidden), shape, cache)
    return LayerInputs(weights, rope, tokens, cache, shape.topk, shape.workspace_bytes, shape.phase)


Context = Iterator[Tensor]
"""Chunks of [tokens, index_dim + 576] bf16, in order: W^I_K h and W_DKV h."""


def made_up_prompt(
    shape: LayerShape, weights: LayerWeights, seed: int, g: torch.Generator
) -> tuple[Context, Tensor]:
    """Context, and the hidden states of the new tokens, from content vectors."""
    z, y = make_content(
        shape.inputs,
        num_keys=shape.seq_len_kv,
        num_queries=shape.seq_len_q,
        width=CONTENT_WIDTH,
        generator=g,
    )
    noise_seed = int(torch.randint(2**31, (), generator=g, device=g.device))
    new = make_hidden(z[shape.start :], y, shape.preset, seed=seed, noise_seed=noise_seed)
    axes = embedding(shape.preset, seed, g.device).key
    down = key_rows(weights).dequantize(torch.float32) @ axes.float()

    def context() -> Context:
        for part in z[: shape.start].split(CONTEXT_CHUNK):
            rows = part @ down.T
            noise = torch.randn(rows.shape, generator=g, device=rows.device)
            yield (rows + CONTEXT_NOISE * noise).bfloat16()

    return context(), new


def captured_prompt(
    shape: LayerShape, weights: LayerWeights, seed: int, g: torch.Generator
) -> tuple[Context, Tensor]:
    """The tensor `hidden_states` [tokens, hidden_size] of a file, its first seq_len_kv tokens."""
    from safetensors import safe_open

    length, width = shape.seq_len_kv, shape.preset.hidden_size
    with safe_open(shape.inputs, framework="pt", device=str(g.device)) as file:
        if "hidden_states" not in file.keys():  # noqa: SIM118 - the file is no mapping
            raise Unsupported(f"{shape.inputs} has no tensor hidden_states [tokens, {width}]")
        size = tuple(file.get_slice("hidden_states").get_shape())
        if len(size) != 2 or size[0] < length or size[1] != width:
            raise Unsupported(
                f"hidden_states of {shape.inputs} must be [{length} or more, {width}], got {size}"
            )
        hidden = file.get_slice("hidden_states")[:length].bfloat16()
    down = key_rows(weights).dequantize(torch.bfloat16)
    context = (part @ down.T for part in hidden[: shape.start].split(CONTEXT_CHUNK))
    return context, hidden[shape.start :].contiguous()


def key_rows(weights: LayerWeights) -> Matrix:
    """W^I_K and W_DKV."""
    return weights.down.slice_rows(weights.preset.q_lora_rank, weights.down.out_features)


def permuted_cache(shape: LayerShape, g: torch.Generator) -> LayerCache:
    cache = LayerCache.allocate(
        shape.preset, shape.batch_size, shape.seq_len_kv, shape.precision, g.device
    )
    table = make_block_table(shape.batch_size, cache.block_table.shape[1], g)
    return replace(cache, block_table=table)


def place_tokens(hidden: Tensor, shape: LayerShape, cache: LayerCache) -> Tokens:
    """The new tokens of every sequence, at the end of its context."""
    device = hidden.device
    positions = torch.arange(shape.start, shape.seq_len_kv, dtype=torch.int32, device=device)
    positions = positions.repeat(shape.batch_size)
    owner = torch.arange(shape.batch_size, device=device).repeat_interleave(shape.seq_len_q)
    slots = cache.slots(owner, positions)
    return make_tokens(hidden, positions, slots, cache.block_table, shape.seq_len_kv)


def write_context(
    context: Context, sequence: int, weights: LayerWeights, rope: Tensor, cache: LayerCache
) -> None:
    """Keys of the tokens 0 … of one sequence."""
    begin, dim = 0, weights.preset.index_dim
    for rows in context:
        end = begin + rows.shape[0]
        positions = torch.arange(begin, end, dtype=torch.int32, device=rows.device)
        begin = end
        cache_write.reference(
            cache_write.CacheWriteInputs(
                rows[:, dim:],
                weights.kv_norm,
                rows[:, :dim] if cache.index_cache is not None else None,
                weights.index_k_norm_weight,
                weights.index_k_norm_bias,
                weights.preset.norm_eps,
                positions,
                rope,
                cache.slots(torch.full_like(positions, sequence), positions),
                cache.kv_cache,
                cache.index_cache,
                cache.page_size,
            )
        )
