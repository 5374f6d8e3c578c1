"""SVC: calibrate singular values that several tasks inflate."""

import torch
from torch import Tensor

from merging.method import Patterns, Positive, merge_method
from merging.spectra import is_weight_matrix, precision_of, svd
from taskvec.deltas import Deltas, Tile
from taskvec.errors import shortened
from taskvec.plan import Plan, Report

_FLAT = 1.0001  # largest over smallest singular value


@merge_method(
    "svc",
    paper="arXiv:2602.05536",
    role="postprocess",
    unit="tensor",
    copies=12,
    cost="1 SVD and T products per matrix",
)
def svc(deltas: Deltas, *, floor: Positive = 1.0, excluded: Patterns = ()) -> Plan:
    """Shrink those directions of the merged vector that count what the tasks share several times.

    Args:
        floor: α, the least a task's coefficient counts; from 1 on, singular values only shrink.
        excluded: patterns of matrices that are left as they are, like all tensors that are not matrices.

    For each left singular vector u_j of the merged matrix: a_j = u_jᵀ Δ, a_j^t = u_jᵀ Δ_t,
    s_j^t = ⟨a_j, a_j^t⟩ / ‖a_j^t‖², γ_j = T / Σ_t max(α, s_j^t), and σ_j becomes γ_j σ_j. Directions that are zero up
    to rounding stay zero; a task without any part in a direction counts α there. Where all singular values are the same (after
    `iso_c`) any basis is as good as another, and the result follows rounding: that is warned of.
    """
    flat: set[str] = set()
    yield Report(lambda: {"warnings": _told(sorted(flat))})

    def kernel(tile: Tile) -> Tensor:
        assert tile.merged is not None
        if not is_weight_matrix(tile.name, tile.shape, excluded):
            return tile.merged
        found = svd(tile.merged, precision_of(tile.stack))
        merged_part = found.values[:, None] * found.right.T
        least = found.cut
        there = found.values[found.values > least]
        if len(there) > 1 and float(there.max()) <= _FLAT * float(there.min()):
            flat.add(tile.name)
        total = torch.zeros_like(found.values)
        for delta in tile.stack:
            part = found.left.T @ delta.double()
            square = part.square().sum(1)
            there = square > least**2
            share = (merged_part * part).sum(1) / square.where(there, 1.0)
            total += share.where(there, floor).clamp(min=floor)
        values = found.values * len(tile.stack) / total
        return found.dense(values).to(tile.merged.dtype)

    return kernel


def _told(names: list[str]) -> list[str]:
    if not names:
        return []
    return [
        f"{len(names)} matrices have one singular value for all directions ({shortened(names)}), so which directions are "
        "shrunk follows rounding; use svc on a merge whose spectrum is not flat"
    ]
