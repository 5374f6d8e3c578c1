"""Concrete masks over task vectors: sampling, rescaling, merging, and their gradients in closed form.

A mask weighs every element of a task vector: θ = θ0 + m ⊙ Σ λ_i τ_i. It is learned through logits ℓ by the binary
concrete relaxation s = σ((ℓ + log u − log(1 − u)) / temperature), u uniform, and each tensor of a sample is divided by
its own mean, so that a mask redistributes a task vector inside each tensor and never shrinks it. Concrete subspace
merging (arXiv:2312.06173) and DAM (arXiv:2410.13910) both train such masks.

Everything here also runs under autograd when the logits, coefficients or masks require gradients; training does not use
that, since the gradients are known: for g = ∂L/∂θ and T = Σ λ_i τ_i, with n elements and mean μ in a tensor,

    ∂L/∂m = a = g ⊙ T        ∂L/∂s = (a − ⟨a, m⟩ / n) / μ        ∂L/∂ℓ = ∂L/∂s ⊙ s (1 − s) / temperature
    ∂L/∂λ_i = ⟨g ⊙ m, τ_i⟩
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, overload

import torch
from torch import Tensor

from taskvec.errors import (
    MismatchError,
    NonFiniteError,
    ParameterError,
    Problems,
    UsageError,
    did_you_mean,
)
from taskvec.precision import all_finite, compute_dtype, is_float, rounded

Tensors = Mapping[str, Tensor]
Vector = Any
"""One task vector: a mapping name to delta, or anything with `.infos` and `.read(name)`."""
Vectors = Mapping[str, Vector] | Sequence[Vector]


def saturation(dtype: torch.dtype) -> float:
    """How close to 0 and 1 a probability of this dtype gets: 2^-23 for float32.

    The relaxed Bernoulli of torch works from probabilities clamped to [eps, 1 - eps]: a float32 logit acts as if
    limited to about 15.94, with gradient zero beyond. The published masks were trained with that, so we do the same.
    """
    return torch.finfo(dtype).eps


# -- noise -------------------------------------------------------------------------------------------------------------


def noise_key(seed: int, step: int, name: str) -> tuple[int, int]:
    """Two 32-bit keys for one tensor's noise at one step; equal on every machine."""
    digest = hashlib.blake2b(f"{seed}|{step}|{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def _mix(bits: Tensor) -> Tensor:
    """One round of a 32-bit integer hash with low bias (constants: C. Wellons, "Hash function prospector")."""
    bits ^= (bits >> 16) & 0xFFFF
    bits *= 0x7FEB352D
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= -2073254261  # 0x846ca68b as a signed number
    bits ^= (bits >> 16) & 0xFFFF
    return bits


def uniform_noise(
    key: tuple[int, int], start: int, stop: int, device: "torch.device | str | None" = None
) -> Annotated[Tensor, "element"]:
    """Uniform numbers in (0, 1) for elements `start` to `stop` of one tensor.

    Counter-based: element k depends on the key and on k alone, so cutting a tensor into pieces, or moving it to another
    device, changes nothing, and noise is drawn again where it is needed instead of being stored.

    Args:
        key: from `noise_key`.
        start: first element, row-major.
        stop: one past the last; at most 2^31.
        device: where to make them.
    """
    bits = torch.arange(start, stop, dtype=torch.int32, device=device)
    bits *= -1640531527  # 2^32 / golden ratio, odd: a bijection that spreads neighbours
    bits += key[0]
    bits = _mix(bits)
    bits ^= key[1]
    bits = _mix(bits)
    # 23 bits and a half: exactly representable, never 0 or 1
    return ((bits >> 9) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)


# -- masks -------------------------------------------------------------------------------------------------------------


def clamped_logit(probability: Tensor) -> Tensor:
    """The logit log p − log(1 − p), from p clamped to [2^-23, 1 − 2^-23] (float32)."""
    eps = saturation(probability.dtype)
    probability = probability.clamp(eps, 1 - eps)
    return probability.log() - torch.log1p(-probability)


def relaxed(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """One relaxed Bernoulli sample, σ((ℓ + log u − log(1 − u)) / temperature), saturating as torch's does."""
    sample = torch.sigmoid((clamped_logit(uniform) + clamped_logit(torch.sigmoid(logits))) / temperature)
    return sample.clamp(torch.finfo(sample.dtype).tiny, 1 - torch.finfo(sample.dtype).eps)


def relaxed_slope(logits: Tensor, sample: Tensor, temperature: float) -> Tensor:
    """∂s/∂ℓ = s (1 − s) / temperature, zero where the logit has saturated."""
    probability = torch.sigmoid(logits)
    eps = saturation(probability.dtype)
    moves = (probability >= eps) & (probability <= 1 - eps)
    return torch.where(moves, sample * (1 - sample) / temperature, 0.0)


def rescale_gradient(cotangent: Tensor, sample: Tensor) -> Tensor:
    """∂L/∂s of one tensor, for m = s / mean(s) and cotangent = ∂L/∂m."""
    mean = sample.mean()
    cotangent = cotangent.to(sample)  # a 0-dimensional float32 would not widen it
    return (cotangent - (cotangent * sample).mean() / mean) / mean


@overload
def rescale(mask: Tensor) -> Tensor: ...
@overload
def rescale(mask: Tensors) -> dict[str, Tensor]: ...
def rescale(mask: Tensor | Tensors) -> Tensor | dict[str, Tensor]:
    """Each tensor of the mask divided by its own mean, so that every tensor's mask has mean 1.

    Args:
        mask: name to tensor with values in [0, 1] (or true and false), or one tensor. A tensor that is zero everywhere stays zero
            (the authors' code divides 0 by 0 there). The result is float32, or float64 if the mask is.
    """
    if isinstance(mask, Tensor):
        mask = mask.to(compute_dtype(mask.dtype))
        mean = mask.mean()
        return mask / torch.where(mean == 0, torch.ones_like(mean), mean)
    if not isinstance(mask, Mapping) or not all(isinstance(tensor, Tensor) for tensor in mask.values()):
        raise UsageError(f"mask: expected a tensor, or name to tensor, found a {type(mask).__name__}")
    return {name: rescale(tensor) for name, tensor in mask.items()}


def density(mask: Tensors) -> Tensor:
    """Mean over all elements of all tensors: the fraction of the task vector that a 0/1 mask keeps."""
    total = sum(tensor.sum(dtype=torch.float64) for tensor in mask.values())
    return torch.as_tensor(total / max(1, sum(tensor.numel() for tensor in mask.values())), dtype=torch.float64)


class ConcreteMask:
    """A mask learned through logits, one per element of each tensor.

    Sampling draws from the binary concrete distribution; `mean` is the probability itself. Nothing is rescaled here:
    `rescale(mask.sample(...))` is what a merge takes. Masks and gradients of half-precision logits are float32.

    Args:
        logits: name to logits. They are used as given (no copy), so an optimiser may own them.
        temperature: of the relaxation, > 0; the smaller, the closer samples are to 0 and 1.

    Raises:
        ParameterError: the temperature is not positive, or logits are not floating or hold NaN.
    """

    def __init__(self, logits: Tensors, temperature: float = 0.5):
        if not isinstance(logits, Mapping):
            raise UsageError(f"logits: expected name to tensor, found a {type(logits).__name__}")
        problems = Problems()
        if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
            problems.add(
                f"temperature: {temperature!r} is not positive; the relaxation is defined for numbers > 0 (published: 0.5)"
            )
        for name, tensor in logits.items():
            if not isinstance(tensor, Tensor) or not is_float(tensor.dtype):
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                problems.add(f"{name}: logits are {kind}, expected a tensor of a floating dtype")
            elif bool(torch.isnan(tensor).any()):
                problems.add(f"{name}: logits hold NaN")
        problems.raise_if_any(ParameterError)
        self.logits = dict(logits)
        self.temperature = float(temperature)
        self._drawn: Tensors | None = None

    @classmethod
    def constant(
        cls,
        shapes: Mapping[str, Sequence[int]],
        logit: float = 0.0,
        temperature: float = 0.5,
        *,
        device: "torch.device | str | None" = None,
    ) -> "ConcreteMask":
        """A mask with the same logit everywhere (0: probability one half).

        Args:
            shapes: name to shape.
            logit: the starting value.
            temperature: of the relaxation.
            device: where the logits live.
        """
        return cls(
            {name: torch.full(tuple(shape), logit, device=device) for name, shape in shapes.items()}, temperature
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.logits)

    def uniform(self, seed: int, step: int = 0) -> dict[str, Tensor]:
        """The counter-based noise of one step, in the shape of the logits."""
        return {
            name: uniform_noise(noise_key(seed, step, name), 0, tensor.numel(), tensor.device).view(tensor.shape)
            for name, tensor in self.logits.items()
        }

    def sample(self, uniform: Tensors | None = None, *, seed: int | None = None, step: int = 0) -> dict[str, Tensor]:
        """One relaxed sample, values in (0, 1).

        Args:
            uniform: name to numbers in [0, 1], shaped as the logits.
            seed: draw counter-based noise of this seed instead.
            step: which draw of that seed.

        Raises:
            UsageError: neither or both of `uniform` and `seed` are given.
            MismatchError: noise is missing for a tensor, or has another shape.
        """
        noise = self._noise(uniform, seed, step)
        self._drawn = noise
        return {
            name: relaxed(tensor, noise[name].to(tensor), self.temperature) for name, tensor in self._wide().items()
        }

    def bernoulli(self, uniform: Tensors | None = None, *, seed: int | None = None, step: int = 0) -> dict[str, Tensor]:
        """One hard sample: 1 with probability σ(ℓ), else 0. Arguments as in `sample`."""
        noise = self._noise(uniform, seed, step)
        return {
            name: (noise[name].to(tensor) < torch.sigmoid(tensor)).to(tensor.dtype)
            for name, tensor in self._wide().items()
        }

    def mean(self) -> dict[str, Tensor]:
        """The probabilities σ(ℓ): the mean of the 0/1 mask, and the chance that a relaxed sample exceeds one half."""
        return {name: torch.sigmoid(tensor) for name, tensor in self._wide().items()}

    @torch.no_grad()
    def gradient(
        self, cotangent: Tensors, uniform: Tensors | None = None, *, rescaled: bool = True
    ) -> dict[str, Tensor]:
        """∂/∂ℓ of Σ cotangent ⊙ rescale(sample), in closed form.

        Args:
            cotangent: name to ∂L/∂m, shaped as the logits.
            uniform: the noise of the sample; default: that of the last call of `sample`.
            rescaled: whether the sample was rescaled before use.

        Raises:
            UsageError: no noise given, and `sample` was never called.
        """
        if uniform is None:
            if self._drawn is None:
                raise UsageError(
                    "gradient: no sample has been drawn; call sample() first, or pass its noise as `uniform`"
                )
            uniform = self._drawn
        noise = self._noise(uniform, None, 0)
        self._check(cotangent, "cotangent")
        gradients = {}
        for name, tensor in self._wide().items():
            sample = relaxed(tensor, noise[name].to(tensor), self.temperature)
            slope = relaxed_slope(tensor, sample, self.temperature)
            upstream = rescale_gradient(cotangent[name], sample) if rescaled else cotangent[name].to(sample)
            gradients[name] = upstream * slope
        return gradients

    def _wide(self) -> dict[str, Tensor]:
        """The logits in the dtype of sums; in half precision log u would have two or three digits."""
        return {name: tensor.to(compute_dtype(tensor.dtype)) for name, tensor in self.logits.items()}

    def _noise(self, uniform: Tensors | None, seed: int | None, step: int) -> Tensors:
        if (uniform is None) == (seed is None):
            raise UsageError("sample: give either `uniform` (recorded noise) or `seed`, and not both")
        if seed is not None:
            return self.uniform(seed, step)
        assert uniform is not None
        self._check(uniform, "noise")
        outside = [
            name for name in self.logits if not bool(((uniform[name] >= 0) & (uniform[name] <= 1)).all())
        ]  # NaN is outside, too
        if outside:
            raise ParameterError([f"{name}: noise must lie in [0, 1]" for name in outside])
        return uniform

    def _check(self, tensors: Tensors, what: str) -> None:
        if not isinstance(tensors, Mapping):
            raise UsageError(f"{what}: expected name to tensor, found a {type(tensors).__name__}")
        problems = Problems()
        for name, tensor in self.logits.items():
            if name not in tensors:
                problems.add(f"{name}: no {what} given.{did_you_mean(name, tensors)}")
            elif not isinstance(tensors[name], Tensor):
                problems.add(f"{name}: {what} is a {type(tensors[name]).__name__}, expected a tensor")
            elif tensors[name].shape != tensor.shape:
                problems.add(f"{name}: {what} has {list(tensors[name].shape)}, the logits have {list(tensor.shape)}")
        problems.raise_if_any(MismatchError)


# -- merging -----------------------------------------------------------------------------------------------------------


def delta(vector: Vector, name: str) -> Tensor | None:
    """One tensor of a task vector (a mapping, or anything with `infos` and `read`), or None where it has none."""
    if isinstance(vector, Mapping):
        return vector.get(name)
    return vector.read(name) if name in vector.infos else None


def vector_names(vector: Vector) -> Sequence[str]:
    """The names of a task vector's tensors."""
    return list(vector) if isinstance(vector, Mapping) else list(vector.infos)


def merged_names(base: Tensors, vectors: Sequence[Vector]) -> list[str]:
    """The tensors that a merge changes, in the base's order: floating, and in at least one task vector."""
    present = {name for vector in vectors for name in vector_names(vector)}
    return [name for name, tensor in base.items() if name in present and is_float(tensor.dtype)]


def masked_merge(
    base: Tensors,
    vectors: Vectors,
    coefficients: "Tensor | Sequence[float] | Mapping[str, float]",
    mask: "Tensors | Sequence[Tensors] | Mapping[str, Tensors] | None" = None,
    *,
    clamp: bool = False,
    order: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """θ0 + m ⊙ Σ λ_i τ_i, tensor by tensor.

    Args:
        base: name to tensor; everything in it is returned, tensors without a task vector unchanged.
        vectors: task vectors in task order: name to delta, or `TaskVector`s.
        coefficients: λ, [task], or [task, layer] with one column per merged tensor; or task name to λ, where the vectors
            have names.
        mask: name to weights, already rescaled where that is wanted; one mask for all tasks, or one mask per task, as a
            sequence or by task name (θ0 + Σ λ_i m_i ⊙ τ_i). None merges without a mask.
        clamp: clamp the coefficients to [0, 1] first (the authors' `clamp_weights`).
        order: tensor names in the order of the coefficients' columns; default: the base's order.

    Returns:
        name to tensor, each in the base's dtype (sums in float32, one rounding).

    Raises:
        MismatchError: names, shapes or counts that do not fit; every one is listed.
        NonFiniteError: the result holds NaN or infinity.

    Paper: arXiv:2410.13910. The authors scale, mask and add each task vector in turn; the sum is the same.
    """
    tasks = _tasks(base, vectors)
    names = list(order) if order is not None else merged_names(base, tasks)
    weights = _coefficients(coefficients, vectors)
    masks = _masks(mask, vectors)
    _check_merge(base, tasks, weights, masks, names)
    if clamp:
        weights = weights.clamp(0, 1)
    merged = dict(base)
    for column, name in enumerate(names):
        dtype = compute_dtype(base[name].dtype)
        layer = weights if weights.ndim == 1 else weights[:, column]
        total: Tensor | None = None
        for index, vector in enumerate(tasks):
            found = delta(vector, name)
            if found is None:
                continue
            term = layer[index].to(base[name].device, dtype) * found.to(base[name].device, dtype)
            if len(masks) > 1:
                term = masks[index][name].to(term) * term
            total = term if total is None else total + term
        if total is None:
            continue
        if len(masks) == 1:
            total = masks[0][name].to(total) * total
        whole = base[name].to(dtype) + total
        if not all_finite(whole.detach()):
            raise NonFiniteError(name, "the merge", int((~torch.isfinite(whole)).sum()))
        merged[name] = rounded(whole, base[name].dtype, where=name)[0]
    return merged


@torch.no_grad()
def masked_merge_gradient(
    cotangent: Tensors,
    vectors: Vectors,
    coefficients: "Tensor | Sequence[float] | Mapping[str, float]",
    mask: Tensors | None = None,
    *,
    clamp: bool = False,
    order: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """∂L/∂m and ∂L/∂λ of a masked merge, from g = ∂L/∂θ, without a graph through the merge.

    Args:
        cotangent: name to g, in the base's order; tensors without a task vector are passed over.
        vectors: as in `masked_merge`.
        coefficients: as in `masked_merge`.
        mask: as in `masked_merge`, one for all tasks.
        clamp: whether the merge clamped its coefficients: their gradient is zero outside [0, 1].
        order: as in `masked_merge`.

    Returns:
        (name to ∂L/∂m, ∂L/∂λ shaped as the coefficients).
    """
    tasks = _tasks(cotangent, vectors)
    names = list(order) if order is not None else merged_names(cotangent, tasks)
    weights = _coefficients(coefficients, vectors)
    if mask is not None and not (isinstance(mask, Mapping) and all(isinstance(one, Tensor) for one in mask.values())):
        raise UsageError("mask: expected name to tensor; the gradient is that of one mask for all tasks")
    _check_merge(cotangent, tasks, weights, _masks(mask, vectors), names)
    used = weights.clamp(0, 1) if clamp else weights
    gradient = torch.zeros_like(weights)
    masks: dict[str, Tensor] = {}
    for column, name in enumerate(names):
        upstream = cotangent[name].to(compute_dtype(cotangent[name].dtype))
        weighed = upstream if mask is None else upstream * mask[name].to(upstream)
        total = torch.zeros_like(upstream)
        for index, vector in enumerate(tasks):
            found = delta(vector, name)
            if found is None:
                continue
            found = found.to(upstream)
            share = (weighed * found).sum()
            if weights.ndim == 1:
                gradient[index] += share
                total += used[index] * found
            else:
                gradient[index, column] = share
                total += used[index, column] * found
        masks[name] = upstream * total
    if clamp:
        gradient = gradient * ((weights >= 0) & (weights <= 1))
    return masks, gradient


def _tasks(base: Tensors, vectors: Vectors) -> list[Vector]:
    """The task vectors in order, where base and task vectors are what they should be."""
    if not isinstance(base, Mapping) or not all(isinstance(tensor, Tensor) for tensor in base.values()):
        raise UsageError(f"base: got a {type(base).__name__}; expected name to tensor")
    tasks = list(vectors.values()) if isinstance(vectors, Mapping) else list(vectors)
    for index, vector in enumerate(tasks):
        deltas = vector.values() if isinstance(vector, Mapping) else ()
        if not (isinstance(vector, Mapping) or hasattr(vector, "infos")) or not all(
            isinstance(own, Tensor) for own in deltas
        ):
            raise UsageError(f"task vector {index}: got a {type(vector).__name__}; expected name to tensor")
    return tasks


def _coefficients(values: "Tensor | Sequence[float] | Mapping[str, float]", vectors: Vectors) -> Tensor:
    """λ as a floating tensor; numbers that come without a dtype keep all their digits."""
    if isinstance(values, Mapping):
        values = [values[task] for task in _by_task("coefficients", values, vectors)]
    try:
        found = torch.as_tensor(values, dtype=None if isinstance(values, Tensor) else torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"coefficients: got a {type(values).__name__}; expected a number for each task") from None
    if found.is_complex():
        raise UsageError("coefficients: are complex, expected real numbers")
    return found if found.is_floating_point() else found.to(torch.float32)


def _masks(mask: "Tensors | Sequence[Tensors] | Mapping[str, Tensors] | None", vectors: Vectors) -> list[Tensors]:
    if mask is None:
        return []
    if isinstance(mask, Mapping):
        if not mask or not any(isinstance(value, Mapping) for value in mask.values()):
            return [mask]  # type: ignore[list-item]
        mask = [mask[task] for task in _by_task("mask", mask, vectors)]  # type: ignore[misc]
    if len(mask) != len(vectors):
        raise MismatchError([f"{len(mask)} masks for {len(vectors)} task vectors; give one for all, or one each"])
    for one in mask:
        if not isinstance(one, Mapping):
            raise UsageError(f"mask: got a {type(one).__name__}; expected name to tensor, for all tasks or for each")
    return list(mask)


def _by_task(what: str, values: Mapping[str, Any], vectors: Vectors) -> list[str]:
    """The tasks in their order, for values that are given by task name."""
    if not isinstance(vectors, Mapping):
        raise UsageError(f"{what}: given by task, but the task vectors have no names; give a sequence in their order")
    problems = Problems()
    problems.extend(f"{what}: none for task {task!r}" for task in vectors if task not in values)
    problems.extend(
        f"{what}: there is no task {task!r}.{did_you_mean(task, vectors)}" for task in values if task not in vectors
    )
    problems.raise_if_any(MismatchError)
    return list(vectors)


def _check_merge(
    base: Tensors, tasks: Sequence[Vector], coefficients: Tensor, masks: Sequence[Tensors], names: Sequence[str]
) -> None:
    problems = Problems()
    if not tasks:
        problems.add("no task vectors given; expected at least one")
    wanted = f"[{len(tasks)}] or [{len(tasks)}, {len(names)}] (one column per merged tensor)"
    shape = list(coefficients.shape)
    if shape not in ([len(tasks)], [len(tasks), len(names)]):
        problems.add(f"coefficients have shape {shape}, expected {wanted}")
    for name in names:
        if name not in base:
            problems.add(f"{name}: not in the base.{did_you_mean(name, base)}")
        elif not is_float(base[name].dtype):
            problems.add(f"{name}: is {base[name].dtype}, which is copied and never merged; leave it out of `order`")
        elif names.count(name) > 1:
            problems.add(f"{name}: {names.count(name)} times in `order`")
    chosen = set(names)
    for index, vector in enumerate(tasks):
        for name in vector_names(vector):
            if name in base and is_float(base[name].dtype) and name not in chosen:
                problems.add(f"{name}: in task vector {index}, not in `order`; leave it out of both, or of none")
            if name not in base:
                problems.add(f"{name}: in task vector {index}, not in the base. Was it made from another base?")
                continue
            found = vector[name].shape if isinstance(vector, Mapping) else vector.infos[name].shape
            if tuple(found) != tuple(base[name].shape):
                problems.add(f"{name}: task vector {index} has {list(found)}, the base has {list(base[name].shape)}")
    for mask in masks:
        for name in names:
            if name not in mask:
                problems.add(f"{name}: the mask has no such tensor; give ones where a tensor is merged whole")
            elif not isinstance(mask[name], Tensor):
                problems.add(f"{name}: mask is a {type(mask[name]).__name__}, expected a tensor")
            elif name in base and mask[name].shape != base[name].shape:
                problems.add(f"{name}: mask has {list(mask[name].shape)}, the base has {list(base[name].shape)}")
        for name in mask:
            if name not in base:
                problems.add(f"{name}: in the mask, not in the base. Was the mask learned for another model?")
    problems.raise_if_any(MismatchError)
