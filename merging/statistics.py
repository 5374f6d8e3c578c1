"""Files of statistics of a task's data: what Fisher merging and RegMean need beside the models.

One safetensors file for each task, its tensors named as the model's parameters: `fisher` files hold the diagonal of the
Fisher information in the parameter's shape, `gram` and `gram++` files the mean of x xᵀ over the inputs x of each linear
layer, [in, in], under the name of its weight. Made by `taskvec learn statistics` (`merging.learn.statistics`), read here piece
by piece.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from merging.method import plain_mean, weighted
from taskvec.checkpoint import Checkpoint
from taskvec.deltas import Deltas, Tile, infos_of_model
from taskvec.errors import MismatchError, NotAModelError, ParameterError, shortened
from taskvec.plan import Kernel

Kind = Literal["fisher", "gram", "gram++"]
FORMAT = "taskvec-statistics"


class Statistics:
    """One task's statistics, read lazily.

    Attributes:
        kind: what they are.
        examples: how many examples (fisher) or input vectors of the first layer (gram) they were made of.
        norm: Euclidean norm of all values together (fisher).
        transposed: names of weights stored [in, out], as GPT-2's.
    """

    def __init__(self, path: Path):
        self.source = Checkpoint.open_file(path)
        facts = self.source.metadata
        if facts.get("format") != FORMAT:
            raise NotAModelError(
                f"{path}: not a file of statistics. `taskvec learn statistics` makes them from a model and a few batches."
            )
        self.path = path
        self.kind = facts["kind"]
        self.examples = int(facts.get("examples", 0))
        self.norm = float(facts.get("norm", 0.0))
        self.transposed = frozenset(json.loads(facts.get("transposed", "[]")))

    def __contains__(self, name: str) -> bool:
        return name in self.source.infos

    def read(self, name: str, like: Tensor) -> Tensor:
        """The whole tensor, float64, where `like` is."""
        return self.source.read(name).to(like.device, torch.float64)

    def read_flat(self, name: str, start: int, stop: int, like: Tensor) -> Tensor:
        """A piece of it, float64, where `like` is."""
        return self.source.read_flat(name, start, stop).to(like.device, torch.float64)


def metadata(kind: Kind, *, examples: int, norm: float = 0.0, transposed: Sequence[str] = ()) -> dict[str, str]:
    """What a file of statistics says of itself."""
    return {
        "format": FORMAT,
        "kind": kind,
        "examples": str(examples),
        "norm": repr(norm),
        "transposed": json.dumps(sorted(transposed)),
    }


@lru_cache(maxsize=64)
def _opened(path: Path, size: int, changed: int) -> Statistics:
    return Statistics(path)


def opened(files: Sequence[str], deltas: Deltas, kind: Kind) -> list[Statistics]:
    """The tasks' statistics, checked against the model.

    Raises:
        ParameterError: not one file for each task, a file that does not exist, or one of another kind.
        MismatchError: shapes that are not the model's, or no name in common.
    """
    if len(files) != len(deltas.tasks):
        raise ParameterError(
            f"statistics_files: {len(files)} files for {len(deltas.tasks)} tasks; name one for each, in their order"
        )
    paths = [Path(file).expanduser() for file in files]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ParameterError([f"statistics_files: there is no file {path}" for path in missing])
    found = [_opened(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    problems = [
        f"statistics_files: {statistics.path} holds {statistics.kind} statistics, not {kind}"
        for statistics in found
        if statistics.kind != kind
    ]
    if problems:
        raise ParameterError(problems)
    infos = infos_of_model(deltas)
    wrong = []
    for statistics in found:
        if not any(name in statistics for name in infos):
            theirs = shortened(list(statistics.source.infos), 2)
            wrong.append(f"{statistics.path} names none of the model's tensors ({theirs}). Made from another model?")
        for name, info in statistics.source.infos.items():
            if name not in infos:
                continue
            shape = infos[name].shape
            if kind != "fisher":
                width = shape[0 if name in statistics.transposed else -1] if len(shape) == 2 else 0
                shape = (width, width)
            if info.shape != shape:
                wrong.append(f"{name}: {statistics.path} has {list(info.shape)}, the model asks for {list(shape)}")
    if wrong:
        raise MismatchError(wrong, title="The statistics do not fit the model")
    return found


def uncovered(statistics: Sequence[Statistics], deltas: Deltas, *, matrices: bool) -> Mapping[str, list[str]]:
    """A warning for what is averaged because statistics are missing for it."""
    names = [
        name
        for name, info in deltas.infos.items()
        if (not matrices or len(info.shape) == 2) and not all(name in each for each in statistics)
    ]
    if not names:
        return {"warnings": []}
    return {"warnings": [f"{len(names)} tensors have no statistics and are averaged: {shortened(names)}"]}


def regression(statistics: Sequence[Statistics], off_diagonal: float, ridge: float) -> Kernel:
    """The kernel of RegMean: the linear layer whose outputs are nearest to all the tasks' on their own inputs."""

    def kernel(tile: Tile) -> Tensor:
        mean = plain_mean(tile)
        if len(tile.shape) != 2 or not all(tile.name in each for each in statistics):
            return mean
        turned = tile.name in statistics[0].transposed
        start = mean.double().T if turned else mean.double()
        total, target = (
            torch.zeros(start.shape[1], start.shape[1], dtype=torch.float64, device=mean.device),
            0.0 * start,
        )
        for delta, each in zip(weighted(tile).double(), statistics):
            gram = each.read(tile.name, delta)
            shrunk = off_diagonal * gram
            shrunk.diagonal().copy_(gram.diagonal())
            total += shrunk
            target += (delta.T if turned else delta) @ shrunk
        held = ridge * float(total.diagonal().mean())
        if held:
            total.diagonal().add_(held)
            target += held * start
        factor, failed = torch.linalg.cholesky_ex(total)
        if int(failed):
            raise ParameterError(
                f"{tile.name}: the inputs do not determine the layer (too few examples for {len(total)} inputs); "
                "set ridge above 0 or off_diagonal below 1"
            )
        solved = torch.cholesky_solve(target.T, factor)
        return (solved if turned else solved.T).to(mean.dtype)

    return kernel
