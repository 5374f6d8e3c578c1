"""A merged vector as long as the task vectors."""

import torch
from torch import Tensor

from merging.method import Positive, merge_method
from taskvec.deltas import Deltas, Tile
from taskvec.moments import sums
from taskvec.plan import Plan, Report


@merge_method("norm_match", paper="arXiv:2511.21437", role="postprocess", passes=2)
def norm_match(deltas: Deltas, *, multiple: Positive = 1.0) -> Plan:
    """Scale the merged vector to the mean norm of the task vectors.

    Args:
        multiple: how many times that norm.

    Merges of language models fail with the distance from the base (2511.21437); this sets it. The mean is over the task
    vectors as they enter the combination, without their weights. Norms are the whole model's, or each tensor's with
    `statistics: tensor`. Passes: 1 for the norms, 1 to merge.
    """

    def squares(tile: Tile) -> Tensor:
        assert tile.merged is not None
        return torch.cat([tile.stack, tile.merged.reshape(1, -1)]).double().square().sum(1)

    *norms, merged = (yield from sums(squares)).sqrt().tolist()
    factor = multiple * sum(norms) / len(norms) / merged if merged > 0 else 1.0
    yield Report({"norm before": merged, "norm after": factor * merged, "factor": factor})

    def kernel(tile: Tile) -> Tensor:
        assert tile.merged is not None
        return tile.merged * factor

    return kernel
