"""Spherical interpolation of any number of models."""

from functools import cache

import numpy as np
from torch import Tensor

from merging.method import merge_method, task_weights
from merging.sphere import Sphere, combination, shares_of
from taskvec.deltas import Deltas, Tile
from taskvec.errors import ParameterError
from taskvec.moments import gram
from taskvec.plan import Plan, Report, formula


@merge_method(
    "multislerp",
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    space="weight",
    either_space=True,
    statistics="tensor",
    passes=2,
)
def multislerp(deltas: Deltas, *, normalize: bool = True) -> Plan:
    """Average directions on the sphere by one step from their mean, and lengths by themselves.

    Args:
        normalize: divide the task weights by their sum (mergekit's `normalize_weights`).

    The weighted mean m of the unit vectors is put on the sphere; the weighted mean of the tangents u_i - ⟨u_i, m⟩ m is
    followed along the great circle; the result has the weighted mean length. Only inner products are needed.
    Where directions cancel, the plain weighted sum is taken, with a warning. Passes: 1 for those, 1 to merge.

    Raises:
        ParameterError: the task weights add up to zero.
    """
    sphere = Sphere((yield from gram(len(deltas.tasks))))
    warnings: list[str] = []
    yield Report(lambda: {"warnings": sorted(set(warnings))})

    @cache
    def coefficients(weights: tuple[float, ...]) -> list[float]:
        shares = shares_of(weights)
        if shares is None:
            raise ParameterError("the task weights add up to zero; multislerp needs their proportions")
        if not normalize:
            shares = np.asarray(weights, np.float64)
        point = sphere.mean(shares)
        if point is None:
            if sphere.directed.any():
                warnings.append("directions cancel each other: the plain weighted sum is taken")
            return [float(share) for share in shares]
        point = sphere.step(point, sphere.tangent(point, shares, logarithm=False))
        return sphere.coefficients(point, float(shares @ sphere.lengths))

    @formula("combination", coefficients=lambda weights: coefficients(tuple(weights)))
    def kernel(tile: Tile) -> Tensor:
        return combination(tile.stack, coefficients(tuple(task_weights(tile, "multislerp"))))

    return kernel
