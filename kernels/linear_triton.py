"""Block-scaled e4m3 products in plain Triton for Hopper, one kernel for many rows, one for few.

Both take one block of 128 columns a step: tiles come by TMA, tensor cores sum 128 products, the
CUDA cores multiply the sum by both scales and add it to the result in fp32.

Many rows: BLOCK_M rows of x by 128 + 64 columns of the weight. 256 columns would leave no registers
for the sum of a block beside the result; with 192 the CUDA cores scale one part while the tensor
cores work on the other. Tiles are walked in groups of row tiles, so that L2 keeps what neighbours
share.

Few rows: the weight is the left operand, as tensor cores take 64 rows at the least: its rows fill
them, and 16 tokens suffice. Bound by the reading of the weight, which needs all multiprocessors:
where its row tiles are too few, the columns are divided among programs as well, which write partial
sums in fp32; a second kernel adds them up in their order, so that two runs give the same bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.linear import (
    BLOCK,
    LinearInputs,
    LinearOutputs,
    LinearShape,
    check_arguments,
)
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "linear"
TMA_ALIGNMENT = 16
"""Bytes: of the address and the row stride of what a descriptor reads."""
FEATURE_ALIGNMENT = 8
"""bf16 elements of those 16 bytes."""
FEW_ROWS = 256
"""Up to here the weight's tiles are the left operand."""
SUM_BLOCK = 1024


@triton.jit
def _linear_kernel(
    x_desc, left_desc, right_desc, left_out_desc, right_out_desc, x_scale_ptr, w_scale_ptr,
    num_rows, out_features, num_blocks,
    stride_x_scale_row, stride_x_scale_block, stride_w_scale_row,
    BLOCK_M: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows, LEFT + RIGHT columns, all of the sum."""
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(out_features, LEFT + RIGHT)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    in_group = tl.program_id(0) % (GROUP_M * tiles_n)
    group_size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    first_m = (group * GROUP_M + in_group % group_size) * BLOCK_M
    first_n = in_group // group_size * (LEFT + RIGHT)
    # neither part may lie under two scales: where the tile begins in the middle of a block of the
    # weight, the narrow part comes first
    left_n = tl.cdiv(first_n, LEFT) * LEFT
    right_n = tl.where(left_n == first_n, first_n + LEFT, first_n)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    is_row = offs_m < num_rows
    x_scale_ptrs = x_scale_ptr + offs_m.to(tl.int64) * stride_x_scale_row
    last = (out_features - 1) // BLOCK_K  # a part behind it has no columns, and no scale
    left_row = tl.minimum(left_n // BLOCK_K, last).to(tl.int64) * stride_w_scale_row
    right_row = tl.minimum(right_n // BLOCK_K, last).to(tl.int64) * stride_w_scale_row
    left = tl.zeros([BLOCK_M, LEFT], tl.float32)
    if RIGHT:
        right = tl.zeros([BLOCK_M, RIGHT], tl.float32)
    for block in tl.range(0, num_blocks, num_stages=NUM_STAGES):
        x_scale = tl.load(x_scale_ptrs, mask=is_row, other=0.0)
        x = x_desc.load([first_m, block * BLOCK_K])
        left_scale = tl.load(w_scale_ptr + left_row + block)
        w = left_desc.load([left_n, block * BLOCK_K])
        left += tl.dot(x, w.T) * (x_scale * left_scale)[:, None]
        if RIGHT:
            right_scale = tl.load(w_scale_ptr + right_row + block)
            v = right_desc.load([right_n, block * BLOCK_K])
            right += tl.dot(x, v.T) * (x_scale * right_scale)[:, None]
        x_scale_ptrs += stride_x_scale_block
    left_out_desc.store([first_m, left_n], left.to(left_out_desc.dtype))
    if RIGHT:
        right_out_desc.store([first_m, right_n], right.to(right_out_desc.dtype))


@triton.jit
def _store_rows(
    out_ptr, tile, first_m, first_n, num_rows, out_features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] to a contiguous matrix, in its type; nothing outside of it."""
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * out_features + offs_n[None, :]
    exists = (offs_m < num_rows)[:, None] & (offs_n < out_features)[None, :]
    tl.store(ptrs, tile.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _linear_few_rows_kernel(
    x_desc, w_desc, x_scale_ptr, w_scale_ptr, out_ptr,
    num_rows, out_features, num_blocks, blocks_per_split,
    stride_x_scale_row, stride_x_scale_block, stride_w_scale_row,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_O rows of the weight, BLOCK_T tokens, one share of the columns."""
    first_o = tl.program_id(0) * BLOCK_O
    first_t = tl.program_id(1) * BLOCK_T
    first_block = tl.program_id(2) * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, num_blocks)
    offs_t = first_t + tl.arange(0, BLOCK_T)
    is_row = offs_t < num_rows
    x_scale_ptrs = x_scale_ptr + offs_t.to(tl.int64) * stride_x_scale_row
    x_scale_ptrs += first_block.to(tl.int64) * stride_x_scale_block
    w_scale_row = w_scale_ptr + (first_o // BLOCK_K).to(tl.int64) * stride_w_scale_row
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for block in tl.range(first_block, last_block, num_stages=NUM_STAGES):
        x_scale = tl.load(x_scale_ptrs, mask=is_row, other=0.0)
        w_scale = tl.load(w_scale_row + block)
        w = w_desc.load([first_o, block * BLOCK_K])
        x = x_desc.load([first_t, block * BLOCK_K])
        total += tl.dot(w, x.T) * (x_scale * w_scale)[None, :]
        x_scale_ptrs += stride_x_scale_block
    part = tl.program_id(2).to(tl.int64) * num_rows * out_features
    _store_rows(out_ptr + part, total.T, first_t, first_o, num_rows, out_features, BLOCK_T, BLOCK_O)


@triton.jit
def _sum_parts_kernel(parts_ptr, out_ptr, size, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK elements, their partial sums added up from the first to the last."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offs < size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.static_range(NUM_PARTS):
        total += tl.load(parts_ptr + offs, mask=exists, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=exists)


@dataclass(frozen=True, kw_only=True, slots=True)
class ManyRowsConfig:
    block_m: int = 128
    left: int = BLOCK
    right: int = 64
    """Columns beside `left`, or 0."""
    group_m: int = 8
    num_warps: int = 8
    num_stages: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class FewRowsConfig:
    block_t: int
    block_o: int
    num_splits: int
    num_warps: int = 4
    num_stages: int = 6


def choose_config(
    num_rows: int, in_features: int, out_features: int, num_sms: int
) -> ManyRowsConfig | FewRowsConfig:
    """192 columns a tile where they fill the GPU, else 128; for few rows two programs a
    multiprocessor.
    """
    if num_rows > FEW_ROWS:
        tiles = -(-num_rows // 128) * -(-out_features // 192)
        return ManyRowsConfig(right=64 if tiles >= num_sms else 0)
    block_t = min(128, max(16, triton.next_power_of_2(num_rows)))
    programs = -(-out_features // 64) * -(-num_rows // block_t)
    num_blocks = in_features // BLOCK
    wanted = max(1, min(2 * num_sms // programs, num_blocks // 4))
    return FewRowsConfig(
        block_t=block_t,
        block_o=64,
        num_splits=even_splits(num_blocks, wanted),
        num_stages=6 if block_t <= 64 else 4,
    )


def even_splits(num_blocks: int, wanted: int) -> int:
    """Shares of equal size, but for the last, of which none is empty: at most `wanted`."""
    share = -(-num_blocks // wanted)
    return -(-num_blocks // share)


def linear(inputs: LinearInputs, config: ManyRowsConfig | FewRowsConfig | None = None) -> Tensor:
    """Product with the weight; formula and conventions as in `linear.py`, e4m3 alone.

    x and the weight must begin at multiples of 16 bytes, their rows too.
    Returns:
        [num_rows, out_features], contiguous.
    """
    check_arguments(inputs)
    x, x_scale, weight = inputs.x, inputs.x_scale, inputs.weight
    if x_scale is None or weight.scale is None:
        raise TypeError(f"triton linear takes float8_e4m3fn, got {x.dtype} (use torch)")
    (num_rows, columns), features = x.shape, weight.values.shape[0]
    out = torch.empty(num_rows, features, dtype=inputs.result_dtype, device=x.device)
    _expect_aligned("x", x)
    _expect_aligned("weight.values", weight.values)
    if num_rows > FEW_ROWS:
        _expect_aligned("out", out)
    if out.numel() == 0:
        return out
    properties = torch.cuda.get_device_properties(x.device)
    config = config or choose_config(num_rows, columns, features, properties.multi_processor_count)
    scale = weight.scale.contiguous()
    if isinstance(config, ManyRowsConfig):
        _launch_many(x, x_scale, weight.values, scale, out, config)
    else:
        _launch_few(x, x_scale, weight.values, scale, out, config)
    return out


def _expect_aligned(name: str, tensor: Tensor) -> None:
    row_bytes = _row_stride(tensor) * tensor.element_size()
    if row_bytes % TMA_ALIGNMENT or tensor.data_ptr() % TMA_ALIGNMENT:
        raise ValueError(
            f"rows of {name} must begin at multiples of {TMA_ALIGNMENT} bytes, got strides"
            f" {tuple(tensor.stride())} (pass contiguous rows of a multiple of 16 elements)"
        )


def _row_stride(tensor: Tensor) -> int:
    """Elements from row to row; of a single row, whose stride says nothing, its width."""
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]


def _descriptor(tensor: Tensor, block_rows: int, block_columns: int = BLOCK) -> TensorDescriptor:
    strides = [_row_stride(tensor), 1]
    return TensorDescriptor(tensor, list(tensor.shape), strides, [block_rows, block_columns])


def _launch_many(
    x: Tensor, x_scale: Tensor, w: Tensor, scale: Tensor, out: Tensor, config: ManyRowsConfig
) -> None:
    (num_rows, features), block_m = out.shape, config.block_m
    right = config.right or config.left
    grid = -(-num_rows // block_m) * -(-features // (config.left + config.right))
    _linear_kernel[(grid,)](
        _descriptor(x, block_m), _descriptor(w, config.left), _descriptor(w, right),
        _descriptor(out, block_m, config.left), _descriptor(out, block_m, right),
        x_scale, scale, num_rows, features, scale.shape[1], *x_scale.stride(), scale.stride(0),
        BLOCK_M=block_m, LEFT=config.left, RIGHT=config.right, BLOCK_K=BLOCK,
        GROUP_M=config.group_m, NUM_STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _launch_few(
    x: Tensor, x_scale: Tensor, w: Tensor, scale: Tensor, out: Tensor, config: FewRowsConfig
) -> None:
    (num_rows, features), splits, target = out.shape, config.num_splits, out
    if splits > 1:
        target = torch.empty(splits, num_rows, features, device=out.device)
    grid = (-(-features // config.block_o), -(-num_rows // config.block_t), splits)
    _linear_few_rows_kernel[grid](
        _descriptor(x, config.block_t), _descriptor(w, config.block_o), x_scale, scale, target,
        num_rows, features, scale.shape[1], -(-scale.shape[1] // splits),
        *x_scale.stride(), scale.stride(0),
        BLOCK_T=config.block_t, BLOCK_O=config.block_o, BLOCK_K=BLOCK,
        NUM_STAGES=config.num_stages, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        _sum_parts_kernel[(-(-out.numel() // SUM_BLOCK),)](
            target, out, out.numel(), NUM_PARTS=splits, BLOCK=SUM_BLOCK, num_warps=4
        )


def run(inputs: LinearInputs) -> LinearOutputs:
    return LinearOutputs(linear(inputs))


def supports(shape: LinearShape, machine: Machine) -> str | None:
    if shape.precision != "fp8":
        return "triton linear is for fp8 alone (use torch in bf16)"
    if not machine.is_hopper:
        return f"triton linear needs Hopper (TMA and wgmma), this is {machine.name}"
    if shape.out_features % FEATURE_ALIGNMENT:
        return (
            f"triton linear needs out_features of a multiple of {FEATURE_ALIGNMENT},"
            f" this case has {shape.out_features}"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=10),)

SIGNATURE = {
    "x_scale_ptr": "*fp32:16", "w_scale_ptr": "*fp32:16", "num_rows": "i32:16",
    "out_features": "i32:16", "num_blocks": "i32", "stride_x_scale_row": "i32:1",
    "stride_x_scale_block": "i32:16", "stride_w_scale_row": "i32",
}  # fmt: skip


def compile_cases() -> list[CompileCase]:
    many = [ManyRowsConfig(), ManyRowsConfig(right=0)]
    few = [choose_config(rows, 7168, 2240, 132) for rows in (1, 32, 64, 128)]
    cases = [_many_rows_case(config) for config in many]
    cases += [_few_rows_case(config) for config in few if isinstance(config, FewRowsConfig)]
    return [
        *cases,
        CompileCase(
            name="linear_triton[sum]",
            kernel=_sum_parts_kernel,
            signature={"parts_ptr": "*fp32:16", "out_ptr": "*bf16:16", "size": "i32:16"},
            constexprs={"NUM_PARTS": 7, "BLOCK": SUM_BLOCK},
            options={"num_warps": 4},
        ),
    ]


def _many_rows_case(config: ManyRowsConfig) -> CompileCase:
    left, right, block_m = config.left, config.right or config.left, config.block_m
    return CompileCase(
        name=f"linear_triton[many-{config.left + config.right}]",
        kernel=_linear_kernel,
        signature={
            "x_desc": f"tensordesc<fp8e4nv[{block_m}, {BLOCK}]>",
            "left_desc": f"tensordesc<fp8e4nv[{left}, {BLOCK}]>",
            "right_desc": f"tensordesc<fp8e4nv[{right}, {BLOCK}]>",
            "left_out_desc": f"tensordesc<bf16[{block_m}, {left}]>",
            "right_out_desc": f"tensordesc<bf16[{block_m}, {right}]>", **SIGNATURE,
        },
        constexprs={
            "BLOCK_M": block_m, "LEFT": left, "RIGHT": config.right, "BLOCK_K": BLOCK,
            "GROUP_M": config.group_m, "NUM_STAGES": config.num_stages,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        must_have={f"QGMMA.64x{left}": 4, f"QGMMA.64x{right}": 4, "UTMALDG": 2, "UTMASTG": 1},
    )  # fmt: skip


def _few_rows_case(config: FewRowsConfig) -> CompileCase:
    return CompileCase(
        name=f"linear_triton[few-{config.block_t}]",
        kernel=_linear_few_rows_kernel,
        signature={
            "x_desc": f"tensordesc<fp8e4nv[{config.block_t}, {BLOCK}]>",
            "w_desc": f"tensordesc<fp8e4nv[{config.block_o}, {BLOCK}]>",
            "out_ptr": "*fp32:16", "blocks_per_split": "i32", **SIGNATURE,
        },
        constexprs={
            "BLOCK_T": config.block_t, "BLOCK_O": config.block_o,
            "BLOCK_K": BLOCK, "NUM_STAGES": config.num_stages,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        must_have={f"QGMMA.64x{config.block_t}": 4, "UTMALDG": 2},
    )  # fmt: skip
