"""How selective an edit can be: the separability dimension of a layer's features, and the bound that follows from it.

The dimension (arXiv:2311.07579, as used in arXiv:2406.12670) of a law D of features is

    n(D, delta) = -1 - log2 P[<x - y, y> >= delta],    x and y independent from D.

For features on the unit sphere, any fixed trigger and a detector that fires where the cosine to the trigger exceeds
1 - theta, a random prompt fires it with probability at most

    sqrt(P) = 2^(-(1 + n(D, 2 theta (theta - 2))) / 2)                                    (Theorem 2 of the paper)

because two prompts that both fire lie within twice the cone's angle of each other. The bound is uniform over triggers:
one number per layer and theta, without making an edit. It says nothing about rounding, soft activations or the loss of
a replaced neuron, and for one given edit a direct count (`rate_bound`) is far tighter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from taskvec.errors import DataError, UsageError

THETAS = (0.005, 0.02, 0.05, 0.1, 0.2)
"""The thresholds of the paper's plots, from its own default to a radius that catches paraphrases."""

_BLOCK_BYTES = 64 << 20
"""Size of one block of inner products: five thetas on 20,000 vectors then take under 0.3 GiB beside the features."""

_ON_SPHERE = 0.02
"""Largest deviation of a norm from 1 that still counts as the unit sphere (a norm layer's eps moves it by about 1e-5,
bfloat16 storage by up to 4e-3)."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """The estimate at every theta, with what it rests on. Tensors are float64 of shape [theta] unless said.

    `p`, `dimension` and `bound` are plug-in values: the share of pairs seen, -1 - log2 of it (infinite where no pair
    was seen) and its root. They can look far better than the sample can certify: zero pairs seen do not mean
    probability zero. `p_interval`, `dimension_interval` ([theta, 2]) and `bound_upper` are what the sample does
    certify at `confidence` (see `intrinsic_dimension`).
    """

    thetas: Tensor
    deltas: Tensor
    p: Tensor
    dimension: Tensor
    bound: Tensor
    p_interval: Tensor
    dimension_interval: Tensor
    bound_upper: Tensor
    standard_error: Tensor
    """Of `p`, asymptotic, by sequences where they are known; for ranking layers, not for a guarantee."""
    hits: Tensor
    """Ordered pairs seen with <x - y, y> >= delta, int64."""
    pairs: int
    """Ordered pairs looked at."""
    used: int
    first_excluded: int
    """First positions that were left out."""
    independent: int
    """Number of independent draws the interval rests on: sequences where given, else vectors."""
    confidence: float
    centred: bool
    renormalised: bool
    centroid_norm: float
    """Length of the mean of the features as given: 0 for a spread-out cloud, near 1 for a narrow cone."""
    sphere_error: float
    """Largest | |x| - 1 | over the vectors that were compared."""

    @property
    def bound_applies(self) -> bool:
        """Whether the compared vectors lie on the unit sphere, as the theorem asks."""
        return self.sphere_error <= _ON_SPHERE

    def rows(self) -> list[dict[str, float | int]]:
        """One dictionary for each theta."""
        return [
            {
                "theta": float(self.thetas[i]),
                "delta": float(self.deltas[i]),
                "hits": int(self.hits[i]),
                "p": float(self.p[i]),
                "p_low": float(self.p_interval[i, 0]),
                "p_high": float(self.p_interval[i, 1]),
                "standard_error": float(self.standard_error[i]),
                "dimension": float(self.dimension[i]),
                "dimension_low": float(self.dimension_interval[i, 0]),
                "dimension_high": float(self.dimension_interval[i, 1]),
                "bound": float(self.bound[i]),
                "bound_upper": float(self.bound_upper[i]),
            }
            for i in range(len(self.thetas))
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain numbers; infinite dimensions become None, since JSON has no infinity."""
        rows = [
            {key: (None if isinstance(value, float) and math.isinf(value) else value) for key, value in row.items()}
            for row in self.rows()
        ]
        return {
            "thetas": rows,
            "pairs": self.pairs,
            "vectors": self.used,
            "first_positions_excluded": self.first_excluded,
            "independent_draws": self.independent,
            "confidence": self.confidence,
            "centred": self.centred,
            "renormalised": self.renormalised,
            "centroid_norm": self.centroid_norm,
            "sphere_error": self.sphere_error,
            "bound_applies": self.bound_applies,
        }


def intrinsic_dimension(
    features: Annotated[Tensor, "vector d"] | Annotated[Tensor, "sequence position d"],
    thetas: Sequence[float] | Tensor = THETAS,
    *,
    centre: bool | Annotated[Tensor, "d"] = False,
    renormalise: bool = False,
    sequences: Annotated[Tensor, "vector"] | None = None,
    positions: Annotated[Tensor, "vector"] | None = None,
    mask: Annotated[Tensor, "sequence position"] | None = None,
    skip_first: int = 1,
    confidence: float = 0.95,
    block_bytes: int = _BLOCK_BYTES,
) -> Dimension:
    """The separability dimension at delta = 2 theta (theta - 2), for all thetas in one pass over the pairs.

    Without `sequences` (and for two-dimensional features) all ordered pairs of different vectors count, as in the
    authors' code. With them, the first `skip_first` positions of each sequence are left out (they are all nearly the
    same vector, the attention sink, and alone cap the dimension at -1 - 2 log2 of their share), and so are pairs
    within a sequence, since x and y are to be independent.

    The interval is Hoeffding's for U-statistics in its Kullback-Leibler form, two-sided: with m = half the number of
    independent draws, P[estimate off by that much] <= exp(-m KL). It uses all pairs, assumes only that the draws
    (sequences where given, else vectors) are independent, holds for any sample size and for sequences of unequal
    length, and with no pair seen gives about log(2 / (1 - confidence)) / m.

    Memory is the features in float32 plus `block_bytes` times about four; time is d * vectors^2 multiplications.

    Args:
        features: points on the unit sphere, [vector, d], or [sequence, position, d] (then each first index is a
            sequence). Use φ(x) of the MLP input; see `Dimension.bound_applies`.
        thetas: thresholds, each in [0, 1]. theta = 0 is the authors' integer-0 path, P[<x - y, y> >= 0].
        centre: subtract the mean of the vectors used, or this vector (a jet-pack's centroid), first.
        renormalise: put the centred vectors back on the sphere, as a jet-pack does. The authors' code does not when
            it evaluates the dimension; the theorem needs it.
        sequences: for [vector, d], the sequence each vector comes from; vectors of one sequence in order of position.
        positions: for [vector, d] with `sequences`, the position of each vector in the window that the model saw; by
            default its rank in its sequence. Needed where a text was cut into several windows.
        mask: for [sequence, position, d], True where there is a token (padding on either side is left out).
        skip_first: positions left out at the start of each sequence; 0 keeps them.
        confidence: of the two-sided interval, in (0, 1).

    Raises:
        UsageError: a theta outside [0, 1], or arguments that do not fit together.
        DataError: fewer than two vectors (or sequences) left, or NaN or infinite features.
    """
    levels = torch.as_tensor(thetas, dtype=torch.float64).reshape(-1)
    if levels.numel() == 0 or not bool(((levels >= 0) & (levels <= 1)).all()):
        raise UsageError(f"thetas: {levels.tolist()} must be one or more numbers in [0, 1].")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence: {confidence} is not in (0, 1).")
    if skip_first < 0:
        raise UsageError(f"skip_first: {skip_first} is negative.")
    points, owner, excluded = _selected(features, sequences, positions, mask, skip_first)
    centroid = points.mean(0)
    if isinstance(centre, Tensor):
        if centre.shape != centroid.shape:
            raise UsageError(f"centre: has shape {list(centre.shape)}, the features need {list(centroid.shape)}.")
        points = points - centre.to(points.dtype)
    elif centre:
        points = points - centroid
    if renormalise:
        lengths = points.norm(dim=1, keepdim=True)
        if bool((lengths == 0).any()):
            raise DataError("features: a vector equals the centroid, so it has no direction to renormalise.")
        points = points / lengths
    deltas = 2 * levels * (levels - 2)
    hits, degrees = _close_pairs(points, deltas, owner, block_bytes)
    draws = len(points) if owner is None else int(owner.max()) + 1
    counts = None if owner is None else torch.bincount(owner, minlength=draws).double()
    pairs = len(points) * (len(points) - 1) if counts is None else int(counts.sum() ** 2 - (counts**2).sum())
    p = hits.double() / pairs
    interval = torch.stack([_interval(float(share), draws, counts, confidence) for share in p])
    norms = points.norm(dim=1)
    return Dimension(
        thetas=levels,
        deltas=deltas,
        p=p,
        dimension=-1 - p.log2(),
        bound=p.sqrt(),
        p_interval=interval,
        dimension_interval=-1 - interval.flip(1).log2(),
        bound_upper=interval[:, 1].sqrt(),
        standard_error=_standard_error(p, degrees, pairs, owner, counts),
        hits=hits,
        pairs=pairs,
        used=len(points),
        first_excluded=excluded,
        independent=draws,
        confidence=confidence,
        centred=centre is not False,
        renormalised=renormalise,
        centroid_norm=float(centroid.double().norm()),
        sphere_error=float((norms - 1).abs().max()),
    )


def rate_bound(hits: int, trials: int, confidence: float = 0.95) -> float:
    """The upper Clopper-Pearson limit of a rate of which `hits` in `trials` independent prompts were seen.

    Zero hits give about 3 / trials at 95 %. This, not the theorem, is the sharp statement about one given edit.

    Raises:
        UsageError: hits outside [0, trials], no trial, or a confidence outside (0, 1).
    """
    if not 0 <= hits <= trials or trials < 1:
        raise UsageError(f"rate_bound: {hits} hits in {trials} trials is not a count of at least one trial.")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence: {confidence} is not in (0, 1).")
    if hits == trials:
        return 1.0
    from scipy.stats import beta

    return float(beta.ppf(confidence, hits + 1, trials - hits))


def edits_bound(bound: float, edits: int) -> float:
    """The theorem's bound for any of several edits of one layer: a union bound, at most 1."""
    return min(1.0, bound * edits)


def _selected(
    features: Tensor, sequences: Tensor | None, positions: Tensor | None, mask: Tensor | None, skip_first: int
) -> tuple[Tensor, Tensor | None, int]:
    """The vectors to compare ([vector, d], at least float32), the sequence of each, and how many were dropped."""
    if features.ndim == 3:
        if sequences is not None:
            raise UsageError("sequences: features of shape [sequence, position, d] already say it.")
        rows, length = features.shape[:2]
        if mask is None:
            mask = torch.ones(rows, length, dtype=torch.bool)
        if mask.shape != (rows, length):
            raise UsageError(f"mask: has shape {list(mask.shape)}, the features need {[rows, length]}.")
        mask = mask.to(features.device).bool()
        features = features[mask]
        sequences = torch.arange(rows, device=mask.device)[:, None].expand(rows, length)[mask]
    elif features.ndim != 2:
        raise UsageError(
            f"features: have shape {list(features.shape)}, expected [vector, d] or [sequence, position, d]."
        )
    elif mask is not None:
        raise UsageError("mask: needs features of shape [sequence, position, d].")
    excluded = 0
    owner = None
    if positions is not None and sequences is None:
        raise UsageError("positions: need `sequences` beside them.")
    if sequences is not None:
        if sequences.shape != features.shape[:1]:
            raise UsageError(f"sequences: {list(sequences.shape)} names for {len(features)} vectors.")
        owner = torch.unique(sequences, return_inverse=True)[1]
        if positions is None:
            positions = _position_in_sequence(owner)
        elif positions.shape != owner.shape:
            raise UsageError(f"positions: {list(positions.shape)} positions for {len(features)} vectors.")
        keep = positions.to(owner.device) >= skip_first
        excluded = int((~keep).sum())
        features, owner = features[keep], owner[keep]
        owner = torch.unique(owner, return_inverse=True)[1]
        if owner.numel() == 0 or int(owner.max()) < 1:
            raise DataError(
                f"features: after leaving out {excluded} first positions fewer than two sequences are left; "
                "the dimension compares vectors of different sequences. Give more text."
            )
    if len(features) < 2:
        raise DataError(f"features: {len(features)} vectors; the dimension needs at least two.")
    points = features if features.dtype == torch.float64 else features.float()
    if not bool(torch.isfinite(points.sum(0)).all()):
        raise DataError("features: NaN or infinite values; the model that made them is broken or overflows its dtype.")
    return points, owner, excluded


def _position_in_sequence(owner: Tensor) -> Tensor:
    """How many earlier vectors belong to the same sequence."""
    order = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner)
    starts = counts.cumsum(0) - counts
    position = torch.empty_like(owner)
    position[order] = torch.arange(len(owner), device=owner.device) - starts[owner[order]]
    return position


def _close_pairs(points: Tensor, deltas: Tensor, owner: Tensor | None, block_bytes: int) -> tuple[Tensor, Tensor]:
    """Ordered pairs with <x - y, y> >= delta: counts [theta], and for each vector its pairs [theta, vector]."""
    count = len(points)
    squares = (points * points).sum(1)
    hits = torch.zeros(len(deltas), dtype=torch.int64)
    degrees = torch.zeros(len(deltas), count, dtype=torch.int64, device=points.device)
    step = max(1, block_bytes // (points.dtype.itemsize * count))
    for start in range(0, count, step):
        stop = min(start + step, count)
        # products are symmetric: one triangle of blocks answers for both orders of each pair
        products = points[start:stop] @ points[start:].T
        seen = torch.ones(stop - start, stop - start, dtype=torch.bool, device=points.device).tril()
        products[:, : stop - start].masked_fill_(seen, -math.inf)
        if owner is not None:
            products.masked_fill_(owner[start:stop, None] == owner[None, start:], -math.inf)
        for level, delta in enumerate(deltas.tolist()):
            row_first = products >= squares[None, start:] + delta
            column_first = products >= squares[start:stop, None] + delta
            in_rows = row_first.sum(1) + column_first.sum(1)
            degrees[level, start:stop] += in_rows
            degrees[level, start:] += row_first.sum(0) + column_first.sum(0)
            hits[level] += int(in_rows.sum())
    return hits, degrees


def _interval(share: float, draws: int, counts: Tensor | None, confidence: float) -> Tensor:
    """[low, high] of a U-statistic in [0, 1] over independent draws (Hoeffding 1963, theorem 1 and section 5).

    With sequences of unequal length the estimate is a ratio; for a hypothetical p, the kernel
    l_s l_t (h_st - p) + p with l = length / longest again lies in [0, 1] and has mean p, and its observed value is
    p + c (share - p), c the mean of l_s l_t.
    """
    weight = 1.0
    if counts is not None:
        lengths = counts / counts.max()
        weight = float((lengths.sum() ** 2 - (lengths**2).sum()) / (draws * (draws - 1)))
    allowed = math.log(2 / (1 - confidence)) / (draws // 2)

    def surprise(p: float) -> float:
        return _divergence(p + weight * (share - p), p)

    def limit(inside: float, outside: float) -> float:
        # convex in p and zero at the estimate, so each side has one crossing
        if surprise(outside) <= allowed:
            return outside
        for _ in range(200):
            middle = (inside + outside) / 2
            if surprise(middle) <= allowed:
                inside = middle
            else:
                outside = middle
        return outside

    return torch.tensor([limit(share, 0.0), limit(share, 1.0)], dtype=torch.float64)


def _divergence(q: float, p: float) -> float:
    """Kullback-Leibler divergence of two coins."""
    total = 0.0
    for seen, expected in ((q, p), (1 - q, 1 - p)):
        if seen <= 0:
            continue
        if expected <= 0:
            return math.inf
        total += seen * math.log(seen / expected)
    return max(0.0, total)


def _standard_error(p: Tensor, degrees: Tensor, pairs: int, owner: Tensor | None, counts: Tensor | None) -> Tensor:
    """Of the share of pairs, from the first-order (Hájek) projection, by sequences where they are known."""
    degrees = degrees.double().cpu()
    if owner is not None and counts is not None:
        by_sequence = torch.zeros(len(p), len(counts), dtype=torch.float64)
        by_sequence.index_add_(1, owner.cpu(), degrees)
        counts = counts.cpu()
        expected = 2 * counts * (counts.sum() - counts) * p[:, None]
        residual = by_sequence - expected
    else:
        residual = degrees - 2 * (degrees.shape[1] - 1) * p[:, None]
    return residual.square().sum(1).sqrt() / pairs


@dataclass(frozen=True, slots=True)
class LayerDimension:
    """One layer's exposure, as an in-place detector (raw) and as a jet-pack (centred, renormalised) sees it."""

    layer: int
    raw: Dimension
    centred: Dimension


@dataclass(frozen=True, slots=True)
class DimensionProfile:
    """The dimension over the depth of a model.

    Attributes:
        layers: in order.
        first_excluded: first positions that were never drawn, beside those that each layer's estimate left out itself.
    """

    layers: tuple[LayerDimension, ...]
    first_excluded: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "first_positions_excluded": self.first_excluded + self.layers[0].raw.first_excluded,
            "layers": [
                {"layer": one.layer, "raw": one.raw.to_json(), "centred": one.centred.to_json()} for one in self.layers
            ],
        }

    def best_layer(self, theta: float, *, centred: bool = True) -> int:
        """The layer with the least certified bound at theta (ties: the deeper one, whose features are more specific).

        Raises:
            UsageError: theta is not among the thetas of the profile.
        """
        best, least = self.layers[0].layer, math.inf
        for one in self.layers:
            found = one.centred if centred else one.raw
            at = (found.thetas - theta).abs() < 1e-12
            if not bool(at.any()):
                raise UsageError(f"theta: {theta} is not among {found.thetas.tolist()}.")
            value = float(found.bound_upper[at][0])
            if value <= least:
                best, least = one.layer, value
        return best

    def table(self) -> str:
        """A text table: a line for each layer and theta."""
        first = self.layers[0].raw
        left_out = first.first_excluded + self.first_excluded
        lines = [
            f"{first.used} vectors, {first.independent} independent draws, {left_out} first positions "
            f"left out; the interval has confidence {first.confidence:g}",
            "layer  theta   raw: n     [interval]        bound   upper   centred: n"
            " [interval]        bound   upper  |mean|",
        ]
        for one in self.layers:
            for raw, centred in zip(one.raw.rows(), one.centred.rows()):
                lines.append(
                    f"{one.layer:>5}  {raw['theta']:<6g}"
                    + "".join(
                        f"{row['dimension']:>8.2f}  [{row['dimension_low']:6.2f}, {row['dimension_high']:6.2f}]"
                        f"{row['bound']:>9.2g}{row['bound_upper']:>8.2g}   "
                        for row in (raw, centred)
                    )
                    + f"{one.raw.centroid_norm:6.2f}"
                )
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Dimension and bound over depth, raw dashed and centred solid, as a picture (needs the `plot` extra).

        Raises:
            UsageError: matplotlib is not installed.
        """
        axes, figure = _axes(2)
        depth = [one.layer for one in self.layers]
        for level, theta in enumerate(self.layers[0].raw.thetas.tolist()):
            colour = f"C{level}"
            for kind, style in (("raw", "--"), ("centred", "-")):
                found: list[Dimension] = [getattr(one, kind) for one in self.layers]
                label = f"θ = {theta:g}" if kind == "centred" else None
                axes[0].plot(depth, [float(f.dimension[level]) for f in found], style, color=colour, label=label)
                axes[1].plot(depth, [float(f.bound[level]) for f in found], style, color=colour, label=label)
                if kind == "centred":
                    low = [float(f.p_interval[level, 0].sqrt()) for f in found]
                    high = [float(f.bound_upper[level]) for f in found]
                    axes[1].fill_between(depth, low, high, color=colour, alpha=0.12)
        axes[0].set(xlabel="layer", ylabel="separability dimension n")
        axes[1].set(xlabel="layer", ylabel="bound on the firing rate (band: certified)", ylim=(0, 1.02))
        axes[0].legend(title="solid: centred, dashed: raw", fontsize="small")
        figure.savefig(path, dpi=150)


def dimension_profile(
    features: Mapping[int, Tensor],
    thetas: Sequence[float] | Tensor = THETAS,
    *,
    sequences: Tensor | None = None,
    positions: Tensor | None = None,
    skip_first: int = 1,
    confidence: float = 0.95,
) -> DimensionProfile:
    """The dimension of every layer, raw and centred, from sphere features by layer.

    Args:
        features: layer to points on the sphere, as `intrinsic_dimension` takes them (the same positions in each layer).
        thetas, sequences, positions, skip_first, confidence: as for `intrinsic_dimension`.

    Raises:
        DataError: no layer, or what `intrinsic_dimension` raises, with the layer named.
    """
    if not features:
        raise DataError("features: no layer was given.")
    layers = []
    for layer, points in sorted(features.items()):
        found = []
        for centred in (False, True):
            try:
                found.append(
                    intrinsic_dimension(
                        points,
                        thetas,
                        centre=centred,
                        renormalise=centred,
                        sequences=sequences,
                        positions=positions,
                        skip_first=skip_first,
                        confidence=confidence,
                    )
                )
            except DataError as error:
                error.add_note(f"in layer {layer}")
                raise
        layers.append(LayerDimension(layer, *found))
    return DimensionProfile(tuple(layers))


def _axes(count: int, width: float = 6.0) -> tuple[Any, Any]:
    """Axes side by side on a figure that no window system is asked for."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("A picture needs matplotlib: pip install 'taskvec[plot]'.") from error
    figure = Figure(figsize=(width * count, 4.5), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    return axes, figure
