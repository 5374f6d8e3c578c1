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
from taskvec.errors import DataError, LearningError, MismatchError, ParameterError, Problems, UsageError, did_you_mean
from taskvec.precision import compute_dtype
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
    config = config or DamConfig()
    forward = forward or default_forward
    warnings: list[str] = []
    _check_inputs(base, models, data, heads)
    with on_device(base, device) as where:
        vectors = task_vectors(base, models)
        if len(vectors) == 1:
            warnings.append(
                "one model only: there is no other to dilute a backdoor with; a smaller coefficient does more"
            )
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
        warnings += _still(vectors)
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
        self.base, self.tuned = base, tuned
        self.infos = {name: tensor for name, tensor in tuned.items() if name in base}

    def read(self, name: str) -> Tensor:
        return _minus(self.tuned[name], self.base[name])


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


def _check_inputs(base: Any, models: Mapping[str, Any], data: Any, heads: Mapping[str, Any]) -> None:
    if not isinstance(base, nn.Module):
        raise UsageError(
            f"base: got a {type(base).__name__}; expected the encoder as a torch module with the base's weights"
        )
    for role, given in (("models", models), ("heads", heads)):
        if not isinstance(given, Mapping):
            raise UsageError(f"{role}: got a {type(given).__name__}; expected task to {role[:-1]}")
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
            tuned = {name: p.data for name, p in model.named_parameters() if name not in buffers}
            vectors[task] = _Difference(own, tuned)
        elif isinstance(model, Mapping):
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
        self.base, self.source = base, source
        self.infos = {name: info for name, info in source.infos.items() if name in base}

    def read(self, name: str) -> Tensor:
        return _minus(self.source.read(name), self.base[name])


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
    problems.raise_if_any(MismatchError)


def _chosen(base: nn.Module, config: DamConfig) -> list[str]:
    names = [name for name, _ in base.named_parameters()]
    for pattern in [*config.include, *config.exclude]:
        if names and not names_matching(names, [pattern]):
            raise ParameterError(f"include/exclude: {pattern!r} matches no parameter of the base")
    excluded = set(names_matching(names, list(config.exclude)))
    return [name for name in names_matching(names, list(config.include)) if name not in excluded]


def head_of(head: Any, device: torch.device) -> Head:
    if isinstance(head, Tensor):
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
    for step, noise in enumerate(config.noise or ()):
        for segment in model.segments:
            shape = list(segment.original.shape)
            found = list(noise[segment.name].shape) if segment.name in noise else None
            if found is None:
                problems.add(f"noise: draw {step} has none for {segment.name}")
            elif found != shape:
                problems.add(f"noise: draw {step} has {found} for {segment.name}, expected {shape}")
        if problems:
            break  # the draws after it are made alike
    problems.raise_if_any(ParameterError)


def _still(vectors: Mapping[str, Vector]) -> list[str]:
    """A warning for each model that is the base itself."""
    return [
        f"the model of task {task!r} equals the base everywhere; there is nothing of it to merge"
        for task, vector in vectors.items()
        if not any(bool((delta(vector, name) != 0).any()) for name in vector_names(vector))  # type: ignore[union-attr]
    ]


def _initial_coefficients(config: DamConfig, model: MaskedModel, tasks: Sequence[str], device: torch.device) -> Tensor:
    merge = config.base_merge
    if isinstance(merge, str):
        shape = (len(tasks), len(model.segments)) if merge == "adamerging_layer" else (len(tasks),)
        return torch.full(shape, float(config.lam0), dtype=model.total.dtype, device=device)
    values = torch.as_tensor(merge, dtype=model.total.dtype, device=device)
    if not bool(torch.isfinite(values).all()):
        raise ParameterError("base_merge: coefficients must be finite numbers")
    if list(values.shape) not in ([len(tasks)], [len(tasks), len(model.segments)]):
        raise ParameterError(
            f"base_merge: coefficients have shape {list(values.shape)}, expected [{len(tasks)}] or "
            f"[{len(tasks)}, {len(model.segments)}] (one column per merged parameter)"
        )
    return values


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
