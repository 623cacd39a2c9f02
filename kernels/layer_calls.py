"""Which operators a layer calls with which shapes: for its cost, its memory and `supports`."""

from typing import Any

from dsa_bench.kernels import (
    cache_read,
    cache_write,
    head_linear,
    index_query,
    linear,
    masked_prefill,
    quantize,
    query_rope,
    rms_norm,
)
from dsa_bench.kernels.dsa import DsaShape
from dsa_bench.kernels.layer_inputs import LayerShape
from dsa_bench.kernels.paging import HEAD_DIM_QK, INDEX_DIM, index_row_bytes, mla_row_bytes
from dsa_bench.operator import Memory
from dsa_bench.preset import Preset

Calls = dict[str, tuple[Any, ...]]


def core_shape(shape: LayerShape) -> DsaShape:
    """Selection and sparse attention of this layer, as the operator `dsa` has them."""
    return DsaShape(
        phase=shape.phase,
        seq_len_kv=shape.seq_len_kv,
        seq_len_q=shape.seq_len_q,
        topk=shape.topk,
        precision=shape.precision,
        batch_size=shape.batch_size,
        num_heads=shape.rank_heads,
        preset=shape.preset,
        workspace_bytes=shape.workspace_bytes,
    )


def product_widths(shape: LayerShape, *, with_index: bool) -> list[tuple[int, int]]:
    """(in_features, out_features) of the products with W_DQ | W_DKV, W_UQ and W_O."""
    preset = shape.preset
    down = preset.q_lora_rank + HEAD_DIM_QK + (preset.index_dim if with_index else 0)
    up = shape.rank_heads * preset.head_dim_qk_mha
    if with_index:
        up += preset.index_heads * preset.index_dim
    return [
        (preset.hidden_size, down),
        (preset.q_lora_rank, up),
        (shape.rank_heads * preset.head_dim_v_mha, preset.hidden_size),
    ]


def glue_calls(shape: LayerShape, *, with_index: bool) -> Calls:
    """Products, norms, rotations and the cache, up to the queries and behind the heads."""
    preset, rows, heads = shape.preset, shape.num_tokens, shape.rank_heads
    widths = product_widths(shape, with_index=with_index)
    is_fp8 = shape.precision == "fp8"
    products = [
        linear.LinearShape(num_rows=rows, in_features=n, out_features=m, precision=shape.precision)
        for n, m in widths
    ]
    if with_index:
        products.append(
            linear.LinearShape(
                num_rows=rows, in_features=preset.hidden_size, out_features=preset.index_heads
            )
        )
    quantized = [quantize.QuantizeShape(num_rows=rows, width=widths[i][0]) for i in (0, 2)]
    return {
        "linear": tuple(products),
        "quantize": tuple(quantized) if is_fp8 else (),
        "rms_norm": (
            rms_norm.RmsNormShape(num_rows=rows, width=preset.q_lora_rank, quantized=is_fp8),
        ),
        "cache_write": (
            cache_write.CacheWriteShape(
                batch_size=shape.batch_size,
                seq_len_kv=shape.seq_len_kv,
                seq_len_q=shape.seq_len_q,
                page_size=preset.page_size,
                precision=shape.precision if with_index else "bf16",
                with_index=with_index,
            ),
        ),
        "query_rope": (
            query_rope.QueryRopeShape(
                num_rows=rows, num_heads=heads, num_positions=shape.seq_len_q
            ),
        ),
    }


def index_query_calls(shape: LayerShape) -> Calls:
    call = index_query.IndexQueryShape(
        num_rows=shape.num_tokens,
        index_heads=shape.preset.index_heads,
        precision=shape.precision,
        num_positions=shape.seq_len_q,
    )
    return {"index_query": (call,)}


def head_product(num_rows: int, shape: LayerShape, in_features: int, out_features: int) -> Any:
    return head_linear.HeadLinearShape(
        num_rows=num_rows,
        num_heads=shape.rank_heads,
        in_features=in_features,
        out_features=out_features,
    )


def absorbed_calls(shape: LayerShape) -> Calls:
    """W_UK into the queries, W_UV out of the latents."""
    preset, rows = shape.preset, shape.num_tokens
    return {
        "head_linear": (
            head_product(rows, shape, preset.head_dim_nope, preset.head_dim_v),
            head_product(rows, shape, preset.head_dim_v, preset.head_dim_v_mha),
        )
    }


def head_key_calls(shape: LayerShape, num_keys: int) -> Calls:
    """Keys and values of each head from the latents."""
    preset = shape.preset
    return {
        "head_linear": (
            head_product(num_keys, shape, preset.head_dim_v, preset.head_dim_nope),
            head_product(num_keys, shape, preset.head_dim_v, preset.head_dim_v_mha),
        )
    }


def read_calls(shape: LayerShape) -> Calls:
    call = cache_read.CacheReadShape(
        num_tokens=shape.seq_len_kv,
        page_size=shape.preset.page_size,
        precision=shape.precision,
    )
    return {"cache_read": (call,)}


def sparse_calls(shape: LayerShape) -> Calls:
    """The sparse layer, MQA form."""
    core = {name: (part,) for name, part in core_shape(shape).stage_shapes().items()}
    glue = glue_calls(shape, with_index=True) | index_query_calls(shape) | absorbed_calls(shape)
    return glue | (read_calls(shape) if shape.is_prefill else {}) | core


def masked_calls(shape: LayerShape) -> Calls:
    """The sparse layer in prefill, MHA form; nothing is selected where all keys fit into topk."""
    everything = shape.seq_len_kv <= shape.topk
    core: Calls = {"indexer": (), "topk": (), "index_query": ()}
    if not everything:
        stages = core_shape(shape).stage_shapes()
        core = {name: (stages[name],) for name in ("indexer", "topk")} | index_query_calls(shape)
    attention = masked_prefill.MaskedPrefillShape(
        seq_len_q=shape.seq_len_q,
        seq_len_kv=shape.seq_len_kv,
        topk=None if everything else shape.topk,
        num_heads=shape.rank_heads,
        head_dim_qk=shape.preset.head_dim_qk_mha,
        head_dim_v=shape.preset.head_dim_v_mha,
        sm_scale=shape.preset.sm_scale,
    )
    glue = glue_calls(shape, with_index=True) | head_key_calls(shape, shape.seq_len_kv)
    return glue | read_calls(shape) | core | {"masked_prefill": (attention,)}


def weight_bytes(shape: LayerShape, *, with_index: bool) -> int:
    preset, heads = shape.preset, shape.rank_heads
    size = 1 if shape.precision == "fp8" else 2
    blocks = sum(n * m for n, m in product_widths(shape, with_index=with_index))
    head_products = heads * preset.head_dim_v * (preset.head_dim_nope + preset.head_dim_v_mha)
    index = preset.index_heads * preset.hidden_size if with_index else 0
    return blocks * size + 2 * (head_products + index)


def held_bytes(shape: LayerShape, *, with_index: bool) -> Memory:
    """Weights, tokens, rotation and caches; outputs; what lies between them in the MQA form."""
    preset, rows, heads = shape.preset, shape.num_tokens, shape.rank_heads
    keys = shape.batch_size * shape.seq_len_kv
    precision = shape.precision if with_index else "bf16"
    cached = mla_row_bytes(precision) + (index_row_bytes(precision) if with_index else 0)
    hidden = 2 * rows * preset.hidden_size
    (_, down), (_, up), (joined, _) = product_widths(shape, with_index=with_index)
    queries = heads * (HEAD_DIM_QK + preset.head_dim_v)
    return Memory(
        input_bytes=weight_bytes(shape, with_index=with_index)
        + hidden
        + 4 * preset.head_dim_rope * shape.seq_len_kv
        + keys * cached,
        output_bytes=hidden + (4 * rows * shape.topk if with_index else 0),
        workspace_bytes=2 * rows * (down + up + joined + queries),
    )


def sparse_memory(shape: LayerShape) -> Memory:
    held = held_bytes(shape, with_index=True)
    return _with_workspace(held, _selection_bytes(shape))


def masked_memory(shape: LayerShape) -> Memory:
    held = held_bytes(shape, with_index=True)
    return _with_workspace(held, _selection_bytes(shape) + head_key_bytes(shape))


def head_key_bytes(shape: LayerShape) -> int:
    preset: Preset = shape.preset
    width = preset.head_dim_qk_mha + preset.head_dim_v_mha
    return 2 * shape.seq_len_kv * shape.rank_heads * width


def _selection_bytes(shape: LayerShape) -> int:
    """Keys read back, index queries, and the logits of one chunk."""
    rows, preset = shape.num_tokens, shape.preset
    logits = 4 * rows * shape.seq_len_kv
    queries = rows * preset.index_heads * (preset.index_dim * 2 + 8)
    if not shape.is_prefill:
        return logits + queries
    read = 2 * shape.seq_len_kv * (HEAD_DIM_QK + INDEX_DIM)
    return min(logits, max(shape.workspace_bytes, 4 * shape.seq_len_kv)) + queries + read


def _with_workspace(held: Memory, more: int) -> Memory:
    return Memory(
        input_bytes=held.input_bytes,
        output_bytes=held.output_bytes,
        workspace_bytes=held.workspace_bytes + more,
    )
