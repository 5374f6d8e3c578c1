"""Defense-aware merging (DAM) and Concrete subspace merging: masks learned without labels.

θ = θ0 + Σ λ_i (τ_i ⊙ M1 ⊙ M2): the task-shared mask M1 is trained for confident predictions on clean inputs, the
backdoor-detection mask M2 for predictions that do not change under perturbations. Papers: arXiv:2410.13910 (DAM),
arXiv:2312.06173 (Concrete). What the released code does instead (one mask, several slips) is kept behind
`compat="published"`.

This lowers the risk that a backdoor of one model survives the merge. It certifies nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merging.learn.inversion import (
    Additive,
    InvertedTrigger,
    Perturbation,
    invert_triggers,
    measured_range,
    place,
    stamped,
)
from merging.learn.masked import Draw, MaskedModel, MaskLogits
from merging.learn.masks import Tensors, Vector
from taskvec.errors import DataError, LearningError, MismatchError, ParameterError, Problems, UsageError, did_you_mean
from taskvec.source import names_matching

Batch = Any
"""One batch of inputs: a tensor, a mapping of tensors (a tokenizer's output), or a tuple whose first entry is one."""
Forward = Callable[[nn.Module, Batch], Tensor]
Head = Callable[[Tensor], Tensor]

_UNSET: Any = object()

_CORRECTED: dict[str, Any] = {
    "masks": "dual",
    "base_merge": "task_arithmetic",
    "mask_lr": 6e-3,
    "mask_steps": 150,
    "safety": "consistency",
    "safety_weight": 1.0,
    "safety_source": "inversion",
    "performance": "teacher",
    "refine_steps": 1,
    "final_mask": "mean",
    "adv_lr": 0.01,
    "coefficient_lr": 1e-3,
    "refit_steps": 0,
    "min_elements": 16,
}
# the released yaml, except that its trigger_norm is read nowhere
_PUBLISHED: dict[str, Any] = {
    "masks": "single",
    "base_merge": "adamerging_task",
    "mask_lr": 1e-3,
    "mask_steps": 1000,
    "safety": "entropy",
    "safety_weight": 0.1,
    "safety_source": "universal",
    "performance": "entropy",
    "refine_steps": 0,
    "final_mask": "sample",
    "adv_lr": 1e-4,
    "coefficient_lr": 1.0,
    "refit_steps": 1000,
    "min_elements": 1,
}


@dataclass(frozen=True, kw_only=True)
class DamConfig:
    """How masks are learned. Defaults are the corrected form; `compat="published"` brings the released code's own.

    Args:
        compat: None, or "published": the released task-wise loop with its three slips (the coefficient loss is taken
            at the last step's coefficients but applied to the initial ones; the coefficient gradient of the mask
            step leaks into the next; perturbed inputs are clamped to [0, 1] in the model's own input space).
        base_merge: "task_arithmetic" (λ = `lam0`, fixed), "adamerging_task" or "adamerging_layer" (λ learned by
            entropy, starting from `lam0`), or coefficients [task] or [task, tensor] to keep fixed.
        lam0: λ of task arithmetic, and where learned coefficients start.
        masks: "dual" (M1 ⊙ M2, as the paper) or "single" (as the released code).
        safety: loss of the safety term: "consistency" (KL from the clean to the perturbed prediction), "entropy" of
            the perturbed prediction, or "none" (Concrete subspace merging).
        safety_weight: weight of the safety loss, ≥ 0 (α in the paper).
        safety_source: what perturbs: "inversion" (triggers found by inversion of each model, see `invert_triggers`),
            "universal" (one untargeted perturbation per task, trained along, as published), "both", or "known".
        known_triggers: task to functions that put a known trigger on a batch's input tensor; used as well as, or with
            safety_source "known" instead of, what is found.
        performance: loss on clean inputs: "entropy" (as published), or "teacher": cross-entropy to the predictions
            of each task's own model on the same unlabelled inputs.
        mask_steps: number of mask steps.
        mask_lr: Adam's step size for the logits.
        temperature: of the relaxation.
        init_logit: initial logits of M1 (0: probability one half).
        safety_logit: initial logits of M2.
        rescale_safety: divide M2 by its mean per tensor, as M1. Without it, M2 can shrink a task vector.
        budget: size of the universal perturbation in the input's own (normalised) units.
        norm: in which the budget is measured: "linf" or "l2".
        adv_lr: Adam's step size for the perturbation.
        adv_steps: perturbation steps per mask step.
        input_range: (low, high) of valid inputs after normalisation, numbers or one per channel; default: measured on
            the adaptation data.
        inversion_steps: optimisation steps of the trigger inversion.
        inversion_size: largest share of the input that an inverted patch may cover, in (0, 1).
        flag: a class is suspected when an inverted patch sends more than this share of inputs to it, in [0, 1].
        restarts: searches from other starting points, of each kind, for a suspected class.
        refine_steps: steps by which two of the inverted triggers, in turn, are adapted to the merged model before each
            mask step. Without it, masks close the holes that were found and leave those beside them.
        refine_lr: Adam's step size for that.
        share_triggers: put each inverted trigger on the inputs of every task, not only of its own.
        final_mask: "mean" (deterministic), "sample" (one relaxed sample) or "bernoulli" (one hard sample).
        coefficient_lr: Adam's step size for learned coefficients.
        clamp_coefficients: clamp λ to [0, 1] in the merge.
        refit_steps: steps that fit learned coefficients again under the final mask.
        refit_lr: Adam's step size for that.
        per_task_masks: one mask per task vector in place of a shared one (memory then grows with the tasks).
        include: shell-style patterns of parameter names to merge (default: all).
        exclude: patterns to leave at the base, for example heads that are not shared.
        min_elements: parameters with fewer elements are merged whole.
        batch_size: inputs of each task per step, where `data` gives tensors and not batches.
        collapse: stop and roll back when the entropy of a task's average prediction falls below this share of where it
            started, in [0, 1); 0 never stops.
        noise: recorded uniform numbers, one mapping per mask step and a last one for the final sample.
        trace: keep every gradient and state in the history (small models only).

    Raises:
        ParameterError: a value out of range; all of them are listed.
    """

    compat: Literal["published"] | None = None
    base_merge: Any = _UNSET
    lam0: float = 0.3
    masks: Literal["dual", "single"] = _UNSET
    safety: Literal["consistency", "entropy", "none"] | None = _UNSET
    safety_weight: float = _UNSET
    safety_source: Literal["universal", "inversion", "both", "known"] = _UNSET
    known_triggers: Mapping[str, Sequence[Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    performance: Literal["entropy", "teacher"] = _UNSET
    mask_steps: int = _UNSET
    mask_lr: float = _UNSET
    temperature: float = 0.5
    init_logit: float = 0.0
    safety_logit: float = 0.0
    rescale_safety: bool = True
    budget: float = 0.33
    norm: Literal["linf", "l2"] = "linf"
    adv_lr: float = _UNSET
    adv_steps: int = 1
    input_range: tuple[Any, Any] | None = None
    inversion_steps: int = 60
    inversion_size: float = 0.03
    flag: float = 0.5
    restarts: int = 4
    refine_steps: int = _UNSET
    refine_lr: float = 0.1
    share_triggers: bool = False
    final_mask: Literal["mean", "sample", "bernoulli"] = _UNSET
    coefficient_lr: float = _UNSET
    clamp_coefficients: bool = False
    refit_steps: int = _UNSET
    refit_lr: float = 1e-3
    per_task_masks: bool = False
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    min_elements: int = _UNSET
    batch_size: int = 16
    collapse: float = 0.5
    noise: Sequence[Tensors] | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        defaults = _PUBLISHED if self.compat == "published" else _CORRECTED
        for name, value in defaults.items():
            if getattr(self, name) is _UNSET:
                object.__setattr__(self, name, value)
        if self.safety is None:
            object.__setattr__(self, "safety", "none")
        self._check()

    def _check(self) -> None:
        problems = Problems()
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if isinstance(value, str) or value is None:
                if value not in choices:
                    problems.add(f"{name}: {value!r} is not one of {', '.join(map(repr, choices))}")
            elif name != "base_merge":
                problems.add(f"{name}: {value!r} is not one of {', '.join(map(repr, choices))}")
        for name in ("mask_lr", "temperature", "adv_lr", "budget", "coefficient_lr", "refit_lr"):
            if not getattr(self, name) > 0:
                problems.add(f"{name}: {getattr(self, name)} is not positive")
        for name in ("mask_steps", "refit_steps", "inversion_steps", "refine_steps", "adv_steps"):
            if getattr(self, name) < 0:
                problems.add(f"{name}: {getattr(self, name)} is negative")
        for name in ("batch_size", "restarts", "min_elements"):
            if getattr(self, name) < 1:
                problems.add(f"{name}: {getattr(self, name)} is less than 1")
        if self.safety_weight < 0:
            problems.add(f"safety_weight: {self.safety_weight} is negative")
        if not 0 < self.inversion_size < 1:
            problems.add(f"inversion_size: {self.inversion_size} is not in (0, 1)")
        if not 0 <= self.flag <= 1:
            problems.add(f"flag: {self.flag} is not in [0, 1]")
        if not 0 <= self.collapse < 1:
            problems.add(f"collapse: {self.collapse} is not in [0, 1)")
        if self.compat == "published":
            for name, needed in (("masks", "single"), ("base_merge", "adamerging_task"), ("performance", "entropy")):
                if getattr(self, name) != needed:
                    problems.add(
                        f"{name}: the published loop has {needed!r} only; leave compat out for {getattr(self, name)!r}"
                    )
            if self.safety_source != "universal" or self.per_task_masks:
                problems.add("the published loop has one universal perturbation per task and one shared mask only")
        if self.safety_source == "known" and not self.known_triggers:
            problems.add("safety_source: 'known' needs known_triggers")
        if self.per_task_masks and self.masks == "dual":
            problems.add("per_task_masks: has one mask per task; set masks='single'")
        if self.noise is not None and len(self.noise) < self.mask_steps + (self.final_mask != "mean"):
            problems.add(
                f"noise: {len(self.noise)} draws recorded, {self.mask_steps} mask steps and the final mask need more"
            )
        problems.raise_if_any(ParameterError)


_CHOICES: dict[str, tuple[Any, ...]] = {
    "compat": (None, "published"),
    "base_merge": ("task_arithmetic", "adamerging_task", "adamerging_layer"),
    "masks": ("dual", "single"),
    "safety": ("consistency", "entropy", "none"),
    "safety_source": ("universal", "inversion", "both", "known"),
    "performance": ("entropy", "teacher"),
    "norm": ("linf", "l2"),
    "final_mask": ("mean", "sample", "bernoulli"),
}


@dataclass
class DamResult:
    """What DAM made, and how.

    `state_dict` is the merged model (every tensor of the base, in its dtype). `masks` holds the final weights of
    M1 ⊙ M2 as they multiplied the task vectors, `probabilities` the masks' probabilities by role. `history` has one
    entry per step.
    """

    state_dict: dict[str, Tensor]
    masks: dict[str, Tensor]
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


# -- inputs ------------------------------------------------------------------------------------------------------------


class _Difference:
    """A fine-tuned model as a task vector, one tensor at a time; the base's tensors are those at the start."""

    def __init__(self, base: Tensors, tuned: Tensors):
        self.base, self.tuned = base, tuned
        self.infos = {name: tensor for name, tensor in tuned.items() if name in base}

    def read(self, name: str) -> Tensor:
        base = self.base[name]
        return self.tuned[name].to(base.device, torch.float32) - base.to(torch.float32)


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


class _Stream:
    """Endless batches of one task: from a tensor (shuffled by the seed), or from a re-iterable of batches, in order.

    After `teach`, `target` holds the teacher's probabilities for the batch that came last.
    """

    def __init__(self, task: str, data: Any, size: int, seed: int, device: torch.device):
        self.task, self.data, self.size, self.device = task, data, size, device
        self.generator = torch.Generator().manual_seed(seed)
        self.iterator = self._batches()
        self.target: Tensor | None = None
        self.taught: Tensor | list[Tensor] | None = None

    @property
    def rows(self) -> int | None:
        """Number of inputs, if the data are one tensor or one mapping of tensors."""
        if isinstance(self.data, Tensor):
            return len(self.data)
        if isinstance(self.data, Mapping):
            return len(next(iter(self.data.values()))) if self.data else 0
        return None

    def _batches(self) -> Iterator[Batch]:
        count = self.rows
        while True:
            any_batch = False
            if count is None:
                for index, batch in enumerate(self.data):
                    any_batch = True
                    if self.taught is not None:
                        self.target = self.taught[index].to(self.device)
                    yield self.moved(batch)
            elif count:
                size = min(self.size, count)
                order = torch.randperm(count, generator=self.generator)
                for start in range(0, count - size + 1, size):
                    any_batch = True
                    rows = order[start : start + size]
                    if isinstance(self.taught, Tensor):
                        self.target = self.taught[rows].to(self.device)
                    yield self.moved(_rows(self.data, rows))
            if not any_batch:
                raise DataError(f"data[{self.task!r}] is empty. {_NO_DATA}")

    def moved(self, batch: Batch) -> Batch:
        batch = batch[0] if isinstance(batch, tuple | list) else batch
        if isinstance(batch, Mapping):
            return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        if not isinstance(batch, Tensor):
            raise DataError(
                f"data[{self.task!r}] gave a {type(batch).__name__}; expected a tensor or a mapping of tensors"
            )
        return batch.to(self.device)

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        """Every batch once, in order, at most `limit` of them; does not disturb the endless iteration."""
        count = self.rows
        if count is None:
            for index, batch in enumerate(self.data):
                if limit is not None and index >= limit:
                    return
                yield self.moved(batch)
        else:
            for start in range(0, count, 64):
                if limit is not None and start >= 64 * limit:
                    return
                yield self.moved(_rows(self.data, torch.arange(start, min(start + 64, count))))

    def teach(self, predict: Callable[[Batch], Tensor]) -> None:
        """Keep a teacher's probabilities for every input; from here on the batches themselves are kept too."""
        if self.rows is None:
            self.data = list(self.data)
        with torch.no_grad():
            shares = [predict(batch).softmax(-1).cpu() for batch in self.once()]
        if shares:
            self.taught = torch.cat(shares) if self.rows is not None else shares

    def __next__(self) -> Batch:
        return next(self.iterator)


def _rows(data: Any, rows: Tensor) -> Any:
    return {key: value[rows] for key, value in data.items()} if isinstance(data, Mapping) else data[rows]


_NO_DATA = (
    "Masks are learned from unlabelled in-domain inputs of every task; other images or noise make the result worse, so "
    "nothing is substituted. Without data, merge with method task_arithmetic and a small weight instead."
)


# -- training ----------------------------------------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the softmax, in nats."""
    logs = F.log_softmax(logits, -1)
    return -(logs.exp() * logs).sum(-1).mean()


def published_entropy(logits: Tensor) -> Tensor:
    """The authors' entropy: −mean Σ p log(p + 1e-8)."""
    shares = logits.softmax(-1)
    return -(shares * torch.log(shares + 1e-8)).sum(-1).mean()


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence from probabilities `target` to the softmax of `logits`."""
    return F.kl_div(F.log_softmax(logits, -1), target, reduction="batchmean")


class _Trainer:
    """What both loops share: streams, heads, one encoder call for all tasks, the adversaries."""

    def __init__(
        self,
        model: MaskedModel,
        streams: Mapping[str, _Stream],
        heads: Mapping[str, Head],
        forward: Forward,
        config: DamConfig,
        seed: int,
    ):
        self.model, self.streams, self.heads, self.forward = model, dict(streams), dict(heads), forward
        self.config, self.seed = config, seed
        self.tasks = list(streams)
        self.history: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.perturbations: dict[str, list[Perturbation]] = {}
        self.triggers: list[InvertedTrigger] = []
        self.scan: dict[str, dict[int, float]] = {}
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    # the encoder sees all tasks at once where their inputs can be stacked: exact without batch statistics
    def logits(self, batches: Sequence[tuple[str, Batch]]) -> list[Tensor]:
        inputs = [batch for _, batch in batches]
        if len(inputs) > 1 and all(isinstance(batch, Tensor) for batch in inputs) and _stackable(inputs):
            features = self.forward(self.model.module, torch.cat(inputs))
            parts = list(features.split([len(batch) for batch in inputs]))
        elif len(inputs) > 1 and all(isinstance(batch, Mapping) for batch in inputs) and _stackable_mappings(inputs):
            joined = {key: torch.cat([batch[key] for batch in inputs]) for key in inputs[0]}
            features = self.forward(self.model.module, joined)
            parts = list(features.split([len(next(iter(batch.values()))) for batch in inputs]))
        else:
            parts = [self.forward(self.model.module, batch) for batch in inputs]
        return [self.heads[task](part) for (task, _), part in zip(batches, parts, strict=True)]

    def batches(self) -> list[tuple[str, Batch]]:
        return [(task, next(stream)) for task, stream in self.streams.items()]

    def batches_with_targets(self) -> tuple[list[tuple[str, Batch]], list[Tensor | None]]:
        batches, targets = [], []
        for task, stream in self.streams.items():
            batches.append((task, next(stream)))
            targets.append(stream.target)
        return batches, targets

    def perturbed(self, task: str, batch: Batch, step: int) -> Batch:
        spot = place(self.model.module, batch)
        return spot.put(stamped(spot.inputs, self.perturbations[task], step))


def _stackable(tensors: Sequence[Tensor]) -> bool:
    return len({(tensor.shape[1:], tensor.dtype) for tensor in tensors}) == 1


def _stackable_mappings(batches: Sequence[Mapping[str, Any]]) -> bool:
    if any(list(batch) != list(batches[0]) for batch in batches):
        return False
    return all(
        all(isinstance(batch[key], Tensor) for batch in batches) and _stackable([batch[key] for batch in batches])
        for key in batches[0]
    )


def _train_published(trainer: _Trainer, coefficients: Tensor) -> tuple[MaskLogits, Tensor]:
    """The released task-wise loop, with the three habits that its recorded runs show."""
    model, config = trainer.model, trainer.config
    mask = MaskLogits(model, config.init_logit, temperature=config.temperature, lr=config.mask_lr)
    initial = coefficients.clone()
    current = nn.Parameter(coefficients.clone())
    inner = torch.optim.Adam([current], lr=config.coefficient_lr)
    stale = torch.zeros_like(initial)
    deltas: dict[str, Tensor] = {}
    adversary: torch.optim.Adam | None = None

    def used() -> Tensor:
        return current.detach().clamp(0, 1) if config.clamp_coefficients else current.detach().clone()

    def coefficient_gradient(draw: Draw) -> Tensor:
        gradient = model.coefficient_gradient(current.detach(), (mask, draw))
        return gradient * ((current >= 0) & (current <= 1)) if config.clamp_coefficients else gradient

    def entropies(batches: Sequence[tuple[str, Batch]]) -> Tensor:
        return torch.stack([published_entropy(logits) for logits in trainer.logits(batches)]).sum()

    for step in range(config.mask_steps):
        draw = _draw(config, trainer.seed, step)
        record: dict[str, Any] = {"step": step}
        # 1: the coefficients. The loss is taken at the last step's, the update starts from the initial ones (habit 1),
        # and the gradient that the last mask step left is still there (habit 2).
        batches = trainer.batches()
        model.sum_(used())
        model.compose_((mask, draw))
        losses = model.backward(lambda batches=batches: [entropies(batches)])
        gradient = coefficient_gradient(draw) + stale
        with torch.no_grad():
            current.copy_(initial)
        current.grad = gradient
        inner.step()
        record["coefficient_gradient"], record["coefficients"] = gradient.clone(), current.detach().clone()
        # 2: the perturbation, unclipped (habit 3)
        batches = trainer.batches()
        model.sum_(used())
        model.compose_((mask, draw))
        if adversary is None:
            for task, batch in batches:
                inputs = place(model.module, batch).inputs
                deltas[task] = torch.zeros_like(inputs[0]).requires_grad_()
                trainer.perturbations[task] = [Additive(deltas[task], config.budget)]
            adversary = torch.optim.Adam(list(deltas.values()), lr=config.adv_lr)
        with torch.no_grad():
            labels = [logits.argmax(-1) for logits in trainer.logits(batches)]
        moved = [(task, _shifted(model.module, batch, deltas[task])) for task, batch in batches]
        loss = -torch.stack(
            [F.cross_entropy(logits, label) for logits, label in zip(trainer.logits(moved), labels, strict=True)]
        ).sum()
        for task, gradient in zip(deltas, torch.autograd.grad(loss, list(deltas.values())), strict=True):
            deltas[task].grad = gradient
        losses.append(float(loss.detach()))
        record["perturbation_gradient"] = {
            task: delta.grad.clone() for task, delta in deltas.items() if delta.grad is not None
        }
        adversary.step()
        record["perturbation"] = {task: delta.detach().clone() for task, delta in deltas.items()}
        # 3: the mask
        batches = trainer.batches()
        moved = [(task, _shifted(model.module, batch, deltas[task].detach(), clip=True)) for task, batch in batches]

        def both(batches: Any = batches, moved: Any = moved) -> list[Tensor]:
            count = len(batches)
            values = [published_entropy(logits) for logits in trainer.logits([*batches, *moved])]
            return [torch.stack(values[:count]).sum() + config.safety_weight * torch.stack(values[count:]).sum()]

        losses += model.backward(both)
        stale = coefficient_gradient(draw)
        if config.trace:
            flat = torch.cat([model.mask_gradient(segment, mask, draw) for segment in model.segments])
            record["mask_gradient"] = model.named(flat)
        model.step_(mask, draw)
        if config.trace:
            record["mask_logits"] = model.named(mask.logits)
        else:
            for key in ("perturbation_gradient", "perturbation"):
                record[key] = {task: float(value.abs().max()) for task, value in record[key].items()}
        record["losses"] = tuple(losses)
        trainer.history.append(record)

    draw = _draw(config, trainer.seed, config.mask_steps, config.final_mask)
    with torch.no_grad():
        current.copy_(initial)
    final = torch.optim.Adam([current], lr=config.refit_lr)
    for step in range(config.refit_steps):
        batches = trainer.batches()
        model.sum_(used())
        model.compose_((mask, draw))
        losses = model.backward(lambda batches=batches: [entropies(batches)])
        current.grad = coefficient_gradient(draw) + stale
        stale = torch.zeros_like(stale)
        final.step()
        trainer.history.append({"refit": step, "losses": tuple(losses), "coefficients": current.detach().clone()})
    return mask, used()


def _shifted(module: nn.Module, batch: Batch, delta: Tensor, *, clip: bool = False) -> Batch:
    spot = place(module, batch)
    moved = spot.inputs + delta
    return spot.put(moved.clamp(0, 1) if clip else moved)


def _draw(config: DamConfig, seed: int, step: int, kind: str = "sample") -> Draw:
    uniform = None
    if config.noise is not None and kind != "mean":
        uniform = config.noise[step]
    return Draw(kind, seed, step, uniform)  # type: ignore[arg-type]


class _Corrected:
    """The default loop: coefficients, adversary, then M1 (performance) and M2 (safety) one after the other."""

    def __init__(self, trainer: _Trainer, coefficients: Tensor):
        config, model = trainer.config, trainer.model
        self.trainer, self.config, self.model = trainer, config, model
        self.learns = config.base_merge in ("adamerging_task", "adamerging_layer")
        self.coefficients = coefficients
        self.optimiser: torch.optim.Optimizer | None = None
        self.leaf = nn.Parameter(coefficients.clone())
        if self.learns:
            self.optimiser = torch.optim.Adam([self.leaf], lr=config.coefficient_lr)
        self.first = MaskLogits(model, config.init_logit, temperature=config.temperature, lr=config.mask_lr)
        self.second: MaskLogits | None = None
        self.rest: Tensor | None = None
        if config.masks == "dual" and config.safety != "none":
            self.second = MaskLogits(
                model,
                config.safety_logit,
                temperature=config.temperature,
                lr=config.mask_lr,
                rescaled=config.rescale_safety,
            )
            self.rest = torch.empty_like(model.total)
        self.low, self.high = trainer.low, trainer.high
        self.adversary: torch.optim.Adam | None = None
        self.refiners: list[torch.optim.Adam] = []

    # -- losses
    def performance(self, logits: Sequence[Tensor], targets: Sequence[Tensor | None]) -> Tensor:
        terms = [
            entropy(own) if target is None else F.cross_entropy(own, target)
            for own, target in zip(logits, targets, strict=True)
        ]
        return torch.stack(terms).sum()

    def safety(self, clean: Sequence[Tensor], moved: Sequence[Tensor]) -> Tensor:
        if self.config.safety == "entropy":
            return torch.stack([entropy(logits) for logits in moved]).sum()
        terms = [divergence(target, logits) for target, logits in zip(clean, moved, strict=True)]
        return torch.stack(terms).sum()

    # -- steps
    def used(self) -> Tensor:
        leaf = self.leaf.detach()
        return leaf.clamp(0, 1) if self.config.clamp_coefficients else leaf

    def run(self) -> None:
        trainer, config, model = self.trainer, self.config, self.model
        model.sum_(self.used())
        guard = _CollapseGuard(config, trainer.tasks, [mask for mask in (self.first, self.second) if mask is not None])
        for step in range(config.mask_steps):
            batches, targets = trainer.batches_with_targets()
            record: dict[str, Any] = {"step": step}
            if self.learns:
                record["coefficient_loss"] = self.coefficient_step(batches, targets, step)
                record["coefficients"] = self.leaf.detach().clone()
            predictions = self.mask_steps(batches, targets, step, record)
            record["prediction_entropy"] = guard.update(predictions)
            trainer.history.append(record)
            stopped = guard.check(step)
            if stopped is not None:
                trainer.warnings.append(stopped)
                break
        if self.learns and config.refit_steps:
            self.refit()
        self.coefficients = self.used().clone()

    def coefficient_step(self, batches: Any, targets: Any, step: int) -> float:
        draw = _draw(self.config, self.trainer.seed, step)
        masks = [(self.first, draw)]
        if self.second is not None:
            masks.append((self.second, Draw("mean")))
        return self._coefficient_step(batches, targets, masks)

    def _coefficient_step(self, batches: Any, targets: Any, masks: Sequence[tuple[MaskLogits, Draw]]) -> float:
        assert self.optimiser is not None
        self.model.compose_(*masks)
        losses = self.model.backward(lambda: [self.performance(self.trainer.logits(batches), targets)])
        gradient = self.model.coefficient_gradient(self.leaf.detach(), *masks)
        if self.config.clamp_coefficients:
            gradient *= (self.leaf >= 0) & (self.leaf <= 1)
        self.leaf.grad = gradient
        self.optimiser.step()
        self.model.sum_(self.used())
        return losses[0]

    def refit(self) -> None:
        assert self.optimiser is not None
        masks = self.final()
        for step in range(self.config.refit_steps):
            batches, targets = self.trainer.batches_with_targets()
            loss = self._coefficient_step(batches, targets, masks)
            self.trainer.history.append(
                {"refit": step, "coefficient_loss": loss, "coefficients": self.leaf.detach().clone()}
            )

    def final(self) -> list[tuple[MaskLogits, Draw]]:
        draw = _draw(self.config, self.trainer.seed, self.config.mask_steps, self.config.final_mask)
        masks = [(self.first, draw)]
        if self.second is not None:
            masks.append((self.second, replace(draw, seed=draw.seed + 1)))
        return masks

    def mask_steps(self, batches: Any, targets: Any, step: int, record: dict[str, Any]) -> list[Tensor]:
        config, model, trainer = self.config, self.model, self.trainer
        draw = _draw(config, trainer.seed, step)
        predictions: list[Tensor] = []

        def clean() -> list[Tensor]:
            logits = trainer.logits(batches)
            predictions[:] = [own.detach().softmax(-1) for own in logits]
            return [self.performance(logits, targets)]

        if self.second is None:
            model.compose_((self.first, draw))
            if config.safety == "none":
                record["losses"] = tuple(model.backward(clean))
            else:
                record["losses"] = self._safety_backward(batches, targets, step, predictions)
            model.step_(self.first, draw)
            return predictions
        assert self.rest is not None
        # M1: performance, M2 at its mean
        model.weighed_total((self.second, Draw("mean")), out=self.rest)
        model.compose_((self.first, draw), total=self.rest)
        losses = model.backward(clean)
        model.step_(self.first, draw, total=self.rest)
        # M2: safety, M1 at its mean
        other = replace(draw, seed=draw.seed + 1)
        model.weighed_total((self.first, Draw("mean")), out=self.rest)
        model.compose_((self.second, other), total=self.rest)
        record["losses"] = (*losses, *self._safety_backward(batches, targets, step, predictions))
        model.step_(self.second, other, total=self.rest)
        return predictions

    def _safety_backward(self, batches: Any, targets: Any, step: int, predictions: list[Tensor]) -> tuple[float, ...]:
        config, model, trainer = self.config, self.model, self.trainer
        with torch.no_grad():
            before = [own.softmax(-1) for own in trainer.logits(batches)]
        self.attack(batches, before, step)
        chosen = [(task, batch) for task, batch in batches if trainer.perturbations.get(task)]
        count = len(batches)

        def both() -> list[Tensor]:
            moved = [(task, trainer.perturbed(task, batch, step)) for task, batch in chosen]
            logits = trainer.logits([*batches, *moved])
            clean = logits[:count]
            predictions[:] = [own.detach().softmax(-1) for own in clean]
            loss = self.performance(clean, targets)
            if moved:
                anchors = {
                    task: (own if target is None else target)
                    for (task, _), own, target in zip(batches, predictions, targets, strict=True)
                }
                loss = loss + config.safety_weight * self.safety([anchors[task] for task, _ in chosen], logits[count:])
            return [loss]

        return tuple(model.backward(both))

    # -- adversaries
    def attack(self, batches: Any, before: Sequence[Tensor], step: int) -> None:
        """Move the perturbations against the model as it is composed now."""
        config, trainer = self.config, self.trainer
        if config.safety_source in ("universal", "both"):
            self._universal(batches, before)
        if config.refine_steps and trainer.triggers:
            self._refine(batches, step)

    def _universal(self, batches: Any, before: Sequence[Tensor]) -> None:
        config, trainer = self.config, self.trainer
        if self.adversary is None:
            self.additive = {}
            for task, batch in batches:
                inputs = place(self.model.module, batch).inputs.detach()
                shape = inputs.shape[1:]
                generator = torch.Generator().manual_seed(trainer.seed)
                # not zero: consistency has gradient zero there
                start = 0.01 * config.budget * torch.randn(shape, generator=generator)
                self.additive[task] = Additive(
                    start.to(inputs).requires_grad_(), config.budget, config.norm, self.low, self.high
                )
                trainer.perturbations.setdefault(task, []).append(self.additive[task])
            self.adversary = torch.optim.Adam([a.delta for a in self.additive.values()], lr=config.adv_lr)
        for _ in range(config.adv_steps):
            moved = []
            for task, batch in batches:
                spot = place(self.model.module, batch)
                moved.append((task, spot.put(self.additive[task](spot.inputs))))
            loss = -torch.stack(
                [divergence(target, logits) for target, logits in zip(before, trainer.logits(moved), strict=True)]
            ).sum()
            deltas = [a.delta for a in self.additive.values()]
            for delta, gradient in zip(deltas, torch.autograd.grad(loss, deltas), strict=True):
                delta.grad = gradient
            self.adversary.step()
            for a in self.additive.values():
                a.project_()

    def _refine(self, batches: Any, step: int) -> None:
        """Adapt two of the inverted triggers, in turn, to the merged model as it stands."""
        trainer = self.trainer
        if not self.refiners:
            for trigger in trainer.triggers:
                for variable in trigger.perturbation.variables:
                    variable.requires_grad_()
                self.refiners.append(torch.optim.Adam(list(trigger.perturbation.variables), lr=self.config.refine_lr))
        inputs = dict(batches)
        count = len(trainer.triggers)
        chosen = sorted({(2 * step) % count, (2 * step + 1) % count})
        for _ in range(self.config.refine_steps):
            moved, targets = [], []
            for index in chosen:
                trigger = trainer.triggers[index]
                spot = place(self.model.module, inputs[trigger.task])
                changed = trigger.perturbation(spot.inputs)
                moved.append((trigger.task, spot.put(changed)))
                targets.append(torch.full((len(changed),), trigger.target, device=changed.device))
            losses = [
                F.cross_entropy(logits, target) for logits, target in zip(trainer.logits(moved), targets, strict=True)
            ]
            variables = [v for index in chosen for v in trainer.triggers[index].perturbation.variables]
            for variable, gradient in zip(
                variables, torch.autograd.grad(torch.stack(losses).sum(), variables), strict=True
            ):
                variable.grad = gradient
            for index in chosen:
                self.refiners[index].step()
                trainer.triggers[index].perturbation.project_()


class _CollapseGuard:
    """Watches each task's average prediction; a model that becomes confident of one class is rolled back."""

    every = 10

    def __init__(self, config: DamConfig, tasks: Sequence[str], masks: Sequence[MaskLogits]):
        self.config, self.tasks, self.masks = config, tasks, masks
        self.average: list[Tensor] | None = None
        self.start: list[float] | None = None
        self.kept: list[Tensor] = [mask.logits.to(torch.float16) for mask in masks]
        self.kept_at = 0
        self.steps = 0

    def update(self, predictions: Sequence[Tensor]) -> dict[str, float]:
        means = [shares.mean(0) for shares in predictions]
        if self.average is None:
            self.average = means
        else:
            self.average = [0.9 * old + 0.1 * new for old, new in zip(self.average, means, strict=True)]
        self.steps += 1
        entropies = [float(-(m * m.clamp_min(1e-12).log()).sum()) for m in self.average]
        if self.steps == self.every:
            self.start = entropies
        self.now = entropies
        return dict(zip(self.tasks, entropies, strict=True))

    def check(self, step: int) -> str | None:
        if not all(math.isfinite(value) for value in self.now):
            raise LearningError(f"mask step {step}: the loss is not finite. Lower mask_lr or safety_weight.")
        if self.start is None or not self.config.collapse or self.steps % self.every:
            return None
        for task, now, start in zip(self.tasks, self.now, self.start, strict=True):
            if now < self.config.collapse * start:
                for mask, kept in zip(self.masks, self.kept, strict=True):
                    mask.logits.copy_(kept)
                return (
                    f"collapse at mask step {step}: the entropy of the average prediction for {task!r} fell from "
                    f"{start:.2f} to {now:.2f} nats; stopped, masks rolled back to step {self.kept_at}. "
                    "Lower safety_weight, budget or mask_lr."
                )
        self.kept = [mask.logits.to(torch.float16) for mask in self.masks]
        self.kept_at = step + 1
        return None


# -- the one call ------------------------------------------------------------------------------------------------------


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
            task: _Stream(task, data[task], config.batch_size, seed * 1009 + index, where)
            for index, task in enumerate(vectors)
        }
        trainer = _Trainer(model, streams, ready, forward, config, seed)
        with evaluating(base, list(ready.values())), model:
            if config.compat == "published":
                mask, coefficients = _train_published(trainer, coefficients)
                model.sum_(coefficients)
                masks = [(mask, _draw(config, seed, config.mask_steps, config.final_mask))]
            else:
                _prepare(trainer, coefficients)
                loop = _Corrected(trainer, coefficients)
                loop.run()
                coefficients, masks = loop.coefficients, loop.final()
            model.compose_(*masks)
            state = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
            weights = {}
            for segment in model.segments:
                value = torch.ones_like(segment.total)
                for own, draw in masks:
                    if segment.masked:
                        value *= own.weights(segment, draw)
                weights[segment.name] = value.view(segment.original.shape)
            roles = ["M1", "M2"] if len(masks) > 1 else ["M"]
            probabilities = {
                role: model.named(torch.sigmoid(own.logits), masked_only=True)
                for role, (own, _) in zip(roles, masks, strict=True)
            }
    return DamResult(
        state,
        weights,
        probabilities,
        coefficients,
        tuple(vectors),
        trainer.history,
        trainer.perturbations,
        trainer.triggers,
        trainer.scan,
        warnings + trainer.warnings,
    )


def _check_inputs(base: Any, models: Mapping[str, Any], data: Any, heads: Mapping[str, Any]) -> None:
    if not isinstance(base, nn.Module):
        raise UsageError(
            f"base: got a {type(base).__name__}; expected the encoder as a torch module with the base's weights"
        )
    if not models:
        raise UsageError("models: none given; expected task to fine-tuned model")
    problems = Problems()
    for task in models:
        if data is None or task not in data or data[task] is None:
            problems.add(f"data: nothing for task {task!r}.{did_you_mean(task, data or {})}")
        if task not in heads:
            problems.add(f"heads: none for task {task!r}.{did_you_mean(task, heads)}")
    if problems:
        raise DataError("\n".join([*problems.found, _NO_DATA]))
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
        else:
            vectors[task] = _SourceDifference(own, model)
        _check_model(task, vectors[task], own, buffers)
    return vectors


class _SourceDifference(_Difference):
    """A checkpoint on disk as a task vector; each tensor is read when it is asked for."""

    def __init__(self, base: Tensors, source: Any):
        self.base, self.source = base, source
        self.infos = {name: info for name, info in source.infos.items() if name in base}

    def read(self, name: str) -> Tensor:
        base = self.base[name]
        return self.source.read(name).to(base.device, torch.float32) - base.to(torch.float32)


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
        return head.to(device)
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


def _initial_coefficients(config: DamConfig, model: MaskedModel, tasks: Sequence[str], device: torch.device) -> Tensor:
    merge = config.base_merge
    if isinstance(merge, str):
        shape = (len(tasks), len(model.segments)) if merge == "adamerging_layer" else (len(tasks),)
        return torch.full(shape, float(config.lam0), device=device)
    values = torch.as_tensor(merge, dtype=torch.float32, device=device)
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
        self.device = torch.device(device) if device is not None else self.before

    def __enter__(self) -> torch.device:
        if self.device != self.before:
            self.module.to(self.device)
        return self.device

    def __exit__(self, *_: object) -> None:
        if self.device != self.before:
            self.module.to(self.before)


class evaluating:
    """Modules in eval mode for the time of a `with` block: no dropout, no batch statistics."""

    def __init__(self, module: nn.Module, heads: Sequence[Any]):
        self.modules = [part for own in (module, *heads) if isinstance(own, nn.Module) for part in own.modules()]

    def __enter__(self) -> None:
        self.modes = [part.training for part in self.modules]
        for part in self.modules:
            part.training = False

    def __exit__(self, *_: object) -> None:
        for part, mode in zip(self.modules, self.modes, strict=True):
            part.training = mode


def _prepare(trainer: _Trainer, coefficients: Tensor) -> None:
    """Valid range, teachers and inverted triggers: all that is needed of the individual models, before training."""
    config, model = trainer.config, trainer.model
    samples: dict[str, list[Tensor]] = {}
    pools: dict[str, list[Batch]] = {}
    needs_inputs = config.safety != "none"
    if needs_inputs:
        with torch.no_grad():
            for task, stream in trainer.streams.items():
                pools[task] = list(stream.once(limit=16))
                samples[task] = [place(model.module, batch).inputs for batch in pools[task]]
        if config.input_range is not None:
            shape = next(iter(samples.values()))[0].shape[1:]
            trainer.low, trainer.high = (_broadcast(bound, shape, model.device) for bound in config.input_range)
        else:
            trainer.low, trainer.high = measured_range(samples)
    inverts = needs_inputs and config.safety_source in ("inversion", "both")
    if config.performance == "teacher" or inverts:
        for index, task in enumerate(trainer.tasks):
            alone = torch.zeros(len(trainer.tasks), device=model.device)
            alone[index] = 1.0
            model.sum_(alone)
            model.compose_()

            def predict(batch: Batch, task: str = task) -> Tensor:
                return trainer.logits([(task, batch)])[0]

            if config.performance == "teacher":
                trainer.streams[task].teach(predict)
            if inverts:
                _invert(trainer, task, _joined(pools[task]), predict)
    if inverts and not trainer.triggers:
        trainer.warnings.append(
            "no class of any model was suspected, so there was no trigger to train against: the masks are those of "
            "Concrete merging. A lower `flag` or larger `inversion_size` suspects more."
        )
    if needs_inputs:
        for task, functions in config.known_triggers.items():
            trainer.perturbations.setdefault(task, []).extend(_Known(function) for function in functions)


def _joined(batches: Sequence[Batch]) -> Batch:
    """Batches as one; of those that differ in shape (padding), the ones shaped as the first."""
    first = batches[0]
    if isinstance(first, Mapping):
        alike = [batch for batch in batches if _stackable_mappings([first, batch])]
        return {key: torch.cat([batch[key] for batch in alike]) for key in first}
    return torch.cat([batch for batch in batches if _stackable([first, batch])])


def _invert(trainer: _Trainer, task: str, pool: Batch, logits: Callable[[Batch], Tensor]) -> None:
    """Scan every class of one model for a small patch that wins it over, and search again where one was found."""
    config = trainer.config
    with torch.no_grad():
        inputs = place(trainer.model.module, pool).inputs
    text = isinstance(pool, Mapping) and "input_ids" in pool

    def predict(changed: Tensor, rows: Tensor) -> Tensor:
        if not isinstance(pool, Mapping):
            return logits(changed)
        spot = place(trainer.model.module, _rows(pool, rows))
        return logits(spot.put(changed))

    assert trainer.low is not None
    assert trainer.high is not None
    for parameter in trainer.model.module.parameters():
        parameter.requires_grad_(False)
    common: dict[str, Any] = {
        "task": task,
        "low": trainer.low,
        "high": trainer.high,
        "budget": config.budget,
        "norm": config.norm,
        "steps": config.inversion_steps,
    }
    size = config.inversion_size
    first: Literal["tokens", "patch"] = "tokens" if text else "patch"
    scan = invert_triggers(predict, inputs, kind=first, size=size, seed=trainer.seed, **common)
    trainer.scan[task] = {trigger.target: trigger.success for trigger in scan}
    flagged = [trigger.target for trigger in scan if trigger.success >= config.flag]
    if flagged:
        goals = flagged * config.restarts
        kinds = ((first, size, 1), (first, 2 * size, 2), *(() if text else (("pattern", size, 3),)))
        for kind, share, seed in kinds:
            trainer.triggers += [
                trigger
                for trigger in invert_triggers(
                    predict,
                    inputs,
                    kind=kind,
                    size=share,
                    targets=goals,
                    seed=trainer.seed + seed,
                    **common,
                )
                if trigger.success >= config.flag
            ]
        found = [trigger.perturbation for trigger in trainer.triggers if trigger.task == task]
        for other in trainer.tasks if config.share_triggers else [task]:
            trainer.perturbations.setdefault(other, []).extend(found)
    for segment in trainer.model.segments:
        segment.parameter.requires_grad_(True)


class _Known:
    """A known trigger as a perturbation without variables."""

    variables: Sequence[Tensor] = ()

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.function(inputs)

    def project_(self) -> None:
        """Nothing to project."""


def _broadcast(bound: Any, shape: torch.Size, device: torch.device) -> Tensor:
    values = torch.as_tensor(bound, dtype=torch.float32, device=device)
    return values if values.ndim == 0 else values.view(-1, *[1] * (len(shape) - 1))
