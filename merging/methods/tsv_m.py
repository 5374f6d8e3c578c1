"""TSV-M: merge task singular vectors after whitening them."""

from typing import Literal

import torch

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
    without_matrices,
)
from taskvec.deltas import Deltas, Tile, rounding_of
from taskvec.plan import Plan, Report


@merge_method("tsv_m", paper="arXiv:2412.00081", unit="tensor", copies=20, cost="T + 2 SVDs per matrix")
def tsv_m(
    deltas: Deltas, *, averaged: Patterns = ("*text_projection*",), rounding: Literal["keep", "drop"] = "keep"
) -> Plan:
    """Give each task its share of a matrix's rank, and take apart the directions on which tasks interfere.

    Args:
        averaged: patterns of matrices that are averaged like all other tensors (the authors leave CLIP's
            text_projection out; embeddings count as matrices).
        rounding: whether directions no larger than the rounding of the stored weights (as of adapters folded into bfloat16
            models) count like others, or are left out.

    Of each task vector the k = ⌊r / T⌋ largest singular directions are kept, r = min(m, n). Side by side they are
    whitened, each set by its polar factor P: Δ = P([U_1 … U_T]) diag(Σ_1 … Σ_T) P([V_1 … V_T])ᵀ. Tensors that are not
    matrices are averaged. `scale` is α (1 in the paper). A task weight scales its task vector.
    Differs from the authors' code on input of low rank: a task keeps no more directions than its numerical rank, where
    the reference keeps arbitrary ones. With more tasks than r, each keeps one.
    """
    watch = RankWatch(
        "each task keeps only its own directions, none of those that are zero up to rounding",
        without_matrices(deltas, averaged, "are averaged"),
    )
    yield Report(watch.facts)

    @abreast
    def kernel(tile: Tile) -> Work:
        if not is_weight_matrix(tile.name, tile.shape, averaged):
            return plain_mean(tile)
        dtype, keep = precision_of(tile.stack), max(1, min(tile.shape) // len(tile.tasks))
        parts, floor = [], rounding_floor(tile, rounding_of(deltas, tile.name))
        for task, part in enumerate((yield Decompositions(weighted_rows(tile), dtype, most=keep))):
            if part.rank < keep:
                watch.saw(tile.name, part)
            least = floor * float(tile.weights[task].abs().double().mean())
            if rounding == "keep":
                watch.rounded(tile.name, part.mostly_below(least))
            parts.append(part if rounding == "keep" else part.above(least))
        watch.counted(tile.name)
        values, lefts, rights = (torch.cat(sides, -1) for sides in zip(*((p.values, p.left, p.right) for p in parts)))
        del parts
        left, right = yield Polars([lefts, rights], dtype)
        return (left.mul_(values) @ right.T).to(tile.stack.dtype)

    return kernel
