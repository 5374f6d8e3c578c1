"""`merge(recipe, out)`: the one function most people call; and `verify`, which checks what it made."""

import fcntl
import glob
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.assembly import Assembly, assemble, in_order, staged
from merging.card import model_card
from merging.prepare import Opened, Prepared
from merging.recipe import Recipe
from taskvec import __version__, ahead, native
from taskvec.adapter import Adapter
from taskvec.checkpoint import SEGMENT, Checkpoint, combined_hash, content_hash
from taskvec.deltas import Tile
from taskvec.errors import (
    BaseMismatchError,
    NonFiniteError,
    NotAModelError,
    RecipeError,
    TaskvecError,
    UsageError,
    VerificationError,
    shortened,
)
from taskvec.precision import compute_dtype, dtype_name, is_float
from taskvec.source import TensorSource, bare
from taskvec.sweep import Options, Outcome, Progress, sweep
from taskvec.writer import CheckpointWriter, assert_digests, output_path

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
        UsageError: `recipe` is no recipe, or `out` no name that a file can have.
    """
    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"merge: expected a Recipe (`Recipe.load(path)`, `Recipe.from_data(mapping)`), found {type(recipe).__name__}"
        )
    return _in_stages(recipe, output_path(out), _Run(overwrite, resume, progress, notice))


@dataclass(frozen=True)
class _Run:
    """How a merge is carried out, whatever it merges."""

    overwrite: bool
    resume: bool
    progress: Callable[[Progress], None] | None
    notice: Callable[[str], None]


def _in_stages(recipe: Recipe, out: Path, run: _Run) -> Merged:
    if not recipe.stages:
        return _merged(assemble(recipe, out, overwrite=run.overwrite), out, run)
    staged(recipe, out, overwrite=run.overwrite)  # whatever is wrong anywhere is told before anything is made
    existing = next(folder for folder in out.parents if folder.exists())
    with _own_folder(existing, out.name, "stages", run.notice) as place:
        made: dict[str, TensorSource] = {}
        facts: dict[str, Any] = {}
        for name, stage in in_order(recipe).items():
            run.notice(f"stage {name}")
            inner = assemble(stage, opened=Opened(made))
            path = place / f"{len(made)}"
            facts[name] = _merged(inner, path, _Run(False, False, run.progress, run.notice), cached=True).provenance
            checkpoint = Checkpoint.open(path)
            checkpoint.label = name
            made[name] = checkpoint
        last = recipe.model_copy(update={"stages": {}})
        assembly = assemble(last, out, overwrite=run.overwrite, opened=Opened(made))
        return _merged(assembly, out, run, recipe=recipe, stages=facts)


@contextmanager
def _own_folder(parent: Path, name: str, what: str, notice: Callable[[str], None]) -> Iterator[Path]:
    """A folder for results on the way, removed at the end; those that killed runs left are removed first.

    A run holds a lock in its folder, so one whose lock is free is nobody's.
    """
    for old in sorted(parent.glob(f".{glob.escape(name)}.{what}-*/lock")):
        with old.open("rb") as held, suppress(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            notice(f"found {old.parent.name} of an interrupted run: removed")
            shutil.rmtree(old.parent)
    with (
        tempfile.TemporaryDirectory(prefix=f".{name}.{what}-", dir=parent) as place,
        (Path(place) / "lock").open("wb") as held,
    ):
        fcntl.flock(held, fcntl.LOCK_EX)
        yield Path(place)


def _merged(
    assembly: Assembly,
    out: Path,
    run: _Run,
    *,
    recipe: Recipe | None = None,
    stages: Mapping[str, Any] | None = None,
    cached: bool = False,
) -> Merged:
    for warning in assembly.warnings:
        run.notice(f"warning: {warning}")
    before = _provenance(assembly, recipe or assembly.recipe)
    if stages:
        before["stages"] = dict(stages)
    companions, root = assembly.companions()
    tasks = sum(len(part.tasks) + 1 for part in assembly.parts)
    with CheckpointWriter(
        out,
        assembly.infos,
        shard_size=assembly.recipe.output.shard_size,
        metadata={"taskvec": json.dumps(before)},
        reserve=4096 + 1024 * tasks,
        companions=companions,
        companions_root=root,
        inputs=assembly.input_paths(),
        overwrite=run.overwrite,
        fingerprint=_fingerprint(assembly),
        resume=run.resume,
        notice=run.notice,
        cached=cached or assembly.recipe.device != "cpu",  # there no core waits for the page cache
    ) as writer:
        known = ahead.found()
        for _, source in assembly.sources():
            if isinstance(source, Checkpoint):
                source.take_digests(known)
        outcomes = [_sweep_part(part, writer, run.progress) for part in assembly.parts]
        writer.settle()
        _refuse_zero(assembly, outcomes)
        inputs = _inputs(assembly)
        _refuse_other_base(assembly, inputs)
        for _, source in assembly.sources():
            if isinstance(source, Checkpoint):
                source.check_unchanged()
        after = before | _findings(assembly, outcomes, writer, inputs)
        files: dict[str, str] = {
            **assembly.files,
            PROVENANCE: json.dumps(after | _outputs(assembly, writer), indent=2) + "\n",
            "README.md": model_card(after, out.name, config=assembly.config),
        }
        path = writer.finish(metadata={"taskvec": json.dumps(after)}, files=files)
    return Merged(path, after, after["warnings"])


def _sweep_part(part: Prepared, writer: CheckpointWriter, progress: Callable[[Progress], None] | None) -> Outcome:
    outcome = Outcome()
    if part.merged:
        options = part.options()
        outcome = sweep(
            part.deltas,
            part.stages(),
            _Taking(part, writer, _written_aliases(part)),
            scope=part.scope,
            options=Options(options.memory, options.workers, options.device, options.tile, progress),
            skip=frozenset(writer.done),
        )
    _copy_kept(part, writer)
    return outcome


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


def _provenance(assembly: Assembly, recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "taskvec": __version__,
        "recipe": recipe.data(),
        "method": _method_facts(assembly.parts[0]),
        "seed": recipe.seed,
        "versions": {name: version(name) for name in ("torch", "safetensors", "numpy")}
        | {"python": platform.python_version(), "compiled passes": native.usable()},
    }
    if assembly.whole is None:
        found["parts"] = {
            name: {"method": _method_facts(part), "tensors": len(part.infos)}
            for name, part in zip(assembly.names, assembly.parts)
        }
    return found


def _method_facts(part: Prepared) -> dict[str, Any]:
    return {
        "name": part.method.name,
        "paper": part.method.paper,
        "parameters": part.parameters,
        "statistics": part.scope,
        "space": part.space,
    }


def _fingerprint(assembly: Assembly) -> str:
    """What an output is made from: equal for two runs that would write the same bytes."""
    recipe = assembly.recipe
    facts: list[Any] = [
        __version__,
        version("torch"),
        recipe.data(),
        {n: str(i) for n, i in assembly.infos.items()},
    ]
    if assembly.files:
        facts.append(assembly.files)
    for _, source in assembly.sources():
        for path in getattr(source, "files", ()) or [p for p in [getattr(source, "path", None)] if p is not None]:
            status = os.stat(path)
            facts.append([os.path.realpath(path), status.st_size, status.st_mtime_ns])
    for path in (recipe.coefficients, recipe.masks):
        if path is not None:
            facts.append([os.path.realpath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns])
    return blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _inputs(assembly: Assembly) -> list[dict[str, Any]]:
    found = []
    for name, source in assembly.sources():
        entry: dict[str, Any] = {"name": name, "path": source.label}
        if isinstance(source, Adapter):
            entry["content_hash"] = source.content_hash()
        elif isinstance(source, Checkpoint):
            entry |= {"content_hash": source.content_hash(), "files": file_hashes(source)}
        else:
            entry["content_hash"] = content_hash(source)
        found.append(entry)
    return found


def file_hashes(source: Checkpoint) -> dict[str, str]:
    """Weight file name to the combined hash of its tensors."""
    digests = source.digests()
    by_file: dict[str, list[str]] = {}
    for name, file in source.shards().items():
        by_file.setdefault(file, []).append(name)
    return {
        file: combined_hash({n: source.infos[n] for n in names}, digests) for file, names in sorted(by_file.items())
    }


def _refuse_zero(assembly: Assembly, outcomes: Sequence[Outcome]) -> None:
    if "zero_task" in assembly.recipe.allow:
        return
    moved: dict[str, bool] = {}
    for part, outcome in zip(assembly.parts, outcomes):
        if part.space == "delta":
            for task, norm in zip(part.tasks, outcome.norms):
                moved[task.name] = moved.get(task.name, False) or norm != 0
    zero = [name for name, moves in moved.items() if not moves]
    if zero:
        raise RecipeError(
            [
                f"tasks: {name} equals the base in every merged tensor, so it would only dilute the merge. Is it the right "
                "file? (`allow: [zero_task]` lets it through)"
                for name in zero
            ]
        )


def _refuse_other_base(assembly: Assembly, inputs: Sequence[Mapping[str, Any]]) -> None:
    prepared, recipe = assembly.whole, assembly.recipe
    if prepared is None:
        return  # layers of one model may come twice
    by_source = {id(source): entry["content_hash"] for (_, source), entry in zip(assembly.sources(), inputs)}
    hashes = {name: by_source[id(bare(source))] for name, source in prepared.originals.items()}
    if "duplicate_task" not in recipe.allow:
        seen: dict[str, str] = {}
        for task in prepared.tasks:
            other = seen.setdefault(hashes[task.name], task.name)
            if other != task.name:
                raise RecipeError(
                    f"tasks: {other} and {task.name} have the same content. Give one a larger weight instead, or allow it "
                    "(`allow: [duplicate_task]`)"
                )
    base_hash = by_source[id(bare(prepared.base))] if prepared.has_base else None
    if recipe.coefficients is not None:
        from taskvec.coefficients import Coefficients

        learned = Coefficients.load(recipe.coefficients)
        learned.check(base_hash=base_hash, task_hashes=hashes, source=recipe.coefficients)
    if recipe.masks is not None:
        from taskvec.masks import Masks

        kinds = {task.name: "vector" if task.is_delta else "model" for task in prepared.tasks}
        kinds |= {name: "adapter" for name, source in prepared.originals.items() if isinstance(bare(source), Adapter)}
        Masks.load(recipe.masks).check(base_hash=base_hash, task_hashes=hashes, task_kinds=kinds)


def _findings(
    assembly: Assembly, outcomes: Sequence[Outcome], writer: CheckpointWriter, inputs: list[dict[str, Any]]
) -> dict[str, Any]:
    warnings = [*assembly.warnings]
    for outcome in outcomes:
        warnings += [warning for warning in outcome.warnings if warning not in warnings]
    warnings += [
        f"{name}: {count} values saturated in {dtype_name(assembly.infos[name].dtype)}"
        for name, count in writer.saturated.items()
    ]
    found: dict[str, Any] = {"inputs": inputs}
    norms: dict[str, dict[str, float]] = {}
    for name, part, outcome in zip(assembly.names, assembly.parts, outcomes):
        if part.space != "delta":
            continue
        norms[name] = dict(zip((task.name for task in part.tasks), outcome.norms))
        sizes = [norm for norm in outcome.norms if norm > 0]
        if sizes and max(sizes) > 3 * min(sizes):
            warnings.append(
                f"{f'{name}: ' if name else ''}the norms of the task vectors differ by a factor of "
                f"{max(sizes) / min(sizes):.1f}; the largest will dominate (the `equalize` preprocess evens them out)"
            )
    if norms:
        found["norms"] = norms[""] if assembly.whole is not None else norms
    kept = [n for part in assembly.parts for n in part.kept if n in part.infos]
    facts = dict(zip(assembly.names, (outcome.facts for outcome in outcomes)))
    return found | {
        "passes": max(outcome.passes for outcome in outcomes),
        "statistics": facts[""] if assembly.whole is not None else facts,
        "tensors": {
            "merged": sum(len(part.merged) for part in assembly.parts),
            "kept from the base": kept if len(kept) <= 64 else len(kept),
        },
        "outputs": writer.shard_hashes(),
        "warnings": warnings,
    }


def _outputs(assembly: Assembly, writer: CheckpointWriter) -> dict[str, Any]:
    from blake3 import blake3

    companions, root = assembly.companions()
    beside = {str(p.relative_to(root)) if root else p.name: p.read_bytes() for p in companions}
    beside |= {name: text.encode() for name, text in assembly.files.items()}
    beside.pop("README.md", None)
    return {
        "companions": {name: blake3(content).hexdigest() for name, content in beside.items()},
        "digests": writer.digests(),
    }


# -- checking what was made --------------------------------------------------------------------------------------------------


def provenance_of(path: "str | os.PathLike[str]") -> dict[str, Any]:
    """What taskvec.json (or, for a single file, the header) says of a merged model.

    Raises:
        NotAModelError: no provenance of ours is there.
    """
    where = Path(path).expanduser()
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
    kinds: dict[str, type] = {"recipe": dict, "inputs": list, "outputs": dict, "companions": dict, "digests": dict}
    optional: dict[str, dict[str, str]] = {
        "companions": {},
        "digests": {},
    }  # a single file's header has no room for them
    damaged = [key for key, kind in kinds.items() if not isinstance(found.get(key, optional.get(key)), kind)]
    if damaged:
        raise NotAModelError(f"{where}: {PROVENANCE} is damaged; it says nothing that fits of {shortened(damaged)}.")
    if found.get("version") != 1:
        raise NotAModelError(f"{where}: {PROVENANCE} is of version {found.get('version')}, not 1; use a newer taskvec.")
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
    where = Path(path).expanduser()
    found = provenance_of(where)
    checkpoint = Checkpoint.open(where)
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
        with _own_folder(where.parent, where.name, "verify", lambda _: None) as place:
            again = merge(
                recipe, place / (where.name if where.suffix == ".safetensors" else "again"), progress=progress
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
            try:
                assert_digests(remade, checkpoint.digests(), again.path)
            except VerificationError as error:
                other = _other_versions(found, again.provenance)
                if not other:
                    raise
                raise VerificationError(
                    f"{error} It was made with other versions ({other}), whose last bits may differ; verify it there."
                ) from error
    return result


def _other_versions(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a merge was made with that is not what we have, for messages."""
    old, new = recorded.get("versions", {}), now["versions"]
    return ", ".join(f"{name} {old.get(name)}, here {new[name]}" for name in new if old.get(name) != new[name])


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
