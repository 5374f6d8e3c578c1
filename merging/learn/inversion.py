"""Perturbations of inputs that a safety mask is trained against, and their search by trigger inversion.

A backdoor is a small change of the input that sends everything to one class. Inversion looks for it: for each candidate
class, a patch or a pattern of bounded size is optimised until it flips clean inputs to that class (the search of Neural
Cleanse, Wang et al. 2019, with a hard size budget in place of a penalty). Nothing here needs labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskvec.errors import DataError

Batch = Any


# -- where a batch can be perturbed ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placed:
    """The tensor of a batch that can be perturbed, and how to put a changed one back.

    `is_text` says that it is embedded text [input, position, width], whose batches may differ in length.
    """

    inputs: Tensor
    put: Callable[[Tensor], Batch]
    is_text: bool = False


def place(module: nn.Module, batch: Batch) -> Placed:
    """The floating tensor of a batch: the batch itself, `pixel_values`, `inputs_embeds`, or the embedded `input_ids`.

    Args:
        module: the encoder; its `get_input_embeddings()` turns token ids into vectors.
        batch: a tensor, or a mapping of tensors.

    Raises:
        DataError: nothing in the batch can be perturbed.
    """
    if isinstance(batch, Tensor):
        if not batch.is_floating_point():
            raise DataError(
                f"inputs are {batch.dtype}; perturbations need floating inputs, or a mapping with input_ids"
            )
        return Placed(batch, lambda inputs: inputs)
    for key in ("pixel_values", "inputs_embeds"):
        if key in batch:
            put = lambda inputs, key=key: {**batch, key: inputs}  # noqa: E731
            return Placed(batch[key], put, is_text=key == "inputs_embeds")
    if "input_ids" in batch and hasattr(module, "get_input_embeddings"):
        table: Any = module.get_input_embeddings
        embedded = table()(batch["input_ids"])
        rest = {key: value for key, value in batch.items() if key != "input_ids"}
        return Placed(embedded, lambda inputs: {**rest, "inputs_embeds": inputs}, is_text=True)
    floating = [key for key, value in batch.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if len(floating) == 1:
        return Placed(batch[floating[0]], lambda inputs: {**batch, floating[0]: inputs})
    raise DataError(
        f"batch with {', '.join(map(str, batch))}: no pixel_values, inputs_embeds or input_ids, and not exactly one "
        "floating tensor, so there is nothing to perturb. Set safety='none', or give one of these."
    )


def clipped(inputs: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """`inputs` limited to the valid range, where there is one."""
    return inputs if low is None or high is None else torch.maximum(torch.minimum(inputs, high), low)


# -- perturbations -----------------------------------------------------------------------------------------------------


@runtime_checkable
class Perturbation(Protocol):
    """A change of inputs with numbers that can be optimised."""

    @property
    def variables(self) -> Sequence[Tensor]: ...
    def __call__(self, inputs: Tensor) -> Tensor: ...
    def project_(self) -> None:
        """Bring the variables back into the budget."""
        ...


class Additive:
    """x + δ, clipped to the valid range; δ within a norm budget, broadcast over the batch.

    Args:
        delta: δ; its leading dimensions may be missing or 1.
        budget: largest norm, in the inputs' own units.
        norm: "linf", or "l2" over the whole of δ.
        low: lowest valid input, broadcastable, or None.
        high: highest valid input.
    """

    def __init__(
        self,
        delta: Tensor,
        budget: float,
        norm: Literal["linf", "l2"] = "linf",
        low: Tensor | None = None,
        high: Tensor | None = None,
    ):
        self.delta, self.budget, self.norm, self.low, self.high = delta, budget, norm, low, high

    @property
    def variables(self) -> Sequence[Tensor]:
        return (self.delta,)

    def __call__(self, inputs: Tensor) -> Tensor:
        _check_fits(self.delta, inputs)
        return clipped(inputs + self.delta, self.low, self.high)

    @torch.no_grad()
    def project_(self) -> None:
        if self.norm == "linf":
            self.delta.clamp_(-self.budget, self.budget)
        else:
            size = self.delta.norm()
            self.delta.mul_(torch.clamp(self.budget / size.clamp_min(1e-12), max=1.0))


class Stamp:
    """(1 − w) ⊙ x + w ⊙ p: a pattern p laid over the input with weights w in [0, 1], Σ w within a size budget.

    Args:
        weight: logits of w, [1, *space] (one weight for all channels).
        pattern: logits of p between `low` and `high`, [channel, *space].
        size: largest mean of w, in (0, 1).
        low: lowest valid input.
        high: highest valid input.
    """

    def __init__(self, weight: Tensor, pattern: Tensor, size: float, low: Tensor, high: Tensor):
        self.weight, self.pattern, self.size, self.low, self.high = weight, pattern, size, low, high

    @property
    def variables(self) -> Sequence[Tensor]:
        return (self.weight, self.pattern)

    def __call__(self, inputs: Tensor) -> Tensor:
        _check_fits(self.pattern, inputs)
        share = torch.sigmoid(self.weight)
        share = share * torch.clamp(self.size / share.mean(tuple(range(-inputs.ndim + 1, 0)), keepdim=True), max=1.0)
        pattern = self.low + (self.high - self.low) * torch.sigmoid(self.pattern)
        return (1 - share) * inputs + share * pattern

    def project_(self) -> None:
        """The budget is part of the formula."""


def _check_fits(pattern: Tensor, inputs: Tensor) -> None:
    """Whether a pattern can be laid over every input.

    Raises:
        DataError: their shapes differ, as with images of several sizes.
    """
    here, there = pattern.shape[::-1], inputs.shape[:0:-1]
    if any(one not in (1, other) for one, other in zip(here, there, strict=False)):
        raise DataError(
            f"inputs of shape {list(inputs.shape[1:])} where earlier ones of the task made a perturbation "
            f"{list(pattern.shape)}; images and other inputs must have one shape within a task"
        )


class SoftTokens:
    """Vectors written over the first positions after the first token of embedded text [position, width].

    Of a text with fewer positions, only those that there are.

    Args:
        vectors: [token, width].
        budget: longest vector, in the embeddings' own norm.
    """

    def __init__(self, vectors: Tensor, budget: float):
        self.vectors, self.budget = vectors, budget

    @property
    def variables(self) -> Sequence[Tensor]:
        return (self.vectors,)

    def __call__(self, inputs: Tensor) -> Tensor:
        count = min(self.vectors.shape[-2], inputs.shape[-2] - 1)
        vectors = self.vectors[..., :count, :]
        # inputs may have a leading axis of one search each
        shape = torch.broadcast_shapes(inputs[..., 1 : 1 + count, :].shape, vectors.shape)
        rest = inputs.expand(*shape[:-2], *inputs.shape[-2:])
        return torch.cat([rest[..., :1, :], vectors.expand(shape), rest[..., 1 + count :, :]], -2)

    @torch.no_grad()
    def project_(self) -> None:
        size = self.vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        self.vectors.mul_(torch.clamp(self.budget / size, max=1.0))


# -- inversion ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InvertedTrigger:
    """A perturbation that sends clean inputs to one class.

    `success` is the share of inputs not predicted as `target` that become it, on inputs not used in the search.
    """

    task: str
    target: int
    kind: str
    success: float
    perturbation: Perturbation


def invert_triggers(
    predict: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    *,
    task: str,
    kind: Literal["patch", "pattern", "tokens"],
    low: Tensor,
    high: Tensor,
    targets: Sequence[int] | None = None,
    size: float = 0.03,
    budget: float = 0.33,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 60,
    lr: float = 0.1,
    batch: int = 16,
    seed: int = 0,
) -> list[InvertedTrigger]:
    """For each target class, the perturbation of bounded size that best sends inputs to it; all are searched at once.

    Args:
        predict: (inputs, rows they come from) to logits [input, class], weights fixed.
        inputs: clean inputs [input, *shape]; the last fifth measures success only.
        task: for the record.
        kind: "patch" (a `Stamp` of mean weight `size`), "pattern" (an `Additive` of norm `budget`), or for embedded
            text "tokens" (`SoftTokens`, a share `size` of the positions, at least one).
        low: lowest valid input, broadcastable to one input.
        high: highest valid input.
        targets: classes to search for; one may stand several times, each search starts elsewhere. Default: all.
        size: budget of a patch.
        budget: budget of a pattern.
        norm: of the pattern.
        steps: Adam steps.
        lr: Adam's step size, for a patch's logits; for a pattern in shares of its budget.
        batch: clean inputs per step.
        seed: of the choice of inputs and starting points.

    Returns:
        One trigger per target, in the order of the targets.
    """
    generator = torch.Generator().manual_seed(seed)
    held = max(1, len(inputs) // 5)
    last = torch.arange(len(inputs) - held, len(inputs), device=inputs.device)
    shape = inputs.shape[1:]
    with torch.no_grad():
        clean = predict(inputs[last], last)
    goals = list(range(clean.shape[-1])) if targets is None else list(targets)
    clean = clean.argmax(-1)
    everything: Perturbation
    if kind == "patch":
        spread = torch.randn((len(goals), 1, 1, *shape[1:]), generator=generator)
        everything = Stamp(
            (spread - 1).to(inputs).requires_grad_(),
            (0.5 * torch.randn((len(goals), 1, *shape), generator=generator)).to(inputs).requires_grad_(),
            size,
            low,
            high,
        )
        rate = lr
    elif kind == "tokens":
        count = max(1, round(size * shape[0]))
        # no longer than a real token's vector, or the search leaves the space of text
        longest = float(inputs.norm(dim=-1).quantile(0.9))
        start = torch.randn((len(goals), 1, count, shape[-1]), generator=generator).to(inputs)
        start = start / start.norm(dim=-1, keepdim=True) * longest
        everything = SoftTokens(start.requires_grad_(), longest)
        rate = lr * longest / shape[-1] ** 0.5
    else:
        noise = 0.3 * budget * torch.randn((len(goals), 1, *shape), generator=generator)
        everything = Additive(noise.to(inputs).requires_grad_(), budget, norm, low, high)
        rate = lr * (budget if norm == "linf" else budget / shape.numel() ** 0.5)
    optimiser = torch.optim.Adam(list(everything.variables), lr=rate)
    wanted = torch.tensor(goals, device=inputs.device)
    for _ in range(steps):
        rows = torch.randint(max(1, len(inputs) - held), (batch,), generator=generator).to(inputs.device)
        logits = predict(everything(inputs[rows].unsqueeze(0)).flatten(0, 1), rows.repeat(len(goals)))
        # a sum, so that the searches do not share one gradient scale
        loss = F.cross_entropy(logits, wanted.repeat_interleave(batch)) * len(goals)
        gradients = torch.autograd.grad(loss, list(everything.variables))
        for variable, gradient in zip(everything.variables, gradients, strict=True):
            variable.grad = gradient
        optimiser.step()
        _project_each(everything)
    found = []
    with torch.no_grad():
        for index, target in enumerate(goals):
            single = _single(everything, index)
            others = clean != target
            flipped = predict(single(inputs[last]), last).argmax(-1) == target
            success = float(flipped[others].float().mean()) if bool(others.any()) else 0.0
            found.append(InvertedTrigger(task, target, kind, success, single))
    return found


@torch.no_grad()
def _project_each(everything: Perturbation) -> None:
    if isinstance(everything, Additive) and everything.norm == "l2":
        size = everything.delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        scale = torch.clamp(everything.budget / size, max=1.0)
        everything.delta.mul_(scale.view(-1, *[1] * (everything.delta.ndim - 1)))
    else:
        everything.project_()


def _single(everything: Perturbation, index: int) -> Perturbation:
    if isinstance(everything, Stamp):
        weight, pattern = (v.detach()[index, 0].clone() for v in everything.variables)
        return Stamp(weight, pattern, everything.size, everything.low, everything.high)
    if isinstance(everything, SoftTokens):
        return SoftTokens(everything.vectors.detach()[index, 0].clone(), everything.budget)
    assert isinstance(everything, Additive)
    delta = everything.delta.detach()[index, 0].clone()
    return Additive(delta, everything.budget, everything.norm, everything.low, everything.high)


def stamped(inputs: Tensor, perturbations: Sequence[Perturbation], offset: int = 0) -> Tensor:
    """Each input under one of the perturbations, in turn.

    Args:
        inputs: [input, *shape].
        perturbations: at least one.
        offset: which comes first.
    """
    count = len(perturbations)
    groups = [[row for row in range(len(inputs)) if (row + offset) % count == k] for k in range(count)]
    result = inputs.clone()
    for perturbation, rows in zip(perturbations, groups, strict=True):
        if rows:
            result = result.index_copy(0, torch.tensor(rows, device=inputs.device), perturbation(inputs[rows]))
    return result


def measured_range(batches: Mapping[str, Sequence[Placed]]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel over all inputs, shaped to broadcast over one input.

    The channels are those of images [input, channel, *space]; of embedded text, the entries of a vector.

    Raises:
        DataError: the inputs have different numbers of channels.
    """
    lows, highs = [], []
    for several in batches.values():
        for spot in several:
            tensor, channel = spot.inputs, 2 if spot.is_text else 1
            axes = (
                tuple(axis for axis in range(tensor.ndim) if axis != channel)
                if tensor.ndim > 2
                else tuple(range(tensor.ndim))
            )
            keep = tensor.ndim > 2
            lows.append(tensor.amin(axes, keepdim=keep)[0] if keep else tensor.amin())
            highs.append(tensor.amax(axes, keepdim=keep)[0] if keep else tensor.amax())
    if len({low.shape for low in lows}) > 1:
        raise DataError(
            f"inputs have different channels {sorted({low.numel() for low in lows})}; give `input_range` as two numbers "
            "that hold for all of them"
        )
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)
