"""Spherical interpolation of two models."""

import math
from collections.abc import Sequence

from torch import Tensor

from merging.method import Fraction, Unweighted, merge_method
from taskvec.deltas import Deltas, Tile
from taskvec.moments import gram
from taskvec.plan import Plan, Report, formula


@merge_method("slerp", paper="doi:10.1145/325334.325242", space="weight", statistics="tensor", tasks=(2, 2), passes=2)
def slerp(deltas: Deltas, *, t: Fraction = 0.5, collinear: Fraction = 0.9995) -> Plan:
    """Interpolate two models along the great circle between them.

    Args:
        t: position on the way from the first model (0) to the second (1).
        collinear: absolute cosine above which the way is a straight line (the arc is then ill-conditioned).

    Each tensor is one vector by default; with `statistics: model` the whole model is. Lengths are interpolated as the
    formula of Shoemake does it: sin((1-t)φ)/sin φ and sin(tφ)/sin φ are applied to the models as they are.
    A vector of zeros counts as at a right angle to any other, as in mergekit. Task weights have no meaning here; given
    ones are warned of. Passes: 1 for the angle, 1 to merge.
    """
    weights = Unweighted()
    yield Report(weights.facts)
    products = yield from gram(2)
    lengths = math.sqrt(float(products[0, 0] * products[1, 1]))
    cosine = float(products[0, 1]) / lengths if lengths else 0.0
    if abs(cosine) > collinear:
        first, second = 1 - t, t
    else:
        angle = math.acos(cosine)
        first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

    def coefficients(given: Sequence[float]) -> list[float]:
        weights.given(given)
        return [first, second]

    @formula("combination", coefficients=coefficients)
    def kernel(tile: Tile) -> Tensor:
        weights.look(tile)
        return (tile.stack[0] * first).add_(tile.stack[1], alpha=second)

    return kernel
