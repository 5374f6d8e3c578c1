"""What an edit did: to its own prompt, to other prompts, to text. Everything is counted on all tokens, nothing sampled.

The reference is the same network without the edits' values: for widened models the one widened by silent neurons, so that a
change of zero is exactly zero and not the rounding of another order of summation.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from merging.edits import optimise, stealth
from merging.edits.edit import Edit, Patch, apply_to_model, check_compatible, check_fits, undo_on_model
from merging.edits.optimise import Sequence_, device_of, logits_of, padded
from merging.edits.requests import Requests, Text, requests_of
from merging.edits.site import Site, evaluating
from taskvec.checkpoint import content_hash
from taskvec.errors import BaseMismatchError, EditError
from taskvec.source import in_memory

if TYPE_CHECKING:
    from merging.edits.jetpack import JetPack


@dataclass(frozen=True)
class Report:
    """The outcome of `check`.

    Attributes:
        edits: for each edit prompt, target, `success` (whole target is the greedy answer), `answer` (greedy ids), loss.
        success: share of edits whose whole target is the greedy answer.
        paraphrases, paraphrase_success: how many were tried, and the share that gives the target.
        prompts: other prompts tried.
        fired: on how many of them a detector fired.
        fired_bound: 95 % upper limit of that rate.
        changed: how many continue differently (greedy, `tokens` tokens).
        changed_bound: 95 % upper limit of that rate.
        changed_prompts: the first of them.
        largest_logit_change: over every position of prompts and text.
        largest_outside: the same over positions up to which no detector has fired.
        neighbours, neighbours_changed: prompts close to the edits', and how many continue differently.
        text_tokens: tokens of text.
        nll_before, nll_ratio: mean −log p of the text before, and after over before.
        kl: mean KL divergence (before ‖ after) over all text tokens; kl_max its largest value.
        rounding: largest logit change from widening alone (order of summation), None if nothing was widened.
        seconds: taken by the check.
    """

    edits: tuple[Mapping[str, Any], ...]
    success: float
    paraphrases: int = 0
    paraphrase_success: float | None = None
    prompts: int = 0
    fired: int = 0
    fired_bound: float | None = None
    changed: int = 0
    changed_bound: float | None = None
    changed_prompts: tuple[str, ...] = ()
    largest_logit_change: float | None = None
    largest_outside: float | None = None
    neighbours: int = 0
    neighbours_changed: int = 0
    text_tokens: int = 0
    nll_before: float | None = None
    nll_ratio: float | None = None
    kl: float | None = None
    kl_max: float | None = None
    rounding: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For people, a line a fact."""
        good = sum(bool(edit["success"]) for edit in self.edits)
        lines = [f"edits that answer the whole target: {good} of {len(self.edits)}"]
        lines += [f"  not: {edit['prompt']!r} → {edit['target']!r}" for edit in self.edits if not edit["success"]]
        if self.paraphrases:
            lines.append(f"paraphrases with the target: {self.paraphrase_success:.0%} of {self.paraphrases}")
        if self.prompts:
            lines.append(
                f"other prompts: {self.prompts}; a detector fired on {self.fired} (rate ≤ {self.fired_bound:.2g} at 95 %), the "
                f"greedy continuation changed on {self.changed} (≤ {self.changed_bound:.2g})"
            )
            lines += [f"  changed: {prompt!r}" for prompt in self.changed_prompts[:5]]
        if self.neighbours:
            lines.append(f"neighbouring prompts changed: {self.neighbours_changed} of {self.neighbours}")
        if self.largest_logit_change is not None:
            lines.append(
                f"largest logit change elsewhere: {self.largest_logit_change:.3g}; where no detector has fired: "
                f"{self.largest_outside:.3g}"
            )
        if self.text_tokens:
            lines.append(
                f"text: {self.text_tokens} tokens, NLL {self.nll_before:.4f} × {self.nll_ratio:.6f}, KL {self.kl:.3g} mean, "
                f"{self.kl_max:.3g} at most"
            )
        if self.rounding is not None:
            lines.append(f"widening alone: {self.rounding:.2g} (order of summation)")
        return "\n".join([*lines, *self.notes])


class _Switch:
    """Turns edits on and off on a model that is already widened, by writing only their rows and columns."""

    def __init__(self, model: nn.Module, edits: Sequence[Edit]):
        parameters = dict(model.named_parameters())
        self._pairs = []
        for edit in edits:
            for patch in edit.patches:
                place = parameters[patch.name].data.select(patch.dim, patch.index)
                self._pairs.append((place, patch.old.to(place.device), patch.new.to(place.device)))

    def set(self, on: bool) -> None:
        for place, old, new in self._pairs:
            place.copy_(new if on else old)


@contextmanager
def _switched(model: nn.Module, edits: "Sequence[Edit] | JetPack") -> Iterator[tuple[Any, list[Site]]]:
    """A function that turns the edits on or off, and the sites to watch."""
    if not isinstance(edits, Sequence):
        pack = edits
        with pack.attached(model):
            site = Site.find(model, pack.layer)

            def turn(on: bool) -> None:
                pack.active = on

            try:
                yield turn, [site]
            finally:
                pack.active = True
        return
    layers = sorted({edit.layer for edit in edits if edit.patches}) or [0]
    check_compatible(edits)
    bare = [replace(edit, patches=_no_patches()) for edit in edits]
    apply_to_model(model, bare)
    switch = _Switch(model, edits)
    try:
        yield switch.set, [Site.find(model, layer) for layer in layers]
    finally:
        switch.set(False)
        undo_on_model(model, bare)


def _no_patches() -> tuple[Patch, ...]:
    return ()


@torch.no_grad()
def check(
    model: nn.Module,
    edits: "Sequence[Edit] | JetPack",
    tokenizer: Any = None,
    *,
    prompts: Sequence[Text] = (),
    text: Sequence[Text] = (),
    neighbours: Sequence[Text] = (),
    paraphrases: Mapping[str, Sequence[Text]] | None = None,
    tokens: int = 8,
    chat: bool = False,
    batch: int = 16,
    length: int = 256,
    continuations: Sequence[tuple[int, ...]] | None = None,
    verify: bool = True,
) -> Report:
    """Measures edits, all at once, on their base model; the model is as before afterwards.

    Args:
        model: the base, in the dtype the edits were made for.
        edits: edits of one base, in any layers, or a jet-pack.
        tokenizer: for texts.
        prompts: other prompts, whose answers must not change. Independent ones make the bounds meaningful.
        text: held-out text (or ids) for the NLL ratio and the KL divergence.
        neighbours: prompts close to the edits', counted apart.
        paraphrases: prompt of an edit → other wordings, for which the target is hoped for. None: those that the edits were
            given (their own triggers must fire too), where there is a tokenizer.
        tokens: length of the greedy continuation that is compared.
        chat: prompts are a user's turns.
        batch: sequences at a time.
        length: longest piece of text, in tokens.
        continuations: the base's greedy continuations of prompts and neighbours, if an earlier check found them.
        verify: compare the model's content hash with that of the edits' base.

    Raises:
        BaseMismatchError: the edits were made from another model, or from another dtype of it.
        EditError: no edits, or conflicts among them.
    """
    from merging.edits.dimension import rate_bound

    began = time.perf_counter()
    listed = list(edits) if isinstance(edits, Sequence) else None
    if listed is not None and not listed:
        raise EditError("check: no edits were given.")
    if verify:
        _check_base(model, [edits.base_hash] if listed is None else [e.base_hash for e in listed])  # type: ignore[union-attr]
    if listed is not None:
        check_fits(model, listed)
    ids = [stealth.prompt_ids(tokenizer, p, chat=chat) for p in prompts]
    near = [stealth.prompt_ids(tokenizer, p, chat=chat) for p in neighbours]
    pieces = stealth.corpus_ids(tokenizer, text, length=length)
    own = _own(edits)
    rounding = None
    with evaluating(model), _switched(model, listed if listed is not None else edits) as (turn, sites):
        turn(True)
        answers = [_continued(model, [s.prompt], len(s.target), batch)[0] == s.target for _, _, s in own]
        scores = optimise.losses(model, [s for _, _, s in own], batch=batch)
        if paraphrases is None:
            paraphrases = _given_paraphrases(edits) if tokenizer is not None else {}
        said = _paraphrased(model, tokenizer, own, paraphrases, chat, batch)
        turn(False)
        continued = list(continuations or _continued(model, [*ids, *near], tokens, batch))
        watch = _Watch(edits, sites)
        largest, outside, changed, fired = 0.0, 0.0, [], 0
        for start in range(0, len(continued), batch):
            sequences = [tuple(p) + c[:-1] for p, c in zip([*ids, *near][start : start + batch], continued[start:])]
            table = padded(sequences, device_of(model))
            before = logits_of(model, table)
            turn(True)
            watch.shape = table.shape
            with watch:
                after = logits_of(model, table)
            turn(False)
            for row, sequence in enumerate(sequences):
                number = start + row
                kept = slice(0, len(sequence))
                moved = (after[row, kept] - before[row, kept]).abs().amax(dim=-1)
                largest = max(largest, float(moved.max()))
                outside = max(outside, _largest_before(moved, watch.fired[row, kept]))
                at = len(sequence) - len(continued[number])
                same = torch.equal(
                    after[row, at : len(sequence)].argmax(-1), before[row, at : len(sequence)].argmax(-1)
                )
                changed.append(not same)
                if number < len(ids):
                    fired += bool(watch.fired[row, : len(sequence)].any())
            del before, after
        count, nll_before, nll_after, kl, kl_max = 0, 0.0, 0.0, 0.0, 0.0
        for start in range(0, len(pieces), max(1, batch // 4)):
            chunk = [p for p in pieces[start : start + max(1, batch // 4)] if len(p) > 1]
            if not chunk:
                continue
            table = padded(chunk, device_of(model))
            before = logits_of(model, table)
            turn(True)
            watch.shape = table.shape
            with watch:
                after = logits_of(model, table)
            turn(False)
            for row, piece in enumerate(chunk):
                a, b = before[row, : len(piece)].float(), after[row, : len(piece)].float()
                moved = (a - b).abs().amax(dim=-1)
                largest = max(largest, float(moved.max()))
                outside = max(outside, _largest_before(moved, watch.fired[row, : len(piece)]))
                p, q = F.log_softmax(a[:-1], -1), F.log_softmax(b[:-1], -1)
                wanted = torch.tensor(piece[1:], device=p.device)[:, None]
                nll_before -= float(p.gather(1, wanted).double().sum())
                nll_after -= float(q.gather(1, wanted).double().sum())
                each = (p.exp() * (p - q)).sum(-1).double()
                kl, kl_max = kl + float(each.sum()), max(kl_max, float(each.max()))
                count += len(piece) - 1
        silent = logits_of(model, padded([own[0][2].prompt], device_of(model)))
    if listed is not None and any(edit.widening is not None for edit in listed):
        with evaluating(model):
            plain = logits_of(model, padded([own[0][2].prompt], device_of(model)))
        rounding = float((plain - silent).abs().max())
    outcome = tuple(
        {"prompt": prompt, "target": target, "success": good, "loss": round(score[0], 4)}
        for (prompt, target, _), good, score in zip(own, answers, scores)
    )
    others = changed[: len(ids)]
    in_place = [edit for edit in listed or () if edit.form == "in-place" and edit.patches]
    notes = (
        (
            f"in place: {sum(len(edit.neurons) for edit in in_place)} neurons that did something were replaced, which changes other "
            "answers even where no detector fires; widening and jet-packs replace none",
        )
        if in_place
        else ()
    )
    return Report(
        edits=outcome,
        success=sum(answers) / len(answers),
        paraphrases=len(said),
        paraphrase_success=sum(said) / len(said) if said else None,
        prompts=len(ids),
        fired=fired,
        fired_bound=rate_bound(fired, len(ids)) if ids else None,
        changed=sum(others),
        changed_bound=rate_bound(sum(others), len(ids)) if ids else None,
        changed_prompts=tuple(stealth._as_text(p) for p, c in zip(prompts, others) if c)[:20],
        largest_logit_change=largest if continued or pieces else None,
        largest_outside=outside if continued or pieces else None,
        neighbours=len(near),
        neighbours_changed=sum(changed[len(ids) :]),
        text_tokens=count,
        nll_before=nll_before / count if count else None,
        nll_ratio=nll_after / nll_before if count else None,
        kl=kl / count if count else None,
        kl_max=kl_max if count else None,
        rounding=rounding,
        seconds=optimise.seconds_since(began),
        notes=notes,
    )


def _check_base(model: nn.Module, bases: Sequence[str]) -> None:
    # a jet-pack made from features alone names no base
    wanted = sorted({base for base in bases if base})
    if not wanted:
        return
    found = content_hash(in_memory(model))
    other = next((base for base in wanted if base != found), None)
    if other is not None:
        raise BaseMismatchError(
            f"check: the edits were made from another base (content hash {other[:12]}…; this model has {found[:12]}…). Give the model "
            "that was edited, in the dtype the edits were made for."
        )


def _largest_before(moved: torch.Tensor, fired: torch.Tensor) -> float:
    """The largest change at positions up to which nothing has fired: later ones attend to the place that did."""
    still = fired.to(moved.device).int().cumsum(0) == 0
    return float(moved[still].max()) if bool(still.any()) else 0.0


def _own(edits: "Sequence[Edit] | JetPack") -> list[tuple[str, str, Sequence_]]:
    if isinstance(edits, Sequence):
        return [(e.prompt, e.target, Sequence_(tuple(e.prompt_ids), tuple(e.target_ids))) for e in edits]
    return [(e.prompt, e.target, Sequence_(e.prompt_ids, e.target_ids)) for e in edits.entries]


def _given_paraphrases(edits: "Sequence[Edit] | JetPack") -> dict[str, Sequence[Text]]:
    entries = edits if isinstance(edits, Sequence) else edits.entries
    return {entry.prompt: entry.paraphrases for entry in entries if entry.paraphrases}


def _continued(model: nn.Module, prompts: Sequence[Sequence[int]], tokens: int, batch: int) -> list[tuple[int, ...]]:
    """Greedy continuations of exactly `tokens` tokens, without a cache (an end token does not end them)."""
    found: dict[int, tuple[int, ...]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        grown = [list(prompts[i]) for i in chosen]
        for _ in range(tokens):
            logits = logits_of(model, padded(grown, device_of(model)))
            for row, ids in enumerate(grown):
                ids.append(int(logits[row, len(ids) - 1].argmax()))
        for row, index in enumerate(chosen):
            found[index] = tuple(grown[row][len(prompts[index]) :])
    return [found[index] for index in range(len(prompts))]


def _paraphrased(
    model: nn.Module,
    tokenizer: Any,
    own: Sequence[tuple[str, str, Sequence_]],
    paraphrases: Mapping[str, Sequence[Text]],
    chat: bool,
    batch: int,
) -> list[bool]:
    targets = {prompt: sequence.target for prompt, _, sequence in own}
    unknown = [prompt for prompt in paraphrases if prompt not in targets]
    if unknown:
        raise EditError(f"check: paraphrases are given for {unknown[0]!r}, for which there is no edit.")
    sequences = [
        Sequence_(stealth.prompt_ids(tokenizer, other, chat=chat), targets[prompt])
        for prompt, others in paraphrases.items()
        for other in others
    ]
    return optimise.greedy_matches(model, sequences, batch=batch) if sequences else []


class _Watch:
    """Whether any detector fires, token by token, in the forward passes inside its `with`."""

    def __init__(self, edits: "Sequence[Edit] | JetPack", sites: Sequence[Site]):
        self.edits, self.sites = edits, sites
        self.fired = torch.zeros(0)
        self.shape = torch.Size((1, 1))

    def __enter__(self) -> None:
        self._stack = ExitStack()
        neurons = isinstance(self.edits, Sequence)
        self._seen = [
            self._stack.enter_context(site.reading_neurons() if neurons else site.reading()) for site in self.sites
        ]

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        fired = [
            self._fires(site, seen[0].reshape(*self.shape, -1).float()) for site, seen in zip(self.sites, self._seen)
        ]
        self.fired = torch.stack(fired).any(dim=0)

    def _fires(self, site: Site, values: torch.Tensor) -> torch.Tensor:
        if isinstance(self.edits, Sequence):
            neurons = [n for edit in self.edits if edit.layer == site.layer for n in edit.neurons]
            least = 1e-3 * min((edit.response for edit in self.edits), default=1.0)
            return (values[..., neurons].abs() > least).any(dim=-1)
        return (self.edits.hidden(values.cpu()) > 0).any(dim=-1)


# -- before editing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What an edit would be, before it is made.

    Attributes:
        layer, kind, form, theta, response, plateau: what would be chosen, and `why`.
        site: the layer's description.
        bound: the theorem's bound on the rate at which a random prompt fires one detector (centred where the form is). A
            "contrast" detector has no theorem: there it is the 95 % limit of the rate on unseen siblings.
        dimension: the separability dimension it comes from.
        fires: {edit: other given prompts that its detector would fire on}.
        noise: movement between alone and padded: of features (1 − cosine), or of a contrast detector's response.
        fired, siblings: unseen prompts of the same shape on which a detector fires, and how many were tried (16-bit dtypes).
        missed_in_place: what edits in place would lose at least, in nats of KL divergence a token (None: not possible).
    """

    layer: int
    kind: str
    form: str
    theta: float
    response: float
    plateau: bool
    why: tuple[str, ...]
    site: str
    bound: float
    bound_upper: float
    dimension: float
    fires: Mapping[str, tuple[str, ...]]
    noise: float
    fired: int = 0
    siblings: int = 0
    missed_in_place: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        lines = [self.site, *self.why]
        chosen = f"{self.form}, theta {self.theta:g}, response {self.response:g}{', plateau' if self.plateau else ''}: "
        if self.kind == "contrast":
            lines.append(
                f"{chosen}a prompt of the same shape fires a detector with probability ≤ {self.bound:.2g} (95 %, "
                f"{self.fired} of {self.siblings} unseen ones)"
            )
        else:
            lines.append(
                f"{chosen}by the theorem a random prompt fires a detector with probability ≤ {self.bound:.2g} (certified by "
                f"this sample: {self.bound_upper:.2g})"
            )
        for prompt, others in self.fires.items():
            lines.append(f"  the detector for {prompt!r} would also fire on {', '.join(map(repr, others))}")
        return "\n".join(lines)


@torch.no_grad()
def plan_edits(
    model: nn.Module,
    requests: Requests,
    tokenizer: Any = None,
    *,
    corpus: Sequence[Text],
    layer: int | None = None,
    theta: float | None = None,
    prompts: Sequence[Text] = (),
    chat: bool = False,
) -> Plan:
    """Says before editing which layer, which kind, which theta, and what bound.

    Args:
        model, requests, tokenizer, layer, theta, chat: as for `edit_widen`. A request without a target is fine.
        corpus: other texts: the metric is of their features.
        prompts: further prompts on which the detectors are tried.
    """
    from merging.edits.choice import chosen_form, explained_layer
    from merging.edits.dimension import intrinsic_dimension, rate_bound

    given = [r if not isinstance(r, str) else (r, "x") for r in ([requests] if isinstance(requests, str) else requests)]  # type: ignore[union-attr]
    wanted, _ = requests_of(given)
    # a plan is about prompts; a target may be missing
    bare = [replace(request, target=(0,)) for request in wanted]
    plans = stealth.prepared(model, tokenizer, bare, chat=chat)
    stealth._check_duplicates(plans)
    chunks = stealth.corpus_ids(tokenizer, corpus)
    why: list[str] = []
    if layer is None:
        layer, reason = explained_layer(model, chunks, theta)
        why.append(reason)
    site = Site.find(model, layer)
    choice = chosen_form(site, plans, chunks, theta=theta)
    why += choice.why
    missed = None
    if site.kind != "jet-pack" and not site.gate_only:
        count = sum(len(plan.sequences) for plan in plans)
        missed = float(optimise.removal_effects(site, stealth._some(chunks)).sort().values[:count].sum())
        why.append(
            f"In place would change other answers: without the {count} least missed neurons of this layer the model's "
            f"predictions move by about {missed:.1g} nats of KL divergence a token, detectors aside."
        )
    ids = [plan.sequences[0].prompt for plan in plans]
    background = stealth.Background.of(site, chunks)
    centroid = background.centroid(site.sphere)
    points = site.sphere.double().project(background.features[~background.first].double())
    metric = intrinsic_dimension(points.float()[:5000], [choice.theta], centre=True, renormalise=True).rows()[0]
    triggers = torch.stack([f[-1] for f in stealth.features_of(site, ids)])
    others = [stealth.prompt_ids(tokenizer, p, chat=chat) for p in prompts]
    at = [f[-1] for f in stealth.features_of(site, others)] if others else []
    everywhere = torch.cat([triggers, torch.stack(at)]) if at else triggers
    if choice.session is not None and choice.kind == "contrast":
        made = [choice.session._raw_detector(*pair) for pair in _first_triggers(choice.session, plans)]
        close = torch.stack([detector(everywhere) for detector in made]) > 0
        bound = upper = rate_bound(choice.fired, choice.siblings) if choice.siblings else 1.0
    else:
        z = F.normalize(site.sphere.double().project(everywhere.double()) - centroid, dim=-1)
        close = z[: len(triggers)] @ z.T > 1 - choice.theta
        bound, upper = float(metric["bound"]), float(metric["bound_upper"])
    names = [stealth._as_text(r.prompt) for r in wanted]
    everyone = [*names, *(stealth._as_text(p) for p in prompts)]
    fires = {
        name: tuple(everyone[j] for j in torch.nonzero(close[i]).flatten().tolist() if j != i)
        for i, name in enumerate(names)
    }
    return Plan(
        layer=layer,
        kind=choice.kind,
        form=choice.form,
        theta=choice.theta,
        response=choice.response,
        plateau=choice.plateau,
        why=tuple(why),
        site=site.describe(),
        bound=bound,
        bound_upper=upper,
        dimension=float(metric["dimension"]) if math.isfinite(float(metric["dimension"])) else math.inf,
        fires={name: others for name, others in fires.items() if others},
        noise=choice.noise,
        fired=choice.fired,
        siblings=choice.siblings,
        missed_in_place=missed,
    )


def _first_triggers(session: Any, plans: Sequence[Any]) -> list[tuple[int, torch.Tensor]]:
    """Index and feature of each request's own prompt among all prompts of a session (paraphrases left out)."""
    places, start = [], 0
    for plan in plans:
        places.append((start, session.features[start]))
        start += len(plan.sequences)
    return places
