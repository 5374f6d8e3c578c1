"""Kernels and plans: how a method asks for statistics of the whole model without ever holding it.

A plan is a generator. Each `yield Fold(...)` is one pass over all tiles and gives back the joined result; `yield
Sample(...)` gives back a small stratified sample and is no pass; `yield Report(...)` records facts for the provenance.
What the plan returns is the kernel that makes merged tiles. A method without statistics returns its kernel directly.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from taskvec.deltas import Tile

Kernel = Callable[[Tile], Tensor]


@dataclass(frozen=True, slots=True)
class Fold:
    """One pass over the deltas.

    Attributes:
        of: a partial result from one tile.
        join: two partial results into one. Must not depend on the order (counts, extremes, exact sums), since tiles
            are visited by several threads; then tiling, sharding and threads never change a result.
    """

    of: Callable[[Tile], Any]
    join: Callable[[Any, Any], Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """A stratified sample of `size` elements (all of them when there are fewer): blocks evenly spread over the deltas.

    Gives back `(values, whole)`: what `of` returned for the sampled blocks, side by side along the last dimension in
    the order of the deltas, and whether that is every element.
    """

    of: Callable[[Tile], Tensor]
    size: int


@dataclass(frozen=True, slots=True)
class Report:
    """Facts worth keeping: thresholds, kept fractions, warnings (under the key "warnings").

    Attributes:
        facts: the facts, or a function that gives them when the merge is done (for what kernels find on the way).
    """

    facts: Mapping[str, Any] | Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Formula:
    """What a function of tiles computes, in words: an engine that knows a faster form of it may run that instead.

    Attributes:
        name: which function; its meaning never changes.
        numbers: what it depends on beside the tile.
    """

    name: str
    numbers: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Selection:
    """Asks for exact order statistics of a formula's rows over all deltas; the answer None means: not known here.

    Attributes:
        of: the values, [task, n] for each tile.
        ranks: for each task the wanted ranks, counted from 0.
    """

    of: Formula
    ranks: Sequence[Sequence[int]]


Function = TypeVar("Function", bound=Callable[..., Any])


def formula(name: str, **numbers: Any) -> Callable[[Function], Function]:
    """Says of a function of tiles what it computes. The function itself stays the definition."""

    def declare(function: Function) -> Function:
        function.__dict__["formula"] = Formula(name, numbers)
        return function

    return declare


def formula_of(function: Callable[..., Any]) -> Formula | None:
    """What a function was said to compute, if anything."""
    return getattr(function, "__dict__", {}).get("formula")


Plan = Generator[Fold | Sample | Selection | Report, Any, Kernel]
SubPlan = Generator[Fold | Sample | Selection | Report, Any, Any]
