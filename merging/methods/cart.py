"""CART: task vectors around the average, of reduced rank."""

import torch
from torch import Tensor

from merging.method import Number, Patterns, Share, merge_method, plain_mean, weighted_rows
from merging.spectra import is_weight_matrix, precision_of, share_of_rank, svds
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Kernel


@merge_method("cart", paper="arXiv:2412.12153", unit="tensor", copies=12, cost="T SVDs per matrix")
def cart(deltas: Deltas, *, share: Share = 0.08, gain: Number = 1.0, averaged: Patterns = ()) -> Kernel:
    """Average the models, and add what each has beside the average, in its largest directions only.

    Args:
        share: fraction of the min(m, n) singular directions kept (about 8 % does well in the paper).
        gain: λ, what the low-rank rests are multiplied with (tuned in the paper).
        averaged: patterns of matrices that are only averaged, like all other tensors.

    Δ = Δ̄ + λ Σ_t svd_k(Δ_t - Δ̄). A task weight scales its task vector. `scale` multiplies the whole.
    """

    def kernel(tile: Tile) -> Tensor:
        mean = plain_mean(tile)
        if not is_weight_matrix(tile.name, tile.shape, averaged):
            return mean
        keep, total = share_of_rank(share, min(tile.shape)), mean.to(torch.float64, copy=True)
        rests = (delta.double() - mean for delta in weighted_rows(tile))
        for part in svds(rests, precision_of(tile.stack), most=keep):
            total.add_(part.dense(), alpha=gain)
        return total.to(mean.dtype)

    return kernel
