"""Statistics of the tasks' data from a configuration file, for the command line."""

import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from merging.learn.atlas import _data, _heads, _model, _tokenizer, device_named, names_in_checkpoint
from merging.learn.config import Fraction, LearnConfig
from merging.learn.data import Texts
from merging.learn.objectives import Forward, moved, split
from merging.learn.statistics import called, fisher_diagonal, input_grams, input_grams_through_merged
from taskvec.adapter import is_adapter
from taskvec.checkpoint import Checkpoint
from taskvec.errors import DataError, MismatchError, OutputError, OutputExistsError, UsageError, did_you_mean
from taskvec.source import TensorSource, matches
from taskvec.vector import TaskVector, is_task_vector

# what `learn statistics` shares with the other learners; the rest of `LearnConfig` has no meaning for it
_SHARED = (
    "base", "tasks", "model", "data", "tokenizer", "max_length", "heads", "pool", "normalize", "logit_scale", "exclude",
    "batch", "seed", "device", "dtype",
)  # fmt: skip
# whose files each setting belongs to
_OWN: Mapping[str, tuple[str, ...]] = {
    "labels": ("fisher",),
    "heads": ("fisher",),
    "off_diagonal": ("regmean_pp",),
    "ridge": ("regmean_pp",),
}


class StatisticsFile(LearnConfig):
    """What `taskvec learn statistics` reads: keys shared with the other learners, and these.

    Attributes:
        method: what the statistics are for: `fisher`, `regmean` or `regmean_pp`.
        labels: for `fisher`: one label `sampled` for each prediction, or the `expected` value over all classes.
        off_diagonal, ridge: for `regmean_pp`: as the merge will be given.
        include: patterns of the parameters that get statistics; those of `exclude` get none.
    """

    method: Literal["fisher", "regmean", "regmean_pp"]
    objective: str = "entropy"
    labels: Literal["sampled", "expected"] = "sampled"
    off_diagonal: Fraction = 0.9
    ridge: Annotated[float, Field(ge=0)] = 1e-6
    include: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["*"])

    @model_validator(mode="after")
    def _only_what_is_used(self) -> "StatisticsFile":
        known = (*_SHARED, *(name for name in type(self).model_fields if name not in LearnConfig.model_fields))
        given = self.model_fields_set
        problems = [f"{name}: has no meaning for `learn statistics`" for name in given if name not in known]
        problems += [
            f"{name}: has no meaning for `method: {self.method}`"
            for name, methods in _OWN.items()
            if name in given and self.method not in methods
        ]
        problems += [f"data: nothing for task {task!r}" for task in self.tasks if task not in self.data]
        problems += [
            f"data.{name}: is not in tasks.{did_you_mean(name, self.tasks)}"
            for name in self.data
            if name not in self.tasks
        ]
        problems += [
            f"tasks.{task}: names a file, so it cannot hold a slash or start with a dot"
            for task in self.tasks
            if not task or "/" in task or task.startswith(".")
        ]
        if problems:
            raise ValueError("\n".join(sorted(problems)))
        return self


def collect(
    config: StatisticsFile, out: "str | Path", *, progress: Callable[[str], None] | None = None
) -> dict[str, Path]:
    """Collects statistics by a configuration; the tensors are named as in the base's checkpoint.

    Args:
        config: what to collect, of which models, on which data.
        out: a folder, which gets a file for each task, or for one task a file that ends in `.safetensors`. It appears
            whole or not at all.
        progress: told what was done, a line at a time.

    Returns:
        Task to its file, in the tasks' order.

    Raises:
        OutputExistsError: `out` is taken.
        UsageError: several tasks and a file, or a model without logits for `fisher`.
        MismatchError: models that do not fit the base.
        DataError: data that are missing or empty.
    """
    target = Path(out)
    alone = target.suffix == ".safetensors"
    if alone and len(config.tasks) > 1:
        raise UsageError(f"{target}: {len(config.tasks)} tasks give a file each; name a folder for them.")
    if os.path.lexists(target):
        raise OutputExistsError(f"{target}: exists already. Choose another name, or delete it to collect anew.")
    if not target.absolute().parent.is_dir():
        raise OutputError(f"{target}: there is no folder {target.parent} to write it in.")
    base = Checkpoint.open(config.base)
    sources = {task: _source(base, path) for task, path in config.tasks.items()}
    device = device_named(config.device)
    tokenizer = _tokenizer(config) if any(spec.path for spec in config.data.values()) else None
    batches = {task: _Batches(_data(config, task, config.data[task], tokenizer), device) for task in config.tasks}
    heads = _heads(config, device)
    place = target if alone else target.with_name(f".{target.name}.partial-{os.getpid()}")
    files = {task: place if alone else place / f"{task}.safetensors" for task in config.tasks}
    try:
        if not alone:
            place.mkdir()
        _collected(config, base, sources, batches, heads, device, files, progress or (lambda line: None))
        if not alone:
            place.rename(target)
    finally:
        if not alone:
            shutil.rmtree(place, ignore_errors=True)
    return {task: target if alone else target / f"{task}.safetensors" for task in config.tasks}


def _collected(
    config: StatisticsFile,
    base: Checkpoint,
    sources: Mapping[str, TensorSource],
    batches: Mapping[str, "_Batches"],
    heads: Mapping[str, Callable[[Tensor], Tensor]],
    device: torch.device,
    files: Mapping[str, Path],
    progress: Callable[[str], None],
) -> None:
    if config.method == "regmean_pp":
        begun = time.monotonic()
        models = {task: _loaded(config, task, base, source, device) for task, source in sources.items()}
        names = names_in_checkpoint(next(iter(models.values())), base)
        input_grams_through_merged(
            models,
            batches,
            files,
            off_diagonal=config.off_diagonal,
            ridge=config.ridge,
            forward=_outputs,
            include=_wanted(config, names),
            names=names,
        )
        progress(f"{len(models)} tasks, layer by layer: {time.monotonic() - begun:.1f} s")
        return
    for task, source in sources.items():
        begun = time.monotonic()
        model = _loaded(config, task, base, source, device)
        names = names_in_checkpoint(model, base)
        include = _wanted(config, names)
        if config.method == "fisher":
            forward = _logits(config, heads.get(task))
            fisher_diagonal(
                model, batches[task], files[task], labels=config.labels, forward=forward, include=include,
                seed=config.seed, names=names,
            )  # fmt: skip
        else:
            input_grams(model, batches[task], files[task], forward=_outputs, include=include, names=names)
        progress(f"{task}: {time.monotonic() - begun:.1f} s")


class _Batches:
    """A task's data in a fixed order, as often as they are asked for, on the device."""

    def __init__(self, data: Any, device: torch.device):
        self._data, self._device = data.in_order() if isinstance(data, Texts) else data, device

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data(0):
            yield moved(batch, self._device)


def _outputs(model: nn.Module, batch: Any) -> Any:
    return called(model, split(batch)[0])


def _logits(config: LearnConfig, head: Callable[[Tensor], Tensor] | None) -> Callable[[nn.Module, Any], Tensor]:
    features = Forward(config.pool, config.normalize)

    def logits(model: nn.Module, batch: Any) -> Tensor:
        inputs, _ = split(batch)
        if head is not None:
            return head(features(model, inputs))
        output = called(model, inputs)
        found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(found, Tensor):
            raise UsageError(
                f"model: {type(model).__name__} gives no logits, and Fisher needs them. Choose a class with a head "
                "(AutoModelForSequenceClassification, AutoModelForCausalLM), or give `heads`."
            )
        return found

    return logits


def _wanted(config: StatisticsFile, names: Mapping[str, str]) -> list[str]:
    """The parameters that get statistics: patterns may mean the model's names or the checkpoint's."""
    found = [
        name
        for name, there in names.items()
        if matches(config.include, name, there) and not matches(config.exclude, name, there)
    ]
    if not found:
        raise DataError(f"include: no parameter that the base has matches {config.include} and not {config.exclude}")
    return [glob.escape(name) for name in found]


def _source(base: Checkpoint, path: str) -> TensorSource:
    """A task's weights: of a checkpoint, or of the base with an adapter or a stored task vector."""
    if is_adapter(path):
        return TaskVector.from_adapter(base, path).apply_to(base)
    tuned = Checkpoint.open(path)
    return TaskVector.load(path).apply_to(base) if is_task_vector(tuned) else tuned


def _loaded(config: LearnConfig, task: str, base: Checkpoint, source: TensorSource, device: torch.device) -> nn.Module:
    """A task's model: from its own folder where that says what it is, else the base's with the task's weights."""
    folder = getattr(source, "path", None)
    whole = isinstance(source, Checkpoint) and (":" in config.model or bool(source.config))
    model = _model(config.model_copy(update={"base": str(folder)}) if whole else config)
    model = model.to(device=device, dtype=getattr(torch, config.dtype))
    if whole:
        return model
    names = names_in_checkpoint(model, base)
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in names}
    there = {name: tensor for name, tensor in own.items() if names[name] in source.infos}
    path = config.tasks[task]
    if not there:
        raise MismatchError([f"tasks.{task}: {path} has none of the base's tensors."])
    aliases = {base.aliases.get(names[name], names[name]) for name in there}
    problems = [
        f"tasks.{task}: {path} has no {names[name]}."
        for name in own
        if name not in there and base.aliases.get(names[name], names[name]) not in aliases
    ]
    problems += [
        f"tasks.{task}: {names[name]} is {list(found)} in {path} and {list(tensor.shape)} in the model."
        for name, tensor in there.items()
        if (found := source.infos[names[name]].shape) != tuple(tensor.shape)
    ]
    if problems:
        raise MismatchError(problems)
    with torch.no_grad():
        for name, tensor in there.items():
            tensor.copy_(source.read(names[name]))
    return model


__all__ = ["StatisticsFile", "collect"]
