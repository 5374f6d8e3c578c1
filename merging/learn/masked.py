"""Training a mask inside a module: weights written in place, gradients pulled back in closed form.

θ = θ0 + m ⊙ T is written into the module's own parameters; ordinary forward and backward passes follow; the gradient
left on each parameter is turned into the logits' gradient and an Adam step, tensor by tensor. No autograd graph runs
through the merge, and no noise is stored. With fixed coefficients T is constant, so the training holds seven copies of
the parameters (θ0, T, θ, its gradient, the logits, Adam's two moments) whatever the number of task vectors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from merging.learn.masks import (
    Tensors,
    Vector,
    delta,
    noise_key,
    relaxed,
    relaxed_slope,
    rescale_gradient,
    uniform_noise,
    vector_names,
)
from taskvec.errors import LearningError, MismatchError, Problems, did_you_mean
from taskvec.precision import compute_dtype, is_float

Kind = Literal["sample", "mean", "bernoulli"]


@dataclass(frozen=True, slots=True)
class Draw:
    """Which mask to use: its probabilities, a relaxed sample or a hard one, and the noise behind it.

    `uniform` is recorded noise (name to numbers in [0, 1]); without it, noise is made from (`seed`, `step`, name).
    """

    kind: Kind = "mean"
    seed: int = 0
    step: int = 0
    uniform: Tensors | None = None

    def noise(self, segment: "Segment") -> Tensor:
        if self.uniform is not None:
            return self.uniform[segment.name].reshape(-1).to(segment.total)
        return uniform_noise(noise_key(self.seed, self.step, segment.name), 0, segment.numel, segment.total.device)


@dataclass(slots=True)
class Segment:
    """One parameter of the module: where it lies in the flat buffers, and what it was."""

    name: str
    parameter: nn.Parameter
    original: Tensor
    start: int
    stop: int
    theta: Tensor
    gradient: Tensor
    total: Tensor
    masked: bool

    @property
    def numel(self) -> int:
        return self.stop - self.start


class MaskLogits:
    """Flat logits of one mask with Adam's state.

    Args:
        model: whose parameters the mask weighs.
        logit: initial value everywhere.
        temperature: of the relaxation.
        lr: Adam's step size.
        rescaled: divide each tensor's mask by its own mean (so that its mean is 1). Without it the mask is at most 1
            and can also shrink a task vector.
    """

    betas = (0.9, 0.999)
    eps = 1e-8

    def __init__(
        self, model: "MaskedModel", logit: float, *, temperature: float, lr: float, rescaled: bool = True
    ) -> None:
        self.logits = torch.full_like(model.total, float(logit))
        self.first = torch.zeros_like(self.logits)
        self.second = torch.zeros_like(self.logits)
        self.temperature, self.lr, self.rescaled, self.steps = temperature, lr, rescaled, 0

    def values(self, segment: Segment, draw: Draw) -> tuple[Tensor, Tensor]:
        """The raw mask s of one tensor and what it is divided by (a 0-dimensional tensor)."""
        logits = self.logits[segment.start : segment.stop]
        if draw.kind == "mean":
            raw = torch.sigmoid(logits)
        elif draw.kind == "sample":
            raw = relaxed(logits, draw.noise(segment), self.temperature)
        else:
            raw = (draw.noise(segment) < torch.sigmoid(logits)).to(logits.dtype)
        if not self.rescaled:
            return raw, raw.new_ones(())
        mean = raw.mean()
        # a hard mask may come out zero everywhere; the authors' code then divides by zero
        return raw, torch.where(mean > 0, mean, torch.ones_like(mean))

    def weights(self, segment: Segment, draw: Draw) -> Tensor:
        """The mask of one tensor as it multiplies the task vector."""
        raw, scale = self.values(segment, draw)
        return raw.div_(scale)

    def gradient(self, segment: Segment, cotangent: Tensor, draw: Draw) -> Tensor:
        """∂L/∂ℓ of one tensor, from ∂L/∂m."""
        logits = self.logits[segment.start : segment.stop]
        raw, _ = self.values(segment, draw)
        upstream = rescale_gradient(cotangent, raw) if self.rescaled else cotangent
        if draw.kind == "mean":
            return upstream * raw * (1 - raw)
        return upstream * relaxed_slope(logits, raw, self.temperature)

    def adam_(self, segment: Segment, gradient: Tensor) -> None:
        """One Adam update of one tensor's logits; `steps` must have been counted up for this step."""
        low, high = self.betas
        part = slice(segment.start, segment.stop)
        first = self.first[part].lerp_(gradient, 1 - low)
        second = self.second[part].mul_(high).addcmul_(gradient, gradient, value=1 - high)
        scale = second.sqrt().div_((1 - high**self.steps) ** 0.5).add_(self.eps)
        self.logits[part].addcdiv_(first, scale, value=-self.lr / (1 - low**self.steps))


class MaskedModel:
    """A module whose parameters are θ0 plus a weighted sum of task vectors times masks, for the time of a `with` block.

    Args:
        module: the base; its parameters hold θ0 and get it back, the very same tensors, when the block is left.
        vectors: task vectors in task order.
        names: which parameters to merge (default: all floating ones that a task vector changes).
        min_elements: parameters smaller than this are merged whole, without a mask.
        kernels: use the fused GPU kernels where they apply, never, or also without a GPU (Triton's interpreter).

    Raises:
        MismatchError: names or shapes that do not fit.
        LearningError: a parameter and its task vectors cannot be merged in place.
    """

    def __init__(
        self,
        module: nn.Module,
        vectors: Mapping[str, Vector],
        *,
        names: Sequence[str] | None = None,
        min_elements: int = 1,
        kernels: Literal["auto", "never", "always"] = "auto",
    ) -> None:
        self.module, self.vectors = module, dict(vectors)
        parameters = dict(module.named_parameters())
        chosen = self._names(parameters, names)
        if not chosen:
            raise MismatchError(["no parameter of the base is changed by any task vector; there is nothing to mask"])
        self.device = parameters[chosen[0]].device
        elsewhere = [name for name in chosen if parameters[name].device != self.device]
        if elsewhere:
            raise LearningError(f"{elsewhere[0]} is on {parameters[elsewhere[0]].device}, others on {self.device}")
        self.numel = sum(parameters[name].numel() for name in chosen)
        dtype = compute_dtype(*(parameters[name].dtype for name in chosen))
        self.total = torch.zeros(self.numel, dtype=dtype, device=self.device)
        flat: dict[torch.dtype, list[str]] = {}
        for name in chosen:
            flat.setdefault(parameters[name].dtype, []).append(name)
        self._one_buffer = len(flat) == 1
        pieces: dict[str, tuple[Tensor, Tensor]] = {}
        for dtype, members in flat.items():
            sizes = [parameters[name].numel() for name in members]
            theta = torch.empty(sum(sizes), dtype=dtype, device=self.device)
            gradient = torch.zeros_like(theta)
            self._flat = (theta, gradient)
            pieces.update(zip(members, zip(theta.split(sizes), gradient.split(sizes), strict=True), strict=True))
        self.segments: list[Segment] = []
        start = 0
        for name in chosen:
            parameter = parameters[name]
            stop = start + parameter.numel()
            theta, gradient = pieces[name]
            self.segments.append(
                Segment(
                    name,
                    parameter,
                    parameter.data,
                    start,
                    stop,
                    theta,
                    gradient,
                    self.total[start:stop],
                    parameter.numel() >= min_elements,
                )
            )
            start = stop
        self._frozen: list[tuple[nn.Parameter, bool, Tensor | None]] = []
        self.kernels = self._kernels(kernels)
        self._means: tuple[MaskLogits, Draw, Tensor] | None = None

    def _kernels(self, wanted: Literal["auto", "never", "always"]) -> Any:
        """The fused kernels, where they apply: one float32 buffer on a GPU, every parameter masked."""
        fits = all(s.masked and s.original.dtype == torch.float32 and s.original.is_contiguous() for s in self.segments)
        there = find_spec("triton") is not None and (self.device.type == "cuda" or wanted == "always")
        if wanted == "never" or not (fits and there):
            return None
        from merging.learn.mask_kernels import MaskKernels

        return MaskKernels([s.numel for s in self.segments], [s.original for s in self.segments], self.device)

    def _keys(self, draw: Draw) -> Tensor:
        keys = [noise_key(draw.seed, draw.step, segment.name) for segment in self.segments]
        return torch.tensor(keys, dtype=torch.int32).to(self.device, non_blocking=True)

    def _names(self, parameters: Mapping[str, nn.Parameter], names: Sequence[str] | None) -> list[str]:
        problems = Problems()
        present = {name for vector in self.vectors.values() for name in vector_names(vector)}
        known = dict(self.module.named_parameters(remove_duplicate=False)) | dict(self.module.named_buffers())
        for task, vector in self.vectors.items():
            for name in vector_names(vector):
                if name not in known:
                    problems.add(f"{name}: in task vector {task!r}, not in the base.{did_you_mean(name, known)}")
                    continue
                found = vector[name].shape if isinstance(vector, Mapping) else vector.infos[name].shape
                if tuple(found) != tuple(known[name].shape):
                    problems.add(f"{name}: task {task!r} has {list(found)}, the base has {list(known[name].shape)}")
        problems.raise_if_any(MismatchError)
        wanted = set(parameters) if names is None else set(names)
        return [name for name, p in parameters.items() if name in wanted and name in present and is_float(p.dtype)]

    def __enter__(self) -> Self:
        for parameter in self.module.parameters():
            self._frozen.append((parameter, parameter.requires_grad, parameter.grad))
            parameter.grad = None
            parameter.requires_grad_(False)
        for segment in self.segments:
            segment.parameter.data = segment.theta.view(segment.original.shape)
            segment.parameter.requires_grad_(True)
            segment.theta.copy_(segment.original.reshape(-1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for segment in self.segments:
            segment.parameter.data = segment.original
        for parameter, requires_grad, gradient in self._frozen:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        self._frozen.clear()

    @torch.no_grad()
    def sum_(self, coefficients: Tensor) -> None:
        """T = Σ λ_i τ_i, one sweep over the task vectors.

        Args:
            coefficients: [task] or [task, segment].
        """
        for column, segment in enumerate(self.segments):
            segment.total.zero_()
            for index, vector in enumerate(self.vectors.values()):
                found = delta(vector, segment.name)
                if found is None:
                    continue
                weight = coefficients[index] if coefficients.ndim == 1 else coefficients[index, column]
                # the coefficient stays on its device, so that no step waits for a copy to the host
                segment.total += found.to(segment.total).reshape(-1) * weight

    @torch.no_grad()
    def compose_(self, *masks: tuple[MaskLogits, Draw], total: Tensor | None = None) -> None:
        """Write θ0 + m ⊙ T into the module, m the product of the masks given (none: the plain merge).

        Args:
            masks: each with the draw to use.
            total: T if it is not the model's own, flat.
        """
        self._means = None
        if self.kernels is not None and len(masks) == 1 and self._fused(*masks[0]):
            mask, draw = masks[0]
            theta = self._flat[0]
            means = self.kernels.compose_(
                mask.logits, self._keys(draw), self.total if total is None else total, theta, mask.temperature
            )
            self._means = (mask, draw, means)
            return
        for segment in self.segments:
            source = segment.total if total is None else total[segment.start : segment.stop]
            if not masks or not segment.masked:
                weighed = source
            else:
                weighed = masks[0][0].weights(segment, masks[0][1])
                for mask, draw in masks[1:]:
                    weighed *= mask.weights(segment, draw)
                weighed *= source
            segment.theta.copy_(segment.original.reshape(-1) + weighed)

    def backward(self, losses: Callable[[], Iterator[Tensor]] | Callable[[], Sequence[Tensor]]) -> list[float]:
        """Run forward and backward passes; leaves ∂L/∂θ of the sum of the losses in the segments.

        Args:
            losses: yields scalar losses one after the other, so that each graph is freed before the next is built.
        """
        for segment in self.segments:
            if not self._one_buffer:
                segment.gradient.zero_()
            segment.parameter.grad = segment.gradient.view(segment.original.shape)
        if self._one_buffer:
            self._flat[1].zero_()
        values: list[Tensor] = []
        try:
            for loss in losses():
                loss.backward()
                values.append(loss.detach())
        finally:
            for segment in self.segments:
                segment.parameter.grad = None
        return [float(value) for value in values]

    @torch.no_grad()
    def step_(self, mask: MaskLogits, draw: Draw, *, total: Tensor | None = None) -> None:
        """One Adam step of a mask, from the gradients that `backward` left.

        Args:
            mask: the mask to move.
            draw: the draw with which the model was composed.
            total: what the mask multiplied, flat, if not the model's own T.
        """
        mask.steps += 1
        if self._means is not None and self._means[:2] == (mask, draw):
            source = self.total if total is None else total
            moments = (mask.logits, mask.first, mask.second)
            numbers = (mask.temperature, mask.lr, mask.steps)
            self.kernels.step_(*moments, self._keys(draw), self._means[2], source, self._flat[1], *numbers)
            self._means = None
            return
        for segment in self.segments:
            if segment.masked:
                mask.adam_(segment, self.mask_gradient(segment, mask, draw, total))

    @torch.no_grad()
    def compose_each_(self, masks: Sequence[tuple[MaskLogits, Draw]], coefficients: Tensor) -> None:
        """Write θ0 + Σ λ_i m_i ⊙ τ_i, one mask per task vector; every task vector is read once.

        Args:
            masks: one per task, with the draw to use.
            coefficients: λ, [task] or [task, segment].
        """
        self._means = None
        for column, segment in enumerate(self.segments):
            merged = segment.original.reshape(-1).to(segment.total, copy=True)
            for index, (mask, draw) in enumerate(masks):
                term = self._term(segment, column, index, coefficients)
                if term is not None:
                    merged += term * mask.weights(segment, draw) if segment.masked else term
            segment.theta.copy_(merged)

    @torch.no_grad()
    def step_each_(self, masks: Sequence[tuple[MaskLogits, Draw]], coefficients: Tensor) -> None:
        """One Adam step of every task's mask, from the gradients that `backward` left."""
        for index, (mask, draw) in enumerate(masks):
            mask.steps += 1
            for column, segment in enumerate(self.segments):
                term = self._term(segment, column, index, coefficients) if segment.masked else None
                if term is not None:
                    mask.adam_(segment, mask.gradient(segment, segment.gradient * term, draw))

    def _term(self, segment: Segment, column: int, index: int, coefficients: Tensor) -> Tensor | None:
        """λ_i τ_i of one segment, flat."""
        found = delta(list(self.vectors.values())[index], segment.name)
        if found is None:
            return None
        weight = coefficients[index] if coefficients.ndim == 1 else coefficients[index, column]
        return found.to(segment.total).reshape(-1) * weight

    @staticmethod
    def _fused(mask: MaskLogits, draw: Draw) -> bool:
        return mask.rescaled and draw.kind == "sample" and draw.uniform is None

    def mask_gradient(self, segment: Segment, mask: MaskLogits, draw: Draw, total: Tensor | None = None) -> Tensor:
        """∂L/∂ℓ of one segment from its ∂L/∂θ."""
        source = segment.total if total is None else total[segment.start : segment.stop]
        return mask.gradient(segment, segment.gradient * source, draw)

    @torch.no_grad()
    def coefficient_gradient(self, coefficients: Tensor, *masks: tuple[MaskLogits, Draw]) -> Tensor:
        """∂L/∂λ = ⟨g ⊙ m, τ_i⟩, shaped as the coefficients."""
        gradient = torch.zeros_like(coefficients)
        for column, segment in enumerate(self.segments):
            upstream = segment.gradient.to(segment.total, copy=True)
            for mask, draw in masks:
                if segment.masked:
                    upstream *= mask.weights(segment, draw)
            for index, vector in enumerate(self.vectors.values()):
                found = delta(vector, segment.name)
                if found is None:
                    continue
                share = upstream @ found.to(upstream).reshape(-1)
                if gradient.ndim == 1:
                    gradient[index] += share
                else:
                    gradient[index, column] = share
        return gradient

    @torch.no_grad()
    def weighed_total(self, *masks: tuple[MaskLogits, Draw], out: Tensor | None = None) -> Tensor:
        """M ⊙ T, flat: what the next mask multiplies when these are held fixed."""
        out = torch.empty_like(self.total) if out is None else out
        for segment in self.segments:
            part = out[segment.start : segment.stop].copy_(segment.total)
            for mask, draw in masks:
                if segment.masked:
                    part *= mask.weights(segment, draw)
        return out

    def named(self, flat: Tensor, *, masked_only: bool = False) -> dict[str, Tensor]:
        """A flat tensor cut into the parameters' shapes (copies)."""
        return {
            segment.name: flat[segment.start : segment.stop].view(segment.original.shape).clone()
            for segment in self.segments
            if segment.masked or not masked_only
        }
