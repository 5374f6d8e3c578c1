"""The Karcher mean: the point of the sphere nearest to all models."""

from functools import cache

from torch import Tensor

from merging.method import Count, Positive, merge_method, task_weights
from merging.sphere import Sphere, combination, shares_of
from taskvec.deltas import Deltas, Tile
from taskvec.errors import ParameterError
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
    sphere = Sphere((yield from gram(len(deltas.tasks))))
    warnings: list[str] = []
    yield Report(lambda: {"warnings": sorted(set(warnings))})

    @cache
    def coefficients(weights: tuple[float, ...]) -> list[float]:
        shares = shares_of(weights)
        if shares is None:
            raise ParameterError("the task weights add up to zero; karcher needs their proportions")
        point = sphere.mean(shares)
        if point is None:
            if sphere.directed.any():
                warnings.append("directions cancel each other: the plain weighted mean is taken")
            return [float(share) for share in shares]
        directed = sphere.among_directed(shares)
        for _ in range(steps):
            tangent = sphere.tangent(point, directed, logarithm=True)
            if sphere.norm(tangent) < tolerance:
                break
            point = sphere.step(point, tangent)
        return sphere.coefficients(point, float(shares @ sphere.lengths))

    @formula("combination", coefficients=lambda weights: coefficients(tuple(weights)))
    def kernel(tile: Tile) -> Tensor:
        return combination(tile.stack, coefficients(tuple(task_weights(tile, "karcher"))))

    return kernel
