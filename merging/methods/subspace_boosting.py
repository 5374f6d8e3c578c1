"""Subspace Boosting: lift the small singular values of the merged vector."""

from torch import Tensor

from merging.method import Fraction, Patterns, merge_method
from merging.spectra import RankWatch, is_weight_matrix, precision_of, svd
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Plan, Report


@merge_method(
    "subspace_boosting", paper="arXiv:2506.16506", role="postprocess", unit="tensor", copies=4, cost="1 SVD per matrix"
)
def subspace_boosting(deltas: Deltas, *, share: Fraction, excluded: Patterns = ()) -> Plan:
    """Lift every small singular value of the merged vector to the last of the large ones.

    Args:
        share: β; the large ones are the first that together reach this share of the sum of singular values. 0 makes all
            as large as the largest. No default: the merged vector grows much, and the right share is found on
            validation data.
        excluded: patterns of matrices that are left as they are, like all tensors that are not matrices.

    Differs from the authors' code on input of low rank: directions that are zero up to rounding are not lifted.
    """
    watch = RankWatch("only the directions within it are lifted")
    yield Report(watch.facts)

    def kernel(tile: Tile) -> Tensor:
        assert tile.merged is not None
        if not is_weight_matrix(tile.name, tile.shape, excluded):
            return tile.merged
        found = watch.saw(tile.name, svd(tile.merged, precision_of(tile.stack)))
        if found.rank == 0:
            return tile.merged
        reached = found.values.cumsum(0) >= share * found.values.sum() * (1 - 1e-12)
        last = int(reached.int().argmax()) if bool(reached.any()) else found.rank - 1
        return found.dense(found.values.clamp(min=float(found.values[last]))).to(tile.merged.dtype)

    return kernel
