"""Geometry of a few vectors on a sphere, in the coordinates that their inner products give.

A point is a row of coefficients over the T unit vectors u_i; everything follows from their T × T Gram matrix in
float64, so vectors of any length are interpolated in two passes over them, however many steps an iteration takes. All
tensors of a model are such sets of vectors, and their points move together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskvec.errors import ParameterError
from taskvec.precision import cancelled

_TINY = float(np.finfo(np.float64).tiny)


class Sphere:
    """The directions of T vectors, for any number of sets of them at once. Vectors of length zero have none.

    Args:
        grams: their inner products, float64 [set, task, task].
    """

    def __init__(self, grams: Any):
        self.lengths = np.sqrt(np.maximum(np.diagonal(grams, axis1=1, axis2=2), 0.0))
        self.directed = self.lengths > 0
        safe = np.where(self.directed, self.lengths, 1.0)
        self.units = grams / (safe[:, :, None] * safe[:, None, :])

    def only(self, these: Any) -> "Sphere":
        """Some of the sets."""
        part = object.__new__(Sphere)
        part.lengths, part.directed, part.units = self.lengths[these], self.directed[these], self.units[these]
        return part

    def cosines(self, points: Any) -> Any:
        """Inner products of combinations of the unit vectors, [set, task], with each of these."""
        return (self.units * points[:, None, :]).sum(2)

    def norms(self, points: Any) -> Any:
        """Lengths of combinations of the unit vectors, [set, 1]."""
        return np.sqrt(np.maximum((points * self.cosines(points)).sum(1, keepdims=True), 0.0))

    def mean(self, shares: Any) -> tuple[Any, Any]:
        """The weighted means of the directions, on the sphere, and where they do not vanish (opposite directions)."""
        total = np.where(self.directed, shares, 0.0)
        length = self.norms(total)
        there = (length >= 1e-8 * np.abs(total).sum(1, keepdims=True)) & (length > 0)
        return total / np.where(there, length, 1.0), there[:, 0]

    def tangent(self, points: Any, shares: Any, *, logarithm: bool) -> Any:
        """The weighted mean of what leads from a point to the directions.

        Args:
            logarithm: whether steps have the length of the arc (the logarithm map) or that of the projection.
        """
        cosines = np.minimum(np.maximum(self.cosines(points), -1.0), 1.0)
        factors = np.where(self.directed, shares, 0.0)
        if logarithm:
            sines = np.sqrt(1.0 - cosines**2)
            near = sines <= 1e-12
            factors = factors * np.where(near, 1.0, np.arctan2(sines, cosines) / np.where(near, 1.0, sines))
        return factors - (factors * cosines).sum(1, keepdims=True) * points

    def among_directed(self, shares: Any) -> Any:
        """The shares of the vectors that have a direction, adding up to one again where that is possible."""
        those = np.where(self.directed, shares, 0.0)
        total = those.sum(1, keepdims=True)
        return those / np.where(total == 0, 1.0, total)

    def step(self, points: Any, tangents: Any, lengths: Any) -> Any:
        """The exponential map: from points along great circles, by tangents of these lengths, [set, 1]."""
        moved = np.cos(lengths) * points + np.sin(lengths) / np.maximum(lengths, _TINY) * tangents
        return moved / np.maximum(self.norms(moved), _TINY)

    def coefficients(self, points: Any, lengths: Any) -> Any:
        """What to multiply the vectors with to stand at these points, at these distances from the origin, [set, 1]."""
        return np.where(self.directed, points * lengths / np.where(self.directed, self.lengths, 1.0), 0.0)


Walk = Callable[[Sphere, Any, Any], Any]
"""From the weighted mean directions of several sets, and the shares of their vectors, to the points that are wanted."""


class Centre:
    """A point among T vectors by their directions and, apart from those, their lengths: what to multiply them with.

    Args:
        method: what asks, for messages.
        gram: inner products of the vectors, float64 [task, task].
        walk: from the mean direction to the wanted one; the same for all centres of a merge.
        normalize: whether weights are divided by their sum.
    """

    def __init__(self, method: str, gram: Tensor, walk: Walk, *, normalize: bool = True):
        self._method, self._products, self._walk, self._normalize = method, gram.double().cpu().numpy(), walk, normalize
        self._known: dict[tuple[float, ...], list[float]] = {}
        self._cancel = False

    def coefficients(self, weights: Sequence[float]) -> list[float]:
        """One number for each vector.

        Raises:
            ParameterError: the weights add up to zero.
        """
        if tuple(weights) not in self._known:
            settle([(self, weights)])
        return self._known[tuple(weights)]

    def facts(self) -> dict[str, Any]:
        """A warning where directions cancelled each other."""
        what = "mean" if self._normalize else "sum"
        return {"warnings": [f"directions cancel each other: the plain weighted {what} is taken"] * self._cancel}

    def _shares(self, weights: Sequence[float]) -> Any:
        shares = shares_of(weights)
        if shares is None:
            raise ParameterError(f"the task weights add up to zero; {self._method} needs their proportions")
        return shares if self._normalize else np.asarray(weights, np.float64)


def settle(asked: Sequence[tuple[Centre, Sequence[float]]]) -> None:
    """Finds the coefficients of several centres of one merge at once; asking each for them costs nothing then."""
    shares = np.stack([centre._shares(weights) for centre, weights in asked])
    sphere = Sphere(np.stack([centre._products for centre, _ in asked]))
    points, there = sphere.mean(shares)
    found = shares.copy()
    if there.any():
        part = sphere if there.all() else sphere.only(there)
        points = asked[0][0]._walk(part, points[there], shares[there])
        found[there] = part.coefficients(points, (shares[there] * part.lengths).sum(1, keepdims=True))
    for (centre, weights), numbers, fine, directed in zip(asked, found, there, sphere.directed):
        centre._known[tuple(weights)] = numbers.tolist()
        centre._cancel |= not fine and bool(directed.any())


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
