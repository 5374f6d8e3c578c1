"""Exact order statistics over a whole model, without sorting it and without state that grows with it.

A small stratified sample brackets each wanted rank. One pass then counts what lies below the bracket, compares for
equality with its two ends (so heavy ties cost nothing) and keeps the few values strictly inside, as distinct values
with counts when they are many, and as counts between a few thousand of them when they are too many even so: then one
more pass, with the bracket between two of those, gives the statistic. The result is verified by its rank: a bracket that
missed is followed by an exact radix count over the ordered bits of the floats (16 bits a pass). The answer is always
the same number.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskvec import native
from taskvec.deltas import Tile
from taskvec.native import Stored
from taskvec.plan import Fold, Sample, Selection, SubPlan, formula, formula_of

SAMPLE = 1 << 23  # over all rows; with 4 the bracket at rank fraction 0.9 then holds about 0.2 % of the elements
SAMPLE_MOST = 1 << 24
SORTED_BELOW = 1 << 17  # tensors this small are selected directly
_GROUPS = 16  # interleaved subsamples, to see how much blocks vary beyond independent draws
_DISTINCT = 1 << 21  # values kept before they are compressed to distinct values with counts
_MOST = 1 << 24  # distinct values kept inside one bracket; beyond it they are only counted
_EDGES = 1 << 12  # values between which they are counted
_NARROWED = 2  # times that a bracket is narrowed before the radix count takes over


@dataclass(frozen=True, slots=True)
class OrderStatistic:
    """The value of one rank for one row, and how many elements are below it and equal to it."""

    value: float
    below: int
    equal: int


@formula("magnitude")
def magnitudes(tile: Tile) -> Tensor:
    """The absolute values of the deltas."""
    return tile.stack.abs()


def order_statistics(of: Callable[[Tile], Tensor], ranks: Sequence[Sequence[int]], numel: int) -> SubPlan:
    """The `k`-th smallest values (from 0) of each row of `of(tile)`, over all tiles. A sub-plan: use `yield from`.

    Args:
        of: tile -> [row, n], finite.
        ranks: for each row the wanted ranks; each row has equally many.
        numel: elements of each row over all tiles (d).

    Returns:
        A list over rows of lists over ranks of `OrderStatistic`.

    Passes: one in the common case (plus a sample); one more where a bracket holds more than can be kept, which takes some
    10 B elements; up to 2 more for float32 when a bracket misses.
    """
    told = formula_of(of)
    if told is not None:
        known = yield Selection(told, ranks)
        if known is not None:
            return known
    # a larger model gets a larger sample, so that what lies in the brackets does not grow as fast
    size = min(max(SAMPLE // len(ranks), numel >> 10), SAMPLE_MOST // len(ranks), max(1 << 15, numel // 64))
    values, whole = yield Sample(of, numel if numel <= SORTED_BELOW else size)
    rows = values.detach().to("cpu").numpy()
    if whole:
        return [[_of_sorted(np.sort(row), rank) for rank in wanted] for row, wanted in zip(rows, ranks)]
    brackets = _each(lambda row, wanted: _brackets(row, wanted, numel), rows, ranks)
    del values, rows

    found: list[list[OrderStatistic | None]] = [[None] * len(wanted) for wanted in ranks]
    for _ in range(1 + _NARROWED):
        counts = yield Fold(_counting(of, brackets), _joined)
        narrower = False
        for row, wanted, known, ends in zip(counts, ranks, found, brackets):
            for k, rank in enumerate(wanted):
                known[k] = known[k] or row[k].resolve(rank)
                between = None if known[k] is not None else row[k].around(rank)
                narrower = narrower or between is not None
                # nothing lies in a bracket that is one point
                ends[k] = between if between is not None else _Bracket(ends[k].low, ends[k].low)
        if not narrower:
            break
    missed = [[k for k, value in zip(wanted, row) if value is None] for row, wanted in zip(found, ranks)]
    if any(missed):
        exact = yield from radix_statistics(of, missed)
        for row, wanted, late in zip(found, ranks, exact):
            for position, rank in enumerate(wanted):
                if row[position] is None:
                    row[position] = late[rank]
    return found


def _counting(
    of: Callable[[Tile], Tensor], brackets: "Sequence[Sequence[_Bracket]]"
) -> "Callable[[Tile], list[list[_Count]]]":
    """What counts a tile's values against these brackets."""
    fixed, told = [list(row) for row in brackets], formula_of(of)

    def count(tile: Tile) -> list[list[_Count]]:
        return _count(of(tile), fixed)

    return count if told is None else formula("counts", of=told, brackets=fixed)(count)


def _each(
    function: Callable[[Any, Any], Any], rows: "np.ndarray[Any, Any]", ranks: Sequence[Sequence[int]]
) -> list[Any]:
    """A function of each row; of large ones in threads, since numpy sorts without holding up others."""
    threads = min(len(rows), len(os.sched_getaffinity(0))) if rows.size > SAMPLE // 8 else 1
    if threads == 1:
        return [function(row, wanted) for row, wanted in zip(rows, ranks)]
    with ThreadPoolExecutor(threads, "taskvec-sort") as pool:
        return list(pool.map(function, rows, ranks))


def _of_sorted(ordered: "np.ndarray[Any, Any]", rank: int) -> OrderStatistic:
    value = ordered[rank]
    below, upto = np.searchsorted(ordered, value, "left"), np.searchsorted(ordered, value, "right")
    return OrderStatistic(float(value) + 0.0, int(below), int(upto - below))


# -- the bracket -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Bracket:
    low: float  # both ends are sampled values (or infinite), so ties fall on them
    high: float
    edges: Any = field(default=None, compare=False)  # sampled values between them


def _brackets(sample: "np.ndarray[Any, Any]", ranks: Sequence[int], numel: int) -> list[_Bracket]:
    """For each rank, sampled values about 5.5 standard errors below and above it: one in 25 million is missed."""
    size = sample.shape[0]
    ordered = np.sort(sample)
    found = []
    for rank in ranks:
        share = rank / max(1, numel - 1)
        middle = share * (size - 1)
        pivot = ordered[round(middle)]
        # blocks lie within one tensor, so they vary more than independent draws: the subsamples show by how much
        shares = [float(np.mean(sample[group::_GROUPS] < pivot)) for group in range(_GROUPS)]
        spread = max(float(np.std(shares)) / _GROUPS**0.5 * size, (size * max(share * (1 - share), 1 / size)) ** 0.5)
        margin = 5.5 * spread + 8
        first, last = int(middle - margin), int(middle + margin) + 1
        low = float(ordered[first]) if first >= 0 else -np.inf
        high = float(ordered[last]) if last < size else np.inf
        found.append(_Bracket(low, high, _edges(ordered[max(0, first + 1) : last])))
    return found


def _edges(ordered: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any] | None":
    """Some of these values, evenly; None: there are none."""
    if not len(ordered):
        return None
    return np.unique(ordered[np.linspace(0, len(ordered) - 1, min(_EDGES, len(ordered)), dtype=np.int64)])


@dataclass(slots=True)
class _Count:
    """What one pass learns of one bracket."""

    bracket: _Bracket
    below: int = 0
    at_low: int = 0
    at_high: int = 0
    inside: list[Any] = field(default_factory=list)
    held: int = 0
    distinct: tuple[Any, Any] | None = None
    edges: Any = None  # values between which is counted, once there is too much to keep
    between: Any = None  # below the first edge, from it on and below the second, ..., from the last on
    limit: int = field(default_factory=lambda: _DISTINCT)

    def join(self, tile: "_Count") -> "_Count":
        """Adds what one tile holds."""
        self.below += tile.below
        self.at_low += tile.at_low
        self.at_high += tile.at_high
        self.inside += tile.inside
        self.held += tile.held
        if self.held > self.limit:
            self._compress()
        return self

    def _compress(self, *, wholly: bool = False) -> None:
        """Distinct values with counts in place of values; only where that is less memory, unless `wholly`."""
        if self.inside:
            values = np.concatenate(self.inside)
            self.inside = []  # freed before anything else is made
            values.sort()
            new = values[1:] != values[:-1]
            few = 3 * (np.count_nonzero(new) + 1) <= len(values)
            if self.edges is not None or (not few and len(values) > _MOST):
                self._count_between(values)
            elif few or wholly:
                starts = np.concatenate([[0], np.flatnonzero(new) + 1])
                pair = values[starts], np.diff(starts, append=len(values))
                self.distinct = pair if self.distinct is None else _merged(self.distinct, pair)
            else:
                self.inside, self.limit = [values], 2 * len(values)
                return
        self.held = 0
        if self.distinct is not None and (len(self.distinct[0]) > _MOST or self.edges is not None):
            self._count_between(*self.distinct)
            self.distinct = None

    def _count_between(self, values: Any, counts: Any = None) -> None:
        """Counts sorted values (each so many times) between the sample's edges, else some of the first to come."""
        if self.edges is None:
            self.edges = _edges(values) if self.bracket.edges is None else self.bracket.edges
            self.between, self.limit = np.zeros(len(self.edges) + 1, np.int64), _DISTINCT
        places = np.append(np.searchsorted(values, self.edges), len(values))
        self.between += np.diff(places if counts is None else np.append(0, np.cumsum(counts))[places], prepend=0)

    def resolve(self, rank: int) -> OrderStatistic | None:
        """The statistic, if this bracket holds the rank and what lies inside was kept."""
        if rank < self.below:
            return None
        if rank < self.below + self.at_low:
            return OrderStatistic(self.bracket.low + 0.0, self.below, self.at_low)
        self._compress(wholly=True)
        start = self.below + self.at_low
        if self.edges is not None:
            end = start + int(self.between.sum())
        else:
            values, counts = self.distinct if self.distinct is not None else (np.empty(0), np.empty(0, np.int64))
            ends = start + np.cumsum(counts)
            end = int(ends[-1]) if len(ends) else start
            if rank < end:
                place = int(np.searchsorted(ends, rank, "right"))
                return OrderStatistic(float(values[place]) + 0.0, int(ends[place] - counts[place]), int(counts[place]))
        if end <= rank < end + self.at_high:
            return OrderStatistic(self.bracket.high + 0.0, end, self.at_high)
        return None

    def around(self, rank: int) -> _Bracket | None:
        """The narrower bracket that holds the rank, if what lies inside was only counted and the rank is there."""
        if self.edges is None:
            return None
        ends = self.below + self.at_low + np.cumsum(self.between)
        if not self.below + self.at_low <= rank < ends[-1]:
            return None
        place = int(np.searchsorted(ends, rank, "right"))
        low = self.bracket.low if place == 0 else float(self.edges[place - 1])
        high = self.bracket.high if place == len(self.edges) else float(self.edges[place])
        return _Bracket(low, high)


def _merged(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
    values, where = np.unique(np.concatenate([one[0], other[0]]), return_inverse=True)
    counts = np.bincount(where, np.concatenate([one[1], other[1]]), len(values)).astype(np.int64)
    return values, counts


def _count(values: Tensor, brackets: Sequence[Sequence[_Bracket]]) -> list[list[_Count]]:
    """Counts against each bracket. On the CPU numpy does it: its comparisons and counts of bools are vectorised."""
    if values.device.type != "cpu":
        return _count_there(values.detach(), brackets)
    flat = values.detach().reshape(len(values), -1)
    if flat.dtype == torch.float32 and native.usable() and len(flat) <= native.MOST_TASKS and flat.shape[1]:
        stored = Stored("", 0, flat.shape[1], [row.contiguous() for row in flat], [native.AS_IS] * len(flat), None)
        return _of_native(native.count(stored, native.Values("value"), *_ends(brackets)), brackets)
    rows = flat.numpy()
    result = []
    for row, wanted in zip(rows, brackets):
        counts = []
        for bracket in wanted:
            low, high = row.dtype.type(bracket.low), row.dtype.type(bracket.high)
            above, under = row > low, row < high
            count = _Count(bracket)
            at_or_below = row.size - int(np.count_nonzero(above))
            count.at_low = int(np.count_nonzero(row == low)) if at_or_below else 0
            count.below = at_or_below - count.at_low
            if int(np.count_nonzero(under)) < row.size:
                count.at_high = int(np.count_nonzero(row == high))
            above &= under
            picked = row[above]
            if picked.size:
                count.inside, count.held = [picked], picked.size
            counts.append(count)
        result.append(counts)
    return result


def counted(
    stored: Stored, values: native.Values, brackets: Sequence[Sequence[_Bracket]], squares: Any = None
) -> tuple[list[list[_Count]], bool]:
    """Counts of a tile as it is stored, and whether its base is finite (looked at with `squares`)."""
    found = native.count(stored, values, *_ends(brackets), squares=squares)
    return _of_native(found, brackets), found.base_finite


def _ends(brackets: Sequence[Sequence[_Bracket]]) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    table = np.array([[(bracket.low, bracket.high) for bracket in row] for row in brackets], np.float32)
    return table[..., 0].copy(), table[..., 1].copy()


def _of_native(found: native.Counted, brackets: Sequence[Sequence[_Bracket]]) -> list[list[_Count]]:
    return [
        [
            _Count(bracket, below, at_low, at_high, [inside] if len(inside) else [], len(inside))
            for bracket, (below, at_low, at_high), inside in zip(wanted, rows, insides)
        ]
        for wanted, rows, insides in zip(brackets, found.counts.tolist(), found.inside)
    ]


def _count_there(values: Tensor, brackets: Sequence[Sequence[_Bracket]]) -> list[list[_Count]]:
    """The same where the values are: only counts and the few values inside come back."""
    told, picked = [], []
    for row, wanted in zip(values.reshape(len(values), -1), brackets):
        for bracket in wanted:
            low, high = (torch.full((), end, dtype=row.dtype, device=row.device) for end in (bracket.low, bracket.high))
            told.append(torch.stack([(row < low).sum(), (row == low).sum(), (row == high).sum()]))
            picked.append(row[(row > low) & (row < high)].cpu().numpy())
    tallies, insides = iter(torch.stack(told).tolist()), iter(picked)
    result = []
    for wanted in brackets:
        counts = []
        for bracket in wanted:
            below, at_low, at_high = next(tallies)
            inside = next(insides)
            found = _Count(bracket, below, at_low, at_high)
            if inside.size:
                found.inside, found.held = [inside], inside.size
            counts.append(found)
        result.append(counts)
    return result


def _joined(one: list[list[_Count]], other: list[list[_Count]]) -> list[list[_Count]]:
    return [[a.join(b) for a, b in zip(row, late)] for row, late in zip(one, other)]


# -- the fall-back -----------------------------------------------------------------------------------------------------


def radix_statistics(of: Callable[[Tile], Tensor], ranks: Sequence[Sequence[int]]) -> SubPlan:
    """Exact order statistics for any input by counting the ordered bits of the floats, 16 at a time.

    Returns:
        For each row a mapping from rank to `OrderStatistic`. Passes: 2 for float32, 4 for float64.
    """
    prefixes: list[dict[int, tuple[int, int]]] = [dict.fromkeys(wanted, (0, 0)) for wanted in ranks]
    counts: list[dict[int, int]] = [{} for _ in ranks]
    dtype: list[torch.dtype] = []
    level = 0
    while not dtype or level < dtype[0].itemsize // 2:
        wanted = [sorted({prefix for prefix, _ in row.values()}) for row in prefixes]

        def of_level(tile: Tile, wanted: list[list[int]] = wanted, level: int = level) -> list[dict[int, Any]]:
            values = of(tile).detach().to("cpu")
            values = values.reshape(len(values), -1)  # stages that see tensors whole give them in their shapes
            if not dtype:
                dtype.append(values.dtype)
            return [_digits(row, level, prefixes_) for row, prefixes_ in zip(values.numpy(), wanted)]

        histograms = yield Fold(of_level, _added)
        for row, (states, found) in enumerate(zip(prefixes, counts)):
            for rank, (prefix, below) in states.items():
                histogram = histograms[row][prefix]
                ends = below + np.cumsum(histogram)
                digit = int(np.searchsorted(ends, rank, "right"))
                states[rank] = (prefix << 16 | digit, int(ends[digit] - histogram[digit]))
                found[rank] = int(histogram[digit])
        level += 1
    return [
        {rank: OrderStatistic(_value(key, dtype[0]), below, found[rank]) for rank, (key, below) in states.items()}
        for states, found in zip(prefixes, counts)
    ]


def _keys(row: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Unsigned integers in the order of the floats; -0.0 counts as +0.0."""
    kind = np.uint32 if row.dtype == np.float32 else np.uint64
    raw = (row + row.dtype.type(0)).view(kind)
    top = kind(1 << (8 * row.dtype.itemsize - 1))
    return np.where(raw & top, ~raw, raw | top)


def _digits(row: "np.ndarray[Any, Any]", level: int, prefixes: Sequence[int]) -> dict[int, Any]:
    keys = _keys(row)
    width = 8 * row.dtype.itemsize
    digits = ((keys >> keys.dtype.type(width - 16 * (level + 1))) & keys.dtype.type(0xFFFF)).astype(np.int64)
    if level == 0:
        return {0: np.bincount(digits, minlength=65536)}
    heads = keys >> keys.dtype.type(width - 16 * level)
    return {prefix: np.bincount(digits[heads == prefix], minlength=65536) for prefix in prefixes}


def _added(one: list[dict[int, Any]], other: list[dict[int, Any]]) -> list[dict[int, Any]]:
    return [{prefix: a[prefix] + b[prefix] for prefix in a} for a, b in zip(one, other)]


def _value(key: int, dtype: torch.dtype) -> float:
    kind, floats = (np.uint32, np.float32) if dtype == torch.float32 else (np.uint64, np.float64)
    width = 8 * dtype.itemsize
    raw = key ^ (1 << (width - 1)) if key >> (width - 1) else ~key & ((1 << width) - 1)
    return float(np.array(raw, kind).view(floats)) + 0.0
