"""Iso-C: one singular value for all directions of the sum."""

from typing import Literal

from merging.method import Patterns, merge_method, plain_mean
from merging.spectra import (
    Isometric,
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


@merge_method("iso_c", paper="arXiv:2502.04959", unit="tensor", copies=6, cost="1 SVD per matrix")
def iso_c(
    deltas: Deltas,
    *,
    mean_over: Literal["rank", "full"] = "rank",
    averaged: Patterns = ("*text_projection*",),
    rounding: Literal["keep", "drop"] = "keep",
) -> Plan:
    """Flatten the spectrum of the summed task vectors: every direction gets the mean singular value.

    Args:
        mean_over: what the mean is over where the rank is low: the numerical rank, or all min(m, n) singular values
            ("full", the paper's r), which makes the result shorter.
        averaged: patterns of matrices that are averaged like all other tensors (the authors leave CLIP's
            text_projection out; embeddings and position tables count as matrices).
        rounding: whether directions no larger than the rounding of the stored weights (as of adapters folded into bfloat16
            models) count like others, or are left out.

    Δ = Σ Δ_t = U Σ Vᵀ becomes σ̄ U Vᵀ. Tensors that are not matrices are averaged. `scale` is α, tuned in the paper
    (about 1 to 1.5). A task weight scales its task vector.
    Differs from the authors' code on input of low rank: directions in which the sum is zero up to rounding stay zero;
    the reference puts energy into them, in arbitrary directions.
    """
    watch = RankWatch("only the directions within it are flattened", without_matrices(deltas, averaged, "are averaged"))
    yield Report(watch.facts)

    @abreast
    def kernel(tile: Tile) -> Work:
        if not is_weight_matrix(tile.name, tile.shape, averaged):
            return plain_mean(tile)
        total = tile.total()
        # independent errors of the tasks add in squares
        least = rounding_floor(tile, rounding_of(deltas, tile.name)) * weights_norm(tile)
        found = watch.saw(
            tile.name, (yield Isometric(total, precision_of(tile.stack), floor=least, drop=rounding == "drop"))
        )
        watch.rounded(tile.name, found.mostly_rounding)
        if found.kept == 0:
            return total.zero_()
        mean = found.total / (found.kept if mean_over == "rank" else found.full)
        return (mean * found.factor).to(total.dtype)

    return kernel
