"""Rows of logits with what a stable sort takes of them: of both files of top-k tests."""

import torch

from dsa_bench.kernels.topk import TopkShape
from tests import hostile

INF = float("inf")


def full(num_rows, num_cols, topk):
    return TopkShape(num_rows=num_rows, num_cols=num_cols, topk=topk, valid=num_rows * num_cols)


def values_of(row, columns):
    """Values at the columns, largest first; NaN as -inf, None where there is no column."""
    row = [-INF if x != x else x for x in row]
    found = sorted((row[n] for n in columns if n >= 0), reverse=True)
    return found + [None] * (len(columns) - len(found))


def by_python(inputs):
    """The definition by Python's stable sort: of each row the columns of its largest values."""
    out = []
    for i, row in enumerate(inputs.index_logits.tolist()):
        first, end = max(0, int(inputs.kv_start[i])), min(len(row), int(inputs.kv_end[i]))
        value = [-INF if x != x else x for x in row]
        best = sorted(range(first, end), key=lambda n: -value[n])[: inputs.topk]
        out.append(best + [-1] * (inputs.topk - len(best)))
    return out


def stable_set(inputs):
    """The columns that a stable sort takes, ascending, -1 behind them."""
    in_order = [
        sorted(n for n in row if n >= 0) + [-1] * row.count(-1) for row in by_python(inputs)
    ]
    return torch.tensor(in_order, dtype=torch.int32)


def slots_of(columns, pages):
    """The rows of the cache that the columns lie in, by Python."""
    table, size = pages.block_table.tolist(), pages.page_size
    limit = pages.block_table.shape[1] * size
    return [
        [
            table[i * len(table) // len(columns)][t // size] * size + t % size
            if 0 <= t < limit else -1
            for t in row
        ]
        for i, row in enumerate(columns)
    ]  # fmt: skip


def assert_stable(inputs, outputs):
    """Right, and of equal values the lowest columns; in ascending order if that was asked for. With
    slots where there are pages, and only there."""
    hostile.assert_right("topk", inputs, outputs)
    assert (outputs.topk_slots is None) == (inputs.pages is None)
    if inputs.pages is not None:
        columns = outputs.topk_indices.tolist()
        assert outputs.topk_slots.tolist() == slots_of(columns, inputs.pages)
    actual = outputs.topk_indices.cpu()
    if not inputs.sorted_indices:
        behind = torch.where(actual < 0, 2**31 - 1, actual).sort(1).values
        actual = torch.where(behind == 2**31 - 1, -1, behind)
    assert torch.equal(actual, stable_set(inputs))


KINDS = ["plain", *hostile.MUTATIONS["topk"]]
