"""Spherical interpolation of any number of models."""

from typing import Any

from torch import Tensor

from merging.method import merge_method, task_weights
from merging.sphere import Centre, Sphere, combination, settle
from taskvec.deltas import Deltas, Tile
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

    def walk(sphere: Sphere, points: Any, shares: Any) -> Any:
        tangents = sphere.tangent(points, shares, logarithm=False)
        return sphere.step(points, tangents, sphere.norms(tangents))

    centre = Centre("multislerp", (yield from gram(len(deltas.tasks))), walk, normalize=normalize)
    yield Report(centre.facts)

    @formula("combination", coefficients=centre.coefficients, of=centre, together=settle)
    def kernel(tile: Tile) -> Tensor:
        return combination(tile.stack, centre.coefficients(task_weights(tile, "multislerp")))

    return kernel
