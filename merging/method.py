"""How a merge method is declared, found, and given its parameters."""

import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Literal, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from taskvec.deltas import Deltas, Tile
from taskvec.errors import ParameterError, UsageError, did_you_mean
from taskvec.plan import Kernel, Plan, formula
from taskvec.precision import cancelled
from taskvec.sweep import Role, Scope, Stage, Unit

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Density = Share | list[Share]
"""Fraction of the entries kept, in (0, 1]: one number, or one for each task."""

Number = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Patterns = tuple[str, ...]
"""Shell-style patterns of tensor names; `*` also crosses dots."""
Files = tuple[str, ...]
"""Paths, one for each task."""

Space = Literal["delta", "weight"]
Needs = Literal["nothing", "statistics", "training"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One keyword of a method: what it accepts, its default, and what its docstring says of it."""

    name: str
    annotation: Any
    default: Any
    doc: str

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True)
class MergeMethod:
    """A method of the catalogue.

    Attributes:
        name: as recipes spell it.
        start: the function itself: (deltas, **parameters) -> plan or kernel.
        role: what its kernel returns. A preprocess method used as `method:` is followed by task arithmetic.
        space: whether it works on differences to the base or on weights.
        unit: the least it must see at once.
        statistics: whose statistics it takes unless told otherwise: the model's (as most papers) or each tensor's.
        tasks: fewest and most tasks it accepts.
        passes: passes over the inputs in the common case.
        data: what it needs beside the models.
        contributions: whether it can return the parts of its merge, one for each task.
        copies: float32 copies of a tensor that its kernel makes beside the stack, where it sees tensors whole and makes
            more than a few (measured with four tasks on square matrices); the memory budget counts them.
        whole_if: tells from the parameters whether it must see whole tensors although `unit` is "element".
        either_space: whether it has a meaning on differences to a base as well as on weights (`space` is the default).
        limits: tells from the parameters and the number of tasks what is wrong with them together.
    """

    name: str
    start: Callable[..., "Plan | Kernel"]
    paper: str
    role: Role = "combine"
    space: Space = "delta"
    unit: Unit = "element"
    statistics: Scope = "model"
    tasks: tuple[int, int | None] = (1, None)
    passes: int = 1
    data: Needs = "nothing"
    cost: str = "O(T) per element"
    contributions: bool = False
    copies: int = 0
    whole_if: Callable[[Mapping[str, Any]], bool] | None = None
    either_space: bool = False
    limits: Callable[[Mapping[str, Any], int], Sequence[str]] | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.start) or "").splitlines()[0]

    @property
    def needs_base(self) -> bool:
        return self.space == "delta"

    def bound(self, given: Mapping[str, Any], tasks: int | None = None, *, together: bool = True) -> dict[str, Any]:
        """Every parameter with its value: those given, checked, and the defaults of the others.

        Args:
            given: name to value.
            tasks: how many there are, where that is known.
            together: whether `limits` of several parameters are checked as well (not for values that never meet).

        Raises:
            ParameterError: unknown or missing parameters and values out of range, all at once.
        """
        problems, values = [], {}
        for name in given:
            if name not in self.parameters:
                problems.append(f"{name}: {self.name} has no such parameter." + did_you_mean(name, self.parameters))
        for name, parameter in self.parameters.items():
            if name in given and _claims(given[name]) and "bool" not in str(parameter.annotation):
                problems.append(f"{name}: should be a number, found {given[name]}")
            elif name in given:
                try:
                    values[name] = adapter(parameter.annotation).validate_python(given[name])
                except ValidationError as error:
                    problems += [
                        f"{name}: {_location(e)}{e['msg'][:1].lower()}{e['msg'][1:]}, found {e['input']!r}"
                        for e in _worst(error)
                    ]
                    continue
                if (
                    isinstance(values[name], list)
                    and tasks is not None
                    and len(values[name]) not in (1, tasks)
                    and _per_task(parameter)
                ):
                    problems.append(f"{name}: {len(values[name])} values for {tasks} tasks")
            elif parameter.required:
                problems.append(f"{name}: {self.name} needs a value for it ({parameter.doc})")
            else:
                values[name] = parameter.default
        if not problems and together and tasks is not None and self.limits is not None:
            problems += self.limits(values, tasks)
        if problems:
            raise ParameterError(problems, title=f"Parameters of {self.name}")
        return values

    def stage(self, parameters: Mapping[str, Any]) -> Stage:
        """The method with its (bound) parameters, ready for the engine."""
        unit = self.unit_of(parameters)
        return Stage(self.name, self.role, lambda deltas: self.start(deltas, **parameters), unit, self.copies)

    def unit_of(self, parameters: Mapping[str, Any]) -> Unit:
        """The least it must see at once with these parameters."""
        return "tensor" if self.whole_if is not None and self.whole_if(parameters) else self.unit

    def check_tasks(self, count: int) -> str | None:
        """What is wrong with this number of tasks, or None."""
        least, most = self.tasks
        if count < least or (most is not None and count > most):
            wanted = (
                f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            )
            return f"{self.name} merges {wanted} models, found {count}"
        return None


def _claims(value: Any) -> bool:
    """Whether true or false stands where pydantic would read it as a number."""
    return isinstance(value, bool) or (isinstance(value, list) and any(isinstance(item, bool) for item in value))


def _per_task(parameter: Parameter) -> bool:
    return "list" in str(parameter.annotation)


def _worst(error: ValidationError) -> list[Any]:
    """One message a value: where a union failed, that of the alternative whose type fits the input."""
    found = error.errors(include_url=False)
    ranged = [
        e
        for e in found
        if e["type"] not in ("list_type", "float_type", "bool_type", "int_type", "string_type", "dict_type")
    ]
    return (ranged or found)[:1]


def _location(error: Any) -> str:
    places = [str(place) for place in error["loc"] if isinstance(place, int)]
    return f"value {int(places[0]) + 1}: " if places else ""


@cache
def adapter(annotation: Any) -> "TypeAdapter[Any]":
    """The validator of an annotation."""
    return TypeAdapter(annotation)


_CATALOGUE: dict[str, MergeMethod] = {}


def merge_method(name: str, *, paper: str, **traits: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares a function as a merge method. Its keyword-only arguments are the recipe's parameters.

    Args:
        name: as recipes spell it; the file is called the same.
        paper: arXiv number or other source.
        traits: further attributes of `MergeMethod` by name.
    """

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in _CATALOGUE and _CATALOGUE[name].start.__module__ != function.__module__:
            raise UsageError(
                f"method {name!r} is declared twice, in {_CATALOGUE[name].start.__module__} and {function.__module__}"
            )
        hints = get_type_hints(function, include_extras=True)
        docs = _argument_docs(function)
        parameters = {
            p.name: Parameter(p.name, hints[p.name], p.default, docs.get(p.name, ""))
            for p in inspect.signature(function).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name != "contributions"
        }
        parts = "contributions" in hints
        _CATALOGUE[name] = MergeMethod(name, function, paper, parameters=parameters, contributions=parts, **traits)
        return function

    return declare


def _argument_docs(function: Callable[..., Any]) -> dict[str, str]:
    docs: dict[str, str] = {}
    current, inside = "", False
    for line in (inspect.getdoc(function) or "").splitlines():
        if line.strip() == "Args:":
            inside = True
        elif inside and line and not line.startswith(" "):
            break
        elif inside and line.startswith("    ") and not line.startswith("     ") and ":" in line:
            current, _, text = line.strip().partition(":")
            docs[current] = text.strip()
        elif inside and current and line.strip():
            docs[current] += " " + line.strip()
    return docs


def methods() -> Mapping[str, MergeMethod]:
    """The catalogue: every method of the folder merging/methods, by name."""
    package = import_module("merging.methods")
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"merging.methods.{module.name}")
    return dict(sorted(_CATALOGUE.items()))


def method(name: str) -> MergeMethod:
    """The method of that name.

    Raises:
        UsageError: there is none; names the nearest.
    """
    if name not in _CATALOGUE and name.isidentifier():
        package = import_module("merging.methods")
        if name in {module.name for module in pkgutil.iter_modules(package.__path__)}:
            import_module(f"merging.methods.{name}")
    if name not in _CATALOGUE:
        known = methods()
        if name not in known:
            raise UsageError(f"there is no method {name!r}." + did_you_mean(name, known))
    return _CATALOGUE[name]


def per_task(value: "float | Sequence[float]", count: int) -> list[float]:
    """A parameter that may be one number or one for each task, as one for each task."""
    if isinstance(value, Sequence):
        found = [float(v) for v in value]
        if len(found) == 1:
            return found * count
        if len(found) != count:
            raise ParameterError(f"{len(found)} values for {count} tasks")
        return found
    return [float(value)] * count


@formula("weighted sum")
def weighted_sum(tile: Tile) -> Any:
    """Task arithmetic's kernel: the weighted sum of the deltas, in task order."""
    return tile.total()


@formula("weighted mean")
def weighted_mean(tile: Tile) -> Tensor:
    """The weighted sum divided by the sum of the weights.

    Raises:
        ParameterError: the weights add up to zero.
    """
    weights = tile.weights.double().sum(0)
    if bool(cancelled(tile.weights).any()):
        raise ParameterError(
            f"{tile.name}: the task weights add up to zero, so they cannot be normalised; use normalize=False"
        )
    total = tile.total()
    return total.div_(float(weights) if weights.ndim == 0 else weights.to(total).view_as(total))


def weighted(tile: Tile) -> Tensor:
    """The task vectors, each times its task weight, [task, *shape]: where a weight stands for a longer task vector."""
    if tile.weights.ndim == 1 and bool((tile.weights == 1).all()):
        return tile.stack
    return tile.stack * tile.columns()


def weighted_rows(tile: Tile) -> Iterator[Tensor]:
    """The task vectors one after the other, each times its task weight: no second stack."""
    for task, row in enumerate(tile.stack):
        weight = tile.weight(task)
        yield row if isinstance(weight, float) and weight == 1 else row * weight


def plain_mean(tile: Tile) -> Tensor:
    """The mean of the (weighted) task vectors, in task order."""
    return tile.total().div_(len(tile.tasks))


class Unweighted:
    """Warns when task weights were given to a method that gives them no meaning."""

    def __init__(self) -> None:
        self._given = False

    def look(self, tile: Tile) -> None:
        """Notes whether this tile's weights are anything but 1."""
        self._given = self._given or bool((tile.weights != 1).any())

    def given(self, weights: Sequence[float]) -> None:
        """The same for weights that are one number for each task."""
        self._given = self._given or any(weight != 1 for weight in weights)

    def facts(self) -> Mapping[str, Any]:
        """What to report when the merge is done."""
        return {"warnings": ["task weights have no meaning here; they were ignored"] if self._given else []}


def task_weights(tile: Tile, method: str) -> list[float]:
    """The weights as one number for each task.

    Raises:
        ParameterError: they differ by element, which this method gives no meaning.
    """
    if tile.weights.ndim != 1:
        raise ParameterError(f"{tile.name}: {method} takes one weight for each task, not one for each element")
    return [float(weight) for weight in tile.weights.double()]


def trimmed(stack: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The entries of each row whose magnitude reaches the row's threshold; zeros elsewhere."""
    kept = torch.empty_like(stack)
    limit = torch.tensor(list(thresholds), dtype=stack.dtype)
    for row, out, below in zip(stack, kept, torch.nextafter(limit, torch.full_like(limit, -math.inf)).tolist()):
        # keeps |x| > the number just below the threshold: one pass over the row, not four
        torch.hardshrink(row, below, out=out)
    return kept


__all__ = [
    "Count",
    "Deltas",
    "Density",
    "Files",
    "Fraction",
    "Iterator",
    "MergeMethod",
    "NonNegative",
    "Number",
    "Parameter",
    "Patterns",
    "Positive",
    "Seed",
    "Share",
    "Unweighted",
    "merge_method",
    "method",
    "methods",
    "per_task",
    "plain_mean",
    "task_weights",
    "trimmed",
    "weighted",
    "weighted_mean",
    "weighted_rows",
    "weighted_sum",
]
