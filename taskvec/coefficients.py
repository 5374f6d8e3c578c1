"""Learned coefficients as a small file: which number scales which element of which task vector.

Learning writes the file, merging reads it, and neither needs to know how the other works. What they share stands here:
how a tensor's elements follow the columns (`Region`), and the random partitions of aTLAS x K (`partition_index`).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from taskvec.errors import (
    CorruptFileError,
    MismatchError,
    NonFiniteError,
    NotFoundError,
    OutputError,
    UsageError,
    did_you_mean,
    shortened,
)
from taskvec.source import check_learned_with

FORMAT = "taskvec.coefficients"
MOST_PARTS = 1 << 16  # of a tensor, each with a coefficient of its own
VERSION = 1


@dataclass(frozen=True, slots=True)
class Region:
    """Which column each element of one tensor follows.

    The tensor, row-major, is seen as [outer, parts, inner]; its element [o, p, i] follows column `column + p`. One
    coefficient for the whole tensor is [1, 1, numel]; one for each row [1, rows, rest]; one for each column of a matrix
    [rows, columns, 1]; the q, k, v of a fused projection [1, 3, rest].
    """

    column: int
    outer: int = 1
    parts: int = 1
    inner: int = 1

    @property
    def numel(self) -> int:
        return self.outer * self.parts * self.inner


# splitmix64's constants (Steele, Lea and Flood 2014), as signed 64-bit numbers because torch has no unsigned arithmetic
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical shift to the right (torch's is arithmetic)."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def partition_index(
    name: str, seed: int, parts: int, start: int, stop: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """The part, uniform in 0..parts-1, of each element `start` to `stop` of the tensor `name` (row-major order).

    Counter-based: element e of a tensor has the same part whatever is asked for beside it, on every device.

    Args:
        name: tensor name; tensors of equal shape get different partitions (the authors' code shares them by shape).
        seed: saved in the coefficients file.
        parts: K in the paper, 1 to 65,536.
    """
    if not 1 <= parts <= MOST_PARTS:
        raise UsageError(f"partitions: {parts} parts; expected 1 to {MOST_PARTS}.")
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8, person=b"taskvec-part").digest()
    key = int.from_bytes(digest, "little", signed=True)
    state = torch.arange(start + 1, stop + 1, dtype=torch.int64, device=device) * _GOLDEN + key
    state = (state ^ _shifted(state, 30)) * _MIX1
    state = (state ^ _shifted(state, 27)) * _MIX2
    high = _shifted(state ^ _shifted(state, 31), 32)
    index = _shifted(high * parts, 32)
    return index.to(torch.uint8 if parts <= 256 else torch.int32)


def column_names(runs: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """Names of the columns: `name`, or `name[0]`, `name[1]`, … where a tensor has several."""
    return tuple(
        label for name, count in runs for label in ([name] if count == 1 else [f"{name}[{i}]" for i in range(count)])
    )


@dataclass(frozen=True)
class Coefficients:
    """One number per task vector and block, and which elements of which tensor it scales.

    Attributes:
        values: [task, block], or [task, block, part] with partitions.
        tasks: names of the task vectors, in the order of the rows.
        runs: names of the blocks in the order of the columns, each with its number of columns (1, but for `row`,
            `column` and `qkv`).
        regions: tensor name to the columns its elements follow; names are those of the base checkpoint.
        kept: tensors that learning knew and left at their base value.
        aliases: name to the name that it is tied to.
        granularity: the word the run was made with, for people.
        partitions: (parts, seed) of random partitions, or None.
        indices: explicit partition of a tensor (shape of the tensor, values below the number of parts).
        mode: `nonlinear`, or `linear` (coefficients of the first-order model; baking those is a change of model).
        base_hash: content hash of the base, when it came from files.
        task_hashes: content hash of each task's source, when it came from files.
        statistics: `keep` or `average`: what happens to BatchNorm running statistics.
        history: one record per evaluation of the run.
        objective: how the run was made, for people and for `taskvec coefficients show`.
    """

    values: Tensor
    tasks: tuple[str, ...]
    runs: tuple[tuple[str, int], ...]
    regions: Mapping[str, Region]
    kept: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    granularity: str = "block"
    partitions: tuple[int, int] | None = None
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    mode: str = "nonlinear"
    base_hash: str | None = None
    task_hashes: Mapping[str, str] = field(default_factory=dict)
    statistics: str = "keep"
    history: tuple[Mapping[str, Any], ...] = ()
    objective: Mapping[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return column_names(self.runs)

    @property
    def parts(self) -> int:
        """Parts of each block: 1 without partitions."""
        return int(self.values.shape[2]) if self.values.dim() == 3 else 1

    # -- what the engine asks ----------------------------------------------------------------------------------------

    def region(self, name: str) -> Region | None:
        """The columns of a tensor, or None where it keeps its base value.

        Raises:
            MismatchError: learning never saw a tensor of this name.
        """
        name = self.aliases.get(name, name)
        if name in self.regions:
            return self.regions[name]
        if name in self.kept:
            return None
        known = [*self.regions, *self.kept]
        raise MismatchError(
            [f"{name}: no coefficient was learned for it, and it was not known then." + did_you_mean(name, known)],
            title="The coefficients do not fit this model",
        )

    def is_scalar(self, name: str) -> bool:
        """Whether one number per task scales the whole tensor, so that `weights` says all."""
        region = self.region(name)
        return region is None or (region.parts == 1 and self.parts == 1)

    def weights(self, name: str) -> Tensor:
        """[task]: the weight of each task vector in this tensor (zeros where it keeps its base value).

        Raises:
            MismatchError: learning never saw a tensor of this name.
            UsageError: the elements of this tensor have different weights; `expand` gives them.
        """
        region = self.region(name)
        if region is None:
            return self._kept_weights(name)
        if not self.is_scalar(name):
            raise UsageError(f"{name}: its elements have different weights ({self.granularity}); use `expand`.")
        return self.values.reshape(len(self.tasks), -1)[:, region.column].clone()

    def expand(self, name: str, shape: Sequence[int], start: int, stop: int) -> Tensor:
        """[task, stop - start]: the weight of each element `start` to `stop` (row-major) of a tensor.

        Raises:
            MismatchError: learning never saw this tensor, or it had another shape then.
        """
        region = self.region(name)
        if region is None:
            return self._kept_weights(name)[:, None].expand(-1, stop - start).clone()
        numel = 1
        for size in shape:
            numel *= size
        if region.numel != numel:
            raise MismatchError(
                [f"{name}: coefficients were learned for {region.numel} elements, this tensor has {list(shape)}."],
                title="The coefficients do not fit this model",
            )
        flat = self.values.reshape(len(self.tasks), -1)
        column = torch.full((stop - start,), region.column * self.parts, dtype=torch.int64)
        if region.parts > 1:
            column += torch.arange(start, stop) // region.inner % region.parts * self.parts
        name = self.aliases.get(name, name)
        if name in self.indices:
            column += self.indices[name].reshape(-1)[start:stop].to(torch.int64)
        elif self.partitions is not None:
            parts, seed = self.partitions
            column += partition_index(name, seed, parts, start, stop).to(torch.int64)
        return flat[:, column]

    def _kept_weights(self, name: str) -> Tensor:
        weights = torch.zeros(len(self.tasks), dtype=self.values.dtype)
        if self.statistics == "average" and name.rpartition(".")[2] in ("running_mean", "running_var"):
            weights += 1 / len(self.tasks)
        return weights

    def check(
        self,
        names: Iterable[str] | None = None,
        *,
        tasks: Sequence[str] | None = None,
        base_hash: str | None = None,
        task_hashes: Mapping[str, str] | None = None,
        source: str = "The coefficients",
    ) -> None:
        """Whether these coefficients belong to this base and these task vectors; every problem at once.

        Args:
            names: all floating tensors of the base.
            tasks: names of the merge's task vectors, in order.
            base_hash: content hash of the base.
            task_hashes: content hash of each task.
            source: how to name the file in messages.

        Raises:
            BaseMismatchError: the base, or a task, is another file than the one learned on.
            MismatchError: tensors or tasks are missing or unknown.
        """
        changed = [
            f"{task} ({self.task_hashes[task][:12]}, now {digest[:12]})"
            for task, digest in (task_hashes or {}).items()
            if self.task_hashes.get(task, digest) != digest
        ]
        check_learned_with(source, base=self.base_hash, here=base_hash, changed=changed)
        problems = []
        if tasks is not None and tuple(tasks) != self.tasks:
            missing = [task for task in self.tasks if task not in tasks]
            unknown = [task for task in tasks if task not in self.tasks]
            if missing:
                problems.append(f"learned for {shortened(missing)}, which this merge does not have.")
            if unknown:
                problems.append(f"nothing was learned for {shortened(unknown)}." + did_you_mean(unknown[0], self.tasks))
            if not missing and not unknown:
                problems.append(f"the tasks stand in another order: {list(self.tasks)} there, {list(tasks)} here.")
        if names is not None:
            here = list(names)
            there = set(here)
            spellings: dict[str, list[str]] = {}
            for alias, name in self.aliases.items():
                spellings.setdefault(name, []).append(alias)
            known = {*self.regions, *self.kept, *self.aliases}
            unknown = [name for name in here if name not in known]
            missing = [n for n in self.regions if n not in there and not there.intersection(spellings.get(n, ()))]
            if unknown:
                problems.append(f"no coefficient for {shortened(unknown)}." + did_you_mean(unknown[0], self.regions))
            if missing:
                problems.append(f"learned for {shortened(missing)}, which this merge lacks or leaves out.")
        if problems:
            raise MismatchError(problems, title=f"{source} do not fit this merge")

    # -- the file ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: to a neighbour first, then renamed, so that a file of this name is always whole.

        Raises:
            NonFiniteError: a coefficient is NaN or infinite.
            OutputError: the file cannot be written.
        """
        from safetensors.torch import save_file

        bad = int((~torch.isfinite(self.values)).sum())
        if bad:
            raise NonFiniteError("coefficients", str(path), bad)
        tensors = {"coefficients": self.values.detach().cpu().contiguous().clone()}
        tensors.update({f"partition/{name}": index.cpu().contiguous().clone() for name, index in self.indices.items()})
        record = {
            "tasks": list(self.tasks),
            "blocks": [name if count == 1 else [name, count] for name, count in self.runs],
            "regions": {name: [r.column, r.outer, r.parts, r.inner] for name, r in self.regions.items()},
            "kept": list(self.kept),
            "aliases": dict(self.aliases),
            "granularity": self.granularity,
            "partitions": list(self.partitions) if self.partitions else None,
            "mode": self.mode,
            "base_hash": self.base_hash,
            "task_hashes": dict(self.task_hashes),
            "statistics": self.statistics,
            "history": [dict(entry) for entry in self.history],
            "objective": dict(self.objective),
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "record": json.dumps(record, allow_nan=False)}
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata=metadata)
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            partial.replace(target)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            NotFoundError: no such file.
            CorruptFileError: not a coefficients file, of a newer version, or one that contradicts itself.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise NotFoundError(f"{path}: no such file. Expected coefficients written by `taskvec learn`.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CorruptFileError(
                        f"{path}: holds tensors, but not learned coefficients (no `format: {FORMAT}` in its header)."
                    )
                if int(metadata.get("version", "0")) > VERSION:
                    raise CorruptFileError(
                        f"{path}: format version {metadata['version']}, this program reads up to {VERSION}. Update it."
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record = json.loads(metadata["record"])
            runs = tuple(
                (entry, 1) if isinstance(entry, str) else (entry[0], int(entry[1])) for entry in record["blocks"]
            )
            loaded = cls(
                values=tensors.pop("coefficients"),
                tasks=tuple(record["tasks"]),
                runs=runs,
                regions={name: Region(*numbers) for name, numbers in record["regions"].items()},
                kept=tuple(record["kept"]),
                aliases=record["aliases"],
                granularity=record["granularity"],
                partitions=tuple(record["partitions"]) if record["partitions"] else None,
                indices={name.removeprefix("partition/"): tensor for name, tensor in tensors.items()},
                mode=record["mode"],
                base_hash=record["base_hash"],
                task_hashes=record["task_hashes"],
                statistics=record["statistics"],
                history=tuple(record["history"]),
                objective=record["objective"],
            )
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CorruptFileError(f"{path}: not a readable coefficients file ({error}).") from error
        columns = sum(count for _, count in loaded.runs)
        if loaded.values.dim() not in (2, 3) or tuple(loaded.values.shape[:2]) != (len(loaded.tasks), columns):
            raise CorruptFileError(
                f"{path}: coefficients of shape {list(loaded.values.shape)} for {len(loaded.tasks)} tasks "
                f"and {columns} blocks."
            )
        return loaded
