"""The two loops that learn masks: the default one, and the released one with its habits.

Both see the tasks' inputs through one encoder call, write the weights in place, and take Adam steps from gradients in
closed form (`MaskedModel`). What the loops need beforehand (valid ranges, teachers, inverted triggers) is made here too.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merging.learn.dam_config import DamConfig
from merging.learn.inversion import (
    Additive,
    InvertedTrigger,
    Perturbation,
    Placed,
    invert_triggers,
    measured_range,
    place,
    stamped,
)
from merging.learn.masked import Draw, Kind, MaskedModel, MaskLogits
from taskvec.errors import DataError, LearningError, ParameterError
from taskvec.precision import all_finite

Batch = Any
"""One batch of inputs: a tensor, a mapping of tensors (a tokenizer's output), or a tuple whose first entry is one."""
Forward = Callable[[nn.Module, Batch], Tensor]
Head = Callable[[Tensor], Tensor]

_NOT_FINITE = "mask step {step}: the loss is not finite. Lower mask_lr or safety_weight."
_MISFIT = re.compile(r"shape|size|dtype|dimension|channel|type")

# -- inputs ------------------------------------------------------------------------------------------------------------


class Stream:
    """Endless batches of one task: from a tensor (shuffled by the seed), or from a re-iterable of batches, in order.

    After `teach`, `target` holds the teacher's probabilities for the batch that came last.
    """

    def __init__(self, task: str, data: Any, size: int, seed: int, device: torch.device):
        self.task, self.data, self.size, self.device = task, data, size, device
        _check_data(task, data)
        self.generator = torch.Generator().manual_seed(seed % (1 << 63))
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
                raise DataError(f"data[{self.task!r}] is empty. {NO_DATA}")

    def moved(self, batch: Batch) -> Batch:
        batch = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if self.rows is None:
            _check_rows(self.task, batch, "a batch of ")
        if isinstance(batch, Mapping):
            return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        moved: Tensor = batch.to(self.device)
        return moved

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


def _check_data(task: str, data: Any) -> None:
    if isinstance(data, Tensor | Mapping):
        _check_rows(task, data, "")
    elif isinstance(data, str) or not hasattr(data, "__iter__"):
        raise DataError(
            f"data[{task!r}] is a {type(data).__name__}; expected a tensor, a mapping of tensors or batches of these"
        )


def _check_rows(task: str, inputs: Any, part: str) -> None:
    """Whether inputs are numbers, one row for each input."""
    if not isinstance(inputs, Tensor | Mapping):
        raise DataError(f"data[{task!r}] gave a {type(inputs).__name__}; expected a tensor or a mapping of tensors")
    tensors = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    counts = {}
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            if not part:  # rows are picked from all of it
                raise DataError(f"data[{task!r}]: {key} is a {type(value).__name__}, expected a tensor")
            continue
        if value.ndim == 0:
            raise DataError(f"data[{task!r}]: {key} is one number; expected [input, ...]")
        counts[key] = len(value)
        # on a GPU the look itself would make every step wait; the loss says it there
        if value.is_floating_point() and value.device.type == "cpu" and not all_finite(value):
            raise DataError(f"data[{task!r}]: {part}{key} holds NaN or infinity")
    if len(set(counts.values())) > 1:
        raise DataError(f"data[{task!r}]: {part}tensors of different lengths: {counts}")
    if part and not any(counts.values()):
        raise DataError(f"data[{task!r}] gave a batch of no inputs")


def _rows(data: Any, rows: Tensor) -> Any:
    return {key: value[rows] for key, value in data.items()} if isinstance(data, Mapping) else data[rows]


NO_DATA = (
    "Masks are learned from unlabelled in-domain inputs of every task; other images or noise make the result worse, so "
    "nothing is substituted. Without data, merge with method task_arithmetic and a small weight instead."
)


# -- losses ------------------------------------------------------------------------------------------------------------


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


class Trainer:
    """What both loops share: streams, heads, one encoder call for all tasks, the adversaries."""

    def __init__(
        self,
        model: MaskedModel,
        streams: Mapping[str, Stream],
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

    def predicted(self, task: str, batch: Batch) -> Tensor:
        """Logits of one task, where it is not yet known whether encoder, head and inputs fit.

        Raises:
            DataError: they do not.
            LearningError: the predictions are no numbers.
        """
        with fitting(task):
            logits = self.logits([(task, batch)])[0]
        count = len(next(iter(batch.values()))) if isinstance(batch, Mapping) else len(batch)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count or logits.shape[1] < 2:
            found = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise DataError(
                f"task {task!r}: the head gives {found} for {count} inputs; expected logits [{count}, class] of two classes "
                "or more"
            )
        if not all_finite(logits.detach()):
            raise LearningError(
                f"task {task!r}: predictions are NaN or infinite before anything is learned. Do the head, the inputs and the "
                "model hold numbers?"
            )
        return logits

    def try_inputs(self) -> None:
        """One forward pass of each task, before anything is learned.

        Raises:
            DataError: a task has no inputs, or the encoder or its head cannot take them.
        """
        for task, stream in self.streams.items():
            first = next(stream.once(limit=1), None)
            if first is None:
                raise DataError(f"data[{task!r}] is empty. {NO_DATA}")
            with torch.no_grad():
                self.predicted(task, first)

    def batches(self) -> list[tuple[str, Batch]]:
        return [(task, next(stream)) for task, stream in self.streams.items()]

    def batches_with_targets(self) -> tuple[list[tuple[str, Batch]], list[Tensor | None]]:
        batches, targets = [], []
        for task, stream in self.streams.items():
            batches.append((task, next(stream)))
            targets.append(stream.target)
        return batches, targets

    def one_input(self, task: str, batch: Batch) -> Tensor:
        """What a perturbation of all inputs of a task is shaped as: an input, or, of texts of any length, one position."""
        spot = place(self.model.module, batch)
        first = spot.inputs[0].detach()
        return first[:1] if spot.is_text and self.streams[task].rows is None else first

    def perturbed(self, task: str, batch: Batch, step: int) -> Batch:
        spot = place(self.model.module, batch)
        return spot.put(stamped(spot.inputs, self.perturbations[task], step))


@contextmanager
def fitting(task: str) -> Iterator[None]:
    """Around a forward pass: errors that inputs of another kind cause say so.

    Raises:
        DataError: in place of such an error.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        inner = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
        if inner and not (type(error) is RuntimeError and _MISFIT.search(str(error))):
            raise  # not about the inputs: memory, or an error of the model's own
        raise DataError(
            f"task {task!r}: the encoder or its head cannot take these inputs ({type(error).__name__}: {error}). "
            "Do their names, shapes and dtypes fit, and the head's width the features'?"
        ) from error


def _stackable(tensors: Sequence[Tensor]) -> bool:
    return len({(tensor.shape[1:], tensor.dtype) for tensor in tensors}) == 1


def _stackable_mappings(batches: Sequence[Mapping[str, Any]]) -> bool:
    if any(list(batch) != list(batches[0]) for batch in batches):
        return False
    return all(
        all(isinstance(batch[key], Tensor) for batch in batches) and _stackable([batch[key] for batch in batches])
        for key in batches[0]
    )


def train_published(trainer: Trainer, coefficients: Tensor) -> tuple[MaskLogits, Tensor]:
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
        draw = draw_of(config, trainer.seed, step)
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
                deltas[task] = torch.zeros_like(trainer.one_input(task, batch)).requires_grad_()
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
        if not all(map(math.isfinite, losses)):
            raise LearningError(_NOT_FINITE.format(step=step))

    draw = draw_of(config, trainer.seed, config.mask_steps, config.final_mask)
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
    moved = Additive(delta, math.inf)(spot.inputs)
    return spot.put(moved.clamp(0, 1) if clip else moved)


def draw_of(config: DamConfig, seed: int, step: int, kind: Kind = "sample", *, mask: int = 0, masks: int = 1) -> Draw:
    """The draw of one of several masks at a step: each has noise of its own, recorded or made."""
    uniform = None
    if config.noise is not None and kind != "mean":
        uniform = config.noise[step * masks + mask]
    return Draw(kind, seed + mask, step, uniform)


class MaskLoop:
    """The default loop: coefficients, adversary, then M1 (performance) and M2 (safety) one after the other."""

    def __init__(self, trainer: Trainer, coefficients: Tensor):
        config, model = trainer.config, trainer.model
        self.trainer, self.config, self.model = trainer, config, model
        self.learns = config.learns_coefficients
        self.coefficients = coefficients
        self.optimiser: torch.optim.Optimizer | None = None
        self.leaf = nn.Parameter(coefficients.clone())
        if self.learns:
            self.optimiser = torch.optim.Adam([self.leaf], lr=config.coefficient_lr)
        self.first = MaskLogits(model, config.init_logit, temperature=config.temperature, lr=config.mask_lr)
        self.second: MaskLogits | None = None
        self.each: list[MaskLogits] = []
        if config.per_task_masks:
            others = [
                MaskLogits(model, config.init_logit, temperature=config.temperature, lr=config.mask_lr)
                for _ in trainer.tasks[1:]
            ]
            self.each = [self.first, *others]
        self.rest: Tensor | None = None
        if config.is_dual:
            self.second = MaskLogits(
                model,
                config.safety_logit,
                temperature=config.temperature,
                lr=config.mask_lr,
                rescaled=config.rescale_safety,
            )
            self.rest = torch.empty_like(model.total)
        self.masks = self.each or [mask for mask in (self.first, self.second) if mask is not None]
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
        guard = _CollapseGuard(config, trainer.tasks, self.masks)
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
        masks = [(self.first, self.draw(step))]
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
        return self.drawn(self.config.mask_steps, self.config.final_mask)

    def draw(self, step: int, mask: int = 0, kind: Kind = "sample") -> Draw:
        return draw_of(self.config, self.trainer.seed, step, kind, mask=mask, masks=len(self.masks))

    def drawn(self, step: int, kind: Kind = "sample") -> list[tuple[MaskLogits, Draw]]:
        """Every mask with noise of its own: the product of masks that share it is not one of independent masks."""
        return [(mask, self.draw(step, index, kind)) for index, mask in enumerate(self.masks)]

    def mask_steps(self, batches: Any, targets: Any, step: int, record: dict[str, Any]) -> list[Tensor]:
        config, model, trainer = self.config, self.model, self.trainer
        draw = self.draw(step)
        predictions: list[Tensor] = []

        def clean() -> list[Tensor]:
            logits = trainer.logits(batches)
            predictions[:] = [own.detach().softmax(-1) for own in logits]
            return [self.performance(logits, targets)]

        if self.second is None:
            if self.each:
                model.compose_each_(self.drawn(step), self.used())
            else:
                model.compose_((self.first, draw))
            if config.safety == "none":
                record["losses"] = tuple(model.backward(clean))
            else:
                record["losses"] = self._safety_backward(batches, targets, step, predictions)
            if self.each:
                model.step_each_(self.drawn(step), self.used())
            else:
                model.step_(self.first, draw)
            return predictions
        assert self.rest is not None
        # M1: performance, M2 at its mean
        model.weighed_total((self.second, Draw("mean")), out=self.rest)
        model.compose_((self.first, draw), total=self.rest)
        losses = model.backward(clean)
        model.step_(self.first, draw, total=self.rest)
        # M2: safety, M1 at its mean
        other = self.draw(step, 1)
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
                inputs = trainer.one_input(task, batch)
                shape = inputs.shape
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
            raise LearningError(_NOT_FINITE.format(step=step))
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


# -- before training -----------------------------------------------------------------------------------------------------


def prepare(trainer: Trainer, coefficients: Tensor) -> None:
    """Valid range, teachers and inverted triggers: all that is needed of the individual models, before training."""
    config, model = trainer.config, trainer.model
    samples: dict[str, list[Placed]] = {}
    pools: dict[str, list[Batch]] = {}
    needs_inputs = config.safety != "none"
    if needs_inputs:
        with torch.no_grad():
            for task, stream in trainer.streams.items():
                pools[task] = list(stream.once(limit=16))
                samples[task] = [place(model.module, batch) for batch in pools[task]]
        if config.input_range is not None:
            first = next(iter(samples.values()))[0]
            trainer.low, trainer.high = (_broadcast(bound, first, model.device) for bound in config.input_range)
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
                return trainer.predicted(task, batch)

            if config.performance == "teacher":
                trainer.streams[task].teach(predict)
            if inverts:
                _invert(trainer, task, _joined(pools[task], model.module), predict)
    if inverts and not trainer.triggers:
        trainer.warnings.append(
            "no class of any model was suspected, so there was no trigger to train against: the masks are those of "
            "Concrete merging. A lower `flag` or larger `inversion_size` suspects more."
        )
    if needs_inputs:
        for task, functions in config.known_triggers.items():
            trainer.perturbations.setdefault(task, []).extend(_Known(task, function) for function in functions)


def _joined(batches: Sequence[Batch], module: nn.Module) -> Batch:
    """Batches as one: texts padded to the longest of them; of others that differ in shape, those shaped as the first."""
    first = batches[0]
    if isinstance(first, Mapping):
        batches = _padded(batches, int(getattr(getattr(module, "config", None), "pad_token_id", None) or 0))
        first = batches[0]
        alike = [batch for batch in batches if _stackable_mappings([first, batch])]
        return {key: torch.cat([batch[key] for batch in alike]) for key in first}
    return torch.cat([batch for batch in batches if _stackable([first, batch])])


def _padded(batches: Sequence[Mapping[str, Any]], pad: int) -> Sequence[Mapping[str, Any]]:
    """Token batches [input, position] lengthened to the longest; as they are where no mask could hide the padding."""
    flat = all(
        "input_ids" in batch
        and "attention_mask" in batch
        and all(isinstance(v, Tensor) and v.ndim == 2 for v in batch.values())
        for batch in batches
    )
    if not flat:
        return batches
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    return [
        {
            key: F.pad(value, (0, longest - value.shape[1]), value=pad if key == "input_ids" else 0)
            for key, value in batch.items()
        }
        for batch in batches
    ]


def _invert(trainer: Trainer, task: str, pool: Batch, logits: Callable[[Batch], Tensor]) -> None:
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

    def __init__(self, task: str, function: Callable[[Tensor], Tensor]):
        self.task, self.function = task, function

    def __call__(self, inputs: Tensor) -> Tensor:
        changed = self.function(inputs)
        if not isinstance(changed, Tensor) or changed.shape != inputs.shape:
            found = list(changed.shape) if isinstance(changed, Tensor) else f"a {type(changed).__name__}"
            raise DataError(f"known_triggers[{self.task!r}]: gave {found} for inputs {list(inputs.shape)}")
        return changed.to(inputs)

    def project_(self) -> None:
        """Nothing to project."""


def _broadcast(bound: Any, spot: Placed, device: torch.device) -> Tensor:
    values = torch.as_tensor(bound, dtype=torch.float32, device=device)
    shape = spot.inputs.shape[1:]
    channels = shape[-1 if spot.is_text else 0]
    if values.numel() not in (1, channels):
        raise ParameterError(f"input_range: {values.numel()} channels, the inputs have {channels}")
    return values if values.ndim == 0 or spot.is_text else values.view(-1, *[1] * (len(shape) - 1))
