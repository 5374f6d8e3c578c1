"""KnOTS: align LoRA updates in one basis, then merge."""

from typing import Literal

import torch
from torch import Tensor

from merging.method import Patterns, Share, merge_method, plain_mean, weighted
from merging.spectra import RankWatch, is_weight_matrix, precision_of, svd, without_matrices
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Plan, Report


@merge_method("knots", paper="arXiv:2410.19735", unit="tensor", copies=44, cost="1 SVD of [m, T n] per matrix")
def knots(
    deltas: Deltas,
    *,
    rule: Literal["ties", "mean"] = "ties",
    density: Share = 0.2,
    averaged: Patterns = (),
) -> Plan:
    """Write all updates in one common basis and merge their coordinates there, by TIES or by their mean.

    Args:
        rule: how the V_t are merged: `ties` trims, elects signs and averages those that agree; `mean` averages (which
            is the mean of the updates).
        density: fraction of each V_t's entries that TIES keeps, by magnitude, in each matrix.
        averaged: patterns of matrices that are averaged like all other tensors.

    [Δ_1 … Δ_T] = U Σ [V_1ᵀ … V_Tᵀ]; the result is U Σ V_mergedᵀ. Made for LoRA, whose updates share no basis; works on
    dense ones too. `scale` is the paper's λ. A task weight scales its task vector.
    Differs from the authors' code: coordinates of directions that are zero up to rounding take no part in trimming,
    and trimming is by matrix, where theirs is over all matrices together.
    """
    watch = RankWatch("only the coordinates within it are merged", without_matrices(deltas, averaged, "are averaged"))
    yield Report(watch.facts)

    def kernel(tile: Tile) -> Tensor:
        if not is_weight_matrix(tile.name, tile.shape, averaged):
            return plain_mean(tile)
        stack = weighted(tile)
        count, rows, columns = stack.shape
        found = watch.saw(
            tile.name, svd(stack.transpose(0, 1).reshape(rows, count * columns), precision_of(tile.stack))
        )
        # [task, rank, in]; made from the updates, so that where one is zero it has no sign to vote with
        coordinates = (found.left.T @ stack.double()) / found.values[:, None]
        merged = coordinates.mean(0) if rule == "mean" else _ties(coordinates, density)
        return (found.left @ (found.values[:, None] * merged)).to(stack.dtype)

    return kernel


def _ties(stack: Tensor, density: float) -> Tensor:
    """TIES on a few matrices in memory."""
    flat = stack.flatten(1).abs()
    if flat.shape[1] == 0:
        return stack[0]
    keep = max(1, int(density * flat.shape[1]))
    least = flat.kthvalue(flat.shape[1] - keep + 1, dim=1).values.view(-1, 1, 1)
    trimmed = stack * (stack.abs() >= least)
    positive = trimmed.sum(0) >= 0
    agrees = torch.where(positive, trimmed > 0, trimmed < 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
