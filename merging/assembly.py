"""From a recipe to everything that one output is made of: one merge, or one for each slice, module and leftover.

A recipe of whole models is one part. Slices and modules become several, each an ordinary merge whose models are seen
through a choice of their tensors; what config.json must say of the result is worked out here as well. Headers only.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from merging.layers import (
    Origin,
    Placed,
    chosen_tower,
    heads,
    is_tied,
    module_of_role,
    restacked_config,
    shares_outside,
    untied,
)
from merging.prepare import Opened, Part, Prepared, prepare
from merging.recipe import ModuleSpec, Recipe, SliceSpec, TaskSpec
from merging.vocabulary import Vocabularies, chat_template_files
from taskvec.blocks import depth_of
from taskvec.errors import (
    MismatchError,
    MissingTensorError,
    NotAModelError,
    Problems,
    RecipeError,
    TaskvecError,
    shortened,
)
from taskvec.precision import config_in, dtype_named
from taskvec.source import TensorInfo, TensorSource, bare, names_matching
from taskvec.views import Renamed, Selected

CONFIG = "config.json"


@dataclass
class Assembly:
    """A recipe with its inputs open, and everything decided that headers can decide.

    Attributes:
        recipe: what was asked for.
        names: what messages call each part; "" for a recipe of whole models.
        parts: the merges that make the result, none of which writes another's tensors.
        donor: the model whose companions (configuration, tokenizer) the result gets: the base, else the first named.
        infos: shape and stored dtype of every tensor of the output.
        files: companions that are written anew, by name.
        stale: companions of the donor that are not copied.
        warnings: what is worth knowing, but no reason to refuse.
    """

    recipe: Recipe
    names: list[str]
    parts: list[Prepared]
    donor: TensorSource
    infos: dict[str, TensorInfo]
    files: dict[str, str] = field(default_factory=dict)
    stale: frozenset[str] = frozenset()
    warnings: list[str] = field(default_factory=list)

    @property
    def whole(self) -> Prepared | None:
        """The one part of a recipe of whole models."""
        return self.parts[0] if self.recipe.is_whole else None

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the result."""
        if CONFIG in self.files:
            found: dict[str, Any] = json.loads(self.files[CONFIG])
            return found
        return dict(getattr(self.donor, "config", {}))

    def sources(self) -> list[tuple[str, TensorSource]]:
        """Every input once, the base first, as it is on disk, with its name."""
        found: list[tuple[str, TensorSource]] = []
        for part in self.parts:
            named = [("base", part.base)] if part.has_base else []
            for name, source in [*named, *part.originals.items()]:
                while hasattr(source, "source"):
                    source = source.source
                if all(known is not source for _, known in found):
                    found.append((name, source))
        return sorted(found, key=lambda item: item[0] != "base")

    def input_paths(self) -> list[Path]:
        """Every file or folder that is read."""
        found = [path for part in self.parts for path in part.input_paths()]
        return list(dict.fromkeys([*found, *[p for p in [getattr(self.donor, "path", None)] if p is not None]]))

    def companions(self) -> tuple[tuple[Path, ...], Path | None]:
        """The files beside the donor's weights, and their folder."""
        found: tuple[Path, ...] = getattr(self.donor, "companions", ())
        return tuple(path for path in found if path.name not in self.stale), getattr(self.donor, "path", None)

    def passes(self) -> int:
        """Passes over the inputs in the common case."""
        return max(1 if part.scope == "tensor" else part.passes() for part in self.parts)

    def bytes_to_read(self) -> int:
        return sum(part.bytes_to_read() for part in self.parts)

    def output_bytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def peak_memory(self) -> int:
        return max(part.peak_memory() for part in self.parts)


@dataclass
class _Piece:
    """A part before its inputs are checked against each other."""

    name: str
    recipe: Recipe
    placed: Placed | None = None
    base_layers: tuple[int, int] | None = None
    names: list[str] = field(default_factory=list)

    def see(self, vocabularies: Vocabularies | None) -> Callable[[TensorSource, int], TensorSource]:
        def seen(source: TensorSource, at: int) -> TensorSource:
            if vocabularies is not None:
                of = self.recipe.base if at < 0 else None if self.recipe.tasks[at].over else self.recipe.tasks[at].path
                source = vocabularies.seen(source, of or self.recipe.tasks[max(at, 0)].over or "", self.recipe.base)
            if self.placed is not None:
                layers = self.base_layers if at < 0 else self.recipe.tasks[at].layers
                source = Selected(source, self.placed.names(source, layers))
            return source

        return seen

    @property
    def depth(self) -> dict[str, range]:
        if self.placed is None or self.placed.tower is None:
            return {}
        return {self.placed.tower: range(self.placed.first, self.placed.first + self.placed.count)}


@dataclass
class _Stack:
    """What was stacked: for config.json."""

    tower: str
    depth: int
    origins: list[Origin]


def assemble(
    recipe: Recipe,
    out: "str | os.PathLike[str] | None" = None,
    *,
    overwrite: bool = False,
    opened: Opened | None = None,
) -> Assembly:
    """Opens all inputs of a recipe and checks them against each other, the methods and the output place.

    Args:
        recipe: any recipe without stages of its own.
        out: the output, if it is known.
        overwrite: whether it may be there already.
        opened: checkpoints that are open already, and stand-ins for those that are not made yet.

    Raises:
        RecipeError: everything that is wrong, at once.
    """
    opened = opened or Opened()
    if recipe.is_whole and not any((recipe.tokenizer, recipe.chat_template, recipe.donor)):
        prepared = prepare(recipe, out, overwrite=overwrite, opened=opened)
        # the first model as it is on disk: with an adapter or other names it has no files beside it
        lender = prepared.base if prepared.has_base else opened(*_donor_place(recipe))
        config = getattr(lender, "config", {})
        files = _config_file(config, config, recipe)
        return Assembly(recipe, [""], [prepared], lender, prepared.infos, files, warnings=prepared.warnings)
    problems, warnings = Problems(), list[str]()
    donor = _donor(recipe, opened, problems)
    pieces, stacks = _pieces(recipe, donor, opened, problems, warnings)
    problems.raise_if_any(RecipeError)
    assert donor is not None
    vocabularies = None
    if recipe.tokenizer is not None:
        models = _models(pieces, opened)
        vocabularies = Vocabularies.planned(
            recipe.tokenizer, models, _donor_path(recipe), recipe.base or recipe.donor, problems
        )
        problems.raise_if_any(RecipeError)
    everything = None if recipe.is_whole else [name for piece in pieces for name in piece.names]
    parts: list[Prepared] = []
    told: list[tuple[str, list[str]]] = []
    for piece in pieces:
        part = Part(
            piece.name, piece.see(vocabularies), everything, piece.depth, piece.base_layers, vocabularies is not None
        )
        try:
            parts.append(prepare(piece.recipe, out, overwrite=overwrite, opened=opened, part=part))
        except RecipeError as error:
            told.append((piece.name, list(error.problems)))
    _tell(told, problems)
    problems.raise_if_any(RecipeError)
    infos: dict[str, TensorInfo] = {}
    for part_of in parts:
        twice = [name for name in part_of.infos if name in infos]
        if twice:
            problems.add(f"{shortened(twice)} would be written by two parts")
        infos |= part_of.infos
        warnings += [warning for warning in part_of.warnings if warning not in warnings]
    files = _files(recipe, donor, infos, stacks, vocabularies, opened, pieces, problems, warnings)
    problems.raise_if_any(RecipeError)
    stale = vocabularies.stale if vocabularies is not None else frozenset[str]()
    warnings += vocabularies.warnings if vocabularies is not None else []
    return Assembly(recipe, [piece.name for piece in pieces], parts, donor, infos, files, stale, warnings)


class Planned:
    """The result of a merge that is not made yet, as far as headers can tell."""

    def __init__(self, name: str, assembly: Assembly):
        self.label, self.infos = name, dict(assembly.infos)
        self.config = assembly.config
        self.aliases = {a: b for a, b in assembly.donor.aliases.items() if a in self.infos and b in self.infos}
        companions, _ = assembly.companions()
        self.companions = tuple(path for path in companions if path.name not in assembly.files)
        self.texts: Mapping[str, str] = assembly.files

    def read(self, name: str) -> Tensor:
        raise MissingTensorError(f"{self.label} is a stage that is not merged yet; {name} has no values")

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)


def in_order(recipe: Recipe) -> dict[str, Recipe]:
    """The stages of a recipe, each after those whose results it uses.

    Raises:
        RecipeError: stages that wait for each other.
    """
    found: dict[str, Recipe] = {}
    waiting = dict(recipe.stages)
    while waiting:
        ready = [name for name, stage in waiting.items() if not set(models_of(stage)) & set(waiting)]
        if not ready:
            raise RecipeError(f"stages: {' and '.join(waiting)} wait for each other")
        found |= {name: waiting.pop(name) for name in ready}
    return found


def models_of(recipe: Recipe) -> list[str]:
    """Every model that a recipe names."""
    paths = [recipe.base, recipe.donor, *(part.base for part in [*recipe.slices, *recipe.modules.values()])]
    paths += [part.base for module in recipe.modules.values() for part in module.slices]
    for task in _all_tasks(recipe):
        paths += [task.path, task.over]
    if recipe.tokenizer is not None:
        paths.append(recipe.tokenizer.source)
    return list(dict.fromkeys(path for path in paths if path is not None))


def staged(
    recipe: Recipe, out: "str | os.PathLike[str] | None" = None, *, overwrite: bool = False
) -> list[tuple[str, Assembly]]:
    """Every stage of a recipe in order, and the recipe itself (under the name "") last, from headers alone.

    Raises:
        RecipeError: everything that is wrong with the first stage that has something wrong.
    """
    planned: dict[str, TensorSource] = {}
    found: list[tuple[str, Assembly]] = []
    used = {path for each in [recipe, *recipe.stages.values()] for path in models_of(each)}
    idle = [name for name in recipe.stages if name not in used]
    if idle:
        raise RecipeError([f"stages: nothing uses {name}" for name in idle])
    for name, stage in in_order(recipe).items():
        if stage.stages:
            raise RecipeError(f"stages.{name}: a stage has no stages of its own; write them beside it")
        try:
            assembly = assemble(stage, opened=Opened(planned))
        except RecipeError as error:
            raise RecipeError([f"stages.{name}: {problem}" for problem in error.problems]) from error
        found.append((name, assembly))
        planned[name] = Planned(name, assembly)
    last = recipe.model_copy(update={"stages": {}})
    found.append(("", assemble(last, out, overwrite=overwrite, opened=Opened(planned))))
    return found


def _tell(told: Sequence[tuple[str, list[str]]], problems: Problems) -> None:
    """Problems of the parts, each with its part's name, but once and without it where several have it."""
    count: dict[str, int] = {}
    for _, found in told:
        for problem in found:
            count[problem] = count.get(problem, 0) + 1
    for name, found in told:
        problems.extend(f"{name}: {problem}" if name and count[problem] == 1 else problem for problem in found)


def _donor_path(recipe: Recipe) -> str:
    if recipe.donor is not None or recipe.base is not None:
        return str(recipe.donor or recipe.base)
    first = next(iter(_all_tasks(recipe)))
    return first.over or first.path


def _donor_place(recipe: Recipe) -> tuple[str, str | None]:
    """Path and revision of the donor."""
    path = _donor_path(recipe)
    if path == recipe.base:
        return path, recipe.base_revision
    first = next(iter(_all_tasks(recipe)))
    return path, first.revision if path == first.path and recipe.donor is None else None


def _all_tasks(recipe: Recipe) -> list[TaskSpec]:
    found = list(recipe.tasks)
    for cut in recipe.slices:
        found += cut.tasks
    for module in recipe.modules.values():
        found += _of_module(module)
    return found


def _donor(recipe: Recipe, opened: Opened, problems: Problems) -> TensorSource | None:
    try:
        return opened(*_donor_place(recipe))
    except TaskvecError as error:
        problems.add(str(error))
        return None


def _models(pieces: Sequence[_Piece], opened: Opened) -> dict[str, TensorSource]:
    """The whole models of the recipe by path, the base first, under the names that the recipe gives their tensors."""
    found: dict[str, TensorSource] = {}
    donor = next((piece.recipe.donor for piece in pieces), None)
    if donor is not None:
        found[donor] = opened(donor)
    for piece in pieces:
        if piece.recipe.base is not None:
            found.setdefault(piece.recipe.base, opened(piece.recipe.base, piece.recipe.base_revision))
    for piece in pieces:
        for task in piece.recipe.tasks:
            path = task.over or task.path
            try:
                source = opened(path, None if task.over else task.revision)
            except NotAModelError:
                continue  # an adapter
            found.setdefault(path, Renamed(source, task.rename) if task.rename else source)
    return found


# -- pieces ----------------------------------------------------------------------------------------------------------------


def _pieces(
    recipe: Recipe, donor: TensorSource | None, opened: Opened, problems: Problems, warnings: list[str]
) -> tuple[list[_Piece], list[_Stack]]:
    if recipe.is_whole:
        return [_Piece("", recipe.model_copy(update={"tokenizer": None, "chat_template": None}))], []
    for key in ("coefficients", "masks"):
        if getattr(recipe, key) is not None:
            problems.add(f"{key}: belong to whole models; they do not go with slices or modules")
    if donor is None:
        return [], []
    if recipe.slices:
        pieces, stack = _stacked(recipe, "slices", recipe.slices, recipe, None, opened, problems)
        return pieces, [stack] if stack is not None else []
    return _modules(recipe, donor, opened, problems, warnings)


def _part_recipe(recipe: Recipe, spec: "SliceSpec | ModuleSpec", whole: Any, tasks: Sequence[TaskSpec]) -> Recipe:
    settings = spec.settings(whole)
    if settings["base"] != recipe.base:
        settings["base_revision"] = None
    own: dict[str, Any] = {"slices": [], "modules": {}, "tokenizer": None, "chat_template": None, "stages": {}}
    return recipe.model_copy(update={**settings, **own, "tasks": list(tasks)})


def _source_of(spec: TaskSpec, base: str | None, opened: Opened) -> TensorSource:
    """The whole model that a task is, or that it changes; under the names that it has in the recipe."""
    try:
        source = opened(spec.over or spec.path, None if spec.over else spec.revision)
    except NotAModelError:
        if base is None:
            raise
        source = opened(base)
    return Renamed(source, spec.rename) if spec.rename else source


def _stacked(
    recipe: Recipe,
    where: str,
    slices: Sequence[SliceSpec],
    whole: Any,
    within: frozenset[str] | None,
    opened: Opened,
    problems: Problems,
) -> tuple[list[_Piece], _Stack | None]:
    """The slices of a model, or of the module whose tensors are `within`."""
    settings = [spec.settings(whole) for spec in slices]
    sources: list[list[TensorSource]] = []
    for spec, own in zip(slices, settings):
        row = []
        for task in spec.tasks:
            try:
                row.append(_source_of(task, own["base"], opened))
            except MismatchError as error:
                problems.extend(error.problems)
            except TaskvecError as error:
                problems.add(str(error))
        sources.append(row)
        if any(_step_name(step) == "lines" for step in own["postprocess"]):
            problems.add(f"{where}: lines scales by depth of the whole model; it does not go with slices")
    if any(len(row) < len(spec.tasks) for row, spec in zip(sources, slices)):
        return [], None
    bases = [
        opened(own["base"]) for own in settings if own["base"] is not None and _opens(own["base"], opened, problems)
    ]
    names = [
        name
        for source in [*bases, *(source for row in sources for source in row)]
        for name in source.infos
        if within is None or name in within
    ]
    # names of the first model alone decide about the tower: deeper ones have the same
    tower = chosen_tower(
        sources[0][0], [n for n in sources[0][0].infos if within is None or n in within], recipe.tower, problems
    )
    if tower is None:
        return [], None
    aliases = {a: b for row in sources for source in row for a, b in source.aliases.items()}
    shares = shares_outside(names, tower, [spec.tensors for spec in slices], aliases, problems)
    pieces: list[_Piece] = []
    origins: list[Origin] = []
    first = 0
    for at, (spec, own, row) in enumerate(zip(slices, settings, sources)):
        ranges = [_layers(f"{where}.{at}", task, source, tower, problems) for task, source in zip(spec.tasks, row)]
        counts = [stop - start for start, stop in ranges]
        if len(set(counts)) > 1:
            told = ", ".join(f"{task.label} {count}" for task, count in zip(spec.tasks, counts))
            problems.add(f"{where}.{at}: the models of a slice give equally many layers; found {told}")
        base_layers = spec.base_layers or (ranges[0] if own["base"] is not None else None)
        if base_layers is not None and base_layers[1] - base_layers[0] != counts[0]:
            problems.add(f"{where}.{at}.base_layers: {list(base_layers)} are not {counts[0]} layers as in the models")
        if base_layers is not None and own["base"] is not None and _opens(own["base"], opened, problems):
            have = depth_of(opened(own["base"]).infos).get(tower, 0)
            if base_layers[1] > have:
                problems.add(f"{where}.{at}: the base {own['base']} has {have} layers, asked for {list(base_layers)}")
        tasks = [task.model_copy(update={"layers": span}) for task, span in zip(spec.tasks, ranges)]
        name = f"{where}.{at}"
        placed = Placed(name, tower, first, counts[0], shares[at])
        made = list(dict.fromkeys(n for source, span in zip(row, ranges) for n in placed.names(source, span)))
        pieces.append(_Piece(name, _part_recipe(recipe, spec, whole, tasks), placed, base_layers, made))
        depth = depth_of(row[0].infos).get(tower, 0)
        config = getattr(bare(row[0]), "config", {})
        origins += [Origin(config, depth, layer) for layer in range(*ranges[0])]
        first += counts[0]
    return pieces, _Stack(tower, 0, origins)


def _opens(path: str, opened: Opened, problems: Problems) -> bool:
    try:
        opened(path)
    except TaskvecError as error:
        problems.add(str(error))
        return False
    return True


def _step_name(step: Any) -> str:
    return step if isinstance(step, str) else str(step.get("method", ""))


def _layers(where: str, task: TaskSpec, source: TensorSource, tower: str, problems: Problems) -> tuple[int, int]:
    depth = depth_of(source.infos).get(tower, 0)
    if not depth:
        problems.add(
            f"{where}: {task.label} has no layers {tower}.<number>; it has {shortened(list(depth_of(source.infos)))}"
        )
        return (0, 0)
    start, stop = task.layers if task.layers is not None else (0, depth)
    if not start < stop <= depth:
        problems.add(
            f"{where}: {task.label} has the layers 0 to {depth - 1} (range [0, {depth}]); asked for [{start}, {stop}]"
        )
    return (start, stop)


def _modules(
    recipe: Recipe, donor: TensorSource, opened: Opened, problems: Problems, warnings: list[str]
) -> tuple[list[_Piece], list[_Stack]]:
    found = dict.fromkeys(donor.infos)
    for module in recipe.modules.values():
        base = module.settings(recipe)["base"]
        for task in _of_module(module):
            try:
                found |= dict.fromkeys(_source_of(task, base, opened).infos)
            except TaskvecError as error:
                problems.add(str(error))
    names = list(found)
    problems.raise_if_any(RecipeError)
    claims: dict[str, list[str]] = {}
    for key, module in recipe.modules.items():
        if key == "default" and not module.tensors:
            continue
        claims[key] = names_matching(names, module.tensors) if module.tensors else module_of_role(key, names)
        if not claims[key]:
            what = (
                f"the patterns {module.tensors} match no tensor" if module.tensors else "no tensor's name has that part"
            )
            tops = list(dict.fromkeys(name.split(".")[0] for name in names))
            problems.add(f"modules.{key}: {what}; the models have {shortened(tops)}")
    for key, own in claims.items():
        both = [other for other, theirs in claims.items() if other > key and set(own) & set(theirs)]
        problems.extend(
            f"modules: {key} and {other} both claim {shortened(sorted(set(own) & set(claims[other])))}"
            for other in both
        )
    taken = {name for own in claims.values() for name in own}
    rest = [name for name in names if name not in taken]
    if "default" in recipe.modules and "default" not in claims:
        claims["default"], rest = rest, []
    problems.raise_if_any(RecipeError)
    pieces: list[_Piece] = []
    stacks: list[_Stack] = []
    for key, module in recipe.modules.items():
        within = frozenset(claims[key])
        if module.slices:
            inner, stack = _stacked(
                recipe,
                f"modules.{key}.slices",
                module.slices,
                _Settings(module.settings(recipe)),
                within,
                opened,
                problems,
            )
            pieces += inner
            stacks += [stack] if stack is not None else []
            continue
        placed = Placed(f"modules.{key}", None, 0, 0, within)
        pieces.append(
            _Piece(f"modules.{key}", _part_recipe(recipe, module, recipe, module.tasks), placed, None, claims[key])
        )
    rest = [name for name in rest if name in donor.infos]
    if rest:
        warnings.append(f"{len(rest)} tensors belong to no module and stay those of {donor.label}: {shortened(rest)}")
        kept = recipe.model_copy(
            update={
                "base": None, "tasks": [TaskSpec(path=_donor_path(recipe))], "method": "passthrough", "parameters": {}, "scale": 1.0,
                "space": None, "preprocess": [], "postprocess": [], "modules": {}, "tokenizer": None, "chat_template": None,
                "stages": {}, "include": [], "keep_base": [],
            }
        )  # fmt: skip
        pieces.append(_Piece("the rest", kept, Placed("the rest", None, 0, 0, frozenset(rest)), None, rest))
    return pieces, stacks


class _Settings:
    """Settings of a module, as a whole that its slices inherit from."""

    def __init__(self, values: Mapping[str, Any]):
        self.__dict__.update(values)


def _of_module(module: ModuleSpec) -> list[TaskSpec]:
    return [*module.tasks, *(task for inner in module.slices for task in inner.tasks)]


# -- what lies beside the weights --------------------------------------------------------------------------------------------


def _files(
    recipe: Recipe,
    donor: TensorSource,
    infos: Mapping[str, TensorInfo],
    stacks: Sequence[_Stack],
    vocabularies: Vocabularies | None,
    opened: Opened,
    pieces: Sequence[_Piece],
    problems: Problems,
    warnings: list[str],
) -> dict[str, str]:
    original: dict[str, Any] = dict(getattr(donor, "config", {}))
    config, files = original, dict[str, str]()
    for stack in stacks:
        depth = depth_of(donor.infos).get(stack.tower, 0)
        patterned = "layer_pattern" in recipe.allow
        config = restacked_config(config, stack.tower, depth, stack.origins, problems, patterned=patterned)
    config = _heads(config, donor, infos, problems)
    if vocabularies is not None:
        config = vocabularies.config(config)
        files |= vocabularies.files()
    if not problems:
        files |= _config_file(original, config, recipe)
    if recipe.chat_template is not None:
        models = list(_models(pieces, opened).values())
        files |= chat_template_files(recipe.chat_template, donor, models, files, problems)
    return files


def _config_file(original: Mapping[str, Any], config: Mapping[str, Any], recipe: Recipe) -> dict[str, str]:
    """config.json, where the result needs another than the donor's."""
    stored = recipe.output.dtype
    made = dict(config) if stored is None else config_in(config, dtype_named(stored))
    return {CONFIG: json.dumps(made, indent=2) + "\n"} if made != original else {}


def _heads(
    config: dict[str, Any], donor: TensorSource, infos: Mapping[str, TensorInfo], problems: Problems
) -> dict[str, Any]:
    """The configuration, true to whether the result has a head of its own."""
    theirs, ours = set(heads(donor.infos)), heads(infos)
    apart = [name for name in ours if name not in donor.aliases and name not in theirs]
    if apart and (is_tied(config) or any("tie_word_embeddings" in inner for inner in [config])):
        config = untied(config)
    lacking = [name for name in theirs if name not in infos and name not in donor.aliases]
    if lacking and config:
        problems.add(
            f"{shortened(sorted(lacking))}: {donor.label} has a head of its own, but the models of the last slice tie theirs to the "
            "embeddings. Take that slice's head from a model that has one (`tensors`), or untie the models first."
        )
    return config


__all__ = ["Assembly", "Planned", "assemble", "in_order", "models_of", "staged"]
