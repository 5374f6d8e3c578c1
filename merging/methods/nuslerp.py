"""Spherical interpolation of two models by their weights."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from merging.method import merge_method, task_weights
from merging.sphere import arc, combination
from taskvec.deltas import Deltas, Tile
from taskvec.errors import ParameterError
from taskvec.moments import gram
from taskvec.plan import Plan, formula
from taskvec.precision import cancelled


@merge_method(
    "nuslerp",
    paper="doi:10.1145/325334.325242",
    space="weight",
    either_space=True,
    statistics="tensor",
    tasks=(2, 2),
    passes=2,
    whole_if=lambda given: given.get("by", "tensor") != "tensor",
)
def nuslerp(deltas: Deltas, *, by: Literal["tensor", "row", "column"] = "tensor") -> Plan:
    """Interpolate two models along the great circle between them, as far as their task weights say.

    Args:
        by: what one vector is: a whole tensor (the whole model with `statistics: model`), each row, or each column
            (what mergekit's `nuslerp_row_wise` does, despite its name).

    The position is w_2 / (w_1 + w_2). Where the two point the same or the opposite way (sine under 1e-8) the way is a
    straight line; a vector of zeros counts as at a right angle, as in mergekit. On differences to a base instead of
    weights it interpolates task vectors.
    Passes: 1 for the angle, 1 to merge; by row or column: 1, each tensor whole.

    Raises:
        ParameterError: the two weights add up to zero.
    """
    products = (yield from gram(2)) if by == "tensor" else None

    def position_of(weights: Sequence[float]) -> float:
        one, two = weights
        if cancelled(torch.tensor([one, two], dtype=torch.float64)):
            raise ParameterError("the two task weights add up to zero; nuslerp needs their ratio")
        return two / (one + two)

    def coefficients(weights: Sequence[float]) -> list[float]:
        assert products is not None
        first, second = arc(products[[0, 0, 1], [0, 1, 1]][:, None], position_of(weights))
        return [float(first), float(second)]

    def kernel(tile: Tile) -> Tensor:
        weights = task_weights(tile, "nuslerp")
        a = tile.stack[0]
        if products is not None:
            return combination(tile.stack, coefficients(weights))
        position = position_of(weights)
        axis = -1 if by == "row" or a.ndim < 2 else 0
        wide = tile.stack.double()
        inner = torch.stack([(wide[i] * wide[j]).sum(axis, keepdim=True) for i, j in ((0, 0), (0, 1), (1, 1))])
        first, second = arc(inner, position)
        return (wide[0] * first).add_(wide[1] * second).to(a.dtype)

    return kernel if products is None else formula("combination", coefficients=coefficients)(kernel)
