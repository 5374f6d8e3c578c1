"""What a merge did to accuracy and to backdoors, beside the plain merge at every λ.

The attack success rate is above all a function of the compromised model's coefficient; one number proves little:
every report holds the curve of plain task arithmetic over λ, and a method is worth something where it lies below that
curve at the same accuracy. A report measures the triggers it is given. It certifies nothing about others.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merging.learn.dam import default_forward, evaluating, head_of, task_vectors
from merging.learn.mask_training import Batch, Forward, Head, fitting
from merging.learn.masked import MaskedModel
from taskvec.errors import (
    DataError,
    NonFiniteError,
    OutputError,
    ParameterError,
    UsageError,
    did_you_mean,
    shortened,
)
from taskvec.source import in_memory
from taskvec.vector import assert_alike

NOTE = (
    "This lowers risk and certifies nothing: it counts the triggers that were tried, on these inputs. A backdoor with "
    "another trigger is not measured here."
)


@dataclass(frozen=True)
class Trigger:
    """A known change of inputs, and the class an attacked model answers to it.

    Args:
        apply: batch to batch, in the model's own (normalised) units.
        target: the attacker's class, in the head of the attacked task.
        name: for tables.
    """

    apply: Callable[[Batch], Batch]
    target: int
    name: str = "trigger"


def patch_trigger(pattern: Tensor, row: int, column: int, target: int, name: str = "patch") -> Trigger:
    """A pattern [channel or 1, height, width] pasted at a fixed place of an image, in normalised units; for tests."""
    height, width = pattern.shape[-2:]
    if row < 0 or column < 0:
        raise ParameterError(f"a patch at ({row}, {column}) lies outside every image; rows and columns count from 0")

    def apply(images: Tensor) -> Tensor:
        if row + height > images.shape[-2] or column + width > images.shape[-1]:
            raise DataError(
                f"a {height} x {width} patch at ({row}, {column}) leaves the {list(images.shape[-2:])} image"
            )
        images = images.clone()
        images[..., row : row + height, column : column + width] = pattern.to(images)
        return images

    return Trigger(apply, target, name)


def token_trigger(token: int, target: int, *, position: int = 1, name: str = "token") -> Trigger:
    """A rare token written over the one at a fixed position of `input_ids` (default: after the first); for tests."""

    def apply(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        ids = batch["input_ids"].clone()
        if position >= ids.shape[1]:
            raise DataError(f"a token at position {position} leaves a batch of {ids.shape[1]} positions")
        ids[:, position] = token
        return {**batch, "input_ids": ids}

    return Trigger(apply, target, name)


@dataclass(frozen=True)
class Rate:
    """A count out of a total, with its 95 % Wilson interval. An empty total has no rate (NaN)."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.total:
            return (math.nan, math.nan)
        z, n, p = 1.959964, self.total, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (max(0.0, centre - half), min(1.0, centre + half))

    def as_dict(self) -> dict[str, Any]:
        return {"count": self.count, "total": self.total, "rate": self.value, "interval": list(self.interval)}


@dataclass(frozen=True)
class Measurement:
    """One model: accuracy of each task, attack success of each attacked task, flips of the others.

    A flip is a correct prediction that changes when a trigger made for another task is put on the input (transfer).
    """

    accuracy: Mapping[str, Rate]
    success: Mapping[str, Rate]
    flips: Mapping[str, Rate]

    @property
    def mean_accuracy(self) -> float:
        return _mean([rate.value for rate in self.accuracy.values()])

    @property
    def mean_success(self) -> float:
        return _mean([rate.value for rate in self.success.values()])

    @property
    def mean_flips(self) -> float:
        return _mean([rate.value for rate in self.flips.values()])

    def as_dict(self) -> dict[str, Any]:
        return {
            "mean_accuracy": self.mean_accuracy,
            "mean_success": self.mean_success,
            "mean_flips": self.mean_flips,
            "accuracy": {task: rate.as_dict() for task, rate in self.accuracy.items()},
            "success": {task: rate.as_dict() for task, rate in self.success.items()},
            "flips": {task: rate.as_dict() for task, rate in self.flips.items()},
        }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


@torch.no_grad()
def measure(
    module: nn.Module,
    heads: Mapping[str, Head],
    tests: Mapping[str, Any],
    triggers: Mapping[str, Sequence[Trigger]],
    forward: Forward = default_forward,
    batch_size: int = 256,
) -> Measurement:
    """Count correct predictions, attack successes and flips of one model.

    Args:
        module: the encoder.
        heads: task to head.
        tests: task to (inputs, labels), or to a re-iterable of such pairs.
        triggers: attacked task to its triggers; the tasks not in it are the clean ones.
        forward: (module, batch) to features.
        batch_size: inputs at once, where tests are given as one pair of tensors.

    Raises:
        DataError: tests without inputs, labels that do not belong to them, or a trigger that cannot be put on them.
        ParameterError: a trigger's target that the attacked task's head does not have.
        NonFiniteError: the model's predictions hold NaN.
    """
    accuracy: dict[str, Rate] = {}
    hits: dict[str, list[int]] = {task: [0, 0] for task in triggers}
    flips: dict[str, list[int]] = {task: [0, 0] for task in tests if task not in triggers}
    for task, test in tests.items():
        right = total = 0
        for inputs, labels in _labelled(task, test, batch_size):

            def predict(batch: Batch, task: str = task) -> Tensor:
                with fitting(task):
                    logits = heads[task](forward(module, batch))
                if not bool(torch.isfinite(logits).all()):
                    raise NonFiniteError(f"predictions for task {task!r}", "the model")
                classes = logits.shape[-1]
                beyond = [own.target for own in triggers.get(task, ()) if not 0 <= own.target < classes]
                if beyond:
                    raise ParameterError(
                        f"triggers: target {beyond[0]} of task {task!r}, whose head has {classes} classes"
                    )
                return logits.argmax(-1)

            clean = predict(inputs)
            if labels.shape != clean.shape:
                raise DataError(
                    f"tests[{task!r}]: labels of shape {list(labels.shape)} for {list(clean.shape)} predictions; one class "
                    "number for each input is expected"
                )
            correct = clean == labels
            right, total = right + int(correct.sum()), total + len(labels)
            if task in triggers:
                for trigger in triggers[task]:
                    others = labels != trigger.target
                    try:
                        changed = trigger.apply(inputs)
                    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                        raise DataError(
                            f"trigger {trigger.name!r} cannot be put on the inputs of task {task!r} "
                            f"({type(error).__name__}: {error})"
                        ) from error
                    hits[task][0] += int((predict(changed) == trigger.target)[others].sum())
                    hits[task][1] += int(others.sum())
            else:
                for trigger in (one for several in triggers.values() for one in several):
                    try:
                        changed = trigger.apply(inputs)
                    except (DataError, KeyError):
                        continue  # a trigger made for another kind of input cannot be put on this task's
                    flips[task][0] += int((predict(changed) != clean)[correct].sum())
                    flips[task][1] += int(correct.sum())
        accuracy[task] = Rate(right, total)
    return Measurement(
        accuracy,
        {task: Rate(*pair) for task, pair in hits.items()},
        {task: Rate(*pair) for task, pair in flips.items()},
    )


def _labelled(task: str, test: Any, size: int) -> Any:
    if isinstance(test, tuple) and len(test) == 2 and isinstance(test[1], Tensor):
        inputs, labels = test
        if not len(labels):
            raise DataError(f"tests[{task!r}] is empty")
        count = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
        if count != len(labels):
            raise DataError(f"tests[{task!r}]: {len(labels)} labels for {count} inputs")
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            part = {k: v[rows] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[rows]
            yield part, labels[rows]
        return
    found = False
    for batch in test:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise DataError(f"tests[{task!r}]: gave a {type(batch).__name__}; expected pairs (inputs, labels)")
        found = True
        yield batch[0], batch[1]
    if not found:
        raise DataError(f"tests[{task!r}] is empty")


@dataclass(frozen=True)
class SecurityReport:
    """Rows of models, and the plain merge's curve over λ."""

    rows: Mapping[str, Measurement]
    curve: Mapping[float, Measurement]
    note: str = NOTE

    def curve_success_at(self, accuracy: float) -> float:
        """Attack success of the plain merge where it has this mean accuracy, on the low-λ side; NaN if it never does.

        Interpolated between neighbouring λ; the fair comparison for a method of that accuracy.
        """
        points = [(m.mean_accuracy, m.mean_success) for _, m in sorted(self.curve.items())]
        for (a, s), (b, t) in pairwise(points):
            if a <= accuracy <= b and b > a:
                return s + (t - s) * (accuracy - a) / (b - a)
        return math.nan

    def as_dict(self) -> dict[str, Any]:
        return {
            "note": self.note,
            "rows": {name: row.as_dict() for name, row in self.rows.items()},
            "plain_merge_curve": {f"{lam:g}": row.as_dict() for lam, row in sorted(self.curve.items())},
        }

    def save_json(self, path: "str | Path") -> None:
        """Write everything that was counted; rates that do not exist are null."""
        Path(path).write_text(json.dumps(_no_nan(self.as_dict()), indent=2) + "\n")

    def table(self) -> str:
        """Mean accuracy, attack success and flips, in percent, with the plain merge's success at the same accuracy."""
        width = max([len(name) for name in self.rows] + [len("plain merge, λ = 0.00")])
        lines = [f"{'':{width}}  accuracy  success [95 %]        flips   plain merge there"]
        named = [(f"plain merge, λ = {lam:g}", m, False) for lam, m in sorted(self.curve.items())]
        for name, m, compared in [*named, *((name, m, True) for name, m in self.rows.items())]:
            pooled = Rate(sum(r.count for r in m.success.values()), sum(r.total for r in m.success.values()))
            low, high = pooled.interval
            there = self.curve_success_at(m.mean_accuracy) if compared else math.nan
            lines.append(
                f"{name:{width}}  {100 * m.mean_accuracy:8.1f}  {100 * m.mean_success:6.1f} "
                f"[{100 * low:4.1f}, {100 * high:5.1f}]  {100 * m.mean_flips:6.1f}   "
                + ("" if math.isnan(there) else f"{100 * there:.1f}")
            )
        return "\n".join([*lines, "", self.note])

    def plot(self, path: "str | Path", *, title: str = "Accuracy and attack success") -> None:
        """Accuracy against attack success: every row a point, the plain merge over λ a line."""
        plot_points(
            path,
            {name: (m.mean_accuracy, m.mean_success) for name, m in self.rows.items()},
            {lam: (m.mean_accuracy, m.mean_success) for lam, m in self.curve.items()},
            title=title,
        )


def plot_points(
    path: "str | Path",
    points: Mapping[str, tuple[float, float]],
    curve: Mapping[float, tuple[float, float]],
    *,
    title: str = "",
) -> None:
    """The picture of a report, from (accuracy, success) pairs in [0, 1]."""
    draw_panels(path, [(title, points, curve)])


def draw_panels(
    path: "str | Path",
    panels: Sequence[tuple[str, Mapping[str, tuple[float, float]], Mapping[float, tuple[float, float]]]],
) -> None:
    """One panel a comparison: points of methods, and the plain merge's curve as a line marked with its λ.

    Args:
        path: picture file; its suffix says the format.
        panels: (title, method to (accuracy, success), λ to (accuracy, success)).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for _, points, _ in panels for name in points))
    markers = "osD^vP*X<>hp"
    colours = [
        "#0072B2",
        "#D55E00",
        "#009E73",
        "#CC79A7",
        "#E69F00",
        "#56B4E9",
        "#000000",
        "#8B4513",
        "#7B3FA0",
        "#888888",
    ]
    figure = Figure(figsize=(1.5 + 4.2 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, points, curve) in zip(axes, panels, strict=True):
        line = [(lam, 100 * a, 100 * s) for lam, (a, s) in sorted(curve.items())]
        axis.plot(
            [a for _, a, _ in line], [s for _, _, s in line], "-", color="#999999", lw=1.5, label="plain merge over λ"
        )
        for lam, a, s in line:
            axis.plot(a, s, ".", color="#999999")
            axis.annotate(f"{lam:g}", (a, s), fontsize=7, color="#555555", xytext=(3, 3), textcoords="offset points")
        for name, (a, s) in points.items():
            index = names.index(name)
            axis.plot(
                100 * a, 100 * s, markers[index % len(markers)], color=colours[index % len(colours)], ms=8, label=name
            )
        axis.set_xlabel("mean accuracy (%)")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("attack success rate (%)")
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(str(path), dpi=130)


def check_picture(path: "str | Path") -> None:
    """Whether a picture can be written there, before the work that it shows is done.

    Raises:
        OutputError: there is no such folder, or no such kind of picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if Path(path).suffix.removeprefix(".").lower() not in kinds:
        raise OutputError(f"{path}: no kind of picture that can be drawn; expected one of {', '.join(kinds)}.")
    if not Path(path).parent.is_dir():
        raise OutputError(f"{path}: there is no folder {Path(path).parent}.")


def _no_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def security_report(
    before: Any,
    after: Any,
    *,
    heads: Mapping[str, Any],
    tests: Mapping[str, Any],
    triggers: Mapping[str, "Trigger | Sequence[Trigger]"],
    base: nn.Module,
    models: Mapping[str, Any],
    lambdas: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    forward: Forward | None = None,
) -> SecurityReport:
    """Measure merged models before and after a defence, with the plain merge over λ as reference.

    Args:
        before: the merged model without defence: a state dict, a module, or a mapping name to either.
        after: the defended one(s), likewise; may be empty.
        heads: task to head, as in `dam_merge`.
        tests: task to (inputs, labels) or a re-iterable of such pairs; not the data that masks were learned on.
        triggers: attacked task to its trigger or triggers.
        base: the encoder, with the base's weights; restored afterwards.
        models: task to fine-tuned model, for the curve.
        lambdas: coefficients of the plain merge.
        forward: (module, batch) to features.

    Raises:
        DataError: a task without test inputs, or without labels.
        UsageError: a trigger or head for a task that is not there.
    """
    forward = forward or default_forward
    several = {task: [own] if isinstance(own, Trigger) else list(own) for task, own in triggers.items()}
    for task in [*several, *tests]:
        if task not in heads:
            raise UsageError(f"heads: none for task {task!r}." + did_you_mean(task, heads))
    for task in several:
        if task not in tests:
            raise DataError(f"tests: nothing for the attacked task {task!r}." + did_you_mean(task, tests))
    if not several or not all(several.values()):
        raise UsageError("triggers: none given; expected attacked task to Trigger. What is not tried is not measured.")
    if not lambdas:
        raise ParameterError("lambdas: empty; the curve of the plain merge is part of every report")
    if not all(math.isfinite(lam) for lam in lambdas):
        raise ParameterError(f"lambdas: {list(lambdas)} are not all finite numbers")
    given = {role: _named_states(role, states) for role, states in (("before", before), ("after", after))}
    both = given["before"].keys() & given["after"].keys()
    if both:
        raise UsageError(f"after: {shortened(sorted(both))} has the name of a row before; give it another")
    device = next(base.parameters()).device
    ready = {task: head_of(head, device) for task, head in heads.items()}
    vectors = task_vectors(base, models)
    rows: dict[str, Measurement] = {}
    with evaluating(base, list(ready.values())):
        with MaskedModel(base, vectors) as model:
            curve = {}
            for lam in lambdas:
                model.sum_(torch.full((len(vectors),), float(lam), device=device))
                model.compose_()
                curve[float(lam)] = measure(base, ready, tests, several, forward)
        original = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
        try:
            for name, state in (given["before"] | given["after"]).items():
                _load(base, state, name)
                rows[name] = measure(base, ready, tests, several, forward)
        finally:
            base.load_state_dict(original)
    return SecurityReport(rows, curve)


def _load(base: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    own = base.state_dict()
    assert_alike(in_memory(own, label="the base"), {name: in_memory(state, label=name)})
    base.load_state_dict(state)


def _named_states(role: str, given: Any) -> dict[str, Mapping[str, Tensor]]:
    if isinstance(given, nn.Module):
        return {role: given.state_dict()}
    if hasattr(given, "state_dict"):
        return {role: given.state_dict}
    if isinstance(given, Mapping) and not given:
        return {}
    if not isinstance(given, Mapping):
        raise UsageError(f"{role}: got a {type(given).__name__}; expected a state dict, a module, or names to these")
    if all(isinstance(value, Tensor) for value in given.values()):
        return {role: given}
    return {str(name): next(iter(_named_states(role, own).values())) for name, own in given.items()}
