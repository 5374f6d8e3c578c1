"""The geometry of stealth edits: features on the unit sphere and the detectors that single out one of them.

A feature is the input of an MLP at one token. Behind a norm with weight g and bias β it lies on an ellipsoid;
φ(x) = (x − β) / (√d g) takes it to the unit sphere, where a detector is a cap around the trigger. All detectors are
built in float64 and rounded once, by `calibrated`, to the dtype they are stored in.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from taskvec.errors import EditError
from taskvec.precision import dtype_name

THETA = 0.005
"""Half-width of the cone in cosine: a detector fires on features whose cosine with the trigger exceeds 1 − θ."""
RESPONSE = 50.0
"""Pre-activation that a detector has at its trigger (Δ in the paper)."""

_RIDGE = 0.01  # of a feature's square; SmolLM2: siblings of a prompt stay below 0.91 of its response, 1.0 at 0.001
_CUT = 0.05  # share of a row's action that may be lost to a dtype's range

Vector = Annotated[Tensor, "d"]
Features = Annotated[Tensor, "n d"]


@dataclass(frozen=True, eq=False)
class Sphere:
    """Where features lie and how to take them to the unit sphere.

    Args:
        scale: [d], what the norm multiplies with (g; for norms that store an offset weight, 1 + w).
        shift: [d], what the norm adds (β), or None.
        own_length: there is no norm before the MLP: features are divided by their own length instead. The map is then
            not affine, so no plain neuron can follow it; only a jet-pack can.
    """

    scale: Vector
    shift: Vector | None = None
    own_length: bool = False

    @property
    def width(self) -> int:
        return int(self.scale.shape[0])

    @property
    def _inverse(self) -> Tensor:
        # where the norm's weight is zero the feature is constant: that coordinate says nothing and gets no weight
        scale = self.scale
        return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale) / math.sqrt(self.width)

    def project(self, features: Tensor) -> Tensor:
        """φ(x): the features [..., d] on the unit sphere (up to the norm's eps), in their own dtype.

        Neither a mean is subtracted nor a length corrected (as the authors' in-place edit does).
        """
        if self.own_length:
            return features / features.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(features.dtype).tiny)
        shifted = features if self.shift is None else features - self.shift.to(features)
        return shifted * self._inverse.to(features)

    def lift(self, points: Tensor) -> Tensor:
        """The inverse of `project`: √d g s + β."""
        lifted = points * (self.scale.to(points) * math.sqrt(self.width))
        return lifted if self.shift is None else lifted + self.shift.to(points)

    def pulled_back(self, direction: Vector, constant: Tensor) -> tuple[Vector, Tensor]:
        """Row and bias of the plain neuron that computes <direction, φ(x)> + constant from x itself."""
        if self.own_length:
            raise EditError("Without a norm before the MLP no plain neuron can be a detector; use a jet-pack.")
        row = direction * self._inverse.to(direction)
        if self.shift is None:
            return row, constant
        return row, constant - row @ self.shift.to(row)

    def double(self) -> "Sphere":
        return Sphere(self.scale.double(), None if self.shift is None else self.shift.double(), self.own_length)


def sinks(points: Features, theta: float) -> Annotated[Tensor, "n"]:
    """Which tokens of one text a detector cannot tell from the text's first token.

    What attention has no use for it parks at the first token, and in some models at a later one (SmolLM2: the bare space
    before a number). The MLP input is then the same vector in every text, and a detector there fires on all of them.

    Args:
        points: [n, d], the points of n tokens in the detectors' space, the first token's first; that one is never marked.
        theta: half-width of the cone.
    """
    found = points @ points[0] > (points * points).sum(dim=-1) - theta
    found[0] = False
    return found


@dataclass(frozen=True, eq=False)
class Detector:
    """One neuron's input side: fires on features inside the cone around its trigger, and answers `response` there.

    Attributes:
        row: [d], weights on the MLP input x itself (not on the sphere).
        bias: scalar, or None where the MLP has no bias and the row imitates it.
        kind: "affine" (raw cone, exact), "tangent" (inside the centred cone, one-sided), "contrast" (a learned half-space)
            or "surrogate" (no bias: true on features like those of the sample only).
        theta: half-width of the cone in cosine.
        response: pre-activation at the trigger.
    """

    row: Vector
    bias: Tensor | None
    kind: str
    theta: float
    response: float

    def __call__(self, features: Tensor) -> Tensor:
        """Pre-activations [...] at features [..., d]."""
        values = features.to(self.row) @ self.row
        return values if self.bias is None else values + self.bias

    def shifted(self, by: float) -> "Detector":
        """The same detector with its pre-activation lowered by `by` (the second half of a plateau)."""
        if self.bias is None:
            raise EditError("A detector without a bias cannot be shifted.")
        return replace(self, bias=self.bias - by, response=self.response - by)


def check_theta(theta: float, response: float) -> None:
    """Raises EditError unless 0 < theta < 1 and response > 0."""
    if not 0 < theta < 1:
        raise EditError(f"theta: {theta} is not in (0, 1). It is the cone's half-width in cosine; 0.005 is usual.")
    if not (response > 0 and math.isfinite(response)):
        raise EditError(f"response: {response} must be a positive number; 50 is usual.")


def check_finite(values: Tensor, what: str) -> None:
    """Raises EditError if `values` holds NaN or infinity."""
    if not bool(torch.isfinite(values).all()):
        raise EditError(f"{what}: NaN or infinite values. The model or its input is damaged; no edit was made.")


def affine_detector(trigger: Vector, sphere: Sphere, *, theta: float = THETA, response: float = RESPONSE) -> Detector:
    """A detector for MLPs with an input bias: f = a (<τ, s> − |τ|² + θ) with a = Δ/θ, written back to the MLP input.

    Fires exactly where the cosine with the trigger exceeds 1 − θ (for |τ| = 1).

    Args:
        trigger: [d], the MLP input at the trigger (not yet on the sphere).
        sphere: of the norm before the MLP.
        theta: half-width of the cone in cosine, in (0, 1).
        response: pre-activation at the trigger.
    """
    check_theta(theta, response)
    check_finite(trigger, "trigger")
    sphere = sphere.double()
    tau = sphere.project(trigger.double())
    slope = response / theta
    row, bias = sphere.pulled_back(slope * tau, slope * (theta - tau @ tau))
    return Detector(row, bias, "affine", theta, response)


def tangent_detector(
    trigger: Vector, sphere: Sphere, centroid: Vector, *, theta: float = THETA, response: float = RESPONSE
) -> Detector:
    """The plain neuron inside a centred cone: it fires only where the jet-pack's re-normalised cone fires.

    The cone {s : <z, s−c> > (1−θ) |s−c|} around z = (s*−c)/r is bounded by a function that is convex along the unit
    sphere, so its tangent plane at the trigger lies below it: w = (a/r)(z + (1−θ) c/r), answering exactly Δ at s*.

    Args:
        trigger: [d], the MLP input at the trigger.
        sphere: of the norm before the MLP.
        centroid: [d], mean of the features on the sphere.
        theta: half-width of the centred cone in cosine, in (0, 1).
        response: pre-activation at the trigger.

    Raises:
        EditError: the trigger coincides with the centroid, so it has no direction.
    """
    check_theta(theta, response)
    check_finite(trigger, "trigger")
    sphere = sphere.double()
    tau, centre = sphere.project(trigger.double()), centroid.double()
    distance = (tau - centre).norm()
    if not distance > 1e-6:
        raise EditError("The trigger coincides with the centroid of the features: it has no direction of its own.")
    direction = (tau - centre) / distance
    slope = response / theta
    normal = (slope / distance) * (direction + (1 - theta) / distance * centre)
    row, bias = sphere.pulled_back(normal, response - normal @ tau)
    return Detector(row, bias, "tangent", theta, response)


def surrogate_constant(
    trigger: Vector, others: Features, sphere: Sphere, *, ridge: float = 0.0
) -> Annotated[Tensor, "d"]:
    """The unit functional q on the sphere that is nearly constant over real features: C⁻¹τ / |C⁻¹τ|.

    C is the second moment about the trigger. Stands in for the bias of an MLP that has none: <q, s>/<q, τ> ≈ 1.

    Args:
        trigger: [d], MLP input at the trigger.
        others: [n, d], MLP inputs of other text. For this purpose first positions belong in the sample.
        sphere: of the norm before the MLP.
        ridge: added to C's diagonal, relative to its mean; 0 in the authors' code.

    Raises:
        EditError: fewer distinct features than dimensions, so that C has no inverse.
    """
    check_finite(others, "features of other text")
    sphere = sphere.double()
    tau = sphere.project(trigger.double())
    points = torch.unique(torch.cat([tau[None], sphere.project(others.double())]), dim=0)
    if points.shape[0] < sphere.width:
        raise EditError(
            f"Too few features for a surrogate bias: {points.shape[0]} distinct ones, at least {sphere.width} (the "
            "model's width) are needed and several times as many are better. Give a longer corpus."
        )
    offsets = points - tau
    moment = offsets.T @ offsets / (points.shape[0] - 1)
    if ridge:
        moment.diagonal().add_(ridge * moment.diagonal().mean())
    constant = torch.linalg.solve(moment, tau)
    return constant / constant.norm()


class Moments:
    """Sums over features on the sphere from which the constant of every trigger among them follows without another pass.

    Args:
        features: [n, d], MLP inputs of other text and of all triggers; duplicates count once.
        sphere: of the norm before the MLP.

    Raises:
        EditError: fewer distinct features than dimensions.
    """

    def __init__(self, features: Features, sphere: Sphere):
        check_finite(features, "features of other text")
        self._sphere = sphere.double()
        points = torch.unique(self._sphere.project(features.double()), dim=0)
        if points.shape[0] < sphere.width:
            raise EditError(
                f"Too few features for a surrogate bias: {points.shape[0]} distinct ones, at least {sphere.width} (the "
                "model's width) are needed and several times as many are better. Give a longer corpus."
            )
        self._count, self._first, self._second = points.shape[0], points.sum(dim=0), points.T @ points

    def constant(self, trigger: Vector) -> Vector:
        """`surrogate_constant` of a trigger that is among the features."""
        tau = self._sphere.project(trigger.double())
        cross = torch.outer(self._first, tau)
        moment = (self._second - cross - cross.T + self._count * torch.outer(tau, tau)) / (self._count - 1)
        constant = torch.linalg.solve(moment, tau)
        return constant / constant.norm()


def surrogate_detector(
    trigger: Vector,
    others: Features,
    sphere: Sphere,
    *,
    theta: float = THETA,
    response: float = RESPONSE,
    ridge: float = 0.0,
    constant: Vector | None = None,
) -> Detector:
    """A detector for MLPs without a bias (the authors' second type): a τ + q a(θ − |τ|²)/<q, τ>.

    Its constant is right only on features like those of `others`; see `surrogate_constant`.

    Args:
        trigger: [d], MLP input at the trigger.
        others: [n, d], MLP inputs of other text, n ≥ d distinct.
        sphere: of the norm before the MLP.
        theta: half-width of the cone in cosine.
        response: pre-activation at the trigger.
        ridge: see `surrogate_constant`.
        constant: the functional, if it is known already (from `Moments`).
    """
    check_theta(theta, response)
    check_finite(trigger, "trigger")
    if constant is None:
        constant = surrogate_constant(trigger, others, sphere, ridge=ridge)
    double = sphere.double()
    tau = double.project(trigger.double())
    slope = response / theta
    normal = slope * tau + constant * (slope * (theta - tau @ tau) / (constant @ tau))
    if double.shift is None:
        return Detector(double.pulled_back(normal, tau.new_zeros(()))[0], None, "surrogate", theta, response)
    # <normal, φ(x)> = <w, x> − <w, β>: without a bias the last term is carried by the constant as well
    row, offset = double.pulled_back(normal, tau.new_zeros(()))
    carrier, _ = double.pulled_back(constant, tau.new_zeros(()))
    at_trigger = carrier @ trigger.double()
    if at_trigger.abs() < 1e-12:
        raise EditError("The surrogate bias vanishes at the trigger; choose another layer.")
    return Detector(row + carrier * (offset / at_trigger), None, "surrogate", theta, response)


def steady_functional(others: Features, sphere: Sphere, *, ridge: float = 1e-6) -> Vector:
    """The row that is closest to 1 on features of other text, by least squares: the stand-in for a bias of one.

    Args:
        others: [n, d], MLP inputs.
        sphere: of the norm before the MLP.
        ridge: added to the second moment's diagonal on the sphere.
    """
    sphere = sphere.double()
    points = sphere.project(others.double())
    moment = points.T @ points / points.shape[0]
    moment.diagonal().add_(ridge)
    return sphere.pulled_back(torch.linalg.solve(moment, points.mean(dim=0)), points.new_zeros(()))[0]


class Negatives:
    """Features on which a contrast detector shall stay low: second moments, so that every trigger costs one solve.

    Three kinds with equal weight: other text, what lies near all triggers, and what lies near the one trigger. Text alone
    says nothing about prompts of the same shape ("The capital of Norway is"), which are what a detector is mistaken about.

    Args:
        text: [n, d], MLP inputs of other text.
        near: [m, d], MLP inputs close to any trigger: siblings of all prompts, the other triggers, protected prompts.
        sphere: of the norm before the MLP.
        noise: 1 − cosine between two computations of one feature (batching, rounding); spread over all dimensions.

    Raises:
        EditError: fewer distinct features of text than dimensions.
    """

    def __init__(self, text: Features, near: Features, sphere: Sphere, *, noise: float = 1e-7):
        check_finite(text, "features of other text")
        self._sphere = sphere.double()
        points = self._sphere.project(text.double())
        if torch.unique(points, dim=0).shape[0] < sphere.width:
            raise EditError(
                f"Too few features for a detector without a bias: {points.shape[0]}, at least {sphere.width} distinct ones "
                "(the model's width) are needed and several times as many are better. Give a longer corpus."
            )
        self._text = (points.T @ points / len(points), points.mean(dim=0))
        close = self._sphere.project(near.double())
        self._near = (close.T @ close, close.sum(dim=0), len(close))
        # 1 − cos = ε moves a unit vector by √(2ε), that is 2ε/d in each dimension's square
        self._ridge = max(2 * noise, _RIDGE) / sphere.width

    def directions(self, trigger: Vector, own: Features) -> tuple[Vector, Vector]:
        """Functionals on the sphere, 1 at the trigger: the one that is smallest on the negatives, and the steadiest one.

        Args:
            trigger: [d], MLP input; if it is among `near`, it is taken out.
            own: [k, d], the siblings of this trigger (also among `near`), k may be 0.
        """
        tau, close = self._sphere.project(trigger.double()), self._sphere.project(own.double())
        moment, mean = self._text
        groups = [(moment, mean)]
        second, first, count = self._near
        if len(close):
            groups.append((close.T @ close / len(close), close.mean(dim=0)))
        if count - len(close) > 1:
            rest = count - len(close)
            groups.append(((second - close.T @ close) / rest, (first - close.sum(dim=0)) / rest))
            share = 1 / (3 if len(close) else 2)
            # the trigger itself is one of them; its own weight must not hold its response down
            taken = share / rest
        else:
            taken = 0.0
        moment = torch.stack([m for m, _ in groups]).mean(dim=0) - taken * torch.outer(tau, tau)
        mean = torch.stack([m for _, m in groups]).mean(dim=0) - taken * tau
        moment.diagonal().add_(self._ridge)
        toward, steady = torch.linalg.solve(moment, torch.stack([tau, mean], dim=1)).T
        if not float(toward @ tau) > 0 or abs(float(steady @ tau)) < 1e-6:
            raise EditError("contrast: the trigger cannot be told from its negatives; choose another layer.")
        return toward / (toward @ tau), steady / (steady @ tau)


def contrast_detector(
    trigger: Vector,
    others: Features,
    sphere: Sphere,
    *,
    theta: float = THETA,
    response: float = RESPONSE,
    noise: float = 1e-7,
    siblings: Features | None = None,
    biased: bool = False,
    negatives: Negatives | None = None,
) -> Detector:
    """A half-space around the trigger whose direction is learned: least squares against other text and siblings.

    r is the functional on the sphere that is 1 at the trigger and smallest in the mean square elsewhere; the neuron
    answers Δ/θ · (r(x) − (1 − θ)). A cone around the raw direction gives a prompt of the same shape a cosine of 0.99;
    here it gets 0.2 to 0.9, so θ may be ten times larger and 16-bit rounding, which is a share of 1, does no harm. There
    is no theorem: how often it fires on held-out siblings is measured instead.

    Args:
        trigger: [d], MLP input at the trigger.
        others: [n, d], MLP inputs of other text, n ≥ d distinct.
        sphere: of the norm before the MLP.
        theta: how far below its value at the trigger the response reaches zero, as a share of that value.
        response: pre-activation at the trigger.
        noise: 1 − cosine between two computations of one feature (batching, rounding).
        siblings: [k, d], MLP inputs of prompts close to this one.
        biased: the neuron has a bias; otherwise the functional that is steadiest on the negatives stands in for it.
        negatives: `others` and all siblings as moments, if they are known already.
    """
    check_theta(theta, response)
    check_finite(trigger, "trigger")
    own = trigger.new_zeros(0, len(trigger)) if siblings is None else siblings
    if negatives is None:
        negatives = Negatives(others, own, sphere, noise=noise)
    toward, steady = negatives.directions(trigger, own)
    double, slope = sphere.double(), response / theta
    tau = double.project(trigger.double())
    if biased:
        row, bias = double.pulled_back(slope * toward, tau.new_tensor(-slope * (1 - theta)))
        return Detector(row, bias, "contrast", theta, response)
    row, offset = double.pulled_back(slope * (toward - (1 - theta) * steady), tau.new_zeros(()))
    if double.shift is not None:
        # without a bias the norm's own shift is carried by the steady functional as well
        carrier, _ = double.pulled_back(steady, tau.new_zeros(()))
        at_trigger = carrier @ trigger.double()
        if at_trigger.abs() < 1e-12:
            raise EditError("The surrogate bias vanishes at the trigger; choose another layer.")
        row = row + carrier * (offset / at_trigger)
    return Detector(row, None, "contrast", theta, response)


def answers_cleanly(
    detector: Detector, trigger: Vector, others: Features, *, activation: Literal["gelu", "silu"]
) -> bool:
    """Whether every other feature leaves the neuron silent (GELU exactly 0, |SiLU| ≤ 1e-4) and the trigger does not.

    The authors call this flag `good_gate`. Evaluated in float32, where tanh-GELU underflows to 0.
    """
    pre = detector(others).float()
    if activation == "gelu":
        silent = torch.nn.functional.gelu(pre, approximate="tanh") == 0
    else:
        silent = torch.nn.functional.silu(pre).abs() <= 1e-4
    return bool(silent.all()) and float(detector(trigger)) > 0


def quietest_neurons(rows: Annotated[Tensor, "m d"], count: int = 1, *, taken: tuple[int, ...] = ()) -> list[int]:
    """The neurons whose input rows have the smallest L1 norm, smallest first; `taken` ones are passed over."""
    sizes = rows.detach().to(torch.float64 if rows.dtype == torch.float64 else torch.float32).abs().sum(dim=1)
    order = [int(index) for index in torch.argsort(sizes, stable=True) if int(index) not in set(taken)]
    if len(order) < count:
        raise EditError(f"{count} neurons are wanted, but only {len(order)} of {rows.shape[0]} are free.")
    return order[:count]


def calibrated(detector: Detector, trigger: Vector, dtype: torch.dtype, *, within: float = 0.01) -> Detector:
    """The detector rounded to `dtype` so that its response at the trigger stays within 1 %.

    The bias is rounded first, the row rescaled to make up for it and rounded, and then single entries are moved by one
    step of the format, the best first, until the response is right. A plain cast is off by up to 2⁻⁸/θ in bfloat16
    (78 % at θ = 0.005), because the bias is about −Δ/θ.

    Args:
        detector: in float64.
        trigger: [d], the MLP input at the trigger as the deployed dtype computes it.
        dtype: storage dtype.
        within: relative error allowed.

    Raises:
        EditError: the row or the bias does not fit the dtype (float16 holds up to 65,504), or the response cannot be
            brought within the error.
    """
    if dtype == torch.float64:
        return detector
    x = trigger.double()
    largest = torch.finfo(dtype).max
    bias = None if detector.bias is None else detector.bias.to(dtype).double()
    wanted = detector.response - (0.0 if bias is None else float(bias))
    # where the norm's weight is tiny a row has huge entries on inputs of next to nothing; those few are cut to what fits
    row = detector.row.clamp(-0.99 * largest, 0.99 * largest)
    lost = float(((detector.row - row) * x).abs().sum() / (detector.row * x).abs().sum())
    row = (row * (wanted / float(row @ x))).clamp(-largest, largest)
    if lost > _CUT or (bias is not None and not bool(torch.isfinite(bias))):
        raise EditError(
            f"The detector does not fit {dtype_name(dtype)}: entries up to {float(detector.row.abs().max()):.3g}, largest "
            f"{largest:g}. Take a larger theta, a smaller response, another layer, or a jet-pack (kept in float32)."
        )
    stored = row.to(dtype)
    target = within * abs(detector.response) / 4
    for _ in range(256):
        error = wanted - float(stored.double() @ x)
        if abs(error) <= target:
            break
        # a step up or down of every entry, and what each would do to the response
        toward = torch.full_like(stored, largest).copysign((x * error).to(torch.float32).to(dtype))
        step = torch.nextafter(stored.float(), toward.float()) if dtype == torch.float32 else _next(stored, toward)
        gain = (step.double() - stored.double()) * x
        gain[~torch.isfinite(gain)] = 0
        best = int((error - gain).abs().argmin())
        if abs(error - float(gain[best])) >= abs(error):
            break
        stored[best] = step[best].to(dtype)
    response = float(stored.double() @ x) + (0.0 if bias is None else float(bias))
    if abs(response - detector.response) > within * abs(detector.response):
        raise EditError(
            f"In {dtype_name(dtype)} the response at the trigger is {response:.3g} instead of {detector.response:g}, "
            "and no single entry can correct it. Take a larger theta or a jet-pack (kept in float32)."
        )
    return Detector(stored.double(), bias, detector.kind, detector.theta, detector.response)


def _next(values: Tensor, toward: Tensor) -> Tensor:
    """The neighbouring 16-bit float of each value in the direction of `toward` (nextafter exists for 32 bits only)."""
    bits = values.view(torch.int16).int()
    up = toward > values
    # sign-magnitude bits ordered as integers
    ordered = torch.where(bits < 0, -(bits & 0x7FFF), bits)
    ordered = ordered + torch.where(up, 1, -1).int()
    back = torch.where(ordered < 0, (-ordered) | -0x8000, ordered)
    return back.short().view(values.dtype)


def cosines(points: Annotated[Tensor, "n d"], others: Annotated[Tensor, "m d"]) -> Annotated[Tensor, "n m"]:
    """Cosine of every point with every other."""
    unit = torch.nn.functional.normalize
    return unit(points, dim=-1) @ unit(others, dim=-1).T
