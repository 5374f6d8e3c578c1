"""Recipes: what a merge is made of, as types and as YAML. Every mistake is reported at once, with its line."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from merging.settings import Strict, parsed_documents
from taskvec.blocks import depth_of, layer_of, tower_of
from taskvec.errors import RecipeError, UsageError
from taskvec.sizes import byte_count


def _no_claim(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"should be a number, found {value}")
    return value


def _size(value: Any) -> Any:
    whole = int(value) if isinstance(value, float) and value.is_integer() else value  # 1e9
    try:
        room = byte_count(whole)
    except UsageError as error:
        raise ValueError(str(error)) from None
    if not room:
        raise ValueError(f"{value!r} leaves no room. Write it like 5GB, 2GiB or 400MB.")
    return whole


Whole = Annotated[int, BeforeValidator(_no_claim)]
Size = Annotated[str | int, BeforeValidator(_size)]
Finite = Annotated[float, BeforeValidator(_no_claim), Field(allow_inf_nan=False)]


class Gradient(Strict):
    """A value that changes over the depth of the model.

    Attributes:
        gradient: values at evenly spaced depths; layers in between are interpolated. Tensors outside the layers take
            the first value, a layer alone in its slice or tower the last (both as in mergekit).
    """

    gradient: Annotated[list[Finite], Field(min_length=1)]

    def at(self, name: str, depth: "Depth") -> float:
        layer = layer_of(name)
        layers = depth.get(tower_of(name), 1)
        first, count = (layers.start, len(layers)) if isinstance(layers, range) else (0, layers)
        position = 0.0 if layer is None else (layer - first) / (count - 1) if count > 1 else 1.0
        place = position * (len(self.gradient) - 1)
        first = min(int(place), len(self.gradient) - 1)
        last = min(first + 1, len(self.gradient) - 1)
        share = place - first
        return self.gradient[first] * (1 - share) + self.gradient[last] * share


Depth = Mapping[str, int | range]
"""Tower to its number of layers, or to those of its layers over which gradients run."""

Leaf = Finite | Gradient
ByName = Leaf | dict[str, Leaf | None]
"""A number, a gradient over depth, or a mapping from patterns to those.

The first match wins; `default` holds for the rest. A `default` of null says that every tensor must match a pattern.
"""


def value_at(value: Any, name: str, depth: Depth, otherwise: Any = 1.0) -> Any:
    """The value that holds for one tensor.

    Args:
        value: a number (or any parameter value), a `Gradient`, or a mapping from patterns to them.
        name: the tensor.
        depth: layers of each tower, from `taskvec.blocks.depth_of`, or the range of them that counts.
        otherwise: what holds where no pattern matches and there is no `default`.
    """
    if isinstance(value, Gradient):
        return value.at(name, depth)
    if isinstance(value, Mapping):
        for pattern, leaf in value.items():
            if pattern != "default" and fnmatchcase(name, pattern):
                return value_at(leaf, name, depth)
        return value_at(value.get("default", otherwise), name, depth)
    return value


def unmatched(value: Any, names: Iterable[str]) -> list[str]:
    """The patterns of a mapping that match none of the names."""
    if not isinstance(value, Mapping):
        return []
    found = list(names)
    return [p for p in value if p != "default" and not any(fnmatchcase(name, p) for name in found)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_steps(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping) else value


def _as_task(value: Any) -> Any:
    if isinstance(value, str):
        return {"path": value}
    if not isinstance(value, Mapping | TaskSpec):
        raise ValueError(f"should be a path, or a mapping with the key `path`, found {value!r}")
    return value


class TaskSpec(Strict):
    """One model to merge.

    Attributes:
        path: checkpoint, adapter or stored task vector: a path or a hub id.
        name: how reports call it; default: the last part of the path.
        weight: its weight, a number, a gradient over depth, or by tensor pattern.
        revision: revision of a hub id.
        rename: prefixes of its tensor names that are replaced (`{"model.": ""}`).
        skip: for an adapter, patterns of its modules that are left out (a head that the base lacks: `classifier*`).
        tied: for an adapter that changes one use of a tied tensor: "refuse", or "both" to change both uses.
        over: for an adapter or task vector that belongs to another model than the base: that model. The two together
            then count as one whole model.
        layers: in a slice: which of its layers, as the first and one past the last.
    """

    path: str
    name: str | None = None
    weight: ByName = 1.0
    revision: str | None = None
    rename: dict[str, str] = Field(default_factory=dict)
    skip: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
    tied: Literal["refuse", "both"] = "refuse"
    over: str | None = None
    layers: "Layers | None" = None

    @property
    def label(self) -> str:
        return self.name or Path(self.path).name or self.path


Layers = tuple[Annotated[Whole, Field(ge=0)], Annotated[Whole, Field(ge=0)]]
"""Layers of a model: the first, and one past the last."""


class OutputSpec(Strict):
    """How the result is stored.

    Attributes:
        dtype: of floating tensors; default: as the base stores each of them.
        shard_size: largest size of one file.
    """

    dtype: str | None = None
    shard_size: Size = "5GB"


Patterns = Annotated[list[str], BeforeValidator(_as_list)]
Step = str | dict[str, Any]
Steps = Annotated[list[Step], BeforeValidator(_as_steps)]


def distinct(tasks: Sequence[TaskSpec]) -> list[TaskSpec]:
    """The tasks with names of their own: two folders called `model` are told apart by what comes before."""
    labels = [task.label for task in tasks]
    if len(set(labels)) == len(labels):
        return list(tasks)
    named = []
    for task, label in zip(tasks, labels):
        if labels.count(label) > 1 and task.name is None:
            label = task.path
        named.append(task.model_copy(update={"name": label}))
    full = [task.name for task in named]
    if len(set(full)) < len(full):
        numbered = [f"{name} ({i + 1})" if full.count(name) > 1 else name for i, name in enumerate(full)]
        named = [task.model_copy(update={"name": name}) for task, name in zip(named, numbered)]
    return named


Tasks = Annotated[list[Annotated[TaskSpec, BeforeValidator(_as_task)]], Field(min_length=1), AfterValidator(distinct)]


class _Part(Strict):
    """What a part of a model may set for itself; None takes what the recipe says."""

    base: str | None = None
    method: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    scale: ByName | None = None
    space: Literal["delta", "weight"] | None = None
    preprocess: Steps | None = None
    postprocess: Steps | None = None

    def settings(self, whole: "Recipe | _Part") -> dict[str, Any]:
        """The fields of this part's merge, those of the whole where it says nothing."""
        found: dict[str, Any] = {}
        for key in ("base", "method", "scale", "space", "preprocess", "postprocess"):
            own = getattr(self, key)
            found[key] = own if own is not None else getattr(whole, key)
        same = self.method is None or self.method == whole.method
        found["parameters"] = {**(whole.parameters if same else {}), **self.parameters}
        return found


class SliceSpec(_Part):
    """Some consecutive layers of the result, and where they come from.

    Attributes:
        tasks: the models, each with its `layers`; all of them equally many.
        base_layers: the layers of the base that belong to them; default: those of the first task.
        tensors: patterns of tensors outside the layers that come from here. Default: the embeddings come from the first
            slice's models, everything else (last norm, head) from the last slice's.
        base, method, parameters, scale, space, preprocess, postprocess: as in the recipe, for these layers only.
    """

    tasks: Tasks
    base_layers: Layers | None = None
    tensors: Patterns = Field(default_factory=list)


class ModuleSpec(_Part):
    """A part of a model with several towers, merged in its own way.

    Attributes:
        tensors: patterns of its tensors; default: those below its name (`vision_model.*`), and for the name `default`
            all that no other module claims.
        tasks, slices: what it is made of, one of the two.
        base, method, parameters, scale, space, preprocess, postprocess: as in the recipe, for this module only.
    """

    tensors: Patterns = Field(default_factory=list)
    tasks: Tasks = Field(default_factory=list)
    slices: list[SliceSpec] = Field(default_factory=list)


class TokenOf(Strict):
    """The embedding of one token of one model.

    Attributes:
        model: the model, as the recipe names it.
        token: the token, or `token_id` its number there.
    """

    model: str
    token: str | None = None
    token_id: Annotated[Whole, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenOf":
        if (self.token is None) == (self.token_id is None):
            raise ValueError("name either `token` or `token_id`")
        return self


class TokenSpec(Strict):
    """Where the embedding of one token comes from.

    Attributes:
        source: a model of the recipe (its embedding of this token), a `TokenOf`, or "zero".
        force: whether this holds for models that have the token as well, instead of only for those that lack it.
    """

    source: Annotated[
        Annotated[str, Tag("str")] | Annotated[TokenOf, Tag("TokenOf")],
        Discriminator(lambda value: "str" if isinstance(value, str) else "TokenOf"),
    ]
    force: bool = False


class TokenizerSpec(Strict):
    """The vocabulary of the result. Embeddings are then merged by token, not by row.

    Attributes:
        source: "base", "union" (the base's tokens, then those of the other models), or a model of the recipe or path.
        tokens: rules for single tokens; a token that the vocabulary lacks is added.
        multiple_of: rows of the embeddings are padded to a multiple of this number. Default: where the vocabulary is the
            base's own, its table keeps the rows it has; else there is one row for each token.
        padding: what a model has in padded rows: "keep" (its own where it has them, else zeros), or the "mean" of the
            rows of all tokens, as in mergekit.
    """

    source: str = "union"
    tokens: dict[str, TokenSpec] = Field(default_factory=dict)
    multiple_of: Annotated[Whole, Field(ge=1)] | None = None
    padding: Literal["keep", "mean"] = "keep"


def _as_tokenizer(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class Recipe(Strict):
    """A merge, completely described.

    Attributes:
        base: the model that all tasks were tuned from. Methods in weight space (average, slerp) can do without.
        tasks: the models to merge, in order.
        method: a name of the catalogue.
        parameters: the method's parameters. Where statistics are by tensor, a value may be a mapping from patterns.
        scale: one number for the whole merge (λ), or by depth or pattern.
        statistics: whose order statistics and norms count: the whole model's or each tensor's; default: the method's.
        space: "delta" lets a method that interpolates weights (slerp, nuslerp, multislerp, karcher) work on task vectors.
        tied: whether tied tensors count once in statistics, or each time they appear.
        preprocess, postprocess: further methods, applied to the task vectors first and to the merged delta last.
        coefficients: a file of learned coefficients, used as task weights.
        masks: a file of learned masks that multiply the task vectors.
        include: patterns of the tensors that are merged; all others stay the base's.
        exclude: patterns of tensors that are left out of everything, the output included.
        keep_base: patterns of tensors that stay the base's.
        resize: what to do with tensors whose first dimension differs (vocabularies): `truncate` or `base`, by pattern.
        output: dtype and shard size.
        seed: for randomised methods.
        device: where kernels run.
        memory: budget for tiles and kept deltas ("2GiB"); default: a quarter of what is free.
        workers: threads; default: one for each core. No result depends on it.
        allow: what is refused otherwise: "zero_task" (a task equal to the base), "duplicate_task", "layer_pattern" (layers
            stacked so that a rule of the configuration by layer number fits them no more).
        slices: instead of `tasks`: the layers of the result from top to bottom, each slice with its own models.
        modules: instead of `tasks`: name of a tower (`vision_model`) to how it is merged; what no module claims stays the
            base's (without a base, the first model's).
        donor: the model that lends its configuration, tokenizer and the other files beside its weights; default: the base, or
            without one the first model.
        tower: where the numbered layers are (`model.layers`), if there are several towers.
        tokenizer: the vocabulary of the result; default: the base's files are copied and embeddings merged by row.
        chat_template: "auto" (the models' most common one), a name that is known here, or a Jinja template.
        stages: merges that are made first; their names can stand where a path to a model stands.
    """

    other_words = {  # noqa: RUF012, declared by Strict
        "models": "tasks",
        "base_model": "base",
        "merge_method": "method",
        "lambda": "scale",
        "dtype": "output: {dtype: …}",
        "out_dtype": "output: {dtype: …}",
        "tokenizer_source": "tokenizer",
    }

    base: str | None = None
    base_revision: str | None = None
    tasks: Tasks = Field(default_factory=list)
    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    scale: ByName = 1.0
    statistics: Literal["model", "tensor"] | None = None
    space: Literal["delta", "weight"] | None = None
    tied: Literal["once", "all"] = "once"
    preprocess: Steps = Field(default_factory=list)
    postprocess: Steps = Field(default_factory=list)
    coefficients: str | None = None
    masks: str | None = None
    include: Patterns = Field(default_factory=list)
    exclude: Patterns = Field(default_factory=list)
    keep_base: Patterns = Field(default_factory=list)
    resize: dict[str, Literal["truncate", "base"]] = Field(default_factory=dict)
    output: OutputSpec = OutputSpec()
    seed: Annotated[Whole, Field(ge=0)] = 0
    device: str = "cpu"
    memory: Size | None = None
    workers: Annotated[Whole, Field(ge=1)] | None = None
    allow: list[Literal["zero_task", "duplicate_task", "layer_pattern"]] = Field(default_factory=list)
    slices: list[SliceSpec] = Field(default_factory=list)
    modules: dict[str, ModuleSpec] = Field(default_factory=dict)
    donor: str | None = None
    tower: str | None = None
    tokenizer: Annotated[TokenizerSpec | None, BeforeValidator(_as_tokenizer)] = None
    chat_template: str | None = None
    stages: dict[str, "Recipe"] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_form(self) -> "Recipe":
        given = [key for key in ("tasks", "slices", "modules") if getattr(self, key)]
        if len(given) != 1:
            found = f"found {' and '.join(given)}" if given else "none of them is there"
            raise ValueError(f"a recipe has either `tasks`, `slices` or `modules`; {found}")
        ranged = [task.label for task in self.tasks if task.layers is not None]
        if ranged:
            raise ValueError(f"tasks: `layers` of {ranged[0]} belongs to `slices`; whole models are merged here")
        if self.tower is not None and not self.slices and not any(module.slices for module in self.modules.values()):
            raise ValueError("tower: says where the layers of `slices` are, and there are none")
        for key, module in self.modules.items():
            if bool(module.tasks) == bool(module.slices):
                raise ValueError(f"modules.{key}: has either `tasks` or `slices`")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether whole models are merged in one way, rather than slices or modules."""
        return not (self.slices or self.modules)

    @model_validator(mode="before")
    @classmethod
    def _tasks_by_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("tasks"), Mapping):
            tasks = [
                {"name": name, **(dict(task) if isinstance(task, Mapping) else {"path": task})}
                for name, task in data["tasks"].items()
            ]
            return {**data, "tasks": tasks}
        return data

    # -- reading and writing -----------------------------------------------------------------------------------------

    @classmethod
    def from_text(cls, text: str, *, where: str = "recipe") -> "Recipe":
        """A recipe from YAML text, ours or mergekit's."""
        documents = parsed_documents(text, where)
        if any(isinstance(data, Mapping) and "merge_method" in data for data in documents):
            from merging.mergekit import read_mergekit

            return read_mergekit(text, where=where)
        if len(documents) > 1:
            raise RecipeError(f"{len(documents)} documents; merges that come first stand under `stages`", title=where)
        return cls.from_data(documents[0], where=where)

    def data(self) -> dict[str, Any]:
        """The recipe as plain mappings, without what is at its default."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def dump(self) -> str:
        """The recipe as YAML."""
        from ruamel.yaml import YAML

        yaml = YAML()
        yaml.default_flow_style = False
        stream = StringIO()
        yaml.dump(self.data(), stream)
        return stream.getvalue()


__all__ = [
    "Gradient",
    "OutputSpec",
    "Recipe",
    "TaskSpec",
    "depth_of",
    "unmatched",
    "value_at",
]
