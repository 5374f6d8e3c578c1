"""Sums over a whole model that come out the same in every order: norms, inner products, counts.

Each chunk of 2^15 elements is summed in float64 (chunks start at multiples of 2^15 within their tensor, so tiling does
not move them), and chunk sums are added exactly, as whole multiples of the smallest float. One rounding at the end.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskvec import native
from taskvec.deltas import Tile
from taskvec.errors import NonFiniteError
from taskvec.plan import Fold, SubPlan, formula, formula_of
from taskvec.precision import all_finite

CHUNK = native.CHUNK
_SHIFT = 1126  # 2^-1126 divides every finite float64


def exact(value: float) -> int:
    """A float64 as a whole multiple of 2^-1126: such numbers add without rounding."""
    mantissa, exponent = math.frexp(value)
    return int(mantissa * 2.0**53) << (exponent - 53 + _SHIFT)


def rounded_sum(total: int) -> float:
    """The float64 nearest to an exact sum."""
    return total / (1 << _SHIFT)


def exact_sums(parts: "np.ndarray[Any, Any]", finite: bool = True) -> tuple[list[int], bool]:
    """The exact sums over chunks, [chunk, *any], as whole multiples; `finite` is handed through."""
    return [sum(map(exact, column)) for column in parts.reshape(len(parts), -1).T.tolist()], finite


def sums(of: Callable[[Tile], Tensor]) -> SubPlan:
    """Exact sums of what `of` returns for each chunk. A sub-plan: use `yield from`.

    Args:
        of: tile of at most 2^15 elements -> float64 tensor of partial sums, any fixed shape. Where it has a formula the
            engine may know a faster form of the sums.

    Returns:
        A float64 tensor of that shape. Passes: one.
    """
    shape: list[torch.Size] = []

    def partial(tile: Tile) -> list[int]:
        total: list[int] = []
        for chunk in chunks(tile):
            values = of(chunk)
            if not shape:
                shape.append(values.shape)
            exacts = [exact(value) for value in values.reshape(-1).tolist()]
            total = exacts if not total else [a + b for a, b in zip(total, exacts)]
        return total

    told = formula_of(of)
    if told is not None:
        partial = formula(told.name, **told.numbers)(partial)
    total = yield Fold(partial, _added)
    if isinstance(total, Tensor):  # an engine that knows the formula may have rounded already
        return total
    if not shape:
        shape.append(torch.Size(told.numbers["shape"] if told is not None else (len(total),)))
    return torch.tensor([rounded_sum(value) for value in total], dtype=torch.float64).reshape(shape[0])


def assert_finite(tile: Tile) -> None:
    """Refuses a tile of which the base or a task is not all finite.

    Raises:
        NonFiniteError: names the tensor, the model, and how many values.
    """
    rows = [("the base", tile.base), *((f"task {task!r}", row) for task, row in zip(tile.tasks, tile.stack))]
    for name, values in rows:
        if values is not None and not all_finite(values):
            raise NonFiniteError(tile.name, name, int((~torch.isfinite(values)).sum()))


def _added(one: list[int], other: list[int]) -> list[int]:
    if not one or not other:
        return one or other
    return [a + b for a, b in zip(one, other)]


def chunks(tile: Tile, size: int = CHUNK) -> "list[Tile]":
    """The tile in pieces of `size` elements; tiles start at multiples of it."""
    count = tile.stop - tile.start
    if count <= size and tile.stack.ndim == 2:
        return [tile]
    flat = tile.stack.reshape(len(tile.tasks), -1)
    base = None if tile.base is None else tile.base.reshape(-1)
    merged = None if tile.merged is None else tile.merged.reshape(-1)
    weights = tile.weights if tile.weights.ndim == 1 else tile.weights.reshape(len(tile.tasks), -1)
    return [
        Tile(
            tile.name,
            tile.shape,
            tile.start + first,
            min(tile.start + first + size, tile.stop),
            tile.tasks,
            flat[:, first : first + size],
            None if base is None else base[first : first + size],
            weights if weights.ndim == 1 else weights[:, first : first + size],
            None if merged is None else merged[first : first + size],
        )
        for first in range(0, count, size)
    ]


def gram(tasks: int) -> SubPlan:
    """All inner products between the deltas, float64 [task, task]. Passes: one."""

    @formula("gram", shape=(tasks, tasks))
    def products(tile: Tile) -> Tensor:
        rows = tile.stack.double()
        return rows @ rows.T

    return (yield from sums(products))


def l1_ratios(after: Callable[[Tile], Tensor]) -> SubPlan:
    """For each task the L1 norm of its deltas over that of `after(tile)`, 1 where nothing is left. Passes: one."""

    def sizes(tile: Tile) -> Tensor:
        rows = torch.cat([tile.stack, after(tile)]).double().abs_()
        return rows.sum(1)

    found = (yield from sums(sizes)).tolist()
    count = len(found) // 2
    return [one / two if two else 1.0 for one, two in zip(found[:count], found[count:])]
