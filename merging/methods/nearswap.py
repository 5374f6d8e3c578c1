"""NearSwap: take from another model only what is near."""

from torch import Tensor

from merging.method import Positive, merge_method, weighted
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Kernel


@merge_method("nearswap", paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001", tasks=(1, 1), passes=1)
def nearswap(deltas: Deltas, *, distance: Positive) -> Kernel:
    """Take the model's values where they are near the base's, and move the base by at most `distance` elsewhere.

    Args:
        distance: largest change of an entry (t in the original and in mergekit).

    The change is multiplied by min(1, distance / |change|), which is the change clipped to ±`distance`. mergekit
    divides by max(|change|, 1e-6); the two differ for a distance under 1e-6 only.
    """

    def kernel(tile: Tile) -> Tensor:
        return weighted(tile)[0].clamp(-distance, distance)

    return kernel
