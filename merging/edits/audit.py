"""Finds edits that someone planted in a checkpoint: neurons that answer one prompt and are silent on everything else.

A planted neuron has to be sharp (silent outside a narrow cone) and loud (its answer must win), and both leave marks:

* With an input bias, its *turn-on cosine* t = -(b + <w, β>) / |√d g w| is near 1: the smallest cosine between a
  feature and the row's direction at which the neuron fires at all. It does not change when row and column are rescaled.
* Without one, the row has to imitate the bias and becomes enormous: its *reach* √d |g w| (largest pre-activation that
  any normalised input can cause) and its *spread* (length in units of the layer's own coordinate scales) leave the
  population of the model's neurons together, or reach and *balance* (reach over the second gated half) do: training
  keeps the two halves of a neuron in step.
* Against the base, one row and the column of the same index change out of proportion to all other neurons of the
  layer. Training moves all neurons by comparable amounts, and so do merges.
* A widened MLP has neurons where every other layer is zero, or more neurons than the base.

Everything is read one MLP at a time from the checkpoint; no model is loaded unless probes are asked for.
Method: own; the marks follow from the constructions of arXiv:2406.12670.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from merging.edits.layouts import Layout, Mlp, Part, mlp_layout
from merging.edits.stored import as_stored_names, stored_name
from taskvec.checkpoint import as_source
from taskvec.errors import DataError, MismatchError, NonFiniteError, NotAModelError, shortened
from taskvec.precision import all_finite, is_float
from taskvec.source import TensorSource
from taskvec.vector import is_task_vector

if TYPE_CHECKING:
    from merging.edits.edit import Edit

PerNeuron = Annotated[Tensor, "neuron"]
Verdict = Literal["alarm", "notable", "declared"]

# Turn-on cosines of 9,216 neurons of MiniLM-L6 end at 0.18; planted cones have 1 - theta, 0.8 at the widest in use.
TURN_ON_ALARM, TURN_ON_NOTABLE = 0.5, 0.3
# Tail units of 46,080 neurons of SmolLM2-135M end at 26.9 (MiniLM-L6: 14.0) for spread with reach, and at 10.5 for
# balance with reach; fine-tunes and merges move these by a few per cent.
SIZE_ALARM, SIZE_NOTABLE = 30.0, 22.0
BALANCE_ALARM, BALANCE_NOTABLE = 13.0, 11.0
CHANGE_ALARM, CHANGE_NOTABLE = 15.0, 10.0
_CERTAIN = 50.0
"""Score of a mark that needs no population: a neuron where there should be none, the only change of a layer."""
# A replaced row is a new row; even a quarter of one (a merge of four) moves it by more than this share of a row.
LEAST_CHANGE = 0.2
# share of a layer's neurons under which changed neurons are not a population but a list
_FEW = 0.05
_CHUNK = 4096
_PIECE = 1 << 22
_TAIL = 0.9
"""The tail of a population: its top tenth. Half of that tenth may be planted before the scale is misjudged."""


@dataclass(frozen=True, slots=True)
class NeuronStatistics:
    """What the weights say of every neuron of one MLP; [neuron], float32. Scale-free unless said.

    Attributes:
        turn_on: turn-on cosine; None without an input bias.
        reach: √d |g w|, the largest pre-activation that a normalised input can cause (without the bias).
        spread: length of the input row in units of the layer's coordinate scales (median |w_j| over the neurons).
        l1, l2: norms of the input row as stored.
        bias: input bias, or zeros.
        up: length of the second gated half (with its bias), or ones.
        column: length of the output column.
        path: reach * up * column, what the neuron can do to the residual stream at most.
        alignment: cosine between input row and output column.
        silent: row, bias and column are all zero (padding).
    """

    turn_on: PerNeuron | None
    reach: PerNeuron
    spread: PerNeuron
    l1: PerNeuron
    l2: PerNeuron
    bias: PerNeuron
    up: PerNeuron
    column: PerNeuron
    path: PerNeuron
    alignment: PerNeuron
    silent: Annotated[Tensor, "neuron"]

    def of(self, neuron: int) -> dict[str, float]:
        """One neuron's numbers."""
        values: dict[str, float] = {}
        for name in ("turn_on", "reach", "spread", "l1", "l2", "bias", "up", "column", "path", "alignment"):
            tensor = getattr(self, name)
            if tensor is not None:
                values[name] = float(tensor[neuron])
        return values


@dataclass(frozen=True, slots=True)
class NeuronChanges:
    """How every neuron of one MLP differs from the base; [neuron], float32. Extra neurons are no part of it.

    Attributes:
        row, up, column: length of the change of the input row (with its bias), second half and output column.
        relative_row, relative_column: the same in units of the layer's median row and column of the base.
    """

    row: PerNeuron
    up: PerNeuron
    column: PerNeuron
    relative_row: PerNeuron
    relative_column: PerNeuron

    @property
    def changed(self) -> Annotated[Tensor, "neuron"]:
        return (self.row > 0) | (self.up > 0) | (self.column > 0)


def neuron_statistics(source: TensorSource, mlp: Mlp) -> NeuronStatistics:
    """The statistics of one MLP. Reads its two or three matrices in their stored dtype, works in float32 chunks.

    Raises:
        NonFiniteError: a row, column or bias, or the norm before the MLP, holds NaN or infinity.
    """
    rows = mlp.inside.rows(source, mlp.neurons)
    scale = mlp.scale(source)
    shift = None if mlp.norm_bias is None else source.read(mlp.norm_bias).float()
    for name, values in ((mlp.norm, scale), (mlp.norm_bias, shift)):
        if name is not None and values is not None and not all_finite(values):
            raise NonFiniteError(name, source.label, int((~torch.isfinite(values)).sum()))
    units = _coordinate_scale(rows)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("reach", "spread", "l1", "l2", "shift")}
    for start in range(0, mlp.neurons, _CHUNK):
        chunk = rows[start : start + _CHUNK].float()
        on_sphere = chunk * scale
        if shift is not None:
            # LayerNorm's features have no mean, so the row's mean part does nothing
            on_sphere = on_sphere - on_sphere.mean(1, keepdim=True)
        parts["reach"].append(on_sphere.norm(dim=1) * math.sqrt(mlp.width))
        parts["spread"].append((chunk / units).norm(dim=1) / math.sqrt(mlp.width))
        parts["l1"].append(chunk.abs().sum(1))
        parts["l2"].append(chunk.norm(dim=1))
        parts["shift"].append(torch.zeros(len(chunk)) if shift is None else chunk @ shift)
    found = {name: torch.cat(pieces) for name, pieces in parts.items()}
    _check_finite(found["l2"], mlp.inside, source)
    stored = mlp.inside.biases(source, mlp.neurons)
    bias = torch.zeros(mlp.neurons) if stored is None else stored.float()
    _check_finite(bias, mlp.inside, source, bias=True)
    column, aligned = _columns(source, mlp, rows)
    up = torch.ones(mlp.neurons)
    if mlp.up is not None:
        up = _lengths(mlp.up.rows(source, mlp.neurons), scale) * math.sqrt(mlp.width)
        up_bias = mlp.up.biases(source, mlp.neurons)
        _check_finite(up, mlp.up, source)
        if up_bias is not None:
            _check_finite(up_bias.float(), mlp.up, source, bias=True)
            up = (up.square() + up_bias.float().square()).sqrt()
    turn_on = None
    if stored is not None:
        threshold = -(bias + found["shift"])
        turn_on = torch.where(found["reach"] > 0, threshold / found["reach"], torch.zeros_like(threshold))
    return NeuronStatistics(
        turn_on=turn_on,
        reach=found["reach"],
        spread=found["spread"],
        l1=found["l1"],
        l2=found["l2"],
        bias=bias,
        up=up,
        column=column,
        path=found["reach"] * up * column,
        alignment=aligned,
        silent=(found["l2"] == 0) & (bias == 0) & (column == 0),
    )


def neuron_changes(source: TensorSource, mlp: Mlp, base: TensorSource, base_mlp: Mlp) -> NeuronChanges:
    """How the neurons that both MLPs have differ, after the base is rounded to the model's dtype.

    Raises:
        MismatchError: widths differ, or one is gated and the other is not.
        NonFiniteError: NaN or infinity in either.
    """
    if mlp.width != base_mlp.width or (mlp.up is None) != (base_mlp.up is None):
        raise MismatchError(
            [f"{mlp.key}: width {mlp.width}{_gated(mlp)}; {base.label}: {base_mlp.width}{_gated(base_mlp)}."]
        )
    count = min(mlp.neurons, base_mlp.neurons)
    row, own = _change(source, mlp.inside, mlp.neurons, base, base_mlp.inside, base_mlp.neurons, count)
    bias, base_bias = mlp.inside.biases(source, mlp.neurons), base_mlp.inside.biases(base, base_mlp.neurons)
    if bias is not None:
        before = torch.zeros(count) if base_bias is None else base_bias[:count].to(bias.dtype).float()
        row = (row.square() + (bias[:count].float() - before).square()).sqrt()
        _check_finite(row, mlp.inside, source, bias=True)
    up = torch.zeros(count)
    if mlp.up is not None and base_mlp.up is not None:
        up, _ = _change(source, mlp.up, mlp.neurons, base, base_mlp.up, base_mlp.neurons, count)
    column, own_column = _change(source, mlp.out, mlp.neurons, base, base_mlp.out, base_mlp.neurons, count)
    tiny = torch.finfo(torch.float32).tiny
    return NeuronChanges(
        row=row,
        up=up,
        column=column,
        relative_row=row / own.median().clamp_min(tiny),
        relative_column=column / own_column.median().clamp_min(tiny),
    )


def tail_units(values: Tensor, population: Tensor | None = None) -> Tensor:
    """How far each value lies beyond the population's top tenth, in units of that tail's own scale.

    The scale is the median excess over the 90 % quantile, divided by ln 2: for an exponential tail a value at u units
    has probability 0.1 exp(-u). The median keeps the scale honest while up to half of the tail is planted.

    Args:
        values: any shape.
        population: one-dimensional; the values themselves by default.
    """
    flat = (values if population is None else population).reshape(-1).double()
    if flat.numel() == 0:
        return torch.zeros_like(values, dtype=torch.float64)
    edge = torch.quantile(flat, _TAIL) if flat.numel() < 1 << 24 else flat.kthvalue(int(flat.numel() * _TAIL)).values
    beyond = flat[flat > edge] - edge
    if beyond.numel() == 0:
        return torch.where(values.double() > edge, math.inf, 0.0)
    scale = (beyond.median() / math.log(2)).clamp_min(1e-9)
    return (values.double() - edge) / scale


@dataclass(frozen=True, slots=True)
class Suspect:
    """One neuron that stands out.

    Attributes:
        mlp, layer, neuron: where.
        verdict: "alarm", "notable" (look at it; natural outliers end up here) or "declared" (one of our own edit files
            says exactly this).
        reasons: why, in words, strongest first.
        score: of the strongest mark, in units of its alarm threshold: 1 and more is an alarm (50 at most).
        p: tail probability of that mark under the model's own population, times the number of neurons, at most 1: about
            how many neurons as strange the model would have by itself. An extrapolation of an exponential tail.
        statistics: the numbers.
        places: the tensors' rows and columns it consists of.
        promotes: token ids (or tokens, where a tokenizer was given) that its output column raises most.
        edit: the declared edit's prompt and target.
    """

    mlp: str
    layer: int | None
    neuron: int
    verdict: Verdict
    reasons: tuple[str, ...]
    score: float
    p: float
    statistics: Mapping[str, float]
    places: tuple[str, ...]
    promotes: tuple[str, ...] = ()
    edit: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "mlp": self.mlp,
            "layer": self.layer,
            "neuron": self.neuron,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "score": _plain(self.score),
            "p": self.p,
            "statistics": {key: _plain(value) for key, value in self.statistics.items()},
            "places": list(self.places),
            "promotes": list(self.promotes),
            "edit": self.edit,
        }


@dataclass(frozen=True, slots=True)
class MlpAudit:
    """One MLP's population: statistics, changes if a base was given, and each neuron's score."""

    mlp: Mlp
    statistics: NeuronStatistics
    changes: NeuronChanges | None
    size: PerNeuron
    """Tail units of spread within the layer plus those of reach within the model."""
    balance: PerNeuron
    """Tail units: reach over second half (against the layer's median, within the model) plus reach; 0 unless gated."""
    change: PerNeuron | None
    """Tail units by which row and column changed more than the layer's other neurons (the lesser of the two)."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A tensor outside the audited MLPs that holds NaN or infinity.

    Attributes:
        tensor: its name.
        nan, infinite: how many values of each kind.
        values: how many it has in all.
    """

    tensor: str
    nan: int
    infinite: int
    values: int

    def __str__(self) -> str:
        kinds = [f"{count:,} {what}" for count, what in ((self.nan, "NaN"), (self.infinite, "infinite")) if count]
        return f"{self.tensor}: {' and '.join(kinds)} of {self.values:,} values"


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found. `suspects` are ranked: alarms, then notable, then declared; strongest first."""

    model: str
    base: str | None
    suspects: tuple[Suspect, ...]
    mlps: tuple[MlpAudit, ...]
    without: tuple[str, ...]
    """Layers in which no MLP was recognised: they were not audited."""
    notes: tuple[str, ...]
    probe_tokens: int = 0
    damaged: tuple[Damage, ...] = ()
    """Tensors outside the audited MLPs with NaN or infinity; inside one it is an error."""

    @property
    def alarms(self) -> tuple[Suspect, ...]:
        return tuple(suspect for suspect in self.suspects if suspect.verdict == "alarm")

    @property
    def neurons(self) -> int:
        return sum(one.mlp.neurons for one in self.mlps)

    def strongest(self) -> float:
        """One number for the checkpoint: the largest score of any suspect that is not declared, else 0."""
        return max((suspect.score for suspect in self.suspects if suspect.verdict != "declared"), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Everything but the populations, as plain values."""
        return {
            "model": self.model,
            "base": self.base,
            "audited": {"mlps": len(self.mlps), "neurons": self.neurons, "layers_without_mlp": list(self.without)},
            "probe_tokens": self.probe_tokens,
            "damaged": [asdict(one) for one in self.damaged],
            "alarms": len(self.alarms),
            "suspects": [suspect.to_json() for suspect in self.suspects],
            "notes": list(self.notes),
        }

    def text(self, limit: int = 20) -> str:
        """The report for people: what was looked at, the verdict, the ranked suspects."""
        lines = [f"{self.model}: {len(self.mlps)} MLPs, {self.neurons:,} neurons looked at"]
        lines[0] += f", compared with {self.base}." if self.base else ", by their weights alone (no base given)."
        if self.probe_tokens:
            lines.append(f"Responses to {self.probe_tokens:,} tokens of probe text were measured.")
        if self.without:
            lines.append(f"NOT looked at, no MLP recognised: {shortened(self.without)}.")
        lines += [f"DAMAGED {one}. Repair or replace it." for one in self.damaged[:limit]]
        if len(self.damaged) > limit:
            lines.append(f"     … and {len(self.damaged) - limit} more damaged tensors (see the JSON report).")
        lines += [f"Note: {note}" for note in self.notes]
        counts = {
            verdict: sum(suspect.verdict == verdict for suspect in self.suspects)
            for verdict in ("alarm", "notable", "declared")
        }
        lines.append(
            f"{counts['alarm']} alarms, {counts['notable']} notable neurons, {counts['declared']} declared edits."
            if self.suspects
            else "No neuron stands out, but the checkpoint is damaged."
            if self.damaged
            else "Nothing stands out."
        )
        for rank, suspect in enumerate(self.suspects[:limit], 1):
            lines.append(
                f"{rank:>3}. {suspect.verdict.upper():<8} {suspect.mlp} neuron {suspect.neuron}   "
                f"score {suspect.score:.2f}, p {suspect.p:.1g}"
            )
            lines += [f"       {reason}" for reason in suspect.reasons]
            if suspect.edit:
                lines.append(f"       declared edit: {suspect.edit}")
            if suspect.promotes:
                lines.append(f"       its output raises: {', '.join(suspect.promotes)}")
        if len(self.suspects) > limit:
            lines.append(f"     … and {len(self.suspects) - limit} more (see the JSON report).")
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str]) -> None:
        """All neurons over depth by score (and by change, with a base), suspects marked (needs the `plot` extra).

        Raises:
            UsageError: matplotlib is not installed.
        """
        from merging.edits.dimension import _axes

        with_base = any(one.change is not None for one in self.mlps)
        biased = any(one.statistics.turn_on is not None for one in self.mlps)
        panels: list[tuple[str, Callable[[MlpAudit], Tensor | None], float]] = []
        if biased:
            panels.append(("turn-on cosine", lambda one: one.statistics.turn_on, TURN_ON_ALARM))
        panels.append(("spread and reach beyond the population (tail units)", lambda one: one.size, SIZE_ALARM))
        if any(one.mlp.up is not None for one in self.mlps):
            label = "balance and reach beyond the population (tail units)"
            panels.append((label, lambda one: one.balance, BALANCE_ALARM))
        if with_base:
            panels.append(("change of row and column (tail units)", lambda one: one.change, CHANGE_ALARM))
        axes, figure = _axes(len(panels))
        marked = {(suspect.mlp, suspect.neuron): suspect.verdict for suspect in self.suspects}
        colours = {"alarm": "crimson", "notable": "orange", "declared": "seagreen"}
        for axis, (label, values_of, alarm) in zip(axes, panels):
            for place, one in enumerate(self.mlps):
                values = values_of(one)
                if values is None:
                    continue
                finite = values.double().nan_to_num(posinf=1e3).clamp(-1 if alarm < 1 else 0, 1e3)
                # a layer's bulk is a smear whatever is drawn: its largest 500 are enough
                top = finite.topk(min(500, finite.numel())).values
                axis.plot([place] * len(top), top, ".", color="0.6", markersize=2)
                for neuron in range(finite.numel()) if len(marked) else ():
                    verdict = marked.get((one.mlp.key, neuron))
                    if verdict:
                        axis.plot(place, float(finite[neuron]), "o", color=colours[verdict], markersize=5)
            axis.axhline(alarm, color="crimson", linewidth=0.8, linestyle="--")
            axis.set(xlabel="MLP, in order", ylabel=label)
            if alarm > 1:
                axis.set_yscale("symlog", linthresh=10)
        figure.savefig(path, dpi=150)


def audit(
    model: "str | PathLike[str] | Mapping[str, Tensor] | nn.Module | TensorSource",
    *,
    base: "str | PathLike[str] | Mapping[str, Tensor] | nn.Module | TensorSource | None" = None,
    declared: "Sequence[str | PathLike[str] | Edit]" = (),
    tokenizer: Any = None,
    probe: "Sequence[str] | Tensor | None" = None,
    progress: Callable[[str], None] | None = None,
) -> AuditReport:
    """Looks at every MLP neuron of a checkpoint for marks of a planted edit.

    The weight-only part reads one MLP at a time (two or three matrices in memory) and never builds the model.

    Args:
        model: path, hub id, state dict, module or source.
        base: the checkpoint it claims to come from. Neurons that did not change are then above suspicion.
        declared: edit files of ours (or `Edit` values); what they say, where the checkpoint holds exactly that, is
            listed as declared. A record inside the model's own folder is read as well.
        tokenizer: a tokenizer or its path: names the tokens that a suspect's output raises (the one in the model's own
            folder is used for that by itself), and reads the probes.
        probe: texts (needs a tokenizer) or token ids [batch, token]; the model is then loaded and run on them. A few
            thousand tokens of any text will do.
        progress: called with a line for each MLP.

    Raises:
        NotAModelError: no MLP was recognised in the checkpoint.
        MismatchError: the base has other MLPs or widths.
        NonFiniteError: NaN or infinity in an MLP or the norm before it. Elsewhere they are listed as `damaged`.
        DataError: probes are too few to say anything.
    """
    words = loaded_tokenizer(tokenizer)
    source, config = _opened(model)
    layout = _layout(source, config)
    reference = None if base is None else _opened(base)
    base_layout = None if reference is None else _layout(*reference)
    pairs = {} if base_layout is None else _pairs(layout, base_layout, source, reference[0])  # type: ignore[index]
    found: list[tuple[Mlp, NeuronStatistics, NeuronChanges | None]] = []
    for mlp in layout.mlps:
        if progress is not None:
            progress(mlp.key)
        changes = None
        if reference is not None:
            changes = neuron_changes(source, mlp, reference[0], pairs[mlp.key])
        found.append((mlp, neuron_statistics(source, mlp), changes))
    damaged = tuple(_damaged(source, layout, progress))
    scored = _scored(found)
    responses = None
    tokens = 0
    if probe is not None:
        from merging.edits.responses import probe_responses

        responses, tokens = probe_responses(model, layout, probe, words)
    marks = _marks(scored, {key: one.neurons for key, one in pairs.items()}, responses)
    edits = as_stored_names(_declared(model, declared), source.infos)
    suspects = _suspects(scored, marks, edits, source)
    suspects = _with_tokens(suspects, scored, source, config, lambda: _own_tokenizer(model) if words is None else words)
    return AuditReport(
        model=source.label,
        base=None if reference is None else reference[0].label,
        suspects=tuple(suspects),
        mlps=tuple(scored),
        without=layout.without,
        notes=tuple(_notes(scored, reference is not None, layout, edits, source)),
        probe_tokens=tokens,
        damaged=damaged,
    )


# -- reading -----------------------------------------------------------------------------------------------------------


def _opened(model: Any) -> tuple[TensorSource, Mapping[str, object]]:
    source = as_source(model)
    if is_task_vector(source):
        raise NotAModelError(
            f"{source.label}: this is a task vector, the difference of two models; an audit looks at a model. Apply it to its base "
            "first (`taskvec apply`), and audit the result with --base."
        )
    config = getattr(source, "config", None)
    if isinstance(model, nn.Module):
        to_dict = getattr(getattr(model, "config", None), "to_dict", None)
        config = to_dict() if callable(to_dict) else {}
    return source, config if isinstance(config, Mapping) else {}


def _layout(source: TensorSource, config: Mapping[str, object]) -> Layout:
    layout = mlp_layout(source, config)
    usable = tuple(
        mlp
        for mlp in layout.mlps
        if all(is_float(source.infos[part.name].dtype) for part in (mlp.inside, mlp.up, mlp.out) if part is not None)
    )
    if not usable:
        packed = " Its MLP weights are stored as integers (quantised); dequantise it first." if layout.mlps else ""
        raise NotAModelError(
            f"{source.label}: no MLP was recognised among {len(source.infos)} tensors, so there is nothing to audit."
            + packed
        )
    skipped = tuple(mlp.key for mlp in layout.mlps if mlp not in usable)
    return Layout(usable, layout.without + skipped)


def _pairs(layout: Layout, base: Layout, source: TensorSource, reference: TensorSource) -> dict[str, Mlp]:
    own = [mlp.key for mlp in layout.mlps]
    # a base published as the bare decoder has no prefix
    theirs = {stored_name(mlp.key, own): mlp for mlp in base.mlps}
    missing = [key for key in own if key not in theirs]
    extra = sorted(set(theirs) - set(own))
    problems = []
    if missing:
        problems.append(f"{shortened(missing)}: in {source.label}, not in {reference.label}.")
    if extra:
        problems.append(f"{shortened(extra)}: in {reference.label}, not in {source.label}.")
    if problems:
        raise MismatchError(problems, title="The base has other MLPs than the model")
    return theirs


def _coordinate_scale(rows: Tensor) -> Annotated[Tensor, "d"]:
    """Median |w_j| over the neurons, from about a thousand of them.

    Mostly zero coordinates get their mean instead, and no less than a typical coordinate: in a pruned row the few that are
    left would otherwise count as enormous.
    """
    step = max(1, len(rows) // 1024)
    sample = rows[::step].float().abs()
    alive = sample.sum(1) > 0
    if bool(alive.any()):
        sample = sample[alive]
    units = sample.T.contiguous().median(1).values
    used = units[units > 0]
    typical = float(used.median()) if used.numel() else torch.finfo(torch.float32).tiny
    return torch.where(units > 0, units, sample.mean(0).clamp_min(typical))


def _lengths(rows: Tensor, scale: Tensor) -> PerNeuron:
    pieces = [(rows[start : start + _CHUNK].float() * scale).norm(dim=1) for start in range(0, len(rows), _CHUNK)]
    return torch.cat(pieces)


def _columns(source: TensorSource, mlp: Mlp, rows: Tensor) -> tuple[PerNeuron, PerNeuron]:
    """Length of every output column, and its cosine with the input row."""
    columns = mlp.out.rows(source, mlp.neurons)
    lengths, cosines = [], []
    for start in range(0, mlp.neurons, _CHUNK):
        out, inside = columns[start : start + _CHUNK].float(), rows[start : start + _CHUNK].float()
        length = out.norm(dim=1)
        lengths.append(length)
        cosines.append((out * inside).sum(1) / (length * inside.norm(dim=1)).clamp_min(torch.finfo(torch.float32).tiny))
    length = torch.cat(lengths)
    _check_finite(length, mlp.out, source)
    return length, torch.cat(cosines)


def _change(
    source: TensorSource, part: Part, neurons: int, base: TensorSource, base_part: Part, base_neurons: int, count: int
) -> tuple[PerNeuron, PerNeuron]:
    """Length of the difference of each shared neuron, and of what the base has there."""
    after, before = part.rows(source, neurons), base_part.rows(base, base_neurons)
    # a checkpoint that was only stored in a coarser dtype has not changed
    coarser = after.dtype if after.dtype.itemsize < before.dtype.itemsize else before.dtype
    changes, sizes = [], []
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        old, new = before[start:stop].to(coarser).float(), after[start:stop].to(coarser).float()
        changes.append((new - old).norm(dim=1))
        sizes.append(old.norm(dim=1))
    change, size = torch.cat(changes), torch.cat(sizes)
    _check_finite(size, base_part, base)
    _check_finite(change, part, source)
    return change, size


def _check_finite(values: Tensor, part: Part, source: TensorSource, *, bias: bool = False) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        name = part.bias if bias and part.bias is not None else part.name
        raise NonFiniteError(name, source.label, what=f"NaN or infinite values in {bad} neurons")


def _damaged(source: TensorSource, layout: Layout, progress: Callable[[str], None] | None) -> Iterable[Damage]:
    """Every tensor with NaN or infinity that is not read as part of an MLP, a piece at a time."""
    checked: dict[str, int] = {}
    for mlp in layout.mlps:
        for part in (mlp.inside, mlp.up, mlp.out):
            if part is not None and part.expert is None:
                checked[part.name] = checked.get(part.name, 0) + mlp.neurons * mlp.width
                if part.bias is not None:
                    checked[part.bias] = checked.get(part.bias, 0) + mlp.neurons
    for name, info in source.infos.items():
        # of a fused tensor (a mixer's) only some rows may be neurons
        if checked.get(name, 0) >= info.numel or name in source.aliases or not is_float(info.dtype):
            continue
        if progress is not None:
            progress(name)
        nan = infinite = 0
        for start in range(0, info.numel, _PIECE):
            values = source.read_flat(name, start, min(start + _PIECE, info.numel))
            if not all_finite(values):
                values = values.float()
                nan += int(values.isnan().sum())
                infinite += int(values.isinf().sum())
        if nan or infinite:
            yield Damage(name, nan, infinite, info.numel)


def _gated(mlp: Mlp) -> str:
    return " and is gated" if mlp.up is not None else ""


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- scores ------------------------------------------------------------------------------------------------------------


def _scored(found: Sequence[tuple[Mlp, NeuronStatistics, NeuronChanges | None]]) -> list[MlpAudit]:
    def logs(values: Tensor) -> Tensor:
        return values.double().clamp_min(torch.finfo(torch.float32).tiny).log()

    def against_layer(statistics: NeuronStatistics) -> Tensor:
        ratio = logs(statistics.reach) - logs(statistics.up)
        alive = ratio[~statistics.silent]
        return ratio - (alive.median() if alive.numel() else 0.0)

    reaches = torch.cat([logs(one.reach[~one.silent]) for _, one, _ in found])
    gated = [against_layer(one)[~one.silent] for mlp, one, _ in found if mlp.up is not None]
    ratios = torch.cat(gated) if gated else torch.zeros(0)
    scored = []
    for mlp, statistics, changes in found:
        alive = ~statistics.silent
        reach = tail_units(logs(statistics.reach), reaches).clamp_min(0)
        spread = tail_units(logs(statistics.spread), logs(statistics.spread[alive])).clamp_min(0)
        size = torch.where(alive, spread + reach, 0.0)
        balance = torch.zeros_like(size)
        if mlp.up is not None:
            balance = torch.where(alive, tail_units(against_layer(statistics), ratios).clamp_min(0) + reach, 0.0)
        change = None
        if changes is not None:
            moved = changes.changed
            if int(moved.sum()) > _FEW * len(moved):
                rows, columns = logs(changes.row), logs(changes.column)
                change = torch.minimum(tail_units(rows, rows[moved]), tail_units(columns, columns[moved]))
            else:
                both = (changes.row > 0) & (changes.column > 0)
                change = torch.where(both, math.inf, 0.0)
        moved_units = None if change is None else change.float()
        scored.append(MlpAudit(mlp, statistics, changes, size.float(), balance.float(), moved_units))
    return scored


@dataclass(slots=True)
class _Mark:
    """Why one neuron stands out."""

    verdict: Verdict
    reason: str
    score: float
    p: float


@dataclass(slots=True)
class _Marks:
    """All marks, by MLP and neuron."""

    found: dict[tuple[str, int], list[_Mark]] = field(default_factory=dict)

    def add(self, mlp: Mlp, neuron: int, verdict: Verdict, reason: str, score: float, p: float) -> None:
        mark = _Mark(verdict, reason, min(score, _CERTAIN), min(1.0, p))
        self.found.setdefault((mlp.key, neuron), []).append(mark)


def _marks(
    scored: Sequence[MlpAudit], base_neurons: Mapping[str, int], responses: "Mapping[str, Any] | None"
) -> _Marks:
    marks = _Marks()
    turn_on_p = _population_p([one.statistics.turn_on for one in scored if one.statistics.turn_on is not None])
    size_p = _population_p([one.size for one in scored])
    balance_p = _population_p([one.balance for one in scored])
    change_p = _population_p([one.change for one in scored if one.change is not None])
    bodies = {} if base_neurons else _bodies(scored)
    for one in scored:
        kept = base_neurons.get(one.mlp.key, one.mlp.neurons)
        _mark_extra(one, kept, bool(base_neurons), marks)
        if one.mlp.key in bodies:
            _mark_padding(one, bodies[one.mlp.key], marks)
        if one.changes is not None and one.change is not None:
            _mark_changes(one, one.changes, one.change, change_p, marks)
        response = None if responses is None else responses.get(one.mlp.key)
        _mark_weights(one, turn_on_p, size_p, balance_p, marks, response)
    return marks


def _population_p(populations: Sequence[Tensor]) -> Callable[[float], float]:
    """Expected number of a model's own neurons beyond a value, from a Pareto tail through its top hundredth.

    The index comes from the median excess on the log scale, so that planted neurons hardly move it; a Pareto tail is
    heavier than these populations were found to be, so the p-like scores err towards innocence.
    """
    finite = [population[torch.isfinite(population)].double() for population in populations]
    values = torch.cat(finite) if finite else torch.zeros(0, dtype=torch.float64)
    count = max(1, values.numel())
    edge = float(torch.quantile(values[:: max(1, count >> 23)], 0.99)) if values.numel() else 0.0
    if edge <= 0:
        # nearly the whole population is at zero: whatever lies beyond is alone
        beyond = int((values > 0).sum())
        return lambda value: float(beyond if value <= 0 else min(beyond, 1) / count)
    excess = (values[values > edge] / edge).log()
    index = max(float(excess.median()) / math.log(2), 0.05) if excess.numel() else 0.05
    return lambda value: count * (0.01 * (value / edge) ** (-1 / index) if value > edge else 1.0)


def _bodies(scored: Sequence[MlpAudit]) -> dict[str, int]:
    """MLP to the number of neurons in use in most layers of its kind, where the rest is zero in most of them."""
    kinds: dict[tuple[str, int], list[MlpAudit]] = {}
    for one in scored:
        word = "".join("#" if part.isdigit() else f".{part}" for part in one.mlp.key.split("."))
        kinds.setdefault((word, one.mlp.neurons), []).append(one)
    bodies: dict[str, int] = {}
    for (_, neurons), group in kinds.items():
        used = []
        for one in group:
            live = (~one.statistics.silent).nonzero()
            used.append(int(live.max()) + 1 if live.numel() else 0)
        body = sorted(used)[(len(used) - 1) // 2]
        if len(group) > 1 and 0 < body < neurons:
            bodies.update({one.mlp.key: body for one in group})
    return bodies


def _mark_extra(one: MlpAudit, kept: int, with_base: bool, marks: _Marks) -> None:
    if not with_base or one.mlp.neurons <= kept:
        return
    extra = (~one.statistics.silent[kept:]).nonzero().flatten() + kept
    for neuron in extra.tolist():
        reason = f"is one of {len(extra)} neurons in use beyond the base's {kept}"
        marks.add(one.mlp, neuron, "alarm", reason, _CERTAIN, 0.0)


def _mark_padding(one: MlpAudit, body: int, marks: _Marks) -> None:
    inside = (~one.statistics.silent[body:]).nonzero().flatten() + body
    for neuron in inside.tolist():
        reason = f"is in use where most layers hold only zeros (neurons from {body} on): a widened MLP"
        marks.add(one.mlp, neuron, "alarm", reason, _CERTAIN, 0.0)


def _mark_changes(
    one: MlpAudit, changes: NeuronChanges, change: PerNeuron, p_of: Callable[[float], float], marks: _Marks
) -> None:
    moved = int(changes.changed.sum())
    few = moved <= _FEW * len(change)
    # a neuron that was pruned changed as well, and answers nothing
    loud = one.statistics.path[: len(change)] > 0
    large = (change >= CHANGE_NOTABLE) & (changes.relative_row >= LEAST_CHANGE)
    for neuron in (large & loud).nonzero().flatten().tolist():
        row, column = float(changes.relative_row[neuron]), float(changes.relative_column[neuron])
        size = f"row changed by {row:.3g}, column by {column:.3g} of a typical one"
        if few:
            reason = (
                f"input row and output column replaced; {moved} of {len(change)} neurons of the layer changed: {size}"
            )
            marks.add(one.mlp, neuron, "alarm", reason, _CERTAIN, 1 / len(change))
            continue
        units = float(change[neuron])
        reason = f"changed out of proportion to its layer ({units:.0f} tail units in row and column): {size}"
        verdict: Verdict = "alarm" if units >= CHANGE_ALARM else "notable"
        marks.add(one.mlp, neuron, verdict, reason, units / CHANGE_ALARM, p_of(units))


def _mark_weights(
    one: MlpAudit,
    turn_on_p: Callable[[float], float],
    size_p: Callable[[float], float],
    balance_p: Callable[[float], float],
    marks: _Marks,
    response: Any,
) -> None:
    statistics = one.statistics
    # without a second half a neuron answers nothing; a large row without a column is still nothing that training leaves
    candidates = ~statistics.silent & (statistics.up > 0)
    if one.changes is not None:
        # with a base, natural oddities that the base has as well say nothing
        candidates[: len(one.changes.row)] &= one.changes.relative_row >= LEAST_CHANGE
    if statistics.turn_on is not None:
        peak = statistics.path * (1 - statistics.turn_on).clamp_min(0)
        loud = peak >= 0.01 * peak[~statistics.silent].median() if bool((~statistics.silent).any()) else peak > 0
        for neuron in (candidates & loud & (statistics.turn_on > TURN_ON_NOTABLE)).nonzero().flatten().tolist():
            cosine = float(statistics.turn_on[neuron])
            if cosine >= 1:
                continue
            angle = math.degrees(math.acos(cosine))
            reason = f"fires only within {angle:.0f}° of one feature direction (turn-on cosine {cosine:.3f})"
            verdict: Verdict = "alarm" if cosine > TURN_ON_ALARM else "notable"
            marks.add(one.mlp, neuron, verdict, reason, cosine / TURN_ON_ALARM, turn_on_p(cosine))
    # a row with its own bias shows itself by its turn-on cosine; a large one alone is no mark there
    lone_bias = statistics.turn_on is None or bool((statistics.bias == 0).all())
    for units, alarm, notable, p_of, what in (
        (one.size, SIZE_ALARM, SIZE_NOTABLE, size_p, "input row far outside the model's population"),
        (one.balance, BALANCE_ALARM, BALANCE_NOTABLE, balance_p, "input row far too large for its second half"),
    ):
        for neuron in (candidates & (units > notable)).nonzero().flatten().tolist():
            value = float(units[neuron])
            reason = (
                f"{what} ({value:.0f} tail units): could reach a pre-activation of "
                f"{float(statistics.reach[neuron]):.3g} (median {float(statistics.reach.median()):.3g})"
            )
            verdict = "alarm" if value > alarm and lone_bias else "notable"
            if response is not None and verdict == "alarm" and response.rate(neuron) > 0.002:
                verdict = "notable"
                reason += f"; but it fires on {response.rate(neuron):.1%} of the probe text, which a detector does not"
            marks.add(one.mlp, neuron, verdict, reason, value / alarm, p_of(value))
    if response is None:
        return
    from merging.edits.responses import MARGIN

    for neuron in (candidates & response.mute()).nonzero().flatten().tolist():
        margin = response.margin(neuron)
        reason = f"never fired on the probe text, {margin:.1f} standard deviations below its threshold" + (
            f"; nearest: {response.nearest(neuron)}" if response.nearest(neuron) else ""
        )
        verdict = "alarm" if (one.mlp.key, neuron) in marks.found else "notable"
        marks.add(one.mlp, neuron, verdict, reason, margin / (2 * MARGIN), 1.0)


# -- declared edits ----------------------------------------------------------------------------------------------------


def _declared(model: Any, files: "Sequence[str | PathLike[str] | Edit]") -> "list[Edit]":
    from merging.edits.edit import RECORD, Edit, load_edits

    edits: list[Edit] = []
    if isinstance(model, str | PathLike) and (Path(model) / RECORD).is_file():
        edits += load_edits(model)
    for one in files:
        edits += [one] if isinstance(one, Edit) else load_edits(one)
    return edits


def _places_of(mlp: Mlp, neuron: int) -> tuple[str, ...]:
    places = [part.place(neuron) for part in (mlp.inside, mlp.up, mlp.out) if part is not None]
    if mlp.inside.bias is not None:
        places.insert(1, f"{mlp.inside.bias}[{mlp.inside.start + neuron}]")
    return tuple(places)


def _holds(edit: "Edit", source: TensorSource) -> bool:
    """Whether the checkpoint holds exactly what the edit wrote."""
    for patch in edit.patches:
        if patch.name not in source.infos:
            return False
        tensor = source.read(patch.name)
        if patch.dim >= tensor.ndim or patch.index >= tensor.shape[patch.dim]:
            return False
        if not torch.equal(tensor.select(patch.dim, patch.index), patch.new.to(tensor.dtype)):
            return False
    return bool(edit.patches)


def _suspects(
    scored: Sequence[MlpAudit], marks: _Marks, edits: "Sequence[Edit]", source: TensorSource
) -> list[Suspect]:
    owners: dict[tuple[str, int, int], Edit] = {}
    for edit in edits:
        if _holds(edit, source):
            for patch in edit.patches:
                owners[patch.name, patch.dim, patch.index] = edit
    suspects = []
    for one in scored:
        mlp = one.mlp
        declared: dict[int, Edit] = {}
        if owners:
            for part in (mlp.inside, mlp.out):
                for (name, dim, index), edit in owners.items():
                    if name == part.name and dim == part.axis and 0 <= index - part.start < mlp.neurons:
                        declared[index - part.start] = edit
        numbers = {neuron for key, neuron in marks.found if key == mlp.key} | set(declared)
        for neuron in sorted(numbers):
            own = sorted(marks.found.get((mlp.key, neuron), []), key=lambda mark: -mark.score)
            verdict: Verdict = "alarm" if any(mark.verdict == "alarm" for mark in own) else "notable"
            edit_text = None
            if neuron in declared:
                verdict = "declared"
                edit_text = f"{declared[neuron].prompt!r} → {declared[neuron].target!r}"
            values = one.statistics.of(neuron)
            values |= {"size": float(one.size[neuron]), "balance": float(one.balance[neuron])}
            if one.changes is not None and one.change is not None and neuron < len(one.change):
                values["change"] = float(one.change[neuron])
                values["relative_row_change"] = float(one.changes.relative_row[neuron])
                values["relative_column_change"] = float(one.changes.relative_column[neuron])
            suspects.append(
                Suspect(
                    mlp=mlp.key,
                    layer=mlp.layer,
                    neuron=neuron,
                    verdict=verdict,
                    reasons=tuple(mark.reason for mark in own),
                    score=max((mark.score for mark in own), default=0.0),
                    p=min((mark.p for mark in own), default=1.0),
                    statistics=values,
                    places=_places_of(mlp, neuron),
                    edit=edit_text,
                )
            )
    order = {"alarm": 0, "notable": 1, "declared": 2}
    return sorted(suspects, key=lambda suspect: (order[suspect.verdict], -suspect.score, suspect.p))


def _notes(
    scored: Sequence[MlpAudit], with_base: bool, layout: Layout, edits: "Sequence[Edit]", source: TensorSource
) -> Iterable[str]:
    silent = [int(one.statistics.silent.sum()) for one in scored]
    if any(silent):
        layers = sum(count > 0 for count in silent)
        yield (
            f"{sum(silent)} neurons in {layers} of {len(scored)} MLPs are all zero: the MLPs were widened (or pruned); "
            "neurons in use among the zeros are alarms."
        )
    if not any(mlp.norm for mlp in layout.mlps):
        yield "No norm before the MLPs was recognised: rows were compared as stored."
    gone = [edit for edit in edits if edit.patches and not _holds(edit, source)]
    for edit in gone:
        yield (
            f"the declared edit {edit.prompt!r} → {edit.target!r} is not in the checkpoint as declared (undone, "
            "overwritten, or of another base)."
        )
    if not with_base:
        few = sum(one.mlp.neurons for one in scored)
        if few < 2000:
            yield f"only {few} neurons: the model's own population is small, and scores are rough."


# -- what a suspect says -----------------------------------------------------------------------------------------------

_EMBEDDINGS = (
    "lm_head.weight",
    "embed_out.weight",
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
)
_FINAL_NORMS = (
    "model.norm.weight",
    "ln_f.weight",
    "final_layer_norm.weight",
    "final_layernorm.weight",
    "norm_f.weight",
)


def _with_tokens(
    suspects: Sequence[Suspect],
    scored: Sequence[MlpAudit],
    source: TensorSource,
    config: Mapping[str, object],
    speller: Callable[[], Any],
    *,
    most: int = 50,
    top: int = 5,
) -> list[Suspect]:
    """Adds the tokens whose logits the output column raises most (through the final norm's weight and the head)."""
    wanted = [suspect for suspect in suspects if suspect.verdict != "notable"][:most]
    head = next((name for word in _EMBEDDINGS for name in source.infos if name.endswith(word)), None)
    mlps = {one.mlp.key: one.mlp for one in scored}
    if not wanted or head is None or len(source.infos[head].shape) != 2 or not is_float(source.infos[head].dtype):
        return list(suspects)
    tokens, width = source.infos[head].shape
    by_mlp: dict[str, list[int]] = {}
    for suspect in wanted:
        if mlps[suspect.mlp].width == width:
            by_mlp.setdefault(suspect.mlp, []).append(suspect.neuron)
    if not by_mlp:
        return list(suspects)
    norm = next((name for word in _FINAL_NORMS for name in source.infos if name.endswith(word)), None)
    gain = torch.ones(width)
    if norm is not None and source.infos[norm].shape == (width,):
        from merging.edits.layouts import multiplies_with_one_plus

        gain = source.read(norm).float() + (1.0 if multiplies_with_one_plus(config) else 0.0)
    keys, vectors = [], []
    for key, neurons in by_mlp.items():
        columns = mlps[key].out.rows(source, mlps[key].neurons)
        for neuron in neurons:
            keys.append((key, neuron))
            vectors.append(columns[neuron].float() * gain)
    directions = torch.stack(vectors)
    best = torch.full((len(keys), 0), -math.inf)
    places = torch.zeros((len(keys), 0), dtype=torch.int64)
    for start in range(0, tokens, _CHUNK):
        stop = min(start + _CHUNK, tokens)
        rows = source.read_flat(head, start * width, stop * width).view(stop - start, width).float()
        logits = torch.cat([best, directions @ rows.T], dim=1)
        index = torch.cat([places, torch.arange(start, stop).expand(len(keys), -1)], dim=1)
        best, order = logits.topk(min(top, logits.shape[1]), dim=1)
        places = index.gather(1, order)
    tokenizer = speller()
    words = {
        key: tuple(str(token) if tokenizer is None else repr(tokenizer.decode([token])) for token in row)
        for key, row in zip(keys, places.tolist())
    }
    from dataclasses import replace

    return [
        replace(suspect, promotes=words.get((suspect.mlp, suspect.neuron), ()))
        if suspect.verdict != "notable"
        else suspect
        for suspect in suspects
    ]


def _own_tokenizer(model: Any) -> Any:
    """The tokenizer in the model's own folder, if there is one that can be loaded."""
    if not isinstance(model, str | PathLike) or not (Path(model) / "tokenizer.json").is_file():
        return None
    try:
        return loaded_tokenizer(model)
    except DataError:
        # nobody asked for it: token ids will do
        return None


def loaded_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer as it is, or the one at a path or hub id.

    Raises:
        DataError: there is none.
    """
    if not isinstance(tokenizer, str | PathLike):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError) as error:
        raise DataError(f"{tokenizer}: no tokenizer there ({str(error).splitlines()[0]}).") from error
