"""Defense-aware merging (DAM) and Concrete subspace merging: masks learned without labels.

θ = θ0 + Σ λ_i (τ_i ⊙ M1 ⊙ M2): the task-shared mask M1 is trained for confident predictions on clean inputs, the
backdoor-detection mask M2 for predictions that do not change under perturbations. Papers: arXiv:2410.13910 (DAM),
arXiv:2312.06173 (Concrete). What the released code does instead (one mask, several slips) is kept behind
`compat="published"`.

This lowers the risk that a backdoor of one model survives the merge. It certifies nothing.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merging.learn.atlas import device_named
from merging.learn.dam_config import DamConfig
from merging.learn.inversion import InvertedTrigger, Perturbation
from merging.learn.mask_training import (
    NO_DATA,
    Batch,
    Forward,
    Head,
    MaskLoop,
    Stream,
    Trainer,
    draw_of,
    prepare,
    train_published,
)
from merging.learn.masked import Draw, MaskedModel, MaskLogits
from merging.learn.masks import Tensors, Vector, delta, vector_names
from taskvec.coefficients import Coefficients
from taskvec.errors import (
    DataError,
    LearningError,
    MismatchError,
    NonFiniteError,
    ParameterError,
    Problems,
    UsageError,
    did_you_mean,
    shortened,
)
from taskvec.precision import all_finite, compute_dtype, is_float
from taskvec.source import TensorSource, names_matching

__all__ = ["DamConfig", "DamResult", "dam_merge", "default_forward"]


@dataclass
class DamResult:
    """What DAM made, and how.

    `state_dict` is the merged model (every tensor of the base, in its dtype). `masks` holds the final weights of
    M1 ⊙ M2 as they multiplied the task vectors (with `per_task_masks` they are in `task_masks`, by task),
    `probabilities` the masks' probabilities by role, `history` one entry per step, `scan` the share of inputs that a
    small inverted trigger sent to each class of each task, `triggers` those kept to train against.
    """

    state_dict: dict[str, Tensor]
    masks: dict[str, Tensor]
    task_masks: dict[str, dict[str, Tensor]]
    probabilities: dict[str, dict[str, Tensor]]
    coefficients: Tensor
    tasks: tuple[str, ...]
    history: list[dict[str, Any]]
    perturbations: dict[str, list[Perturbation]]
    triggers: list[InvertedTrigger]
    scan: dict[str, dict[int, float]]
    warnings: list[str]

    def apply_to(self, module: nn.Module) -> nn.Module:
        """Load the merged weights into a module (in place) and return it."""
        module.load_state_dict(self.state_dict)
        return module


def dam_merge(
    base: nn.Module,
    models: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    heads: Mapping[str, Any],
    forward: Forward | None = None,
    config: DamConfig | None = None,
    device: "torch.device | str | None" = None,
    seed: int = 0,
) -> DamResult:
    """Learn masks that merge models with less of a backdoor, from unlabelled inputs of every task.

    Args:
        base: the encoder that all models were tuned from. Its weights are changed while training and restored after.
        models: task to fine-tuned model: a module, a state dict, a path, or a ready `TaskVector`.
        data: task to unlabelled inputs: a tensor [input, ...], a mapping of such tensors, or a re-iterable of batches
            (tensors, mappings, or tuples of which the first entry is used; labels are never looked at).
        heads: task to head, features to logits: a module, a callable, or a weight [class, feature]. Heads are never
            merged.
        forward: (module, batch) to features; default `default_forward`.
        config: see `DamConfig`.
        device: where to train; default: where the base is.
        seed: of the noise, the order of inputs and the adversaries.

    Returns:
        The merged state dict with masks, coefficients, history, perturbations and warnings.

    Raises:
        DataError: no data, or data that cannot be used; nothing is put in their place.
        MismatchError: models that do not fit the base.
        LearningError: batch statistics in training mode, a head inside the merged weights, a loss not finite.
    """
    config = DamConfig() if config is None else config
    forward = forward or default_forward
    _check_inputs(base, models, data, heads, forward, config, seed)
    warnings = [f"data of {task!r} are not used: there is no model of that task" for task in data if task not in models]
    with on_device(base, device) as where:
        vectors = task_vectors(base, models)
        if len(vectors) == 1:
            warnings.append(
                "one model only: there is no other to dilute a backdoor with; a smaller coefficient does more"
            )
        warnings += _left_out(base, models, vectors)
        names = _chosen(base, config)
        ready = {task: head_of(head, where) for task, head in heads.items()}
        _check_heads(base, heads, names)
        model = MaskedModel(base, vectors, names=names, min_elements=config.min_elements)
        coefficients = _initial_coefficients(config, model, list(vectors), where)
        streams = {
            task: Stream(task, data[task], config.batch_size, seed * 1009 + index, where)
            for index, task in enumerate(vectors)
        }
        trainer = Trainer(model, streams, ready, forward, config, seed)
        _check_settings(config, model, list(vectors))
        warnings += _still(base, vectors)
        with evaluating(base, list(ready.values())), model:
            trainer.try_inputs()
            if config.compat == "published":
                mask, coefficients = train_published(trainer, coefficients)
                model.sum_(coefficients)
                masks = [(mask, draw_of(config, seed, config.mask_steps, config.final_mask))]
            else:
                prepare(trainer, coefficients)
                loop = MaskLoop(trainer, coefficients)
                loop.run()
                coefficients, masks = loop.coefficients, loop.final()
            if config.per_task_masks:
                model.compose_each_(masks, coefficients)
            else:
                model.compose_(*masks)
            state = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
            broken = [name for name, tensor in state.items() if is_float(tensor.dtype) and not all_finite(tensor)]
            if broken:
                raise LearningError(
                    f"{shortened(broken)}: the merged weights hold NaN or infinity. Lower mask_lr or lam0."
                )
            each = [_weights(model, [own]) for own in masks] if config.per_task_masks else []
            weights = {} if config.per_task_masks else _weights(model, masks)
            roles = list(vectors) if config.per_task_masks else ["M1", "M2"] if len(masks) > 1 else ["M"]
            probabilities = {
                role: model.named(torch.sigmoid(own.logits), masked_only=True)
                for role, (own, _) in zip(roles, masks, strict=True)
            }
    return DamResult(
        state,
        weights,
        dict(zip(vectors, each, strict=True)) if each else {},
        probabilities,
        coefficients,
        tuple(vectors),
        trainer.history,
        trainer.perturbations,
        trainer.triggers,
        trainer.scan,
        warnings + trainer.warnings,
    )


# -- inputs ------------------------------------------------------------------------------------------------------------


def _minus(tuned: Tensor, base: Tensor) -> Tensor:
    dtype = compute_dtype(tuned.dtype, base.dtype)
    return tuned.to(base.device, dtype) - base.to(dtype)


class _Difference:
    """A fine-tuned model as a task vector, one tensor at a time; the base's tensors are those at the start."""

    def __init__(self, base: Tensors, tuned: Tensors):
        self.base, self.given, self.tensor = base, tuned.keys(), tuned.__getitem__
        self.infos: Mapping[str, Any] = {name: tensor for name, tensor in tuned.items() if name in base}

    def read(self, name: str) -> Tensor:
        return _minus(self.tensor(name), self.base[name])


def default_forward(module: nn.Module, batch: Batch) -> Tensor:
    """Features of a batch: a tensor output as it is; of a transformers output the `pooler_output`, or the first token.

    Raises:
        DataError: the output has neither.
    """
    output = module(**batch) if isinstance(batch, Mapping) else module(batch)
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is not None:
        return hidden[:, 0]
    raise DataError(f"the module returned {type(output).__name__}; pass forward=(module, batch) -> features")


def _weights(model: MaskedModel, masks: Sequence[tuple[MaskLogits, Draw]]) -> dict[str, Tensor]:
    """The product of these masks as it multiplied the task vectors; ones where a parameter is merged whole."""
    weights = {}
    with torch.no_grad():
        for segment in model.segments:
            value = torch.ones_like(segment.total)
            for own, draw in masks:
                if segment.masked:
                    value *= own.weights(segment, draw)
            weights[segment.name] = value.view(segment.original.shape)
    return weights


def _check_inputs(base: Any, models: Any, data: Any, heads: Any, forward: Any, config: Any, seed: Any) -> None:
    if not isinstance(base, nn.Module):
        raise UsageError(
            f"base: got a {type(base).__name__}; expected the encoder as a torch module with the base's weights"
        )
    if next(base.parameters(), None) is None:
        raise UsageError(f"base: the {type(base).__name__} has no parameters; there is nothing to merge")
    for role, given, of in (("models", models, "model"), ("heads", heads, "head"), ("data", data or {}, "inputs")):
        if not isinstance(given, Mapping):
            raise UsageError(f"{role}: got a {type(given).__name__}; expected task to {of}")
    if not callable(forward):
        raise UsageError(f"forward: got a {type(forward).__name__}; expected (module, batch) -> features")
    if not isinstance(config, DamConfig):
        raise UsageError(f"config: got a {type(config).__name__}; expected a DamConfig")
    if not isinstance(seed, int) or abs(seed) >= 1 << 62:
        raise UsageError(f"seed: {seed!r} is not a whole number below 2^62")
    if not models:
        raise UsageError("models: none given; expected task to fine-tuned model")
    problems = Problems()
    for task in models:
        if data is None or task not in data or data[task] is None:
            problems.add(f"data: nothing for task {task!r}.{did_you_mean(task, data or {})}")
        elif isinstance(data[task], Iterator):
            problems.add(f"data: task {task!r} has a generator, which can be read once; give a list of its batches")
        if task not in heads:
            problems.add(f"heads: none for task {task!r}.{did_you_mean(task, heads)}")
    if problems:
        raise DataError("\n".join([*problems.found, NO_DATA]))
    for name, parameter in base.named_parameters():
        if not all_finite(parameter.detach()):
            raise NonFiniteError(name, "the base")
    for name, module in base.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise LearningError(
                f"{name or type(base).__name__}: batch normalisation in training mode would mix the tasks' statistics; "
                "call base.eval() first"
            )


def task_vectors(base: nn.Module, models: Mapping[str, Any]) -> dict[str, Vector]:
    own = {name: parameter.data for name, parameter in base.named_parameters()}
    buffers = {name for name, _ in base.named_buffers()}
    vectors: dict[str, Vector] = {}
    for task, model in models.items():
        if isinstance(model, str | Path):
            from taskvec.checkpoint import Checkpoint

            model = Checkpoint.open(model)
        if hasattr(model, "low_rank"):
            vectors[task] = model
        elif isinstance(model, nn.Module):
            tuned = {name: p.data for name, p in model.named_parameters(remove_duplicate=False) if name not in buffers}
            vectors[task] = _Difference(own, tuned)
        elif isinstance(model, Mapping):
            wrong = next((name for name, tensor in model.items() if not isinstance(tensor, Tensor)), None)
            if wrong is not None:
                raise UsageError(
                    f"models: task {task!r} has a {type(model[wrong]).__name__} as {wrong}; expected name to tensor"
                )
            vectors[task] = _Difference(own, model)
        elif isinstance(model, TensorSource):
            vectors[task] = _SourceDifference(own, model)
        else:
            raise UsageError(
                f"models: task {task!r} has a {type(model).__name__}; expected a module, a state dict, a path or a task vector"
            )
        _check_model(task, vectors[task], own, buffers)
    return vectors


class _SourceDifference(_Difference):
    """A checkpoint on disk as a task vector; each tensor is read when it is asked for."""

    def __init__(self, base: Tensors, source: Any):
        self.base, self.given, self.tensor = base, source.infos.keys(), source.read
        self.infos = {name: info for name, info in source.infos.items() if name in base}


def _check_model(task: str, vector: Vector, own: Tensors, buffers: set[str]) -> None:
    problems = Problems()
    infos = vector.infos if not isinstance(vector, Mapping) else vector
    if isinstance(vector, _Difference):
        for name in own:
            if name not in infos:
                problems.add(f"{name}: in the base, not in the model of task {task!r}")
    for name, info in infos.items():
        if name not in own:
            if name not in buffers:
                problems.add(f"{name}: in the task vector of {task!r}, not in the base.{did_you_mean(name, own)}")
        elif tuple(info.shape) != tuple(own[name].shape):
            problems.add(f"{name}: task {task!r} has {list(info.shape)}, the base has {list(own[name].shape)}")
        elif is_float(own[name].dtype) and not is_float(info.dtype):
            problems.add(f"{name}: task {task!r} has {info.dtype}, the base has {own[name].dtype}")
    problems.raise_if_any(MismatchError)


def _left_out(base: nn.Module, models: Mapping[str, Any], vectors: Mapping[str, Vector]) -> list[str]:
    """A warning for each model with tensors that the base lacks, such as a head; tied ones must be as in the base.

    Raises:
        MismatchError: a model has two values for what is one parameter of the base.
    """
    every = dict(base.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in base.named_parameters()}
    tied = {name: first[id(parameter)] for name, parameter in every.items() if first[id(parameter)] != name}
    known = every.keys() | {name for name, _ in base.named_buffers()}
    problems, warnings = Problems(), []
    for task, vector in vectors.items():
        if not isinstance(vector, _Difference):
            continue  # whose every name was checked
        problems.extend(
            f"{alias}: is {name} in the base; the model of task {task!r} has another value for each"
            for alias, name in tied.items()
            if alias in vector.given and not torch.equal(vector.tensor(alias), vector.tensor(name))
        )
        extra = [name for name in vector.given if name not in known]
        if extra:
            warnings.append(f"the model of task {task!r} has tensors that the base lacks, left out: {shortened(extra)}")
    problems.raise_if_any(MismatchError)
    return warnings


def _chosen(base: nn.Module, config: DamConfig) -> list[str]:
    names = [name for name, _ in base.named_parameters()]
    for pattern in [*config.include, *config.exclude]:
        if names and not names_matching(names, [pattern]):
            raise ParameterError(f"include/exclude: {pattern!r} matches no parameter of the base")
    excluded = set(names_matching(names, list(config.exclude)))
    return [name for name in names_matching(names, list(config.include)) if name not in excluded]


def head_of(head: Any, device: torch.device) -> Head:
    if isinstance(head, Tensor):
        if head.ndim != 2:
            raise UsageError(f"heads: got a tensor of shape {list(head.shape)}; expected a weight [class, feature]")
        weight = head.to(device)
        return lambda features: features @ weight.to(features.dtype).T
    if isinstance(head, nn.Module):
        elsewhere = any(parameter.device != device for parameter in head.parameters())
        return copy.deepcopy(head).to(device) if elsewhere else head
    if not callable(head):
        raise UsageError(
            f"heads: got a {type(head).__name__}; expected a module, a callable or a weight [class, feature]"
        )
    return head


def _check_heads(base: nn.Module, heads: Mapping[str, Any], names: Sequence[str]) -> None:
    inside = {id(parameter): name for name, parameter in base.named_parameters() if name in set(names)}
    for task, head in heads.items():
        if isinstance(head, nn.Module):
            for parameter in head.parameters():
                if id(parameter) in inside:
                    raise LearningError(
                        f"{inside[id(parameter)]}: the head of {task!r} is inside the merged weights; exclude it"
                    )


def _check_settings(config: DamConfig, model: MaskedModel, tasks: Sequence[str]) -> None:
    """What of the settings depends on the tasks and tensors."""
    problems = Problems()
    problems.extend(
        f"known_triggers: there is no task {task!r}.{did_you_mean(task, tasks)}"
        for task in config.known_triggers
        if task not in tasks
    )
    count = len(tasks) if config.per_task_masks else 2 if config.is_dual else 1
    needed = count * (config.mask_steps + (config.final_mask != "mean"))
    if config.noise is not None and len(config.noise) < needed:
        problems.add(
            f"noise: {len(config.noise)} draws recorded, {needed} are needed: {count} for each of {config.mask_steps} mask "
            "steps" + (", and for the final mask" if config.final_mask != "mean" else "")
        )
    for step, noise in enumerate(config.noise or ()):
        for segment in model.segments:
            shape = list(segment.original.shape)
            found = list(noise[segment.name].shape) if segment.name in noise else None
            if found is None:
                problems.add(f"noise: draw {step} has none for {segment.name}")
            elif found != shape:
                problems.add(f"noise: draw {step} has {found} for {segment.name}, expected {shape}")
            elif not bool(((noise[segment.name] >= 0) & (noise[segment.name] <= 1)).all()):
                problems.add(f"noise: draw {step} for {segment.name} must lie in [0, 1]")
        if problems:
            break  # the draws after it are made alike
    problems.raise_if_any(ParameterError)


def _still(base: nn.Module, vectors: Mapping[str, Vector]) -> list[str]:
    """A warning for each model that is the base itself; every task vector is read once.

    Raises:
        NonFiniteError: a model holds NaN or infinity.
    """
    own = dict(base.named_parameters())
    still = []
    for task, vector in vectors.items():
        moves = False
        for name in vector_names(vector):
            found = delta(vector, name)
            if found is None or name not in own:
                continue
            if not all_finite(found):
                raise NonFiniteError(name, f"the model of task {task!r}")
            moves = moves or bool((found != 0).any())
        if not moves:
            still.append(f"the model of task {task!r} equals the base everywhere; there is nothing of it to merge")
    return still


def _initial_coefficients(config: DamConfig, model: MaskedModel, tasks: Sequence[str], device: torch.device) -> Tensor:
    merge = config.base_merge
    if config.learns_coefficients or merge == "task_arithmetic":
        shape = (len(tasks), len(model.segments)) if merge == "adamerging_layer" else (len(tasks),)
        return torch.full(shape, float(config.lam0), dtype=model.total.dtype, device=device)
    if isinstance(merge, str | Path):
        merge = Coefficients.load(merge)
    if isinstance(merge, Coefficients):
        merge = _by_segment(merge, model, tasks)
    if isinstance(merge, Mapping):
        problems = Problems()
        problems.extend(f"base_merge: none for task {task!r}" for task in tasks if task not in merge)
        problems.extend(
            f"base_merge: there is no task {task!r}.{did_you_mean(str(task), tasks)}"
            for task in merge
            if task not in tasks
        )
        problems.raise_if_any(ParameterError)
        merge = [merge[task] for task in tasks]
    try:
        values = torch.as_tensor(merge, dtype=model.total.dtype, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ParameterError(f"base_merge: {merge!r} are not numbers, one for each task") from None
    if not bool(torch.isfinite(values).all()):
        raise ParameterError("base_merge: coefficients must be finite numbers")
    if list(values.shape) not in ([len(tasks)], [len(tasks), len(model.segments)]):
        raise ParameterError(
            f"base_merge: coefficients have shape {list(values.shape)}, expected [{len(tasks)}] or "
            f"[{len(tasks)}, {len(model.segments)}] (one column per merged parameter)"
        )
    return values


def _by_segment(learned: Coefficients, model: MaskedModel, tasks: Sequence[str]) -> Tensor:
    """The numbers of a coefficients file, [task, segment]."""
    problems = Problems()
    if sorted(learned.tasks) != sorted(tasks):
        problems.add(f"base_merge: the coefficients are those of {shortened(learned.tasks)}, not of {shortened(tasks)}")
    if learned.mode == "linear":
        problems.add("base_merge: the coefficients are those of the first-order model; learn them with mode nonlinear")
    names = [segment.name for segment in model.segments]
    known = {*learned.regions, *learned.kept, *learned.aliases}
    lacking = [name for name in names if name not in known]
    if lacking:
        problems.add(f"base_merge: the coefficients have none for {shortened(lacking)}")
    cut = [name for name in names if name in known and not learned.is_scalar(name)]
    if cut:
        problems.add(f"base_merge: {shortened(cut)} have several numbers a task ({learned.granularity}); one is needed")
    problems.raise_if_any(ParameterError)
    rows = torch.tensor([learned.tasks.index(task) for task in tasks])
    return torch.stack([learned.weights(name)[rows] for name in names], 1)


class on_device:
    """The module on another device for the time of a `with` block."""

    def __init__(self, module: nn.Module, device: "torch.device | str | None"):
        self.module = module
        self.before = next(module.parameters()).device
        self.device = device_named(device) if device is not None else self.before

    def __enter__(self) -> torch.device:
        if self.device != self.before:
            self.module.to(self.device)
        return self.device

    def __exit__(self, *_: object) -> None:
        if self.device != self.before:
            self.module.to(self.before)


class evaluating:
    """Modules in eval mode for the time of a `with` block (no dropout, no batch statistics), and frozen heads."""

    def __init__(self, module: nn.Module, heads: Sequence[Any]):
        self.modules = [part for own in (module, *heads) if isinstance(own, nn.Module) for part in own.modules()]
        self.frozen = [p for head in heads if isinstance(head, nn.Module) for p in head.parameters()]

    def __enter__(self) -> None:
        self.modes = [part.training for part in self.modules]
        self.learned = [parameter.requires_grad for parameter in self.frozen]
        for part in self.modules:
            part.training = False
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for part, mode in zip(self.modules, self.modes, strict=True):
            part.training = mode
        for parameter, learned in zip(self.frozen, self.learned, strict=True):
            parameter.requires_grad_(learned)
