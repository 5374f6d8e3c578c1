"""LiNeS: scale by depth."""

import torch
from torch import Tensor

from merging.method import Number, merge_method
from taskvec.blocks import depth_of, layer_of, tower_of
from taskvec.deltas import Deltas, Tile, infos_of_model
from taskvec.moments import sums
from taskvec.plan import Plan, Report


@merge_method("lines", paper="arXiv:2410.17146", role="postprocess", passes=2)
def lines(deltas: Deltas, *, slope: Number, first: Number | None = None) -> Plan:
    """Scale the merged vector linearly with depth: shallow layers, which hold what is general, change least.

    Args:
        slope: b, what the last layer's factor has over the first's; the paper searches it on validation data.
        first: a, the factor of the first layer and of everything outside the layers. Default: the ratio of L1 norms
            ‖Σ_t τ_t‖ / (T ‖τ_merged‖), as the paper sets it for merging. For a single model use a and 1 - a.

    Layer l of L gets a + b l / (L - 1). Layers are read from the tensors' names, each tower (as CLIP's two) by itself.
    The norms are the whole model's, or each tensor's with `statistics: tensor`. Passes: 1 for the norms (none when
    `first` is given), 1 to merge.
    """
    depth = depth_of(infos_of_model(deltas))
    start = 0.0 if first is None else first
    if first is None:

        def sizes(tile: Tile) -> Tensor:
            assert tile.merged is not None
            return torch.stack([tile.total(weighted=False), tile.merged.reshape(-1)]).double().abs().sum(1)

        summed, merged = (yield from sums(sizes)).tolist()
        start = summed / len(deltas.tasks) / merged if merged > 0 else 1.0
    yield Report({"first": start, "last": start + slope})

    def kernel(tile: Tile) -> Tensor:
        assert tile.merged is not None
        layer = layer_of(tile.name)
        if layer is None:
            return tile.merged * start
        last = depth[tower_of(tile.name)] - 1
        return tile.merged * (start + slope * (layer / last if last else 0.0))

    return kernel
