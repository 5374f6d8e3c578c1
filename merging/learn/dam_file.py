"""DAM and security reports from a configuration file, for the command line."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from merging.learn.atlas import _data, _heads, _model, _tokenizer, _vectors, device_named, names_in_checkpoint
from merging.learn.config import DataSpec, LearnConfig
from merging.learn.dam import DamResult, dam_merge
from merging.learn.dam_config import DamConfig
from merging.learn.data import named
from merging.learn.objectives import Forward
from merging.learn.security import SecurityReport, Trigger, security_report, token_trigger
from merging.settings import Strict
from taskvec.coefficients import Coefficients, Region
from taskvec.errors import DataError, OutputError, OutputExistsError, RecipeError, UsageError, did_you_mean, shortened
from taskvec.masks import save_masks
from taskvec.precision import is_float
from taskvec.source import matches

# what `learn dam` shares with the other learners; the rest of `LearnConfig` has no meaning for it
_SHARED = (
    "base", "tasks", "model", "data", "tokenizer", "max_length", "heads", "pool", "normalize", "logit_scale", "exclude",
    "batch", "seed", "device", "dtype", "dam",
)  # fmt: skip
# given by the configuration's own keys, or not expressible in a file
_OWN = ("exclude", "batch_size", "known_triggers", "noise", "trace", "per_task_masks")


class DamFile(LearnConfig):
    """What `taskvec learn dam` reads: keys shared with the other learners, and `dam` with the fields of `DamConfig`."""

    objective: str = "entropy"
    dam: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _only_what_is_used(self) -> "DamFile":
        problems = [f"{name}: has no meaning for `learn dam`" for name in self.model_fields_set if name not in _SHARED]
        known = [field.name for field in fields(DamConfig) if field.name not in _OWN]
        problems += [
            f"dam.{name}: is not a setting.{did_you_mean(name, known)}" for name in self.dam if name not in known
        ]
        problems += [f"data: nothing for task {task!r}" for task in self.tasks if task not in self.data]
        problems += [
            f"data.{name}: is not in tasks.{did_you_mean(name, self.tasks)}"
            for name in self.data
            if name not in self.tasks
        ]
        if self.heads is None and self.pool != "logits":
            problems.append("heads: none; give them, or `pool: logits` where the model gives logits")
        if problems:
            raise ValueError("\n".join(sorted(problems)))
        return self


class TriggerSpec(Strict):
    """A known trigger: a token written at a position, or `module:function` that changes a batch."""

    target: Annotated[int, Field(ge=0)]
    token: Annotated[int, Field(ge=0)] | None = None
    position: Annotated[int, Field(ge=0)] = 1
    function: str | None = None
    name: str = "trigger"

    @model_validator(mode="after")
    def _one_source(self) -> "TriggerSpec":
        if (self.token is None) == (self.function is None):
            raise ValueError("needs either `token` or `function`")
        return self

    def made(self) -> Trigger:
        if self.function is not None:
            return Trigger(named(self.function, "triggers.function"), self.target, self.name)
        return token_trigger(int(self.token or 0), self.target, position=self.position, name=self.name)


class SecurityFile(Strict):
    """What `taskvec evaluate security` reads.

    Attributes:
        base, tasks: as for `learn`; the curve of the plain merge is made of them.
        merged: name to merged checkpoint, before and after a defence.
        tests: labelled data of every task; not those that masks were learned on.
        triggers: attacked task to its triggers.
        lambdas: coefficients of the plain merge.
    """

    base: str
    tasks: Annotated[dict[str, str], Field(min_length=1)]
    merged: Annotated[dict[str, str], Field(min_length=1)]
    tests: Annotated[dict[str, DataSpec], Field(min_length=1)]
    triggers: Annotated[dict[str, list[TriggerSpec]], Field(min_length=1)]
    model: str = "AutoModel"
    tokenizer: str | None = None
    max_length: Annotated[int, Field(ge=1)] = 128
    heads: str | dict[str, str] | None = None
    pool: Literal["auto", "logits", "pooler", "first", "mean"] = "auto"
    normalize: bool = False
    logit_scale: float = 1.0
    exclude: list[str] = Field(default_factory=list)
    batch: Annotated[int, Field(ge=1)] = 64
    lambdas: Annotated[tuple[float, ...], Field(min_length=1)] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    device: str | None = None

    def as_learn(self) -> LearnConfig:
        keys = (
            "base",
            "tasks",
            "model",
            "tokenizer",
            "max_length",
            "heads",
            "pool",
            "normalize",
            "logit_scale",
            "exclude",
        )
        shared = {key: getattr(self, key) for key in keys}
        return LearnConfig(**shared, data=self.tests, batch=self.batch, device=self.device)


class _Epochs:
    """Data that change with the epoch as a re-iterable: each iteration is the next epoch."""

    def __init__(self, data: Callable[[int], Any]):
        self.data, self.epoch = data, 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        yield from self.data(self.epoch - 1)


def _heads_or_logits(config: LearnConfig, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    found = _heads(config, device)
    return found or {name: (lambda logits: logits) for name in config.data}


def _forward(config: LearnConfig) -> Callable[[nn.Module, Any], Tensor]:
    features = Forward(config.pool, config.normalize)
    return lambda module, batch: features(module, batch)


def coefficients_beside(out: "str | Path") -> Path:
    """Where `learn_dam` saves coefficients that are no single number a task: `dam.coefficients.safetensors`."""
    return Path(out).with_name(f"{Path(out).name.removesuffix('.safetensors')}.coefficients.safetensors")


def learn_dam(config: DamFile, out: "str | Path") -> DamResult:
    """Learn masks by a configuration and save them as `out`, under the checkpoint's tensor names.

    Coefficients that differ from tensor to tensor are saved beside it (`coefficients_beside`).

    Raises:
        OutputExistsError: `out` is taken.
        OutputError: its folder cannot be made.
        RecipeError: everything wrong with the settings.
        BaseMismatchError: a task vector or coefficients file of another base.
    """
    from taskvec.checkpoint import Checkpoint, content_hash

    for place in (Path(out), coefficients_beside(out)):
        if place.exists():
            raise OutputExistsError(f"{place}: exists already. Choose another name, or delete it to learn anew.")
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: its folder cannot be made ({error}).") from error
    device = device_named(config.device)
    base = Checkpoint.open(config.base)
    model = _model(config).to(device=device, dtype=getattr(torch, config.dtype))
    names = names_in_checkpoint(model, base)
    vectors, hashes = _vectors(config, base, names)
    parameters = {name for name, _ in model.named_parameters()}
    left = [name for name in parameters if name not in names or matches(config.exclude, name, names[name])]
    tokenizer = _tokenizer(config) if any(spec.path for spec in config.data.values()) else None
    data = {name: _Epochs(_data(config, name, spec, tokenizer)) for name, spec in config.data.items()}
    base_hash = content_hash(base)
    given = dict(config.dam)
    if isinstance(given.get("base_merge"), str) and given["base_merge"].endswith(".safetensors"):
        given["base_merge"] = _coefficients(given["base_merge"], names, base_hash, hashes)
    settings = DamConfig(**given, exclude=left, batch_size=config.batch)
    result = dam_merge(
        model,
        vectors,
        data={task: data[task] for task in config.tasks},
        heads=_heads_or_logits(config, device),
        forward=_forward(config),
        config=settings,
        seed=config.seed,
    )
    unknown = sorted(name for name in parameters if name not in names and not matches(config.exclude, name))
    if unknown:
        result.warnings.append(
            f"parameters of the model that the base has no tensor for are not merged: {shortened(unknown)}"
        )
    masks = {names[name]: mask for name, mask in result.masks.items()}
    for alias, name in base.aliases.items():
        if name in masks:
            masks.setdefault(alias, masks[name])
    save_masks(
        out,
        masks,
        tasks=result.tasks,
        base_hash=base_hash,
        task_hashes=hashes,
        task_kinds={task: _kind(path) for task, path in config.tasks.items()},
        details={
            "coefficients": result.coefficients.tolist(),
            "steps": len(result.history),
            "suspected": sorted({(found.task, found.target) for found in result.triggers}),
            "warnings": result.warnings,
            "config": config.model_dump(mode="json", exclude_defaults=True),
        },
    )
    if result.coefficients.ndim == 2:
        # in the order of the columns
        merged = [names[name] for name in result.masks]
        Coefficients(
            values=result.coefficients.cpu(),
            tasks=result.tasks,
            runs=tuple((name, 1) for name in merged),
            regions={name: Region(column, inner=masks[name].numel()) for column, name in enumerate(merged)},
            kept=tuple(
                name
                for name, info in base.infos.items()
                if is_float(info.dtype) and name not in merged and name not in base.aliases
            ),
            aliases=dict(base.aliases),
            granularity="block",
            base_hash=base_hash,
            task_hashes=hashes,
            objective={"use": "dam", "steps": len(result.history)},
        ).save(coefficients_beside(out))
    return result


def _kind(path: str) -> str:
    """What a task is given as."""
    from taskvec.adapter import is_adapter
    from taskvec.checkpoint import Checkpoint
    from taskvec.vector import is_task_vector

    return "adapter" if is_adapter(path) else "vector" if is_task_vector(Checkpoint.open(path)) else "model"


def _coefficients(path: str, names: Mapping[str, str], base_hash: str, task_hashes: Mapping[str, str]) -> Coefficients:
    """A coefficients file under the model's names."""
    learned = Coefficients.load(path)
    learned.check(base_hash=base_hash, task_hashes=task_hashes, source=f"dam.base_merge: {path}")
    here: dict[str, str] = {}
    for name, there in names.items():
        here.setdefault(there, name)

    def renamed(name: str) -> str:
        return here.get(name, name)

    return replace(
        learned,
        regions={renamed(name): region for name, region in learned.regions.items()},
        kept=tuple(map(renamed, learned.kept)),
        aliases={renamed(alias): renamed(name) for alias, name in learned.aliases.items()},
    )


def evaluate_security(config: SecurityFile) -> SecurityReport:
    """The report that a configuration asks for."""
    from taskvec.checkpoint import Checkpoint

    for task in config.triggers:
        if task not in config.tests:
            raise RecipeError(f"triggers.{task}: is not in tests.{did_you_mean(task, config.tests)}")
    learn = config.as_learn()
    device = device_named(config.device)
    base = Checkpoint.open(config.base)
    model = _model(learn).to(device)
    names = names_in_checkpoint(model, base)
    vectors, _ = _vectors(learn, base, names)
    tokenizer = _tokenizer(learn) if any(spec.path for spec in config.tests.values()) else None
    tests = {
        name: [_pair(name, batch, device) for batch in _data(learn, name, spec, tokenizer, held_out=True)(0)]
        for name, spec in config.tests.items()
    }
    own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    taken = set(names.values())
    beside = [
        name
        for name in base.infos
        if base.aliases.get(name, name) not in taken and name not in taken and not matches(config.exclude, name)
    ]
    merged = {}
    for label, path in config.merged.items():
        source = Checkpoint.open(path)
        lacking = [names[name] for name in own if name in names and names[name] not in source.infos]
        if lacking:
            raise UsageError(f"merged.{label}: {path} has no {lacking[0]}. Was it merged from this base?")
        lost = [n for n in beside if n in source.infos and not torch.equal(source.read(n), base.read(n))]
        if lost:
            raise UsageError(
                f"merged.{label}: {path} changes {shortened(lost)}, for which {config.model} has no parameter, so that would "
                "not be measured. Name the right `model`, or leave them out with `exclude`."
            )
        merged[label] = {**own, **{name: source.read(names[name]).to(own[name]) for name in own if name in names}}
    return security_report(
        merged,
        {},
        heads=_heads_or_logits(learn, device),
        tests=tests,
        triggers={task: [spec.made() for spec in several] for task, several in config.triggers.items()},
        base=model,
        models=vectors,
        lambdas=config.lambdas,
        forward=_forward(learn),
    )


def _pair(name: str, batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping) and "labels" in batch:
        rest = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        return rest, batch["labels"].to(device)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0].to(device), batch[1].to(device)
    raise DataError(f"tests.{name}: a batch has no labels; expected a mapping with `labels`, or (inputs, labels)")
