"""WUDI: the matrix that interferes least with what each task vector does to its own inputs."""

from typing import Literal

import torch
from torch import Tensor

from merging.method import Count, Patterns, Positive, merge_method, plain_mean, weighted_rows
from merging.spectra import is_weight_matrix, without_matrices
from taskvec.blocks import is_embedding, is_head, is_norm
from taskvec.deltas import Deltas, Tile
from taskvec.plan import Plan, Report


@merge_method(
    "wudi",
    paper="arXiv:2503.08099",
    unit="tensor",
    copies=32,
    cost="adam: a product of m × n and n × n for each step; ridge: T Gram matrices and one solve",
)
def wudi(
    deltas: Deltas,
    *,
    solver: Literal["adam", "ridge"] = "adam",
    steps: Count = 300,
    rate: Positive = 1e-5,
    ridge: Positive = 1e-3,
    others: Literal["base", "mean"] = "base",
    excluded: Patterns = (),
) -> Plan:
    """Find for each matrix the update that, on each task's own row space, acts like that task's.

    Args:
        solver: `adam` descends as the authors do; `ridge` solves the same problem at once, held near the start.
        steps: Adam's steps.
        rate: Adam's learning rate. Note that it is absolute: small task vectors move relatively further.
        ridge: μ of the ridge form over the mean diagonal of Σ C_t.
        others: what becomes of tensors that are no attention or MLP matrix (norms, biases, embeddings, heads): they
            stay the base's (the authors), or are averaged.
        excluded: patterns of matrices to treat as `others`.

    Minimises Σ_t ‖(M - Δ_t) Δ_tᵀ‖² / ‖Δ_t‖² from M = Σ Δ_t. With C_t = Δ_tᵀ Δ_t / ‖Δ_t‖² the gradient is
    2 (M Σ C_t - Σ Δ_t C_t), and `ridge` is M = (Σ Δ_t C_t + μ Σ Δ_t)(Σ C_t + μ I)⁻¹. Arithmetic is float64. Task
    vectors of very different norms break it; equalise them first. A task weight w asks M to act like w Δ_t.
    """
    kept = "stay the base's" if others == "base" else "are averaged"
    yield Report({"warnings": without_matrices(deltas, excluded, kept)})

    def kernel(tile: Tile) -> Tensor:
        special = is_embedding(tile.name) or is_head(tile.name) or is_norm(tile.name)
        if special or not is_weight_matrix(tile.name, tile.shape, excluded):
            return plain_mean(tile) if others == "mean" else torch.zeros_like(tile.stack[0])
        dtype = tile.stack.dtype
        start = tile.total().double()
        curvature = torch.zeros(tile.shape[1], tile.shape[1], dtype=torch.float64, device=start.device)
        target = torch.zeros_like(start)
        for raw, delta in zip(tile.stack, weighted_rows(tile)):
            wide = raw.double()
            square = float(wide.square().sum())
            if square == 0:
                continue
            inner = wide.T @ wide / square
            curvature += inner
            target.addmm_(delta.double(), inner)
        size = float(curvature.diagonal().mean())
        if size == 0:
            return start.to(dtype)
        if solver == "ridge":
            held = ridge * size
            factor = torch.linalg.cholesky(
                curvature + held * torch.eye(len(curvature), dtype=torch.float64, device=start.device)
            )
            return torch.cholesky_solve((target + held * start).T, factor).T.to(dtype)
        return _descended(start, curvature, target, steps, rate).to(dtype)

    return kernel


def _descended(start: Tensor, curvature: Tensor, target: Tensor, steps: int, rate: float) -> Tensor:
    """Adam (beta 0.9 and 0.999, epsilon 1e-8) on a quadratic whose gradient is known."""
    point = start.clone()
    first, second = torch.zeros_like(point), torch.zeros_like(point)
    for step in range(1, steps + 1):
        gradient = (point @ curvature - target).mul_(2)
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
        point.addcdiv_(first, scale, value=-rate / (1 - 0.9**step))
    return point
