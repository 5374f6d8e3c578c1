"""`merge(recipe, out)`: the one function most people call; and `verify`, which checks what it made."""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.card import model_card
from merging.prepare import Prepared, prepare
from merging.recipe import Recipe
from taskvec import __version__
from taskvec.adapter import Adapter
from taskvec.checkpoint import SEGMENT, Checkpoint, combined_hash, content_hash
from taskvec.deltas import Tile
from taskvec.errors import (
    BaseMismatchError,
    NonFiniteError,
    NotAModelError,
    RecipeError,
    TaskvecError,
    VerificationError,
    shortened,
)
from taskvec.precision import compute_dtype, dtype_name, is_float
from taskvec.source import TensorSource
from taskvec.sweep import Options, Outcome, Progress, sweep
from taskvec.writer import CheckpointWriter, assert_digests

PROVENANCE = "taskvec.json"
FORMAT = "taskvec.merge"


@dataclass
class Merged:
    """What a merge did.

    Attributes:
        path: where the result is.
        provenance: what stands in taskvec.json.
        warnings: what is worth knowing.
    """

    path: Path
    provenance: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def merge(
    recipe: Recipe,
    out: "str | os.PathLike[str]",
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> Merged:
    """Carries out a recipe and writes the result, streamed, with its provenance.

    Args:
        recipe: what to merge, and how.
        out: the folder to make, or a path ending in `.safetensors` for a single file. It appears whole or not at all.
        overwrite: replace an earlier result.
        resume: go on from the finished shards of an interrupted run of the same recipe and inputs.
        progress: called now and then, from several threads.
        notice: called with messages for people (what was found, resumed, removed).

    Raises:
        RecipeError: everything that headers can tell is wrong, at once, before anything is read or written.
        NonFiniteError: an input holds NaN or infinity; names tensor and task.
        OutputError: the output cannot be written.
    """
    prepared = prepare(recipe, out, overwrite=overwrite)
    for warning in prepared.warnings:
        notice(f"warning: {warning}")
    stages = prepared.stages()
    before = _provenance(prepared)
    companions, root = prepared.companions()
    with CheckpointWriter(
        out,
        prepared.infos,
        shard_size=recipe.output.shard_size,
        metadata={"taskvec": json.dumps(before)},
        reserve=4096 + 1024 * (len(prepared.tasks) + 1),
        companions=companions,
        companions_root=root,
        inputs=prepared.input_paths(),
        overwrite=overwrite,
        fingerprint=_fingerprint(prepared),
        resume=resume,
        notice=notice,
    ) as writer:
        aliases = _written_aliases(prepared)
        options = prepared.options()
        outcome = sweep(
            prepared.deltas,
            stages,
            _Taking(prepared, writer, aliases),
            scope=prepared.scope,
            options=Options(options.memory, options.workers, options.device, options.tile, progress),
            skip=frozenset(writer.done),
        )
        _copy_kept(prepared, writer)
        writer.settle()
        _refuse_zero(prepared, outcome)
        inputs = _inputs(prepared)
        _refuse_other_base(prepared, inputs)
        for source in (prepared.base, *prepared.originals.values()):
            if isinstance(source, Checkpoint):
                source.check_unchanged()
        after = before | _findings(prepared, outcome, writer, inputs)
        files: dict[str, str] = {
            PROVENANCE: json.dumps(after | _outputs(prepared, writer), indent=2) + "\n",
            "README.md": model_card(after, Path(os.fspath(out)).name, config=getattr(prepared.base, "config", {})),
        }
        path = writer.finish(metadata={"taskvec": json.dumps(after)}, files=files)
    return Merged(path, after, after["warnings"])


# -- one tile at a time ----------------------------------------------------------------------------------------------------


@dataclass
class _Taking:
    """The sink of a merge: finished tiles go onto the base and to the writer, under every name they have."""

    prepared: Prepared
    writer: CheckpointWriter
    aliases: Mapping[str, Sequence[str]]

    def __call__(self, tile: Tile) -> None:
        _take(self.prepared, self.writer, self.aliases, tile)

    @cached_property
    def kinds(self) -> dict[str, torch.dtype]:
        """The dtypes in which finished weights are wanted."""
        return {name: self._kind(name) for name in self.prepared.merged}

    def _kind(self, name: str) -> torch.dtype:
        infos = self.prepared.infos
        found = {infos[n].dtype for n in (name, *self.aliases.get(name, ())) if n in infos}
        return torch.bfloat16 if found == {torch.bfloat16} else torch.float32

    def take_weights(self, name: str, start: int, values: Tensor) -> None:
        """Weights that are finished: the base is in them, and they are known to be finite."""
        for known in (name, *self.aliases.get(name, ())):
            if known in self.prepared.infos and known not in self.writer.done:
                self.writer.write(known, values, start)


def _take(prepared: Prepared, writer: CheckpointWriter, aliases: Mapping[str, Sequence[str]], tile: Tile) -> None:
    values = tile.merged
    assert values is not None
    if prepared.space == "delta":
        assert tile.base is not None
        values = tile.base.reshape(-1) + values.reshape(-1)
    values = values.reshape(-1)
    if values.numel() and not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteError(tile.name, f"the result of {prepared.method.name}", bad)
    for name in (tile.name, *aliases.get(tile.name, ())):
        if name in prepared.infos and name not in writer.done:
            writer.write(name, values, tile.start)


def _written_aliases(prepared: Prepared) -> dict[str, list[str]]:
    """Merged name to the tied names under which its values are written once more."""
    found: dict[str, list[str]] = {}
    merged = set(prepared.merged)
    for alias, name in prepared.base.aliases.items():
        if alias in prepared.infos and name in merged and alias not in merged:
            found.setdefault(name, []).append(alias)
    return found


def _copy_kept(prepared: Prepared, writer: CheckpointWriter) -> None:
    for name in prepared.kept:
        if name not in prepared.infos or name in writer.done:
            continue
        info = prepared.base.infos[name]
        for start in range(0, max(info.numel, 1), SEGMENT):
            values = prepared.base.read_flat(name, start, min(start + SEGMENT, info.numel))
            if is_float(info.dtype):
                wide = values.to(compute_dtype(info.dtype))
                if not bool(torch.isfinite(wide).all()):
                    raise NonFiniteError(name, prepared.base.label, int((~torch.isfinite(wide)).sum()))
            writer.write(name, values, start)


# -- what is known beforehand, and what was found out ------------------------------------------------------------------------


def _provenance(prepared: Prepared) -> dict[str, Any]:
    recipe = prepared.recipe
    return {
        "format": FORMAT,
        "version": 1,
        "taskvec": __version__,
        "recipe": recipe.data(),
        "method": {
            "name": prepared.method.name,
            "paper": prepared.method.paper,
            "parameters": prepared.parameters,
            "statistics": prepared.scope,
            "space": prepared.space,
        },
        "seed": recipe.seed,
        "versions": {name: version(name) for name in ("torch", "safetensors", "numpy")}
        | {"python": platform.python_version()},
    }


def _fingerprint(prepared: Prepared) -> str:
    """What an output is made from: equal for two runs that would write the same bytes."""
    facts: list[Any] = [
        __version__,
        version("torch"),
        prepared.recipe.data(),
        {n: str(i) for n, i in prepared.infos.items()},
    ]
    for source in (prepared.base, *prepared.originals.values()):
        for path in getattr(source, "files", ()) or [p for p in [getattr(source, "path", None)] if p is not None]:
            status = os.stat(path)
            facts.append([os.path.realpath(path), status.st_size, status.st_mtime_ns])
    for path in (prepared.recipe.coefficients, prepared.recipe.masks):
        if path is not None:
            facts.append([os.path.realpath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns])
    return blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _inputs(prepared: Prepared) -> list[dict[str, Any]]:
    labels = [spec.label for spec in prepared.recipe.tasks]
    sources: list[tuple[str, TensorSource]] = [("base", prepared.base)] if prepared.has_base else []
    if prepared.has_base and hasattr(prepared.base, "source"):
        sources = [("base", _whole(prepared.base))]
    sources += [(label, _whole(prepared.originals[label])) for label in labels]
    found = []
    for name, source in sources:
        entry: dict[str, Any] = {"name": name, "path": source.label}
        if isinstance(source, Adapter):
            entry["content_hash"] = source.content_hash()
        elif isinstance(source, Checkpoint):
            entry |= {"content_hash": source.content_hash(), "files": file_hashes(source)}
        else:
            entry["content_hash"] = content_hash(source)
        found.append(entry)
    return found


def _whole(source: TensorSource) -> TensorSource:
    """The source behind renaming, resizing and leaving out."""
    while not isinstance(source, Checkpoint) and hasattr(source, "source"):
        source = source.source
    return source


def file_hashes(source: Checkpoint) -> dict[str, str]:
    """Weight file name to the combined hash of its tensors."""
    digests = source.digests()
    by_file: dict[str, list[str]] = {}
    for name, file in source.shards().items():
        by_file.setdefault(file, []).append(name)
    return {
        file: combined_hash({n: source.infos[n] for n in names}, digests) for file, names in sorted(by_file.items())
    }


def _refuse_zero(prepared: Prepared, outcome: Outcome) -> None:
    if prepared.space != "delta" or "zero_task" in prepared.recipe.allow:
        return
    zero = [task.name for task, norm in zip(prepared.tasks, outcome.norms) if norm == 0]
    if zero:
        raise RecipeError(
            [
                f"tasks: {name} equals the base in every merged tensor, so it would only dilute the merge. Is it the right "
                "file? (`allow: [zero_task]` lets it through)"
                for name in zero
            ]
        )


def _refuse_other_base(prepared: Prepared, inputs: Sequence[Mapping[str, Any]]) -> None:
    hashes = {entry["name"]: entry["content_hash"] for entry in inputs}
    if "duplicate_task" not in prepared.recipe.allow:
        seen: dict[str, str] = {}
        for task in prepared.tasks:
            other = seen.setdefault(hashes[task.name], task.name)
            if other != task.name:
                raise RecipeError(
                    f"tasks: {other} and {task.name} have the same content. Give one a larger weight instead, or allow it "
                    "(`allow: [duplicate_task]`)"
                )
    if prepared.recipe.coefficients is not None:
        from taskvec.coefficients import Coefficients

        learned = Coefficients.load(prepared.recipe.coefficients)
        learned.check(
            base_hash=hashes.get("base"),
            task_hashes={t.name: hashes[t.name] for t in prepared.tasks},
            source=prepared.recipe.coefficients,
        )


def _findings(
    prepared: Prepared, outcome: Outcome, writer: CheckpointWriter, inputs: list[dict[str, Any]]
) -> dict[str, Any]:
    warnings = [*prepared.warnings, *outcome.warnings]
    warnings += [
        f"{name}: {count} values saturated in {dtype_name(prepared.infos[name].dtype)}"
        for name, count in writer.saturated.items()
    ]
    norms = dict(zip((task.name for task in prepared.tasks), outcome.norms))
    found: dict[str, Any] = {"inputs": inputs}
    if prepared.space == "delta":
        found["norms"] = norms
        sizes = [norm for norm in norms.values() if norm > 0]
        if sizes and max(sizes) > 3 * min(sizes):
            warnings.append(
                f"the norms of the task vectors differ by a factor of {max(sizes) / min(sizes):.1f}; the largest will dominate "
                "(the `equalize` preprocess evens them out)"
            )
    kept = [n for n in prepared.kept if n in prepared.infos]
    return found | {
        "passes": outcome.passes,
        "statistics": outcome.facts,
        "tensors": {"merged": len(prepared.merged), "kept from the base": kept if len(kept) <= 64 else len(kept)},
        "outputs": writer.shard_hashes(),
        "warnings": warnings,
    }


def _outputs(prepared: Prepared, writer: CheckpointWriter) -> dict[str, Any]:
    from blake3 import blake3

    companions, root = prepared.companions()
    beside = {str(p.relative_to(root)) if root else p.name: blake3(p.read_bytes()).hexdigest() for p in companions}
    beside.pop("README.md", None)
    return {"companions": beside, "digests": writer.digests()}


# -- checking what was made --------------------------------------------------------------------------------------------------


def provenance_of(path: "str | os.PathLike[str]") -> dict[str, Any]:
    """What taskvec.json (or, for a single file, the header) says of a merged model.

    Raises:
        NotAModelError: no provenance of ours is there.
    """
    where = Path(path)
    try:
        if where.is_dir():
            found = json.loads((where / PROVENANCE).read_text("utf-8"))
        else:
            opened = Checkpoint.open(path)
            found = json.loads(getattr(opened, "metadata", {})["taskvec"])
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, TaskvecError):
            raise
        raise NotAModelError(
            f"{where}: no provenance of a merge ({PROVENANCE} or header metadata) is there."
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise NotAModelError(f"{where}: {PROVENANCE} is not that of a merge made by taskvec.")
    return found


def verify(
    path: "str | os.PathLike[str]", *, deep: bool = False, progress: Callable[[Progress], None] | None = None
) -> dict[str, Any]:
    """Checks a merged model against its provenance.

    Args:
        path: what `merge` made.
        deep: also make it again from its recipe, in a temporary place, and compare bit for bit.
        progress: for the second merge.

    Returns:
        What was checked.

    Raises:
        VerificationError: content differs; names tensors or files.
    """
    where = Path(path)
    found = provenance_of(where)
    checkpoint = Checkpoint.open(where)
    assert isinstance(checkpoint, Checkpoint)
    if "digests" in found:
        assert_digests(checkpoint, found["digests"], where)
    hashes = (
        file_hashes(checkpoint) if where.is_dir() else {name: checkpoint_hash(checkpoint) for name in found["outputs"]}
    )
    wrong = [file for file, digest in found["outputs"].items() if hashes.get(file) != digest]
    if wrong or set(hashes) != set(found["outputs"]):
        raise VerificationError(f"{where}: {shortened(wrong or sorted(hashes))} differ from what was recorded.")
    _companions_unchanged(where, found.get("companions", {}))
    result = {"path": str(where), "tensors": len(checkpoint.infos), "files": len(hashes), "deep": deep}
    if deep:
        recipe = Recipe.from_data(found["recipe"], where=PROVENANCE)
        with tempfile.TemporaryDirectory(prefix=f".{where.name}.verify-", dir=where.parent) as place:
            again = merge(
                recipe, Path(place) / (where.name if where.suffix == ".safetensors" else "again"), progress=progress
            )
            changed = [
                entry["name"]
                for entry, now in zip(found["inputs"], again.provenance["inputs"])
                if entry["content_hash"] != now["content_hash"]
            ]
            if changed:
                raise BaseMismatchError(
                    f"{where}: cannot be made again; these inputs have changed since: {shortened(changed)}"
                )
            remade = Checkpoint.open(again.path)
            assert isinstance(remade, Checkpoint)
            assert_digests(remade, checkpoint.digests(), again.path)
    return result


def checkpoint_hash(checkpoint: Checkpoint) -> str:
    """Combined hash of all tensors, tied ones included."""
    return combined_hash(checkpoint.infos, checkpoint.digests())


def _companions_unchanged(where: Path, recorded: Mapping[str, str]) -> None:
    from blake3 import blake3

    wrong = [
        name
        for name, digest in recorded.items()
        if not (where / name).is_file() or blake3((where / name).read_bytes()).hexdigest() != digest
    ]
    if wrong:
        raise VerificationError(f"{where}: {shortened(wrong)} changed or missing since the merge.")


__all__ = ["Merged", "merge", "provenance_of", "verify"]
