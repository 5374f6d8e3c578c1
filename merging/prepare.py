"""From a recipe to open inputs that fit together, or to a list of everything that is wrong. Reads headers only."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.method import MergeMethod, method
from merging.recipe import Depth, Gradient, Recipe, TaskSpec, unmatched, value_at
from merging.stacks import seeded
from taskvec.blocks import depth_of
from taskvec.checkpoint import Checkpoint
from taskvec.deltas import ModelDeltas, Task, WeightsOf
from taskvec.errors import MismatchError, NotAModelError, Problems, RecipeError, TaskvecError, UsageError, shortened
from taskvec.memory import free_memory
from taskvec.plan import Kernel, Plan, formula
from taskvec.precision import FLOAT8, cancelled, dtype_named, is_float
from taskvec.sizes import byte_count, bytes_text
from taskvec.source import TensorInfo, TensorSource, names_matching, paths_of
from taskvec.sweep import TILE, Options, Scope, Stage
from taskvec.vector import TaskVector, assert_alike, is_task_vector
from taskvec.views import Only, Renamed, Resized, Wide, stored_dtype
from taskvec.writer import check_output, output_path

Notice = Callable[[str], None]


class Opened:
    """Checkpoints that are open, each once, however often a recipe names it.

    Attributes:
        planned: sources that stand for a name although nothing is there yet (the results of earlier stages).
    """

    def __init__(self, planned: Mapping[str, TensorSource] | None = None):
        self.planned = dict(planned or {})
        self._found: dict[tuple[str, str | None], TensorSource] = {}

    def __call__(self, path: str, revision: str | None = None) -> TensorSource:
        """The checkpoint of that path, hub id or stage."""
        if path in self.planned:
            return self.planned[path]
        key = (path, revision)
        if key not in self._found:
            self._found[key] = Checkpoint.open(path, revision)
        return self._found[key]


@dataclass(frozen=True)
class Part:
    """A merge that is a part of another: a slice, or a module.

    Attributes:
        name: how messages call it.
        see: how each of its models is seen, given the model and its place among the tasks (-1 for the base).
        names: the tensors of the whole result, against which patterns are checked.
        depth: the layers over which gradients run, by tower.
        base_layers: the layers of the base that the part uses.
        by_token: whether tables are lined up by token.
    """

    name: str
    see: Callable[[TensorSource, int], TensorSource] = lambda source, _: source
    names: Sequence[str] | None = None
    depth: Mapping[str, range] = field(default_factory=dict)
    base_layers: tuple[int, int] | None = None
    by_token: bool = False


@dataclass
class Prepared:
    """A recipe with its inputs open and everything decided that headers can decide.

    Attributes:
        recipe: what was asked for.
        method: the combining method, `parameters` its complete parameters.
        base: the base, or the first model for methods that need none.
        tasks: the inputs, in order, seen through renaming and resizing.
        merged: names of the tensors that are merged; `kept` those copied from the base.
        infos: shape and stored dtype of every tensor of the output.
        warnings: what is worth knowing, but no reason to refuse.
    """

    recipe: Recipe
    method: MergeMethod
    parameters: dict[str, Any]
    scope: Scope
    base: TensorSource
    has_base: bool
    tasks: list[Task]
    originals: dict[str, TensorSource]
    merged: list[str]
    kept: list[str]
    infos: dict[str, TensorInfo]
    weights: WeightsOf
    masks: "Callable[[str, int, int], Tensor] | None"
    depth: Depth
    warnings: list[str] = field(default_factory=list)

    @property
    def space(self) -> str:
        """Whether stacks hold differences to the base or weights."""
        return self.recipe.space or self.method.space

    @cached_property
    def deltas(self) -> ModelDeltas:
        """The task vectors, ready for the engine."""
        return ModelDeltas(
            self.base if self.has_base else None,
            self.tasks,
            self.merged,
            space=self.space,
            weights=self.weights,
            masks=self.masks,
        )

    def stages(self) -> list[Stage]:
        """The stages of the merge. Parameters given by pattern are resolved for the tensor whose turn it is."""
        recipe, count = self.recipe, len(self.tasks)
        stages = [self._stage(method(_name(step)), _given(step), count) for step in recipe.preprocess]
        stages.append(self._stage(self.method, recipe.parameters, count))
        if self.method.role == "preprocess":
            from merging.method import weighted_sum

            stages.append(Stage("task_arithmetic", "combine", lambda deltas: weighted_sum))
        if self.space == "delta" and recipe.scale != 1.0:
            stages.append(Stage("scale", "postprocess", lambda deltas: self._scaling()))
        return stages + [self._stage(method(_name(step)), _given(step), count) for step in recipe.postprocess]

    def _scaling(self) -> Kernel:
        scale = self.recipe.scale

        def scaled(tile: Any) -> Tensor:
            result: Tensor = tile.merged * value_at(scale, tile.name, self.depth)
            return result

        return formula("scale", scale=float(scale))(scaled) if isinstance(scale, float | int) else scaled

    def _stage(self, chosen: MergeMethod, given: Mapping[str, Any], count: int) -> Stage:
        def start(deltas: Any) -> "Plan | Kernel":
            values = dict(given)
            if self.scope == "tensor" and len(deltas.infos) == 1:
                (name,) = deltas.infos
                values = {key: resolved(value, name, self.depth) for key, value in given.items()}
            return chosen.start(deltas, **seeded(chosen, chosen.bound(values, count), values, self.recipe.seed))

        return Stage(chosen.name, chosen.role, start, chosen.unit_of(given), chosen.copies)

    def options(self) -> Options:
        """Budget, threads and device of the recipe."""
        memory = None if self.recipe.memory is None else byte_count(self.recipe.memory)
        return Options(memory=memory, workers=self.recipe.workers, device=self.recipe.device)

    def input_paths(self) -> list[Path]:
        """Every file or folder that is read."""
        return [path for source in (self.base, *self.originals.values()) for path in paths_of(source)]

    def companions(self) -> tuple[tuple[Path, ...], Path | None]:
        """The files beside the base's weights (without a base: the first model's), and their folder."""
        return getattr(self.base, "companions", ()), getattr(self.base, "path", None)

    # -- what `taskvec check` prints -------------------------------------------------------------------------------------

    def passes(self) -> int:
        """Passes over the inputs in the common case."""
        steps = [*self.recipe.preprocess, *self.recipe.postprocess]
        return self.method.passes + sum(method(_name(step)).passes - 1 for step in steps)

    def bytes_to_read(self) -> int:
        """Bytes read from the inputs, when no delta can be kept between passes."""
        kept = sum(self.base.infos[name].nbytes for name in self.kept)
        return (1 if self.scope == "tensor" else self.passes()) * self.deltas.bytes_per_pass() + kept

    def output_bytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def peak_memory(self) -> int:
        """Bytes of working memory: the budget, or less where everything fits below it."""
        options = self.options()
        budget = options.memory if options.memory is not None else free_memory() // 4
        workers = options.workers or len(os.sched_getaffinity(0))
        tiles = TILE * 4 * (4 * len(self.tasks) + 4) * workers
        everything = sum(self.deltas.infos[name].numel * 4 * (2 * len(self.tasks) + 4) for name in self.merged)
        return min(max(budget, tiles), tiles + everything)


def _name(step: Any) -> str:
    return step if isinstance(step, str) else str(step.get("method", ""))


def _given(step: Any) -> dict[str, Any]:
    return {} if isinstance(step, str) else {key: value for key, value in step.items() if key != "method"}


def resolved(value: Any, name: str, depth: Depth) -> Any:
    """A parameter value for one tensor: mappings from patterns and gradients become what holds there.

    In a list, each task's value is such a value of its own.
    """
    if isinstance(value, list):
        return [resolved(item, name, depth) for item in value]
    if isinstance(value, Mapping) and set(value) == {"gradient"}:
        return Gradient(gradient=value["gradient"]).at(name, depth)
    if isinstance(value, Mapping):
        inner = {key: Gradient(gradient=v["gradient"]) if isinstance(v, Mapping) else v for key, v in value.items()}
        return value_at(inner, name, depth, None)
    return value


def prepare(
    recipe: Recipe,
    out: "str | os.PathLike[str] | None" = None,
    *,
    overwrite: bool = False,
    opened: Opened | None = None,
    part: Part | None = None,
) -> Prepared:
    """Opens a recipe's inputs and checks them against each other, the method and the output place.

    Args:
        recipe: a recipe of whole models, or (with `part`) one part of a larger one.
        out: the output, if it is known.
        overwrite: whether it may be there already.
        opened: checkpoints that are open already.
        part: what the recipe is a part of.

    Raises:
        RecipeError: everything that is wrong, at once.
    """
    problems, warnings = Problems(), []
    opened = opened or Opened()
    if part is None and (recipe.tokenizer is not None or recipe.stages):
        raise RecipeError("tokenizer, stages: only `taskvec merge` and `taskvec check` take such recipes")
    part = part or Part("")
    if not recipe.is_whole:
        raise RecipeError("slices, modules: only `taskvec merge` and `taskvec check` take such recipes")
    chosen = _method(recipe, problems)
    parameters = _parameters(recipe, chosen, problems)
    base = _open(recipe.base, recipe.base_revision, opened, problems) if recipe.base is not None else None
    if base is not None and is_task_vector(base):
        problems.add(f"base: {recipe.base} is a task vector; name the model that it was made from")
    if chosen is not None and chosen.needs_base and recipe.base is None:
        problems.add(
            f"base: {chosen.name} works on differences to a base; name the model that the tasks were tuned from"
        )
    originals: dict[str, TensorSource] = {}
    tasks: list[Task] = []
    for spec in recipe.tasks:
        task = _task(spec, base, opened, problems, missing_base=recipe.base is None)
        if task is None:
            continue
        originals[task.name] = task.source
        if spec.rename:
            try:
                task = Task(task.name, Renamed(task.source, spec.rename), task.is_delta)
            except MismatchError as error:
                problems.extend(error.problems)
        tasks.append(task)
    _same_twice(recipe, part.base_layers, problems)
    if out is not None:
        inputs = [path for source in (base, *originals.values()) if source is not None for path in paths_of(source)]
        try:
            check_output(output_path(out), inputs, overwrite=overwrite)
        except TaskvecError as error:
            problems.add(str(error))
    if len(tasks) < len(recipe.tasks) or (recipe.base is not None and base is None) or chosen is None:
        problems.raise_if_any(RecipeError)
    assert chosen is not None
    first: TensorSource = base if base is not None else tasks[0].source
    _quantised([first, *(task.source for task in tasks)], problems)
    donor = first
    tasks = [Task(task.name, part.see(task.source, at), task.is_delta) for at, task in enumerate(tasks)]
    first = part.see(base, -1) if base is not None else tasks[0].source
    exclude = set(names_matching(list(first.infos), recipe.exclude))
    everywhere = list({name: None for source in (first, *(t.source for t in tasks)) for name in source.infos})
    _patterns(recipe, part.names or everywhere, part.names or list(first.infos), problems)
    if recipe.exclude:
        first = Only(first, lambda name: name not in exclude) if exclude else first
        tasks = [Task(t.name, Only(t.source, _outside(recipe.exclude)), t.is_delta) for t in tasks]
    first, tasks = _resized(recipe, first, tasks, problems, whole=part.names is None)
    _alike(recipe, first, tasks, problems)
    problems.raise_if_any(RecipeError)
    kept_patterns = set(names_matching(list(first.infos), recipe.keep_base))
    included = set(names_matching(list(first.infos), recipe.include)) if recipe.include else set(first.infos)
    candidates = [n for n in first.infos if recipe.tied == "all" or n not in first.aliases]
    merged = [n for n in candidates if is_float(first.infos[n].dtype) and n in included and n not in kept_patterns]
    tied_names = {n for n in first.aliases if first.aliases[n] in merged and recipe.tied == "once"}
    kept = [n for n in first.infos if n not in set(merged) and n not in tied_names]
    if not merged and part.names is None:
        problems.add(_NOTHING_LEFT)
    warnings += _integers(first, tasks, kept)
    _tied_apart(first, tasks, problems)
    depth: Depth = depth_of(first.infos) | dict(part.depth)
    shapes = {name: first.infos[name].shape for name in merged}
    weights = _weights(recipe, chosen, parameters, merged, depth, shapes, problems)
    masks = _masks(recipe, shapes, problems)
    infos = _output_infos(recipe, first, problems)
    scope: Scope = recipe.statistics or chosen.statistics
    if scope == "model":
        problems.extend(
            f"{where}: values by pattern or depth need `statistics: tensor`; with the whole model's statistics there is one value"
            for where, value in _settings(recipe)
            if _is_by_name(value)
        )
    else:
        problems.extend(_by_tensor(recipe, chosen, merged, depth))
    _device(recipe, problems)
    if not part.by_token:
        warnings += _tokenizers(donor, [(task.name, originals[task.name]) for task in tasks])
    prepared = Prepared(
        recipe,
        chosen,
        parameters,
        scope,
        first,
        base is not None,
        tasks,
        originals,
        merged,
        kept,
        infos,
        weights,
        masks,
        depth,
        warnings,
    )
    if not problems:
        _memory(prepared, problems)
        if out is not None:
            _space(prepared, output_path(out), problems)
    problems.raise_if_any(RecipeError)
    return prepared


# -- pieces ----------------------------------------------------------------------------------------------------------------


def _outside(patterns: Sequence[str]) -> Callable[[str], bool]:
    return lambda name: not names_matching([name], patterns)


def _inside(patterns: Sequence[str]) -> Callable[[str], bool]:
    return lambda name: bool(names_matching([name], patterns))


def _method(recipe: Recipe, problems: Problems) -> MergeMethod | None:
    for role, steps in (("preprocess", recipe.preprocess), ("postprocess", recipe.postprocess)):
        for step in steps:
            if not _name(step):
                problems.add(
                    f"{role}: a step is a name, or a mapping with the key `method` beside its parameters; "
                    f"found {shortened(sorted(step))} without it (write `{{method: NAME, …}}`)"
                )
                continue
            try:
                found = method(_name(step))
                if found.role != role:
                    problems.add(f"{role}: {found.name} is a {found.role} method")
                else:
                    _bound_leaves(found, _given(step), len(recipe.tasks))
            except RecipeError as error:
                problems.extend(f"{role}: {problem}" for problem in error.problems)
            except UsageError as error:
                problems.add(f"{role}: {error}")
    try:
        chosen = method(recipe.method)
    except UsageError as error:
        problems.add(f"method: {error}")
        return None
    if chosen.role == "postprocess":
        problems.add(f"method: {chosen.name} changes a merged delta; put it under `postprocess`")
        return None
    wrong = chosen.check_tasks(len(recipe.tasks))
    if wrong:
        problems.add(f"tasks: {wrong}")
    if recipe.space is not None and chosen.space == "delta" and recipe.space == "weight":
        problems.add(f"space: {chosen.name} works on differences to the base only")
    if recipe.space == "delta" and chosen.space == "weight" and not chosen.either_space:
        problems.add(f"space: {chosen.name} works on weights only")
    if recipe.space == "delta" and recipe.base is None:
        problems.add("space: differences need a base; name it (`base:`)")
    if (recipe.space or chosen.space) == "weight" and recipe.scale != 1.0:
        problems.add(f"scale: {chosen.name} works on weights, not on differences; it has no scale")
    return chosen


def _is_by_name(value: Any) -> bool:
    """Whether a parameter's value differs from tensor to tensor, for one task at least."""
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(item, Mapping) for item in value))


def _settings(recipe: Recipe) -> list[tuple[str, Any]]:
    """Every parameter of the method and its steps, with what messages call it."""
    found = [(f"parameters.{key}", value) for key, value in recipe.parameters.items()]
    for role, steps in (("preprocess", recipe.preprocess), ("postprocess", recipe.postprocess)):
        named = [step for step in steps if _name(step)]
        found += [(f"{role}.{_name(step)}.{key}", value) for step in named for key, value in _given(step).items()]
    return found


def _sample_value(value: Any) -> Any:
    """Any one value of a mapping from patterns, to check its type."""
    return _leaves(value)[0]


def _bound_leaves(chosen: MergeMethod, given: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The parameters with any one value of each, after every value was checked.

    Raises:
        RecipeError: unknown parameters, and values out of range, all at once.
    """
    samples = {key: _sample_value(value) for key, value in given.items()}
    problems, bound = Problems(), {}
    together = not any(_is_by_name(value) for value in given.values())  # else each tensor's are checked later
    for key, value in given.items() or [("", None)]:
        for leaf in _leaves(value) if key else [None]:
            try:
                bound = chosen.bound({**samples, **({key: leaf} if key else {})}, count, together=together)
            except RecipeError as error:
                problems.extend(error.problems)
    problems.raise_if_any(RecipeError)
    return bound


def _parameters(recipe: Recipe, chosen: MergeMethod | None, problems: Problems) -> dict[str, Any]:
    if chosen is None:
        return {}
    values: dict[str, Any] = {}
    try:
        values = _bound_leaves(chosen, recipe.parameters, len(recipe.tasks))
    except RecipeError as error:
        problems.extend(f"parameters.{problem}" for problem in error.problems)
    return {**seeded(chosen, values, recipe.parameters, recipe.seed), **recipe.parameters} if values else {}


def _by_tensor(recipe: Recipe, chosen: MergeMethod, merged: Sequence[str], depth: Depth) -> list[str]:
    """What is wrong with the parameters that single tensors get, where they are given by pattern or depth."""
    found: list[str] = []
    uses = [("parameters", chosen, recipe.parameters)]
    for role, steps in (("preprocess", recipe.preprocess), ("postprocess", recipe.postprocess)):
        uses += [(role, method(_name(step)), _given(step)) for step in steps]
    for where, used, given in uses:
        if not any(_is_by_name(value) for value in given.values()):
            continue
        seen: dict[str, tuple[str, dict[str, Any]]] = {}
        for name in merged:
            values = {key: resolved(value, name, depth) for key, value in given.items()}
            seen.setdefault(repr(values), (name, values))
        for name, values in seen.values():
            lacking = [
                key
                for key, value in values.items()
                if _is_by_name(given[key]) and (value is None or (isinstance(value, list) and None in value))
            ]
            found += [f"{where}.{key}: no pattern matches {name}, and there is no `default`" for key in lacking]
            if lacking:
                continue
            try:
                used.bound(values, len(recipe.tasks))
            except RecipeError as error:
                found += [f"{where}: {problem} (for {name})" for problem in error.problems]
    return found


def _leaves(value: Any) -> list[Any]:
    """Every number that a value may be for some tensor; a list holds one for each task."""
    if isinstance(value, list) and _is_by_name(value):
        options = [_leaves(item) for item in value]
        return [[option[min(at, len(option) - 1)] for option in options] for at in range(max(map(len, options)))]
    if isinstance(value, Mapping):
        if set(value) == {"gradient"}:
            return list(value["gradient"]) or [None]
        return [leaf for inner in value.values() for leaf in _leaves(inner)] or [None]
    return [value]


def _open(path: str, revision: str | None, opened: Opened, problems: Problems) -> TensorSource | None:
    try:
        return opened(path, revision)
    except TaskvecError as error:
        problems.add(str(error))
        return None


def _adapter(spec: TaskSpec, base: TensorSource) -> Task:
    from taskvec.adapter import Adapter

    found = Adapter.open(spec.path, base, skip=spec.skip, tied=spec.tied, revision=spec.revision)
    return Task(spec.label, found, is_delta=True)


def _task(
    spec: TaskSpec, base: TensorSource | None, opened: Opened, problems: Problems, *, missing_base: bool
) -> Task | None:
    name, path, revision = spec.label, spec.path, spec.revision
    folder = Path(path).expanduser()
    try:
        if spec.over is not None:
            return Task(name, _over(spec, opened(spec.over)))
        if (folder / "adapter_config.json").is_file():
            if base is None:
                if missing_base:
                    problems.add(
                        f"{path}: an adapter is a change to its base; name the base it was trained on (`base:`)"
                    )
                return None
            return _adapter(spec, base)
        try:
            source = opened(path, revision)
        except NotAModelError:
            if folder.exists() or base is None:
                raise
            return _adapter(spec, base)  # a hub id of an adapter
        if is_task_vector(source):
            if base is None:
                if missing_base:
                    problems.add(f"{path}: a task vector is a difference to its base; name that base (`base:`)")
                return None
            vector = TaskVector.load(path)
            vector.apply_to(base)  # refuses another base
            return Task(name, vector, is_delta=True)
        if spec.skip or spec.tied != "refuse":
            problems.add(f"{path}: `{'skip' if spec.skip else 'tied'}` is for adapters; this is a whole model")
        return Task(name, source)
    except MismatchError as error:
        problems.extend(error.problems)
    except TaskvecError as error:
        problems.add(str(error))
    return None


def _over(spec: TaskSpec, model: TensorSource) -> TensorSource:
    """An adapter or task vector together with the model that it belongs to: one whole model."""
    try:
        source = Checkpoint.open(spec.path, spec.revision)
    except NotAModelError:
        adapter: Any = _adapter(spec, model).source
        return Wide(TaskVector([(1.0, adapter)], base=model).apply_to(model))
    if not is_task_vector(source):
        raise MismatchError([f"{spec.path}: `over` is for adapters and task vectors; this is a whole model"])
    return Wide(TaskVector.load(spec.path).apply_to(model))


def _same_twice(recipe: Recipe, base_layers: tuple[int, int] | None, problems: Problems) -> None:
    seen: dict[str, str] = {}
    base = os.path.realpath(recipe.base) if recipe.base is not None else None
    for spec in recipe.tasks:
        real = os.path.realpath(spec.path) if os.path.exists(spec.path) else f"{spec.path}@{spec.revision}"
        is_base = real == base and spec.layers == base_layers and spec.over is None
        if spec.over is not None or spec.layers is not None:
            real = f"{real} over {spec.over}, layers {spec.layers}"
        if real in seen and "duplicate_task" not in recipe.allow:
            problems.add(
                f"tasks: {spec.path} is there twice. Give it one larger weight instead, or allow it (`allow: [duplicate_task]`)"
            )
        if is_base and "zero_task" not in recipe.allow:
            problems.add(
                f"tasks: {spec.path} is the base itself; its task vector is zero (`allow: [zero_task]` lets it through)"
            )
        seen[real] = spec.label


def _quantised(sources: Sequence[TensorSource], problems: Problems) -> None:
    for source in sources:
        config = getattr(source, "config", {})
        quantised = config.get("quantization_config") if isinstance(config, Mapping) else None
        packed = [n for n in source.infos if n.endswith((".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB"))]
        scaled = [
            n
            for n, info in source.infos.items()
            if info.dtype in FLOAT8
            and any(n + end in source.infos for end in ("_scale_inv", "_scale", ".scale", "_scale_2"))
        ]
        if quantised or packed or scaled:
            kind = quantised.get("quant_method", "quantised") if isinstance(quantised, Mapping) else "quantised"
            where = f" ({shortened(packed or scaled, 2)})" if packed or scaled else ""
            problems.add(
                f"{source.label}: a {kind} checkpoint{where}; its numbers are codes or need their scales, so averaging them "
                "would be wrong. Dequantise it first."
            )


def _patterns(recipe: Recipe, everywhere: Sequence[str], names: Sequence[str], problems: Problems) -> None:
    for key in ("include", "keep_base"):
        for pattern in getattr(recipe, key):
            if not names_matching(names, [pattern]):
                problems.add(f"{key}: the pattern {pattern!r} matches no tensor")
    for pattern in recipe.exclude:
        if not names_matching(everywhere, [pattern]):
            problems.add(f"exclude: the pattern {pattern!r} matches no tensor")
    problems.extend(f"resize: the pattern {p!r} matches no tensor" for p in unmatched(recipe.resize, names))
    problems.extend(f"scale: the pattern {p!r} matches no tensor" for p in unmatched(recipe.scale, names))
    for spec in recipe.tasks:
        problems.extend(
            f"weight of {spec.label}: the pattern {p!r} matches no tensor" for p in unmatched(spec.weight, names)
        )
    for where, value in _settings(recipe):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping) and set(item) != {"gradient"}:
                problems.extend(f"{where}: the pattern {p!r} matches no tensor" for p in unmatched(item, names))


def _resized(
    recipe: Recipe, first: TensorSource, tasks: list[Task], problems: Problems, *, whole: bool
) -> tuple[TensorSource, list[Task]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, info in first.infos.items():
        others = [t.source.infos[name].shape for t in tasks if name in t.source.infos]
        if all(shape == info.shape for shape in others) or not info.shape:
            continue
        if any(len(shape) != len(info.shape) or shape[1:] != info.shape[1:] for shape in others):
            continue  # not a matter of rows; reported with the other shapes
        how = next((how for pattern, how in recipe.resize.items() if names_matching([name], [pattern])), None)
        if how is not None:
            shapes[name] = (
                info.shape if how == "base" else (min(info.shape[0], *(s[0] for s in others)), *info.shape[1:])
            )
    if not shapes:
        if whole and recipe.resize and not any(problem.startswith("resize") for problem in problems.found):
            problems.add("resize: every tensor that the patterns match has the same shape in all models")
        return first, tasks
    if any(task.is_delta for task in tasks):
        problems.add("resize: works between whole models, not with adapters or stored task vectors")
    return Resized(first, shapes, first), [Task(t.name, Resized(t.source, shapes, first), t.is_delta) for t in tasks]


_NOTHING_LEFT = "nothing would be merged: include, exclude and keep_base leave no floating tensor"


def _alike(recipe: Recipe, first: TensorSource, tasks: list[Task], problems: Problems) -> None:
    untouched = _outside(recipe.keep_base) if recipe.keep_base else None
    for task in tasks:
        if task.is_delta:
            continue
        ours: TensorSource = Only(first, untouched) if untouched else first
        theirs: TensorSource = Only(task.source, untouched) if untouched else task.source
        if recipe.include:
            ours, theirs = Only(ours, _inside(recipe.include)), Only(theirs, _inside(recipe.include))
        if not ours.infos:
            problems.add(_NOTHING_LEFT)
            continue
        try:
            assert_alike(ours, {task.name: theirs})
        except MismatchError as error:
            for problem in error.problems:
                problems.add(problem)
            rows = [
                n
                for n, i in theirs.infos.items()
                if n in ours.infos and i.shape != ours.infos[n].shape and i.shape[1:] == ours.infos[n].shape[1:]
            ]
            if rows:
                problems.add(
                    f'(for a vocabulary of another size: `resize: {{"{rows[0]}": base}}` keeps the base\'s rows, `truncate` the '
                    "rows that all models have)"
                )
            if any(word in p for p in error.problems for word in ("not in", "are missing", "has none of")):
                hint = _prefix(ours, theirs)
                problems.add(
                    hint
                    or "(`exclude` leaves tensors out of the merge and of the output, `keep_base` keeps the base's)"
                )


def _prefix(ours: TensorSource, theirs: TensorSource) -> str | None:
    """A renaming that would make the names fit, if there is one."""
    mine, other = set(ours.infos), list(theirs.infos)
    for name in sorted(mine)[:50]:
        for candidate in other:
            if candidate.endswith("." + name) or name.endswith("." + candidate):
                longer, shorter = (candidate, name) if len(candidate) > len(name) else (name, candidate)
                prefix = longer[: len(longer) - len(shorter)]
                old, new = (prefix, "") if longer == candidate else ("", prefix)
                if sum((new + n[len(old) :]) in mine for n in other if n.startswith(old)) * 2 > len(mine):
                    return f'(the names fit after renaming: give the task `rename: {{"{old}": "{new}"}}`)'
    return None


def _integers(first: TensorSource, tasks: list[Task], kept: list[str]) -> list[str]:
    warnings = []
    for name in kept:
        info = first.infos[name]
        if is_float(info.dtype) or info.numel > 1 << 24:
            continue
        ours = first.read(name)
        differ = [
            t.name
            for t in tasks
            if not t.is_delta and name in t.source.infos and not torch.equal(t.source.read(name), ours)
        ]
        if differ:
            kind = "complex numbers" if info.dtype.is_complex else "integers"
            warnings.append(
                f"{name}: {info.dtype} values differ in {shortened(differ)}; {kind} are never averaged, the base's are kept"
            )
    return warnings


def _tied_apart(first: TensorSource, tasks: list[Task], problems: Problems) -> None:
    for task in tasks:
        for name, to in first.aliases.items():
            infos = task.source.infos
            if task.is_delta or name not in infos or to not in infos or task.source.aliases.get(name) == to:
                continue
            size = infos[name].numel
            step = 1 << 22
            if any(
                not torch.equal(
                    task.source.read_flat(name, i, min(i + step, size)),
                    task.source.read_flat(to, i, min(i + step, size)),
                )
                for i in range(0, size, step)
            ):
                problems.add(
                    f"{task.name}: {name} and {to} are one tensor in the base, but differ here; merging would drop one of them. "
                    "Untie the base first, or keep it (`keep_base`)."
                )


def _weights(
    recipe: Recipe,
    chosen: MergeMethod,
    parameters: Mapping[str, Any],
    merged: list[str],
    depth: Depth,
    shapes: Mapping[str, tuple[int, ...]],
    problems: Problems,
) -> WeightsOf:
    values = {name: [value_at(spec.weight, name, depth) for spec in recipe.tasks] for name in merged}
    for at, spec in enumerate(recipe.tasks):
        without = [name for name, row in values.items() if row[at] is None]
        if without:
            problems.add(
                f"weight of {spec.label}: is missing for {shortened(without)}; no pattern matches them and there is no default"
            )
    fixed = {
        name: torch.tensor([0.0 if v is None else float(v) for v in row], dtype=torch.float64).float()
        for name, row in values.items()
    }
    if recipe.coefficients is None:
        zero = [name for name, weights in fixed.items() if not bool((weights != 0).any())]
        # a gradient that starts at zero leaves those layers at the base, which is a merge like any other
        in_part = chosen.space == "delta" and len(zero) < len(fixed)
        if zero and not in_part and chosen.name != "passthrough":
            problems.add(f"weights: all are zero for {shortened(zero)}; nothing would be merged there")
        none = [name for name, weights in fixed.items() if bool(cancelled(weights))]
        if none and chosen.name in ("average", "linear", "task_arithmetic") and parameters.get("normalize") is True:
            problems.add(
                f"weights: they add up to zero for {shortened(none)}, so they cannot be normalised (normalize: false)"
            )
        if none and chosen.name in ("karcher", "multislerp", "nuslerp"):
            problems.add(f"weights: they add up to zero for {shortened(none)}; {chosen.name} needs their proportions")
        return lambda name, start, stop: fixed[name]
    from taskvec.coefficients import Coefficients

    try:
        learned = Coefficients.load(recipe.coefficients)
    except TaskvecError as error:
        problems.add(str(error))
        return lambda name, start, stop: fixed[name]
    if learned.mode == "linear":
        problems.add(
            f"{recipe.coefficients}: learned for the first-order model around the base; as weights of the model itself they "
            "would be another model. Learn them with `mode: nonlinear`."
        )
        return lambda name, start, stop: fixed[name]
    labels = [spec.label for spec in recipe.tasks]
    same = sorted(labels) == sorted(learned.tasks)
    try:
        learned.check(merged, tasks=learned.tasks if same else labels, source=recipe.coefficients)
    except MismatchError as error:
        problems.extend(f"{recipe.coefficients}: {problem}" for problem in error.problems)
        return lambda name, start, stop: fixed[name]
    order = torch.tensor([list(learned.tasks).index(label) for label in labels])

    def weights(name: str, start: int, stop: int) -> Tensor:
        if learned.is_scalar(name):
            return learned.weights(name)[order].float() * fixed[name]
        return learned.expand(name, shapes[name], start, stop)[order].float() * fixed[name][:, None]

    return weights


def _masks(
    recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], problems: Problems
) -> "Callable[[str, int, int], Tensor] | None":
    if recipe.masks is None:
        return None
    from taskvec.masks import Masks

    try:
        masks = Masks.load(recipe.masks)
        masks.check(shapes)
    except MismatchError as error:
        problems.extend(f"{recipe.masks}: {problem}" for problem in error.problems)
        return None
    except TaskvecError as error:
        problems.add(str(error))
        return None
    return masks.read_flat


def _output_infos(recipe: Recipe, first: TensorSource, problems: Problems) -> dict[str, TensorInfo]:
    stored = None
    if recipe.output.dtype is not None:
        try:
            stored = dtype_named(recipe.output.dtype)
        except UsageError as error:
            problems.add(f"output.{error}")
    names = [n for n in first.infos if n not in first.aliases or _is_stored(first)]
    return {
        n: TensorInfo(
            first.infos[n].shape,
            stored if stored is not None and is_float(first.infos[n].dtype) else stored_dtype(first, n),
        )
        for n in names
    }


def _is_stored(source: TensorSource) -> bool:
    """Whether the tensors lie in a checkpoint, where a tied name is there because it was stored."""
    while not isinstance(source, Checkpoint) and hasattr(source, "source"):
        source = source.source
    return isinstance(source, Checkpoint)


def _device(recipe: Recipe, problems: Problems) -> None:
    try:
        device = torch.device(recipe.device)
    except RuntimeError:
        problems.add(f"device: {recipe.device!r} is not a device; write cpu, cuda or cuda:1")
        return
    if device.type == "cuda" and not torch.cuda.is_available():
        problems.add("device: no CUDA device is available here; use cpu")
    elif device.type not in ("cpu", "cuda"):
        problems.add(f"device: {recipe.device!r} is not supported; use cpu or cuda")


def _tokenizers(first: TensorSource, others: Sequence[tuple[str, TensorSource]]) -> list[str]:
    def vocabulary(source: TensorSource) -> tuple[bytes, Path] | None:
        for path in getattr(source, "companions", ()):
            if path.name == "tokenizer.json":
                return path.read_bytes(), path
        return None

    ours = vocabulary(first)
    warnings = []
    for label, other in others:
        theirs = vocabulary(other)
        if ours is None or theirs is None or ours[0] == theirs[0]:
            continue
        try:
            one, two = (json.loads(text)["model"].get("vocab") for text, _ in (ours, theirs))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if one != two:
            warnings.append(
                f"{label}: its tokenizer has another vocabulary than {first.label}'s; rows of the embeddings mean other "
                "tokens there, and merging them mixes unrelated tokens (`tokenizer: union` or `base` merges them by token)"
            )
    return warnings


def _memory(prepared: Prepared, problems: Problems) -> None:
    stages = prepared.stages()
    budget = prepared.options().memory
    if budget is None:
        budget = free_memory() // 4
    count = len(prepared.tasks)
    least = TILE * 4 * (2 * count + 4)
    what = "tiles"
    if any(stage.unit == "tensor" for stage in stages):
        biggest = max(prepared.merged, key=lambda name: prepared.deltas.infos[name].numel)
        least, what = prepared.deltas.infos[biggest].numel * 4 * (2 * count + 4), f"{biggest}, which it needs whole"
    if least > budget:
        problems.add(
            f"memory: {prepared.method.name} needs about {bytes_text(least)} for {what}; the budget is {bytes_text(budget)}. "
            "Raise it (--memory), or leave that tensor out (keep_base)."
        )


def _space(prepared: Prepared, out: Path, problems: Problems) -> None:
    parent = next((folder for folder in out.parents if folder.exists()), None)
    if parent is None:
        return
    needed, free = prepared.output_bytes() + (16 << 20), shutil.disk_usage(parent).free
    if needed > free:
        problems.add(f"{out}: the output needs {bytes_text(needed)}, but only {bytes_text(free)} are free there.")
