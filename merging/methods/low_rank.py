"""Task vectors of reduced rank."""

import torch
from torch import Tensor

from merging.method import Count, Patterns, Share, merge_method
from merging.spectra import is_weight_matrix, precision_of, share_of_rank, svds
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Kernel


@merge_method(
    "low_rank", paper="doi:10.1007/BF02288367", role="preprocess", unit="tensor", copies=12, cost="T SVDs per matrix"
)
def low_rank(
    deltas: Deltas,
    *,
    share: Share = 0.1,
    rank: Count | None = None,
    energy: Share | None = None,
    excluded: Patterns = (),
) -> Kernel:
    """Keep the largest singular directions of each matrix of each task vector (Eckart and Young).

    Args:
        share: fraction of the min(m, n) directions kept.
        rank: directions kept, instead of a share.
        energy: as many directions as hold this share of the sum of squares, instead of a share.
        excluded: patterns of matrices that are left as they are, like all tensors that are not matrices.
    """

    def kernel(tile: Tile) -> Tensor:
        if not is_weight_matrix(tile.name, tile.shape, excluded):
            return tile.stack
        result = torch.empty_like(tile.stack)
        keep = rank if rank is not None else share_of_rank(share, min(tile.shape))
        parts = svds(tile.stack, precision_of(tile.stack), most=None if energy is not None else keep)
        for found, kept in zip(parts, result):
            if energy is not None:
                total = found.values.square().cumsum(0)
                keep = int((total < energy * total[-1:]).sum()) + 1
            kept.copy_(found.top(keep).dense())
        return result

    return kernel
