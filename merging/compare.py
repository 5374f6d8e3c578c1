"""Fine-tunes of one base, side by side: norms, cosines, sign conflicts, sparsity, shared subspaces, layer by layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskvec.blocks import is_matrix, layer_key, layer_of
from taskvec.checkpoint import SEGMENT
from taskvec.deltas import ModelDeltas, Task
from taskvec.moments import assert_finite, exact, rounded_sum
from taskvec.precision import is_float
from taskvec.source import TensorSource
from taskvec.vector import assert_alike

SUBSPACE_RANK = 8


@dataclass(slots=True)
class LayerComparison:
    """One layer (or a module outside the layers).

    Attributes:
        name: the layer's name.
        numel: elements.
        norms: norm of each task vector here; `relative`: over the base's norm.
        cosines: [task, task].
        conflict: share of entries (weighted by magnitude) where a task opposes the sum's sign.
        sparsity: share of each task's entries that are exactly zero.
        overlap: mean over matrices and pairs of the overlap of the leading left singular subspaces, in [0, 1].
    """

    name: str
    numel: int
    norms: list[float]
    relative: list[float]
    cosines: list[list[float]]
    conflict: float
    sparsity: list[float]
    overlap: float | None


@dataclass(slots=True)
class _Sums:
    numel: int = 0
    gram: list[list[int]] = field(default_factory=list)
    base: int = 0
    opposed: float = 0.0
    mass: float = 0.0
    zeros: list[int] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)


def compare_models(
    base: TensorSource, tasks: Mapping[str, TensorSource], *, deltas: "Sequence[str]" = (), subspaces: bool = True
) -> list[LayerComparison]:
    """Compares task vectors layer by layer; the last entry is the whole model.

    Args:
        base: the base.
        tasks: name to fine-tuned model (or adapter).
        deltas: names of those that are differences already.
        subspaces: also the overlap of the leading left singular vectors of each matrix (a randomised SVD of rank 8).

    Raises:
        MismatchError: models that do not fit the base.
        NonFiniteError: NaN or infinity in one of them.
    """
    assert_alike(base, {name: source for name, source in tasks.items() if name not in deltas})
    names = [n for n, i in base.infos.items() if is_float(i.dtype) and n not in base.aliases]
    found = ModelDeltas(base, [Task(name, source, name in deltas) for name, source in tasks.items()], names)
    groups: dict[str, _Sums] = {}
    count = len(tasks)
    total = _Sums(gram=[[0] * count for _ in range(count)], zeros=[0] * count)
    for name in names:
        group = groups.setdefault(layer_key(name), _Sums(gram=[[0] * count for _ in range(count)], zeros=[0] * count))
        info = base.infos[name]
        for start in range(0, info.numel, SEGMENT):
            tile = found.tile(name, start, min(start + SEGMENT, info.numel))
            assert tile.base is not None
            assert_finite(tile)
            wide = tile.stack.double()
            products = (wide @ wide.T).tolist()
            squared = exact(float(tile.base.double().dot(tile.base.double())))
            sign = tile.stack.sum(0).sign()
            size = tile.stack.abs()
            opposed, mass = float((size * (tile.stack.sign() == -sign)).sum()), float(size.sum())
            zeros = (tile.stack == 0).sum(1).tolist()
            for sums in (group, total):
                sums.numel += tile.stop - tile.start
                sums.base += squared
                sums.opposed += opposed
                sums.mass += mass
                for i in range(count):
                    sums.zeros[i] += zeros[i]
                    for j in range(count):
                        sums.gram[i][j] += exact(products[i][j])
        if subspaces and count > 1 and is_matrix(info.shape) and info.numel <= SEGMENT * 8:
            stack = found.tile(name, 0, info.numel).stack.view(count, *info.shape)
            value = subspace_overlap(stack)
            group.overlaps.append(value)
            total.overlaps.append(value)
    rows = [_comparison(name, sums) for name, sums in groups.items()]
    return [*rows, _comparison("whole model", total)]


def subspace_overlap(stack: Tensor, rank: int = SUBSPACE_RANK) -> float:
    """Mean over pairs of ‖U_iᵀU_j‖_F² / rank for the leading left singular vectors of a stack of matrices [task, m, n].

    1 when the tasks write into the same directions, about rank / m when they are unrelated. The singular vectors come
    from two steps of subspace iteration on a fixed start, so the figure is reproducible.
    """
    count, rows, columns = stack.shape
    rank = min(rank, rows, columns)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, min(columns, rank + 8), generator=generator)
    leading = []
    for matrix in stack.float():
        q = torch.linalg.qr(matrix @ start)[0]
        for _ in range(2):
            q = torch.linalg.qr(matrix @ (matrix.T @ q))[0]
        leading.append((q @ torch.linalg.svd(q.T @ matrix, full_matrices=False)[0])[:, :rank])
    values = [
        float((leading[i].T @ leading[j]).square().sum()) / rank for i in range(count) for j in range(i + 1, count)
    ]
    return sum(values) / len(values)


def _comparison(name: str, sums: _Sums) -> LayerComparison:
    gram = [[rounded_sum(value) for value in row] for row in sums.gram]
    norms = [math.sqrt(max(0.0, gram[i][i])) for i in range(len(gram))]
    base = math.sqrt(rounded_sum(sums.base))
    cosines = [
        [gram[i][j] / (norms[i] * norms[j]) if norms[i] and norms[j] else 0.0 for j in range(len(gram))]
        for i in range(len(gram))
    ]
    return LayerComparison(
        name,
        sums.numel,
        norms,
        [norm / base if base else math.inf for norm in norms],
        cosines,
        sums.opposed / sums.mass if sums.mass else 0.0,
        [zeros / max(1, sums.numel) for zeros in sums.zeros],
        sum(sums.overlaps) / len(sums.overlaps) if sums.overlaps else None,
    )


def plot_comparison(rows: Sequence[LayerComparison], tasks: Sequence[str], path: "str | Path") -> None:
    """A picture of the comparison: relative norms by layer and task, mean cosine and conflict by layer, and the
    whole model's cosines.

    Raises:
        UsageError: matplotlib is not installed, or the file name ends in no known picture format.
    """
    from taskvec.errors import UsageError

    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install 'taskvec[plot]'") from error
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {path}: end the name in .png, .svg or .pdf")
    layers = sorted(
        rows[:-1], key=lambda row: (layer_of(row.name) is None, row.name.rpartition(".")[0], layer_of(row.name) or 0)
    )
    count = len(tasks)
    figure, axes = plt.subplots(
        1,
        3,
        figsize=(5 + 1.0 * count + 6, max(3.2, 0.24 * len(layers) + 1.8)),
        layout="constrained",
        gridspec_kw={"width_ratios": [max(1.5, 0.6 * count), 2.0, max(1.8, 0.6 * count)]},
    )
    left, middle, right = axes
    labels = [row.name for row in layers]
    image = left.imshow([row.relative for row in layers], aspect="auto", cmap="viridis")
    left.set_xticks(range(count), tasks, rotation=45, ha="right")
    left.set_yticks(range(len(labels)), labels, fontsize=7)
    left.set_title("norm / base's norm", fontsize=9)
    figure.colorbar(image, ax=left, fraction=0.08)
    heights = list(range(len(layers)))
    pairs = max(1, count * (count - 1) // 2)
    mean = [sum(row.cosines[i][j] for i in range(count) for j in range(i + 1, count)) / pairs for row in layers]
    middle.plot(mean, heights, "o-", markersize=3, label="mean cosine")
    middle.plot([row.conflict for row in layers], heights, "s-", markersize=3, label="sign conflict")
    if any(row.overlap is not None for row in layers):
        middle.plot(
            [row.overlap if row.overlap is not None else math.nan for row in layers],
            heights,
            "^-",
            markersize=3,
            label="subspace overlap",
        )
    middle.invert_yaxis()
    middle.set_yticks([])
    middle.axvline(0, color="0.8", linewidth=0.8)
    middle.legend(fontsize=7)
    middle.set_title("between tasks", fontsize=9)
    whole: Any = rows[-1].cosines
    image = right.imshow(whole, vmin=-1, vmax=1, cmap="RdBu_r")
    right.set_xticks(range(count), tasks, rotation=45, ha="right")
    right.set_yticks(range(count), tasks)
    for i in range(count):
        for j in range(count):
            right.text(
                j,
                i,
                f"{whole[i][j]:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if abs(whole[i][j]) > 0.6 else "black",
            )
    right.set_title("cosines, whole model", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
