"""Model Stock: between the base and the average, as far as the angles say."""

from typing import Literal

import torch
from torch import Tensor

from merging.method import Unweighted, merge_method
from taskvec.deltas import Deltas, Tile
from taskvec.moments import gram
from taskvec.plan import Plan, Report, formula

_LEAST = 1e-6  # mergekit's floor of the product of norms and of the denominator


@merge_method(
    "model_stock",
    paper="arXiv:2403.19522",
    statistics="tensor",
    tasks=(2, None),
    passes=2,
    whole_if=lambda given: given.get("by", "tensor") != "tensor",
)
def model_stock(deltas: Deltas, *, by: Literal["tensor", "row"] = "tensor") -> Plan:
    """Shrink the average of the task vectors to the point nearest to the centre that their angles betray.

    Args:
        by: whether the angle is that of each tensor (the whole model with `statistics: model`) or of each row
            (mergekit's `filter_wise`).

    With c the mean cosine between the N task vectors the result is t times their mean, t = N c / (1 + (N - 1) c).
    Task weights have no meaning here; given ones are warned of. Passes: 1 for the angles, 1 to merge.
    """
    count = len(deltas.tasks)
    weights = Unweighted()
    yield Report(weights.facts)

    def ratio(products: Tensor) -> Tensor:
        """T from inner products [task, task, …]."""
        lengths = torch.diagonal(products).movedim(-1, 0).clamp(min=0).sqrt()
        total = torch.zeros_like(products[0, 0])
        for i in range(count):
            for j in range(i):
                total += products[i, j] / (lengths[i] * lengths[j]).clamp(min=_LEAST)
        cosine = total / (count * (count - 1) / 2)
        below = 1 + (count - 1) * cosine
        return torch.where(below.abs() < _LEAST, 0.0, count * cosine / below.where(below.abs() >= _LEAST, 1.0))

    share = float("nan")
    if by == "tensor":
        share = float(ratio((yield from gram(count))))
        yield Report({"share": share})

    def kernel(tile: Tile) -> Tensor:
        weights.look(tile)
        mean = tile.total(weighted=False).div_(count)
        if by == "tensor":
            return mean.mul_(share)
        rows = tile.stack.reshape(count, -1 if tile.stack.ndim > 2 else 1, tile.shape[-1] if tile.shape else 1)
        wide = rows.double()
        products = torch.stack([torch.stack([(a * b).sum(-1) for b in wide]) for a in wide])
        shares = ratio(products)[:, None]
        return mean.reshape(rows.shape[1:]).double().mul_(shares).to(mean.dtype).reshape(mean.shape)

    return formula("plain mean", factor=share, seen=weights.given)(kernel) if by == "tensor" else kernel
