"""Geometry of a few vectors on a sphere, in the coordinates that their inner products give.

A point is a list of coefficients over the T unit vectors u_i; everything follows from their T × T Gram matrix in
float64, so vectors of any length are interpolated in two passes over them, however many steps an iteration takes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskvec.precision import cancelled

Point = "np.ndarray[Any, np.dtype[np.float64]]"


class Sphere:
    """The directions of T vectors. Vectors of length zero have none and take no part in directions.

    Args:
        gram: their inner products, float64 [task, task].
    """

    def __init__(self, gram: Tensor):
        products = gram.double().cpu().numpy()
        self.lengths = np.sqrt(np.clip(np.diag(products), 0.0, None))
        self.directed = self.lengths > 0
        safe = np.where(self.directed, self.lengths, 1.0)
        self.units = products / np.outer(safe, safe)

    def norm(self, point: Any) -> float:
        """Length of a combination of the unit vectors."""
        return math.sqrt(max(0.0, float(point @ self.units @ point)))

    def mean(self, shares: Any) -> Any:
        """The weighted mean of the directions, on the sphere; None where it vanishes (opposite directions)."""
        total = np.where(self.directed, shares, 0.0)
        length = self.norm(total)
        return None if length < 1e-8 * float(np.abs(total).sum()) or length == 0 else total / length

    def tangent(self, point: Any, shares: Any, *, logarithm: bool) -> Any:
        """The weighted mean of what leads from a point to the directions.

        Args:
            logarithm: whether steps have the length of the arc (the logarithm map) or that of the projection.
        """
        cosines = np.clip(self.units @ point, -1.0, 1.0)
        factors = np.where(self.directed, shares, 0.0)
        if logarithm:
            sines = np.sqrt(1.0 - cosines**2)
            near = sines <= 1e-12
            factors = factors * np.where(near, 1.0, np.arctan2(sines, cosines) / np.where(near, 1.0, sines))
        return factors - float(factors @ cosines) * point

    def among_directed(self, shares: Any) -> Any:
        """The shares of the vectors that have a direction, adding up to one again where that is possible."""
        those = np.where(self.directed, shares, 0.0)
        total = float(those.sum())
        return those / total if total else those

    def step(self, point: Any, tangent: Any) -> Any:
        """The exponential map: from a point along a great circle."""
        length = self.norm(tangent)
        if length == 0:
            return point
        moved = math.cos(length) * point + math.sin(length) / length * tangent
        return moved / self.norm(moved)

    def coefficients(self, point: Any, length: float) -> list[float]:
        """What to multiply the vectors with to stand at this point, at this distance from the origin."""
        return [
            float(c) * length / float(n) if there else 0.0 for c, n, there in zip(point, self.lengths, self.directed)
        ]


def combination(stack: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Σ c_i v_i, in task order."""
    total = stack[0] * coefficients[0]
    for row, coefficient in zip(stack[1:], coefficients[1:]):
        total.add_(row, alpha=coefficient)
    return total


def shares_of(weights: Sequence[float]) -> Any:
    """Weights divided by their sum; None where it is zero but for rounding."""
    values = np.asarray(weights, np.float64)
    return None if cancelled(torch.from_numpy(values)) else values / float(values.sum())


def arc(products: Tensor, position: "float | Tensor", collinear: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Coefficients of spherical interpolation between two vectors, for many pairs at once.

    A vector of zeros has no direction and counts as at a right angle to any other (as in mergekit), so what is left is
    the other times the sine of its share of a quarter turn.

    Args:
        products: inner products ⟨a,a⟩, ⟨a,b⟩, ⟨b,b⟩, float64 [3, pair].
        position: on the way from a (0) to b (1).
        collinear: sine of the angle below which the way is a straight line.

    Returns:
        The coefficients of a and of b, float64 [pair].
    """
    lengths = (products[0].clamp(min=0) * products[2].clamp(min=0)).sqrt()
    cosine = (products[1] / lengths.where(lengths > 0, 1.0)).clamp(-1, 1).where(lengths > 0, 0.0)
    sine = (1 - cosine.square()).clamp(min=0).sqrt()
    straight = sine < collinear
    angle, safe = cosine.acos(), sine.where(~straight, 1.0)
    first = (((1 - position) * angle).sin() / safe).where(~straight, 1 - position)
    second = ((position * angle).sin() / safe).where(~straight, position)
    return first, second
