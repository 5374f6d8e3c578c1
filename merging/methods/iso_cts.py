"""Iso-CTS: a common subspace, task-specific ones beside it, one singular value for all."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from merging.method import Patterns, merge_method, plain_mean, weighted_rows
from merging.spectra import (
    Decompositions,
    Polars,
    RankWatch,
    Work,
    abreast,
    is_weight_matrix,
    precision_of,
    rounding_floor,
    weights_norm,
    without_matrices,
)
from taskvec.deltas import Deltas, Tile, rounding_of
from taskvec.plan import Plan, Report


@merge_method("iso_cts", paper="arXiv:2502.04959", unit="tensor", copies=24, cost="T + 3 SVDs per matrix")
def iso_cts(
    deltas: Deltas,
    *,
    common: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.8,
    mean_over: Literal["rank", "full"] = "rank",
    averaged: Patterns = ("*text_projection*",),
    rounding: Literal["keep", "drop"] = "keep",
) -> Plan:
    """Keep the largest directions of the sum, replace the smallest by each task's own, and flatten the spectrum.

    Args:
        common: share of the min(m, n) directions that are common; the rest is divided among the tasks.
        mean_over: what the mean singular value is over where ranks are low: those kept, or all ("full").
        averaged: patterns of matrices that are averaged like all other tensors (the authors leave CLIP's
            text_projection out; embeddings and position tables count as matrices).
        rounding: whether directions no larger than the rounding of the stored weights (as of adapters folded into bfloat16
            models) count like others, or are left out.

    s = round((r - ⌊common · r⌋) / T) directions for each task, k = r - s T common ones, U_k of the sum. Each task's
    come from what the common ones leave of it, (I - U_k U_kᵀ) Δ_t. Side by side [Ū_1 … Ū_T, U_k] and [V̄_1 … V̄_T, V_k]
    are whitened by their polar factors and meet with the mean singular value between them. Where s is 0 (many tasks)
    this is Iso-C, with a warning. Other tensors are averaged; `scale` is α. A task weight scales its task vector.
    Differs from the authors' code on input of low rank: no directions that are zero up to rounding are kept.
    """
    watch = RankWatch(
        "only the directions within it are kept and flattened", without_matrices(deltas, averaged, "are averaged")
    )
    yield Report(watch.facts)

    @abreast
    def kernel(tile: Tile) -> Work:
        if not is_weight_matrix(tile.name, tile.shape, averaged):
            return plain_mean(tile)
        dtype, full, count = precision_of(tile.stack), min(tile.shape), len(tile.tasks)
        own = round((full - int(common * full)) / count)
        own = min(own, full // count)
        if own == 0:
            watch.note(tile.name, "so many tasks leave no directions of their own: Iso-C is what remains")
        (total,) = yield Decompositions([tile.total()], dtype, most=full - own * count, ranked=True)
        watch.saw(tile.name, total)
        # independent errors of the tasks add in squares
        least = rounding_floor(tile, rounding_of(deltas, tile.name)) * weights_norm(tile)
        if rounding == "keep":
            watch.rounded(tile.name, total.mostly_below(least))
        else:
            total = total.above(least)
        parts = []
        if own:
            # rounding is relative to the task vector, not to its rest
            sizes = [float(torch.linalg.matrix_norm(delta.double())) for delta in weighted_rows(tile)]
            rests = (delta - total.left @ (total.left.T @ delta) for delta in map(Tensor.double, weighted_rows(tile)))
            # the common directions are known to the sum's rounding only, and so is what they leave
            for part in (yield Decompositions(rests, dtype, size=sizes, most=own)):
                parts.append(part if rounding == "keep" else part.above(least))
        parts.append(total)
        values, lefts, rights = (torch.cat(sides, -1) for sides in zip(*((p.values, p.left, p.right) for p in parts)))
        del parts, total
        if not len(values):
            return torch.zeros_like(tile.stack[0])
        mean = values.sum() / (len(values) if mean_over == "rank" else full)
        left, right = yield Polars([lefts, rights], dtype)
        return (left.mul_(mean) @ right.T).to(tile.stack.dtype)

    return kernel
