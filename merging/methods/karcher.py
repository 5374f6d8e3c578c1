"""The Karcher mean: the point of the sphere nearest to all models."""

from typing import Any

import numpy as np
from torch import Tensor

from merging.method import Count, Positive, merge_method, task_weights
from merging.sphere import Centre, Sphere, combination, settle
from taskvec.deltas import Deltas, Tile
from taskvec.moments import gram
from taskvec.plan import Plan, Report, formula


@merge_method("karcher", paper="arXiv:2603.04972", space="weight", either_space=True, statistics="tensor", passes=2)
def karcher(deltas: Deltas, *, steps: Count = 10, tolerance: Positive = 1e-5) -> Plan:
    """Average directions by the Riemannian centre of mass on the sphere, and lengths by themselves.

    Args:
        steps: most iterations (mergekit's `max_iter`).
        tolerance: length of the mean tangent at which the iteration ends (mergekit's `tol`).

    All iterates lie in the span of the models, so the iteration runs on their inner products alone. Task weights weigh
    the mean (mergekit's are all equal). Where directions cancel, the plain weighted mean is taken, with a warning.
    Passes: 1 for the inner products, 1 to merge.

    Raises:
        ParameterError: the task weights add up to zero.
    """

    def walk(sphere: Sphere, points: Any, shares: Any) -> Any:
        shares = sphere.among_directed(shares)
        for _ in range(steps):
            tangents = sphere.tangent(points, shares, logarithm=True)
            lengths = sphere.norms(tangents)
            moving = lengths >= tolerance  # those that have arrived stay, whatever the others do
            if not moving.any():
                break
            points = np.where(moving, sphere.step(points, tangents, lengths), points)
        return points

    centre = Centre("karcher", (yield from gram(len(deltas.tasks))), walk)
    yield Report(centre.facts)

    @formula("combination", coefficients=centre.coefficients, of=centre, together=settle)
    def kernel(tile: Tile) -> Tensor:
        return combination(tile.stack, centre.coefficients(task_weights(tile, "karcher")))

    return kernel
