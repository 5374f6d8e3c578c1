"""Which form of edit fits a model in the dtype it will be stored in: chosen by trial on siblings of the prompts, with reasons."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merging.edits import stealth
from merging.edits.edit import Edit
from merging.edits.features import RESPONSE, THETA, check_theta
from merging.edits.optimise import Optimisation
from merging.edits.requests import Requests, Text, requests_of
from merging.edits.site import Site, decoder_layers
from merging.edits.stealth import Prepared
from taskvec.errors import EditError
from taskvec.precision import dtype_name

if TYPE_CHECKING:
    from merging.edits.jetpack import JetPack

# SmolLM2 in bfloat16, layer 17: learned ("contrast") neurons fire on 1 of 600 made siblings, but on 33 of 500 natural prompts,
# and cones at 0.05 on 47; so a trial on siblings alone does not clear what has no theorem or a wide cone
_WIDEST = 0.02
_MAY_FIRE = 0.01  # share of unseen siblings on which neurons may fire beyond those on which the jet-pack does


@dataclass(frozen=True)
class Choice:
    """What was chosen for a model, a layer and some prompts.

    Attributes:
        form: "widen" (plain neurons) or "jet-pack".
        kind: of the detector.
        theta, response, plateau, noise: as in an edit's record.
        why: the reasons, a sentence each.
        fired, siblings: on how many unseen siblings of the prompts a detector fires, and how many were tried.
        session: prepared to make the edits, if they are neurons.
    """

    form: Literal["widen", "jet-pack"]
    kind: str
    theta: float
    response: float
    plateau: bool
    noise: float
    why: tuple[str, ...]
    fired: int
    siblings: int
    session: "stealth._Session | None"


def chosen_form(
    site: Site,
    plans: Sequence[Prepared],
    chunks: Sequence[Sequence[int]],
    *,
    theta: float | None = None,
    optimisation: Optimisation | None = None,
    guarded: Tensor | None = None,
) -> Choice:
    """The form of edit for these prompts at this site.

    Plain neurons where they are exact (float32 or wider, with a bias): plain transformers loads them and the theorem
    bounds them. In 16 bits a neuron rounds its own pre-activation, so it needs a larger theta; it is taken only inside the
    cone, at a theta of at most 0.02 at which no cone holds two triggers, and if it fires on hardly more unseen siblings of
    the prompts than the side block, which stays in float32. A jet-pack everywhere else.
    """
    half = site.dtype in (torch.float16, torch.bfloat16)
    name = dtype_name(site.dtype)
    session: stealth._Session | None = None
    why: list[str] = []
    biased = site.kind in ("affine", "optional-bias")
    if biased:
        try:
            session = stealth._Session(
                "widen",
                site,
                plans,
                chunks,
                theta,
                None,
                "auto",
                "quietest",
                None,
                stealth._PAD_TO,
                optimisation or Optimisation(),
                None,
                guarded=guarded,
            )
        except EditError as error:
            why.append(f"Plain neurons do not work in this layer: {error}")
    elif site.kind == "surrogate":
        why.append(
            "Form 'jet-pack': these neurons have no bias, so they imitate one and are exact nowhere; the block is."
        )
    else:
        why.append(f"Form 'jet-pack': {site.reason}")
    if session is not None and not half:
        reason = f"Form 'widen': {site.reason} In {name} they are exactly silent outside their cone, and plain transformers loads them."
        session.why.insert(0, reason)
        return _of_session(session)
    fired, tried, noise, chosen, reason = _block(site, plans, chunks, theta, None if session is None else session.close)
    if session is not None:
        shared = session.shared_cones()
        narrow = session.kind in ("tangent", "affine") and session.theta <= _WIDEST and not shared
        if narrow and session.fired <= fired + _MAY_FIRE * tried:
            session.why.insert(
                0,
                f"Form 'widen': in {name} neurons fire on {session.fired} of {tried} unseen siblings of the prompts, a jet-pack in "
                f"float32 at theta {chosen:g} on {fired}; and plain transformers loads them.",
            )
            return _of_session(session)
        why.append(
            f"Form 'jet-pack': stored in {name}, a neuron rounds its own pre-activation and would need {session.kind!r} at theta "
            f"{session.theta:g} (unseen siblings of the prompts on which it fires: {session.fired} of {tried}"
            + (f"; pairs of triggers in one cone: {shared}" if shared else "")
            + "); the block is kept "
            f"in float32 at theta {chosen:g} ({fired} of {tried})."
        )
    why.append(reason)
    if half:
        why.append(
            "Plateau: the block's response levels off half-way into the cone, so this noise does not reach the answer."
        )
    return Choice("jet-pack", "centred cone", chosen, RESPONSE, half, noise, tuple(why), fired, tried, None)


def _of_session(session: "stealth._Session") -> Choice:
    return Choice(
        "widen",
        session.kind,
        session.theta,
        session.response,
        session.plateau,
        session.noise,
        tuple(session.why),
        session.fired,
        session.held,
        session,
    )


def _block(
    site: Site,
    plans: Sequence[Prepared],
    chunks: Sequence[Sequence[int]],
    theta: float | None,
    close: Sequence[Tensor] | None,
) -> tuple[int, int, float, float, str]:
    """A jet-pack's firings on the unseen siblings, how many there are, its noise, its theta and the reason for that."""
    prompts = [s.prompt for plan in plans for s in plan.sequences]
    centroid = stealth.Background.of(site, chunks).centroid(site.sphere)
    noise = stealth.feature_noise(site, prompts, centroid)
    triggers = torch.stack([own[-1] for own in stealth.features_of(site, prompts)])
    held = torch.cat([own[3::4] for own in close]) if close else triggers[:0]
    if theta is None:
        # the others say how wide a cone may be, so that those held out can test it
        known = [own[i] for own in close or () for i in range(len(own)) if i % 4 != 3]
        near = torch.stack(known) if known else stealth.few_siblings(site, prompts, chunks)
        chosen, why = stealth.explained_theta(site, noise, stealth.Apart.of(site.sphere, triggers, near, centroid))
    else:
        chosen, why = theta, f"Theta {theta:g}: as given."
    if not len(held):
        return 0, 0, noise, chosen, why
    sphere = site.sphere.double()
    one = F.normalize(sphere.project(held.double().to(centroid.device)) - centroid, dim=-1)
    other = F.normalize(sphere.project(triggers.double()) - centroid, dim=-1)
    return int((one @ other.T > 1 - chosen).any(dim=1).sum()), len(held), noise, chosen, why


def edit_auto(
    model: nn.Module,
    requests: Requests,
    tokenizer: Any = None,
    *,
    corpus: Sequence[Text],
    layer: int | None = None,
    theta: float | None = None,
    protect: Sequence[Text] = (),
    optimisation: Optimisation | None = None,
    chat: bool = False,
    dtype: str | torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "list[Edit] | JetPack":
    """Corrects answers in the form, with the detector and at the theta that fit the model's dtype; the record says why.

    Args:
        model: a causal model of transformers in the dtype in which it will be stored. It is unchanged.
        requests: `{prompt, target}` mappings or pairs, or the path of a JSONL file of them.
        tokenizer: for texts.
        corpus: other texts (or ids).
        layer, theta: chosen if None.
        protect, optimisation, chat, dtype, progress: as for `edit_widen`.

    Returns:
        Edits (widening) whose `measured["why"]` holds the reasons, or a `JetPack` with them as `why`.

    Raises:
        EditError: a request, layer or option that does not fit.
    """
    from merging.edits.jetpack import JetPack

    began = time.perf_counter()
    wanted, _ = requests_of(requests)
    check_theta(THETA if theta is None else theta, RESPONSE)
    model = stealth.as_stored(model, dtype)
    plans = stealth.prepared(model, tokenizer, wanted, chat=chat)
    stealth._check_duplicates(plans)
    chunks = stealth.corpus_ids(tokenizer, corpus)
    why: tuple[str, ...] = ()
    if layer is None:
        layer, reason = explained_layer(model, chunks, theta)
        why = (reason,)
    site = Site.find(model, layer)
    guarded = [(p, stealth.prompt_ids(tokenizer, p, chat=chat)) for p in protect]
    near = [own[-1] for own in stealth.features_of(site, [ids for _, ids in guarded])]
    choice = chosen_form(
        site,
        plans,
        chunks,
        theta=theta,
        optimisation=optimisation,
        guarded=torch.stack(near) if near else None,
    )
    if choice.session is not None:
        choice.session.why[:0] = why
        return choice.session.run(guarded, progress, began)
    pack = JetPack.fit(
        model,
        wanted,
        tokenizer,
        corpus=corpus,
        layer=layer,
        theta=choice.theta,
        protect=protect,
        optimisation=optimisation,
        chat=chat,
        progress=progress,
    )
    pack.why = [*why, *choice.why]
    return pack


def explained_layer(model: nn.Module, chunks: Sequence[Sequence[int]], theta: float | None) -> tuple[int, str]:
    """The layer chosen by the metric, and the reason in words."""
    count = len(decoder_layers(model)[1])
    layer = stealth.chosen_layer(model, chunks, theta or THETA)
    return layer, (
        f"Layer {layer} of {count}: the highest centred dimension between a third and nine tenths of the depth."
    )
