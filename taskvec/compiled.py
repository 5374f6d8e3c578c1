"""Which chains of kernels the compiled CPU passes know, and with which numbers.

Plans say what their functions of tiles compute (`taskvec.plan.formula`). Where every link of a chain is known, whole
tiles go from their stored form to the output's in one call; a method's file is the same either way.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskvec import native
from taskvec.draws import keys, limit
from taskvec.native import Combination, Step, Values
from taskvec.plan import Formula
from taskvec.precision import cancelled

_STEPS = ("trim", "band", "drop", "factors")
_WHOLE = ("pcb", "sce")  # their statistics are those of the deltas themselves
_SUMS = ("weighted sum", "weighted mean", "plain mean", "combination")


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of formulas that can be compiled: steps of preprocessing, one combination, perhaps a scale."""

    ranked: Formula | None
    steps: Sequence[Formula]
    combine: Formula
    scale: float | None

    @classmethod
    def of(cls, told: Sequence[Formula | None]) -> "Chain | None":
        """The chain; None where a link is not known here."""
        formulas = [link for link in told if link is not None]
        if not formulas or len(formulas) != len(told):
            return None
        scale = None
        if formulas[-1].name == "scale":
            scale = float(formulas.pop().numbers["scale"])
        ranked = formulas.pop(0) if formulas and formulas[0].name == "rank drop" else None
        if not formulas or any(link.name not in _STEPS for link in formulas[:-1]):
            return None
        if formulas[-1].name not in (*_SUMS, "ties", "pcb", "sce") or (
            (ranked or formulas[:-1]) and formulas[-1].name in _WHOLE
        ):
            return None
        return cls(ranked, formulas[:-1], formulas[-1], scale)

    def width(self, shape: Sequence[int]) -> int:
        """Elements that a tile must hold whole: a row where entries are ranked within rows, else one."""
        return max(1, math.prod(shape[1:] if len(shape) > 1 else shape)) if self.ranked else 1

    def at(
        self,
        name: str,
        start: int,
        tasks: Sequence[str],
        weights: Tensor,
        *,
        onto_base: bool,
        scale: float = 1.0,
        width: int = 1,
    ) -> Combination | None:
        """What the chain does to a tile; None where its weights are not one number for each task.

        Args:
            start: the tile's first element.
            weights: the task weights that hold there.
            onto_base: whether the result goes onto the base.
            scale: a further factor of the result.
            width: elements of a row, where entries are ranked within rows.

        Raises:
            whatever the chain's own functions raise for these weights.
        """
        if weights.ndim != 1:
            return None
        how = self._combination(name, start, tasks, weights, onto_base=onto_base, scale=scale)
        if how is None or self.ranked is None:
            return how
        ranked = [_ranked(self.ranked.numbers, name, start, task, place, width) for place, task in enumerate(tasks)]
        return replace(how, ranked=ranked, width=width)

    def _combination(
        self, name: str, start: int, tasks: Sequence[str], weights: Tensor, *, onto_base: bool, scale: float
    ) -> Combination | None:
        numbers = self.combine.numbers
        steps = [_step(link, name, start, tasks) for link in self.steps]
        factors = [factor for factor in (self.scale, None if scale == 1.0 else scale) if factor is not None]
        if len(factors) > 1:
            return None
        last = factors[0] if factors else None
        own = [float(weight) for weight in weights]
        if self.combine.name == "ties":
            if any(weight < 0 for weight in own):
                return None  # compiled code takes the unweighted value's sign
            if any(threshold > 0 for threshold in numbers["thresholds"]):
                steps.append(Step("trim", low=numbers["thresholds"]))
            kind = "ties mean" if numbers["normalize"] else "ties sum"
            return Combination(kind, own, steps, scale=last, onto_base=onto_base)  # type: ignore[arg-type]
        if self.combine.name == "pcb":
            return Combination(
                "pcb", own, scale=last, onto_base=onto_base, keeps=numbers["keeps"], low=numbers["low"],
                high=numbers["high"], cut=numbers["cut"], top=numbers["top"],
            )  # fmt: skip
        if self.combine.name == "sce":
            # in single precision one after the other, as the kernel multiplies
            own = [float(np.float32(weight) * np.float32(share)) for weight, share in zip(own, numbers["shares"])]
            return Combination("sce", own, scale=last, onto_base=onto_base, least=numbers["least"])
        divisor = factor = None
        if self.combine.name == "weighted mean":
            divisor = float(weights.double().sum(0))
            if cancelled(weights):
                return None  # the kernel itself refuses, in its own words
        elif self.combine.name == "plain mean":
            numbers["seen"](own)
            own, divisor, factor = [1.0] * len(tasks), float(len(tasks)), numbers.get("factor")
        elif self.combine.name == "combination":
            coefficients: Callable[[Sequence[float]], Sequence[float]] = numbers["coefficients"]
            own = list(coefficients([float(weight) for weight in weights.double()]))
        return Combination("weighted sum", own, steps, divisor, factor, last, onto_base)


def values_of(told: Formula) -> Values | None:
    """Of what a formula's order statistics are taken; None where that is not known here."""
    if told.name in ("magnitude", "variance"):
        return Values(told.name)  # type: ignore[arg-type]
    if told.name == "pcb score":
        return Values("pcb score", tuple(told.numbers["low"]), tuple(told.numbers["high"]))
    return None


def pcb_scores(stack: Tensor, low: Sequence[float], high: Sequence[float]) -> Tensor | None:
    """PCB's scores of a stack, [task, *shape], by compiled code; None where it cannot take it.

    The compiled exponentials are not torch's to the last bit, so whoever compares scores must take all of them here.
    """
    known = stack.dtype == torch.float32 and stack.device.type == "cpu" and native.usable()
    if not known or len(stack) > native.MOST_TASKS or not stack.numel():
        return None
    flat = stack.reshape(len(stack), -1)
    rows: list[Tensor | None] = [row.contiguous() for row in flat]
    stored = native.Stored("", 0, flat.shape[1], rows, [native.AS_IS] * len(rows), None)
    return native.listed(stored, Values("pcb score", tuple(low), tuple(high))).view(stack.shape)


def _ranked(
    numbers: Mapping[str, Any], name: str, start: int, task: str, place: int, width: int
) -> native.Ranked | None:
    density, spread = numbers["densities"][place], numbers["spreads"][place]
    if density == 1:
        return None
    slope, least = (2 * spread / (width - 1), density - spread) if width > 1 else (0.0, density)
    return native.Ranked(keys(numbers["seed"], task, name, start >> 32), slope, least, numbers["rescale"])


def _step(link: Formula, name: str, start: int, tasks: Sequence[str]) -> Step:
    numbers: Mapping[str, Any] = link.numbers
    if link.name == "trim":
        return Step("trim", low=numbers["thresholds"])
    factors = numbers["factors"]  # read now: plans may fill them in after they made the kernel
    scaled = tuple(factors) if any(factor != 1 for factor in factors) else ()
    if link.name == "factors":
        return Step("band", [0.0] * len(tasks), [math.inf] * len(tasks), scaled)
    if link.name == "band":
        return Step("band", low=numbers["low"], high=numbers["high"], factor=scaled)
    drawn = [keys(numbers["seed"], task, name, start >> 32) for task in tasks]
    return Step(
        "drop",
        factor=scaled,
        add=[add for add, _ in drawn],
        multiply=[multiply for _, multiply in drawn],
        limit=[limit(density) for density in numbers["densities"]],
    )
