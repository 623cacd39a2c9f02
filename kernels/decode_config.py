"""How the work of `row_decode.py` is shared among its programs: chosen before the launch.

Programs stand in groups, one program for each tile of heads, for all tiles gather the same rows.
The lists of all queries stand one behind the other on a line, in units of a block of 64 keys, with
`piece_units` before each list for what a piece costs around its blocks. Each group takes a stretch
of the line, and all stretches are equally long. So a group has the end of one list, some whole ones
and the beginning of another: its pieces. Parts of lists leave partial results that have to be
merged; where that does not pay, a group takes whole lists alone.

    lists      |··0000000000|··1111111111|··2222222222|      ·: piece_units
    stretches  <------------------><------------------>      2 groups, share 18
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from dsa_bench.kernels.decode_splits import MAX_SPLITS, PARTIAL_ROWS
from dsa_bench.kernels.paging import HEAD_DIM_V, MLA_ROW_BYTES

BLOCK_KV = 64
BLOCK_MICROSECONDS = {16: 1.6, 32: 1.8, 64: 2.2}
PIECE_MICROSECONDS = {16: 5.0, 32: 9.0, 64: 12.5}
"""Of a program by its heads, for a block of keys and for a piece around its blocks: fitted to
batches of 1 to 256, 128 and 16 heads, 1 to 32 parts on an H100."""
LIST_BYTES_PER_MICROSECOND = 2.25e6
"""Rows of all lists come no faster, behind what a piece costs: 2.2 to 2.4 TB/s."""
MERGE_MICROSECONDS = 2.0
PARTIAL_BYTES_PER_MICROSECOND = 3e6
"""A launch, and partial results at 3 TB/s."""
UNEVEN_MICROSECONDS = 1.0
"""More where some groups have more pieces than others: 48 queries of 16 heads take 37.7 µs by 96
equal pieces, 39.7 by 163."""
PIECE_UNITS_TRIED = (0, 1, 2, 3, 4, 6)
"""A piece costs as much as 3 to 6 blocks; with fewer units stretches may end where lists do."""
MOST_SHARED = 4
"""Lists are not shared where a group has more: at most a fifth would be gained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8DecodeConfig:
    block_h: int
    """Heads of a program: 16, 32 or 64."""
    num_groups: int
    """At most: `divide` leaves out those whose stretch would begin behind all lists."""
    piece_units: int = 0
    shares_lists: bool = True
    """Whether a list may be in several pieces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """What a configuration makes of lists that are all of the same number of blocks."""

    share: int
    """Units of a group's stretch."""
    num_groups: int
    """Those whose stretch begins on the line; one that has piece_units alone has nothing to do."""
    loads: frozenset[tuple[int, int]]
    """(blocks, pieces) that some group has."""
    most_parts: int
    """Pieces of any list."""
    num_partial: int
    """Pieces that are not a whole list."""
    num_whole: int

    @property
    def is_one_piece(self) -> bool:
        """Whether each group has one piece."""
        return all(pieces == 1 for _, pieces in self.loads)

    @property
    def even_blocks(self) -> int:
        """Blocks of each group's only piece, where all have as many; else 0."""
        ((blocks, pieces), *others) = self.loads
        return blocks if pieces == 1 and not others else 0


@lru_cache(maxsize=4096)
def divide(num_queries: int, blocks: int, config: Fp8DecodeConfig) -> Division:
    """Which pieces the groups have, counted; `decode_pieces.py` has the same rule."""
    units = config.piece_units + blocks
    share = -(-num_queries * units // config.num_groups)
    if not config.shares_lists:
        share = -(-num_queries // config.num_groups) * units
    num_groups = -(-num_queries * units // share)
    num_partial = num_whole = 0
    loads = set()
    parts = [0] * num_queries
    for group in range(num_groups):
        begin, end = group * share, (group + 1) * share
        row = begin // units
        group_blocks = group_pieces = 0
        while row < num_queries and row * units + config.piece_units < end:
            list_begin = row * units + config.piece_units
            piece = min(end - list_begin, blocks) - max(begin - list_begin, 0)
            group_blocks += piece
            group_pieces += 1
            parts[row] += 1
            num_whole += piece == blocks
            num_partial += piece < blocks
            row += 1
        loads.add((group_blocks, group_pieces))
    return Division(
        share=share, num_groups=num_groups, loads=frozenset(loads), most_parts=max(parts),
        num_partial=num_partial, num_whole=num_whole,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def choose_config(num_queries: int, num_heads: int, topk: int, num_sms: int) -> Fp8DecodeConfig:
    """What takes the least time where all lists are full, merging included."""
    blocks = -(-topk // BLOCK_KV)
    sizes = [h for h in (16, 32, 64) if h == 16 or h < 2 * num_heads]
    best, best_time = Fp8DecodeConfig(block_h=16, num_groups=1), float("inf")
    for config in _candidates(sizes, num_queries, num_heads, blocks, num_sms):
        if _least_time(num_queries, topk, config) >= best_time:
            continue
        division = divide(num_queries, blocks, config)
        time = _time(num_queries, num_heads, topk, config, division)
        if time < best_time and division.most_parts <= MAX_SPLITS:
            best, best_time = config, time
    return best


def _candidates(
    sizes: list[int], num_queries: int, num_heads: int, blocks: int, num_sms: int
) -> Iterator[Fp8DecodeConfig]:
    """Ways to try: whole lists for each size of program, then shared ones."""
    most_groups = {h: max(num_sms // -(-num_heads // h), 1) for h in sizes}
    for block_h, most in most_groups.items():
        lists = -(-num_queries // most)
        yield Fp8DecodeConfig(
            block_h=block_h, num_groups=-(-num_queries // lists), shares_lists=False
        )
    for block_h, most in most_groups.items():
        if num_queries > MOST_SHARED * most:
            continue
        most = min(most, num_queries * min(blocks, MAX_SPLITS), PARTIAL_ROWS // (2 * num_heads))
        for piece_units in PIECE_UNITS_TRIED:
            units = num_queries * (piece_units + blocks)
            # as many groups as there may be, down to two thirds
            least = -(-units // max(most, 1))
            for share in range(least, least * 3 // 2 + 1, max(least // 32, 1)):
                yield Fp8DecodeConfig(
                    block_h=block_h, num_groups=-(-units // share), piece_units=piece_units
                )


def _least_time(num_queries: int, topk: int, config: Fp8DecodeConfig) -> float:
    """µs that it takes at least, known without dividing."""
    each = -(-num_queries * -(-topk // BLOCK_KV) // config.num_groups)
    time = max(each * BLOCK_MICROSECONDS[config.block_h], _memory_time(num_queries, topk))
    return time + PIECE_MICROSECONDS[config.block_h] + MERGE_MICROSECONDS * config.shares_lists


def _memory_time(num_queries: int, topk: int) -> float:
    return num_queries * topk * MLA_ROW_BYTES / LIST_BYTES_PER_MICROSECOND


def _time(
    num_queries: int, num_heads: int, topk: int, config: Fp8DecodeConfig, division: Division
) -> float:
    """µs, of the busiest SM or of memory, more than either where both bind, and of merging."""
    block, piece = BLOCK_MICROSECONDS[config.block_h], PIECE_MICROSECONDS[config.block_h]
    time = max(n * block + pieces * piece for n, pieces in division.loads)
    memory_time = piece + _memory_time(num_queries, topk)
    time = float((time**8 + memory_time**8) ** (1 / 8))
    if division.num_partial > 0:
        partial_bytes = division.num_partial * num_heads * HEAD_DIM_V * 4
        time += MERGE_MICROSECONDS + partial_bytes / PARTIAL_BYTES_PER_MICROSECOND
        time += UNEVEN_MICROSECONDS * (not division.is_one_piece)
    return time
