"""Stealth edits: one answer corrected by one neuron, in the place of a quiet one or added by widening.

arXiv:2406.12670. A detector neuron fires at the prompt's last token and nowhere else; its output column moves the model to
the target. Differences to the authors' code, each measured to matter: prompts and targets are joined as ids; the output
bias is kept while the column is optimised; a gated neuron's second row is set too (the response is then Δ and not Δ times
whatever the old row gives); many edits of one layer are optimised together; cross-talk is solved, not divided away.
`compat="authors"` gives their construction.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from merging.edits import optimise
from merging.edits.edit import Edit, Patch, Widening, apply_to_model, undo_on_model
from merging.edits.features import (
    RESPONSE,
    THETA,
    Detector,
    Moments,
    Negatives,
    Sphere,
    affine_detector,
    calibrated,
    check_finite,
    check_theta,
    contrast_detector,
    quietest_neurons,
    sinks,
    steady_functional,
    surrogate_detector,
    tangent_detector,
)
from merging.edits.optimise import Optimisation, Sequence_, device_of, find_residuals, padded
from merging.edits.requests import Request, Requests, Text, requests_of
from merging.edits.site import Site, check_causal, decoder_layers, evaluating
from taskvec.checkpoint import content_hash
from taskvec.errors import BaseMismatchError, EditError, did_you_mean
from taskvec.precision import dtype_name, dtype_named
from taskvec.source import in_memory

THETAS = (0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1)
"""The values among which a theta is chosen."""
NARROWER = (0.0005, 0.001, 0.0015, 0.002, 0.003)
"""Further values, for prompts that are too close to each other for the usual ones."""
SIBLINGS = 48
"""Prompts of the same shape that are made for each prompt; a quarter of them only tests the detector."""
PLATEAU = 16.0
"""Height of a plateau: SiLU and GELU are linear there to 2e-6, and 16-bit weights stay far from overflow."""
_REPLY = 100  # tokens of a reply: a token of text on which a detector fires counts as so many sibling prompts
_MISSED_TOKENS = 1024  # of text on which neurons are weighed against each other
_MOVES_MARGIN = (
    4.0  # theta over the measured movement of a response: half of it is plateau, and twice the largest seen fits in
)
_NOISE_MARGIN = 10.0  # theta over the measured feature noise (in cosine) from which a plateau stays flat in any batch
_LEAST_MARGIN = (
    5.0  # theta over feature noise below which no theta goes: half a cone is plateau, so 2.5 times the noise is flat
)
_ALIKE = 0.01  # share of made siblings that may lie inside the cone of a theta that the library chose
_FEW_SIBLINGS = 12  # for each prompt, where they only say how narrow a cone must be
_SINGULAR = 1e4  # condition of a response matrix that is not solved
_SINK = 0.02  # 1 − cosine with a text's first token up to which another token is taken for a sink, too
_PAD_TO = 64  # neurons; multiples of 64 keep tensor cores and tensor-parallel splits happy

Form = Literal["in-place", "widen", "fold"]


# -- tokens ------------------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer: Any, prompt: Text, *, chat: bool = False) -> tuple[int, ...]:
    """Token ids of a prompt: with the tokenizer's own special tokens, or as a user's turn in its chat template.

    Raises:
        EditError: an empty prompt, or a text without a tokenizer or chat template.
    """
    if not isinstance(prompt, str):
        ids = tuple(int(i) for i in prompt)
    elif tokenizer is None:
        raise EditError(f"prompt {prompt!r}: a text needs a tokenizer. Give `tokenizer`, or token ids.")
    elif chat:
        if not getattr(tokenizer, "chat_template", None):
            raise EditError("chat: the tokenizer has no chat template.")
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        ids = tuple(tokenizer(prompt)["input_ids"]) if prompt else ()
        end = getattr(tokenizer, "eos_token_id", None)
        # T5-like tokenizers close a text with </s>; the trigger is the prompt's own last token
        if len(ids) > 1 and ids[-1] == end and not prompt.endswith(str(tokenizer.eos_token)):
            ids = ids[:-1]
    if not ids:
        raise EditError("prompt: empty. An edit needs at least one token to recognise.")
    return ids


def target_ids(tokenizer: Any, target: Text, *, after: Text = "", chat: bool = False) -> tuple[int, ...]:
    """Token ids of an answer; a text gets a leading space where it continues a prompt that ends in none.

    Raises:
        EditError: an empty target, or a text without a tokenizer.
    """
    if not isinstance(target, str):
        ids = tuple(int(i) for i in target)
    elif tokenizer is None:
        raise EditError(f"target {target!r}: a text needs a tokenizer. Give `tokenizer`, or token ids.")
    else:
        spaced = not chat and isinstance(after, str) and after and not after[-1].isspace() and not target[:1].isspace()
        text = f" {target}" if target.strip() and spaced and target[0].isalnum() else target
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if target.strip() else ()
    if not ids:
        raise EditError("target: empty. An edit needs at least one token to say.")
    return ids


def as_stored(model: Any, dtype: str | torch.dtype | None) -> Any:
    """The model itself, or a copy cast to the dtype in which it will be stored.

    Raises:
        EditError: a dtype in which no layer of transformers computes.
    """
    if dtype is None or dtype_named(dtype) == model.dtype:
        return model
    wanted = dtype_named(dtype)
    if wanted not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise EditError(
            f"dtype: a model does not run in {dtype_name(wanted)}, and an edit is made of what it computes. Take float32, bfloat16, "
            "float16 or float64; rows that a quantiser rounds later no longer fire, so keep them out of it or use a jet-pack."
        )
    return copy.deepcopy(model).to(wanted)


def context_length(model: nn.Module) -> int | None:
    """The longest sequence the model takes, if its config says."""
    config = getattr(model, "config", None)
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


@dataclass(frozen=True)
class Prepared:
    """A request as ids: the prompt's sequence first, then one for each paraphrase."""

    request: Request
    sequences: tuple[Sequence_, ...]


def prepared(model: nn.Module, tokenizer: Any, requests: Sequence[Request], *, chat: bool = False) -> list[Prepared]:
    """Requests as ids, checked against the vocabulary and the context.

    Raises:
        EditError: an empty prompt or target, one that does not fit the context, or ids outside the vocabulary; or the model is
            not causal.
    """
    check_causal(model)
    longest = context_length(model)
    size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    made = []
    for number, request in enumerate(requests, 1):
        sequences = []
        for prompt in (request.prompt, *request.paraphrases):
            try:
                ids = prompt_ids(tokenizer, prompt, chat=chat)
                sequence = Sequence_(ids, target_ids(tokenizer, request.target, after=prompt, chat=chat))
            except EditError as error:
                if len(requests) == 1:
                    raise
                raise EditError(f"edit {number} of {len(requests)}, {_short(prompt)}: {error}") from error
            total = len(sequence.prompt) + len(sequence.target)
            if longest is not None and total > longest:
                raise EditError(
                    f"prompt {_short(prompt)}: {len(ids)} tokens and {len(sequence.target)} of the target are longer than the "
                    f"model's context of {longest}."
                )
            outside = [i for i in (*sequence.prompt, *sequence.target) if not 0 <= i < size]
            if outside:
                raise EditError(f"prompt {_short(prompt)}: token id {outside[0]} is not in the vocabulary of {size}.")
            sequences.append(sequence)
        made.append(Prepared(request, tuple(sequences)))
    return made


def _short(text: Text, limit: int = 60) -> str:
    shown = text if isinstance(text, str) else " ".join(map(str, text))
    return repr(shown if len(shown) <= limit else shown[: limit - 1] + "…")


def _as_text(text: Text) -> str:
    return text if isinstance(text, str) else " ".join(str(int(i)) for i in text)


# -- features ----------------------------------------------------------------------------------------------------------


def features_of(
    site: Site, sequences: Sequence[Sequence[int]], *, batch: int = 16
) -> list[Annotated[Tensor, "token d"]]:
    """The MLP inputs at every token of every sequence, float32 on the CPU."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found: dict[int, Tensor] = {}
    with evaluating(site.model):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            ids = padded([sequences[i] for i in chosen], device_of(site.model))
            with site.reading() as seen, stopping_after(site):
                run_until_stopped(site.model, ids)
            values = seen[0].reshape(*ids.shape, -1)
            for row, index in enumerate(chosen):
                found[index] = values[row, : len(sequences[index])].float().cpu()
    return [found[index] for index in range(len(sequences))]


class _Enough(Exception):
    pass


class stopping_after:
    """Ends a forward pass behind the site's layer; the layers above would be computed for nothing."""

    def __init__(self, site: Site):
        self.site = site

    def __enter__(self) -> None:
        def stop(*_: Any) -> None:
            raise _Enough

        self.handle = self.site.layers[self.site.layer].register_forward_hook(stop)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def run_until_stopped(model: nn.Module, ids: Tensor) -> None:
    with suppress(_Enough):
        model(input_ids=ids, use_cache=False)


class Corpus(tuple[tuple[int, ...], ...]):
    """Other texts as token ids, which remembers what a model computes from them.

    Takes the place of a list of texts wherever a `corpus` is asked for. Edits that are made in several calls then share one
    reading of it: by far the longest part of a single edit on a CPU. What is remembered is bound to the content hash of the
    weights, so it is never used for a model that has changed since.
    """

    _features: "dict[tuple[str, int], Background]"
    _effects: dict[tuple[str, int], Tensor]

    @classmethod
    def of(cls, tokenizer: Any, texts: Sequence[Text], *, length: int = 128) -> "Corpus":
        """Texts (or ids) cut into sequences of at most `length` tokens."""
        made = cls(corpus_ids(tokenizer, texts, length=length))
        made._features, made._effects = {}, {}
        return made

    def background(self, site: Site) -> "Background":
        key = (content_hash(in_memory(site.model)), site.layer)
        if key not in self._features:
            self._features[key] = Background.of(site, tuple(self))
        return self._features[key]

    def removal_effects(self, sites: Sequence[Site]) -> list[Annotated[Tensor, "neuron"]]:
        """`optimise.removal_effects` of several layers, on a part of the corpus."""
        base = content_hash(in_memory(sites[0].model))
        new = [site for site in sites if (base, site.layer) not in self._effects]
        if new:
            for site, effects in zip(new, optimise.removal_effects_at(new, _some(self))):
                self._effects[(base, site.layer)] = effects
        return [self._effects[(base, site.layer)] for site in sites]


def _some(chunks: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """About a thousand tokens, from everywhere in the text."""
    chosen: list[Sequence[int]] = []
    tokens = 0
    for chunk in chunks[:: max(1, len(chunks) * len(chunks[0]) // _MISSED_TOKENS)]:
        if tokens < _MISSED_TOKENS:
            chosen.append(chunk)
            tokens += len(chunk)
    return chosen


def corpus_ids(tokenizer: Any, corpus: Sequence[Text], *, length: int = 128) -> Sequence[tuple[int, ...]]:
    """A corpus as sequences of at most `length` tokens (a `Corpus` is one already)."""
    if isinstance(corpus, Corpus):
        return corpus
    chunks: list[tuple[int, ...]] = []
    for text in corpus:
        ids = tuple(int(i) for i in text) if not isinstance(text, str) else prompt_ids(tokenizer, text) if text else ()
        chunks += [ids[start : start + length] for start in range(0, len(ids), length)]
    return [chunk for chunk in chunks if chunk]


@dataclass(frozen=True, eq=False)
class Background:
    """Features of other text at one site.

    Attributes:
        features: [n, d], MLP inputs, every position.
        first: [n], whether the position is the first of its sequence (an attention sink in many models).
    """

    features: Annotated[Tensor, "n d"]
    first: Annotated[Tensor, "n"]

    @classmethod
    def of(cls, site: Site, sequences: Sequence[Sequence[int]]) -> "Background":
        if isinstance(sequences, Corpus):
            return sequences.background(site)
        found = features_of(site, sequences)
        check_finite(torch.cat(found), "features of the corpus")
        first = torch.cat([torch.arange(len(f)) == 0 for f in found])
        return cls(torch.cat(found), first)

    def centroid(self, sphere: Sphere) -> Annotated[Tensor, "d"]:
        """Mean of the features on the sphere, first positions left out (they are all one vector).

        Raises:
            EditError: there is nothing but first positions.
        """
        if bool(self.first.all()):
            raise EditError(
                f"corpus: {len(self.first)} tokens, none of them behind another: too few to find the centre of the features. Give "
                "some hundreds of words of other text."
            )
        return sphere.double().project(self.features[~self.first].double()).mean(dim=0)


def rounding_noise(site: Site) -> float:
    """How far (1 − cosine) rounding alone may move a feature between two machines: one rounding of each layer before it.

    ½ u² (layer + 1) with the dtype's u: 1.4e-4 in SmolLM2's layer 17 in bfloat16, where 0.7e-4 to 2e-4 were measured between
    kernels and batch shapes. A machine whose kernels happen to agree shows none of it, so it is the least that is assumed.
    """
    unit = torch.finfo(site.dtype).eps / 2
    return 0.5 * unit * unit * (site.layer + 1)


def feature_noise(site: Site, prompts: Sequence[Sequence[int]], centroid: Tensor | None = None) -> float:
    """How far (1 − cosine) a prompt's feature moves between running alone and in a padded batch.

    About 1e-7 in float32 and 1e-4 in bfloat16; a theta must be well above it. At least `rounding_noise`. Centred at
    `centroid` where given.
    """
    if not prompts:
        return 0.0
    chosen = list(prompts)[:8]
    longest = max(len(p) for p in chosen) + 5
    alone = [features_of(site, [p])[0][-1] for p in chosen]
    filled = [tuple(p) + (0,) * (longest - len(p)) for p in chosen]
    rows = features_of(site, filled, batch=len(filled))
    together = [rows[i][len(p) - 1] for i, p in enumerate(chosen)]
    sphere = site.sphere.double()
    a, b = sphere.project(torch.stack(alone).double()), sphere.project(torch.stack(together).double())
    if centroid is not None:
        a, b = a - centroid.double(), b - centroid.double()
    least = rounding_noise(site)
    if centroid is not None:
        # the same movement is a larger angle from the centre
        least *= float(1 / a.square().sum(dim=-1).min().clamp(1e-3, 1.0))
    return max(least, float((1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).max()))


def before_sink(
    site: Site,
    features: Annotated[Tensor, "1+target d"],
    directions: Callable[[Tensor], Tensor],
    theta: float,
) -> int:
    """How many tokens, from a prompt's last one on, can have a trigger that does not fire on every text.

    Args:
        site: the layer.
        features: MLP inputs at the first token of the text, and from the prompt's last token on.
        directions: takes features to the detectors' space.
        theta: half-width of the cone there.
    """
    stuck = sinks(directions(features.double()), theta)[1:]
    if bool(stuck[0]) and torch.equal(features[0], features[1]):
        # the prompt is one token, so the first one: does it differ from others at that place?
        others = torch.cat(features_of(site, _spread(site)))
        alike = [sinks(directions(torch.stack([other, features[1]]).double()), theta)[1] for other in others]
        stuck[0] = sum(map(bool, alike)) > len(alike) / 2
    return int((~stuck).int().cumprod(0).sum())


def _spread(site: Site) -> list[list[int]]:
    """Eight texts of one token, from all over the vocabulary."""
    table: Any = site.model.get_input_embeddings
    return [[int(i)] for i in torch.linspace(0, table().weight.shape[0] - 1, 8)]


def stuck_on_a_sink(layer: int, prompts: Sequence[Text]) -> EditError:
    """The refusal of prompts whose last token is an attention sink."""
    return EditError(
        f"In layer {layer} the last token of {len(prompts)} prompts is an attention sink: what the MLP sees there is what it sees at "
        f"the first token of any text, and the edit would fire on all of them: {'; '.join(map(repr, prompts[:4]))}. Take other words "
        "or another layer."
    )


def siblings(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    text: Sequence[int],
    *,
    count: int = SIBLINGS,
    seed: int = 0,
) -> list[list[tuple[int, ...]]]:
    """For each prompt others of the same shape: one or two of its tokens replaced, the first one kept.

    Half of the replacements are the tokens whose embeddings are closest to the replaced one (Bhutan → Nepal), half are any
    from `text`. A detector is tried on them and must stay silent; they have no other use.

    Args:
        model: for its embeddings.
        prompts: token ids.
        text: token ids to draw from.
        count: for each prompt; fewer where there are not so many.
        seed: of the draws.
    """
    table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    wanted = sorted({token for prompt in prompts for token in prompt})
    close: dict[int, list[int]] = {}
    nearest = min(SIBLINGS, len(table) - 1)
    norms = table.float().norm(dim=1).clamp_min(1e-12) if len(table) <= 1 << 18 else None
    for start in range(0, len(wanted), 64):
        part = wanted[start : start + 64]
        scores = (table[part] @ table.T).float()
        if norms is not None:
            scores = scores / norms
        found = scores.topk(nearest + 1, dim=1).indices.tolist()
        for token, others in zip(part, found):
            close[token] = [other for other in others if other != token][:nearest]
    taken = {tuple(prompt) for prompt in prompts}
    made: list[list[tuple[int, ...]]] = []
    for prompt in prompts:
        own: list[tuple[int, ...]] = []
        first = 1 if len(prompt) > 1 else 0
        for attempt in range(2 * count):
            other = list(prompt)
            for _ in range(1 + attempt % 2):
                place = first + draw(len(prompt) - first)
                near = attempt % 4 < 2 or not text
                other[place] = close[prompt[place]][draw(nearest)] if near else text[draw(len(text))]
            if tuple(other) not in taken and len(own) < count:
                taken.add(tuple(other))
                own.append(tuple(other))
        made.append(own)
    return made


def response_noise(site: Site, prompts: Sequence[Sequence[int]], detectors: Sequence[Detector]) -> float:
    """How far a detector's response moves between a prompt alone and in a padded batch, as a share of |row · x|.

    The largest over the prompts (at most 32), or twice what `rounding_noise` does to such a row on average. In units of θ
    for detectors whose value falls to zero θ below the trigger.
    """
    chosen = list(zip(prompts, detectors))[:32]
    if not chosen:
        return 0.0
    longest = max(len(p) for p, _ in chosen) + 5
    alone = torch.stack([features_of(site, [p])[0][-1] for p, _ in chosen]).double()
    filled = [tuple(p) + (0,) * (longest - len(p)) for p, _ in chosen]
    rows = features_of(site, filled, batch=len(filled))
    together = torch.stack([rows[i][len(p) - 1] for i, (p, _) in enumerate(chosen)]).double()
    moved = torch.stack([d.row @ (b - a) / (d.response / d.theta) for (_, d), a, b in zip(chosen, alone, together)])
    # a movement of random direction: √(2ε) long, spread over all dimensions
    scale = site.sphere.scale.double().cpu() * math.sqrt(site.width)
    longest_row = max(float((d.row * scale).norm() / (d.response / d.theta)) for d in detectors)
    least = 2 * longest_row * math.sqrt(2 * rounding_noise(site) / site.width)
    return max(least, float(moved.abs().max()))


def chosen_theta(noise: float, arithmetic: float = 0.0, apart: "Apart | None" = None) -> float:
    """The smallest usual theta that is well above what rounding does to a detector, or a narrower one that prompts need.

    Args:
        noise: movement of features (1 − cosine) between alone and batched; theta is ten times above it.
        arithmetic: largest rounding error of the pre-activation, in cosine; theta is 2.5 times above it, so that the error
            stays within the half of the cone that is a plateau.
        apart: how close triggers are to each other and to prompts of the same shape. If a cone of the usual width holds
            another trigger, or more than 1 % of those prompts, theta is the largest at which it does not, but never less
            than five times the noise.
    """
    usual = _at_least(_NOISE_MARGIN * noise + 2.5 * arithmetic)
    if apart is None:
        return usual
    least = _LEAST_MARGIN * noise + 2.5 * arithmetic
    closest = apart.closest(least)
    if usual <= closest:
        return usual
    narrower = [theta for theta in (*NARROWER, *THETAS) if least <= theta <= closest]
    return narrower[-1] if narrower else usual


@dataclass(frozen=True, eq=False)
class Apart:
    """How close triggers are to each other and to made prompts of the same shape, in 1 − cosine.

    Attributes:
        triggers: [n, n], between triggers.
        siblings: from each made prompt to the closest trigger.
    """

    triggers: Annotated[Tensor, "n n"]
    siblings: Annotated[Tensor, "sibling"]

    @classmethod
    def of(cls, sphere: Sphere, triggers: Tensor, siblings: Tensor, centroid: Tensor | None) -> "Apart":
        """From MLP inputs [n, d] and [sibling, d]; centred at `centroid` where given."""

        def directions(features: Tensor) -> Tensor:
            points = sphere.double().project(features.double())
            return torch.nn.functional.normalize(points if centroid is None else points - centroid.to(points), dim=-1)

        z = directions(triggers)
        near = 1 - directions(siblings) @ z.T
        return cls(1 - z @ z.T, near.amin(dim=1) if near.numel() else near.new_zeros(0))

    @property
    def pairs(self) -> Annotated[Tensor, "pair"]:
        """Distances of the pairs of triggers."""
        count = len(self.triggers)
        row, column = torch.triu_indices(count, count, 1)
        return self.triggers[row, column]

    def inside(self, theta: float) -> tuple[int, int]:
        """How many pairs of triggers, and how many siblings, lie inside a cone of this width."""
        return int((self.pairs < theta).sum()), int((self.siblings < theta).sum())

    def closest(self, least: float) -> float:
        """The widest cone that holds no other trigger and hardly a sibling.

        Args:
            least: width of the narrowest cone there can be. What is closer than that no theta tells apart; it is left out
                here and refused by name later.
        """
        found = math.inf
        pairs = self.pairs[self.pairs > least]
        if len(pairs):
            found = float(pairs.min())
        if len(self.siblings):
            allowed = int(_ALIKE * len(self.siblings))
            found = min(found, max(least, float(self.siblings.sort().values[allowed])))
        return found


def explained_theta(site: Site, noise: float, apart: Apart | None, arithmetic: float = 0.0) -> tuple[float, str]:
    """`chosen_theta` for a layer, and the reason in words."""
    usual, theta = chosen_theta(noise, arithmetic), chosen_theta(noise, arithmetic, apart)
    why = (
        f"Theta {theta:g}: in {dtype_name(site.dtype)} features move by {noise:.1g} (1 − cosine) between kernels, alone or in a "
        "padded batch" + (f", and rounding of the sum is worth {arithmetic:.1g}" if arithmetic else "") + "; "
    )
    if apart is None or theta == usual:
        return theta, why + (
            f"theta is the smallest usual one that is {_NOISE_MARGIN:g} times above the first"
            f"{' and 2.5 times above the second' if arithmetic else ''}."
        )
    held, now = apart.inside(usual), apart.inside(theta)
    return theta, why + (
        f"the usual {usual:g} would hold another trigger in a cone {held[0]} times and {held[1]} of {len(apart.siblings)} made prompts "
        f"of the same shape, {theta:g} holds {now[0]} and {now[1]}."
    )


def overlapping(
    scaled: Annotated[Tensor, "n n"],
    names: Sequence[str],
    distances: Annotated[Tensor, "n n"],
    theta: float,
    layer: int,
) -> EditError | None:
    """The refusal of triggers that no output weights can answer differently, each pair by name; None if all can be.

    Args:
        scaled: responses at each trigger (rows) of each detector, the own one 1.
        names: of the prompts that the triggers belong to.
        distances: 1 − cosine between triggers, in the detectors' space.
        theta, layer: for the message.
    """
    if not len(scaled) or float(torch.linalg.cond(scaled)) < _SINGULAR:
        return None
    alike = torch.minimum(scaled, scaled.T).fill_diagonal_(0)
    row, column = torch.triu_indices(len(alike), len(alike), 1)
    order = alike[row, column].argsort(descending=True).tolist()
    found = [k for k in order if float(alike[row[k], column[k]]) > 1 - 2e-3] or order[:1]
    pairs = [(int(row[k]), int(column[k])) for k in found]
    named = "; ".join(
        f"{names[a]!r} and {names[b]!r} (1 − cosine {float(distances[a, b]):.2g})" for a, b in pairs[:8]
    ) + ("; …" if len(pairs) > 8 else "")
    closest = min(float(distances[a, b]) for a, b in pairs)
    hint = f"a theta below {closest:.1g}, " if closest > 1e-6 else ""
    return EditError(
        f"Two triggers cannot be told apart at theta {theta:g} in layer {layer}: {named}. Take {hint}another layer (`edit plan` "
        "compares them), or leave one of each pair out; the other edits are not affected."
    )


def few_siblings(
    site: Site, prompts: Sequence[Sequence[int]], chunks: Sequence[Sequence[int]]
) -> Annotated[Tensor, "sibling d"]:
    """Features of a few prompts of the same shape for each prompt."""
    text = [token for chunk in chunks for token in chunk]
    count = max(4, min(_FEW_SIBLINGS, 512 // max(1, len(prompts))))
    made = [ids for own in siblings(site.model, prompts, text, count=count) for ids in own]
    if not made:
        return torch.zeros(0, site.width)
    found = torch.stack([own[-1] for own in features_of(site, made, batch=64)])
    check_finite(found, "features of siblings")
    return found


def _at_least(needed: float) -> float:
    return next((theta for theta in THETAS if theta >= needed), THETAS[-1])


def arithmetic_noise(
    features: Sequence[Annotated[Tensor, "d"]], sphere: Sphere, dtype: torch.dtype, centroid: Tensor | None
) -> float:
    """Rounding error of a detector's pre-activation, in units of its cosine.

    A linear layer may round w·x, which is about −b, to the storage dtype before it adds b. That is half a step of the
    format at |b|, and |b| is about Δ/θ: 2⁻⁸ of the cosine in bfloat16, more for the tangent of a centred cone.
    """
    largest = 0.0
    for feature in features:
        if centroid is None:
            made = affine_detector(feature, sphere, theta=0.01, response=1.0)
        else:
            made = tangent_detector(feature, sphere, centroid, theta=0.01, response=1.0)
        assert made.bias is not None
        largest = max(largest, abs(float(made.bias)) * 0.01)
    return largest * torch.finfo(dtype).eps / 2


# -- making edits --------------------------------------------------------------------------------------------------------


def edit_in_place(
    model: nn.Module,
    requests: Requests,
    tokenizer: Any = None,
    *,
    layer: int | None = None,
    theta: float | None = None,
    response: float = RESPONSE,
    corpus: Sequence[Text] | None = None,
    detector: str = "auto",
    neuron: Literal["auto", "quietest", "least-used", "least-missed"] | int = "auto",
    protect: Sequence[Text] = (),
    optimisation: Optimisation | None = None,
    chat: bool = False,
    dtype: str | torch.dtype | None = None,
    compat: Literal["authors"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Edit | list[Edit]:
    """Corrects answers with no new parameter: a quiet neuron's row, bias and column are replaced. The model is unchanged.

    Args:
        model: a causal model of transformers in the dtype in which it will be stored.
        requests: one `{prompt, target}` (or pair), several, or the path of a JSONL file of them.
        tokenizer: for texts.
        layer: index; None chooses on `corpus` the layer whose neurons are missed least (by the metric, if `neuron` says how
            neurons are chosen).
        theta: half-width of the cone in cosine; None chooses from the feature noise of the model's dtype.
        response: pre-activation at the trigger (Δ).
        corpus: other texts (or ids). Needed where the neurons have no bias, at least as many tokens as the model is wide.
            A `Corpus` is read once for many calls.
        detector: "auto"; "affine" or "tangent" (need a bias); "surrogate" (the authors', without a bias) or "contrast" (a
            half-space whose direction is learned from the corpus and from siblings of the prompts). "auto" tries those that
            fit on siblings and text that none of them has seen, and takes the one that fires least.
        neuron: which to replace: "quietest" (smallest L1 norm of its row, as the authors), "least-used" (smallest mean
            contribution on `corpus`), "least-missed" (smallest change of the model's own predictions without it, see
            `removal_effects`), an index for a single edit, or "auto": the least missed where there is a corpus. Each
            replaced neuron did something, so an edit in place always changes other answers a little.
        protect: prompts on which no detector may fire.
        optimisation: of the output vectors.
        chat: prompts are a user's turns in the tokenizer's chat template.
        dtype: make the edit for the model cast to this dtype (features, calibration and hash are of that cast).
        compat: "authors" makes their edit (one prompt at a time, old second row, their 20 Adam steps).
        progress: called with (done, all) during optimisation.

    Returns:
        One `Edit` for one request, else a list in the order of the requests. An answer that is right already gives an
        edit without patches and a note.

    Raises:
        EditError: a request, layer or option that does not fit; the model is as it was.
    """
    return _edit(
        "in-place",
        model,
        requests,
        tokenizer,
        layer=layer,
        theta=theta,
        response=response,
        corpus=corpus,
        detector=detector,
        neuron=neuron,
        protect=protect,
        optimisation=optimisation,
        chat=chat,
        dtype=dtype,
        compat=compat,
        progress=progress,
        plateau=False,
        pad_to=0,
    )


def edit_widen(
    model: nn.Module,
    requests: Requests,
    tokenizer: Any = None,
    *,
    layer: int | None = None,
    theta: float | None = None,
    response: float | None = None,
    corpus: Sequence[Text] | None = None,
    detector: str = "auto",
    plateau: bool | None = None,
    pad_to: int = _PAD_TO,
    protect: Sequence[Text] = (),
    optimisation: Optimisation | None = None,
    chat: bool = False,
    dtype: str | torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Edit | list[Edit]:
    """Corrects answers with new neurons: every layer's MLP grows by silent ones, some of one layer become the edits.

    The result loads in plain transformers. Where neurons have a bias (or the architecture has `mlp_bias`), the effect on a
    prompt outside the cone is exactly zero. A model that was widened before is not widened again while it has silent
    neurons left. The model given is unchanged.

    Args:
        model, requests, tokenizer, layer, theta, protect, optimisation, chat, dtype, progress: as for `edit_in_place`.
        response: pre-activation at the trigger; 50, or 16 on a plateau.
        corpus: other texts; gives the centre of the cone ("tangent"), and the constant where there is no bias.
        detector: "auto": "tangent" with a corpus, "affine" without; where there can be no bias, and in 16-bit dtypes, the
            one that fires least on unseen siblings of the prompts and unseen text ("contrast" or the other). Or one of these.
        plateau: answer with a pair of neurons act(f) − act(f − Δ), which is flat above the ramp, so that rounding noise of
            the features has no effect. None: in 16-bit dtypes.
        pad_to: new neurons a layer are a multiple of this.
    """
    if pad_to < 1:
        raise EditError(f"pad_to: {pad_to} must be at least 1.")
    return _edit(
        "widen",
        model,
        requests,
        tokenizer,
        layer=layer,
        theta=theta,
        response=response,
        corpus=corpus,
        detector=detector,
        neuron="quietest",
        protect=protect,
        optimisation=optimisation,
        chat=chat,
        dtype=dtype,
        compat=None,
        progress=progress,
        plateau=plateau,
        pad_to=pad_to,
    )


@dataclass(eq=False)
class _Trigger:
    """One feature that fires, with the neurons that answer it."""

    edit: int
    sequence: int
    place: int
    feature: Annotated[Tensor, "d"]
    detectors: tuple[Detector, ...]
    signs: tuple[float, ...]
    neurons: tuple[int, ...] = ()


def _edit(
    form: Form,
    model: nn.Module,
    requests: Requests,
    tokenizer: Any,
    *,
    layer: int | None,
    theta: float | None,
    response: float | None,
    corpus: Sequence[Text] | None,
    detector: str,
    neuron: str | int,
    protect: Sequence[Text],
    optimisation: Optimisation | None,
    chat: bool,
    dtype: str | torch.dtype | None,
    compat: str | None,
    progress: Callable[[int, int], None] | None,
    plateau: bool | None,
    pad_to: int,
) -> Edit | list[Edit]:
    began = time.perf_counter()
    wanted, single = requests_of(requests)
    check_theta(THETA if theta is None else theta, RESPONSE if response is None else response)
    if compat not in (None, "authors"):
        raise EditError(f"compat: {compat!r} is not known; only 'authors' is.")
    model = as_stored(model, dtype)
    plans = prepared(model, tokenizer, wanted, chat=chat)
    _check_duplicates(plans)
    chunks = corpus_ids(tokenizer, corpus) if corpus is not None else None
    why: tuple[str, ...] = ()
    if layer is None:
        if chunks is None:
            raise EditError("layer: none was given, and without a corpus none can be chosen. Give one of the two.")
        if form == "in-place" and neuron in ("auto", "least-missed") and compat is None:
            layer, reason = least_missed_layer(model, chunks, sum(len(plan.sequences) for plan in plans))
            why = (reason,)
        else:
            layer = chosen_layer(model, chunks, theta or THETA)
    site = Site.find(model, layer)
    site.require_neurons("an edit in place" if form == "in-place" else "widening")
    guarded = [(p, prompt_ids(tokenizer, p, chat=chat)) for p in protect]
    near = [own[-1] for own in features_of(site, [ids for _, ids in guarded])]
    session = _Session(
        form,
        site,
        plans,
        chunks,
        theta,
        response,
        detector,
        neuron,
        plateau,
        pad_to,
        optimisation or Optimisation(),
        compat,
        guarded=torch.stack(near) if near else None,
    )
    session.why[:0] = why
    edits = session.run(guarded, progress, began)
    return edits[0] if single else edits


def _check_duplicates(plans: Sequence[Prepared]) -> None:
    seen: dict[tuple[int, ...], Prepared] = {}
    for plan in plans:
        for sequence in plan.sequences:
            other = seen.get(sequence.prompt)
            if other is not None:
                raise EditError(
                    f"prompt {_short(plan.request.prompt)} is given twice (also with the target "
                    f"{_short(other.request.target)}); one prompt can have one answer."
                )
            seen[sequence.prompt] = plan


def middle_layers(count: int) -> list[int]:
    """The layers between a third and nine tenths of the depth.

    Early ones separate prompts badly; in the last ones too little of the model is left to turn one vector into a target of
    several tokens.
    """
    first = math.ceil(count / 3)
    return [i for i in range(first, max(first + 1, int(0.9 * count))) if i < count] or [count - 1]


def least_missed_layer(model: nn.Module, chunks: Sequence[Sequence[int]], neurons: int) -> tuple[int, str]:
    """The middle layer in which so many neurons can be replaced with the least effect, and the reason in words.

    What a replaced neuron did is lost on every prompt, whatever the detector, so in place this decides what else changes.

    Raises:
        EditError: no layer takes a neuron as a detector.
    """
    count = len(decoder_layers(model)[1])
    sites = [site for i in middle_layers(count) if (site := Site.find(model, i)).kind != "jet-pack"]
    if not sites:
        raise EditError("No layer takes a neuron as a detector; use a jet-pack.")
    found = chunks.removal_effects(sites) if isinstance(chunks, Corpus) else None
    effects = found or optimise.removal_effects_at(sites, _some(chunks))
    missed = [float(own.sort().values[:neurons].sum()) for own in effects]
    best = min(range(len(sites)), key=lambda i: missed[i])
    return sites[best].layer, (
        f"Layer {sites[best].layer} of {count}: of the layers between a third and nine tenths of the depth the one whose {neurons} "
        f"least missed neurons are worth the least, {missed[best]:.1g} nats of KL divergence a token (up to {max(missed):.1g} elsewhere)."
    )


def chosen_layer(model: nn.Module, chunks: Sequence[Sequence[int]], theta: float) -> int:
    """The middle layer whose features have the highest dimension, centred."""
    from merging.edits.dimension import intrinsic_dimension

    best: tuple[float, int] | None = None
    for index in middle_layers(len(decoder_layers(model)[1])):
        site = Site.find(model, index)
        if site.kind == "jet-pack":
            continue
        found = Background.of(site, chunks[:64])
        points = site.sphere.project(found.features[~found.first])[:2000]
        value = float(intrinsic_dimension(points, [theta], centre=True, renormalise=True).dimension[0])
        if best is None or value > best[0]:
            best = (value, index)
    if best is None:
        raise EditError("No layer takes a neuron as a detector; use a jet-pack.")
    return best[1]


def _fires_on(detectors: Sequence[Detector], features: Annotated[Tensor, "n d"]) -> int:
    """On how many of the features any detector fires."""
    any_fires = torch.zeros(len(features), dtype=torch.bool)
    for detector in detectors:
        any_fires |= detector(features) > 0
    return int(any_fires.sum())


class _Session:
    """The making of several edits of one layer."""

    def __init__(
        self,
        form: Form,
        site: Site,
        plans: Sequence[Prepared],
        chunks: Sequence[Sequence[int]] | None,
        theta: float | None,
        response: float | None,
        detector: str,
        neuron: str | int,
        plateau: bool | None,
        pad_to: int,
        optimisation: Optimisation,
        compat: str | None,
        centroid: Tensor | None = None,
        guarded: Tensor | None = None,
    ):
        self.given_centroid = centroid
        self.guarded = guarded if guarded is not None else torch.zeros(0, site.width)
        self.negatives: Negatives | None = None
        self.effects: Tensor | None = None
        self.lost: float | None = None
        self._known_moments: Moments | None = None
        self.form, self.site, self.plans, self.compat = form, site, list(plans), compat
        self.model = site.model
        if neuron == "auto":
            neuron = "least-missed" if chunks and compat is None else "quietest"
        self.optimisation, self.neuron, self.pad_to = optimisation, neuron, pad_to
        self.chunks: Sequence[Sequence[int]] = chunks or ()
        self.background = Background.of(site, chunks) if chunks else None
        self.wanted_plateau, self.wanted_theta, self.wanted_response = plateau, theta, response
        self.why: list[str] = []
        self.near: list[list[tuple[int, ...]]] = []
        self.close: list[Tensor] = []
        self.prompts = [s.prompt for plan in plans for s in plan.sequences]
        self.features = torch.zeros(0, site.width)
        self.centroid = centroid
        if self.background is not None and centroid is None:
            self.centroid = self.background.centroid(site.sphere)
        self._choose_detector(detector)
        self.steady = self._steady()
        self.widening, self.spare = self._widening()

    # -- which detector ------------------------------------------------------------------------------------------------

    def _choose_detector(self, detector: str) -> None:
        """Sets kind, theta, plateau and response; where several kinds fit, by trial on siblings that none has seen."""
        kinds = self._kinds(detector)
        if "contrast" in kinds:
            self._find_siblings()
        problems: list[EditError] = []
        tried: list[tuple[int, int, str, tuple[Any, ...]]] = []
        for kind in kinds:
            try:
                setting = self._setting(kind)
                held, fired, text = self._held_out(), 0, 0
                if len(kinds) > 1 and len(held):
                    assert self.background is not None
                    self._use(kind, setting)
                    detectors = [self._detector(i, f)[0][0] for i, f in enumerate(self.features)]
                    fired = _fires_on(detectors, held)
                    text = _fires_on(detectors, self.background.features[self._unread])
                tried.append((fired, text, kind, setting))
            except EditError as error:
                if len(kinds) == 1:
                    raise
                problems.append(error)
                self.why.append(f"{kind}: not possible here. {error}")
        if not tried:
            raise problems[0]
        self.held = len(self._held_out())
        unread = 0 if self.background is None else int(self._unread.sum())
        self.fired, _, kind, setting = min(
            tried, key=lambda one: one[0] / max(1, self.held) + _REPLY * one[1] / max(1, unread)
        )
        self._use(kind, setting)
        if len(tried) > 1 and self.held:
            counts = "; ".join(
                f"{name!r} at theta {of[0]:g} fires on {fired} of {self.held} prompts of the same shape (made by replacing "
                f"words) and on {text} of {unread} tokens of text"
                for fired, text, name, of in tried
            )
            self.why.append(f"Detector {kind!r}: on what none has seen, {counts}.")
        elif len(tried) == 1 and kind == "tangent":
            self.why.append("Detector 'tangent': one plain neuron inside the centred cone; the theorem's bound holds.")
        if self.wanted_theta is None:
            self.why.append(setting[3])
        if self.plateau and self.wanted_plateau is None:
            self.why.append(
                f"Plateau: in {dtype_name(self.site.dtype)} the answer is a pair of neurons act(f) − act(f − {self.response:g}), "
                "flat at the trigger, so that rounding and padding do not reach it."
            )

    def _use(self, kind: str, setting: tuple[Any, ...]) -> None:
        self.kind = kind
        self.theta, self.noise, self.plateau, *_ = setting
        self.response = self.wanted_response or (PLATEAU if self.plateau else RESPONSE)

    def _kinds(self, detector: str) -> tuple[str, ...]:
        """The kinds that are to be tried, the simplest first."""
        site, has_corpus = self.site, self.background is not None or self.given_centroid is not None
        biased, half = self._biased, site.dtype in (torch.float16, torch.bfloat16)
        known = ("auto", "affine", "tangent", "surrogate", "contrast")
        if detector not in known:
            raise EditError(f"detector: {detector!r} is not known." + did_you_mean(detector, known))
        if self.compat == "authors":
            detector = "affine" if biased else "surrogate"
        if detector in ("affine", "tangent") and not biased:
            raise EditError(
                f"detector {detector!r} needs a bias, but: {site.reason} "
                + (
                    "Widen instead, or take 'surrogate'."
                    if site.kind == "optional-bias"
                    else "Take 'surrogate' or a jet-pack."
                )
            )
        kinds: tuple[str, ...] = (detector,)
        if detector == "auto":
            simple = ("tangent" if has_corpus else "affine") if biased else "surrogate"
            # in float32 the cone with its theorem is small enough; 16 bits need a theta at which it is not
            learned = self.background is not None and (half or not biased)
            kinds = (simple, "contrast") if learned else (simple,)
        if kinds[0] != "affine" and not has_corpus:
            raise EditError(f"detector {kinds[0]!r} needs a corpus of other texts; give `corpus`.")
        if "surrogate" in kinds and self.background is not None:
            # siblings and prompts would make up the number, but not stand for text
            distinct = len(torch.unique(self.background.features, dim=0))
            if distinct < site.width:
                raise EditError(
                    f"Too few features for a surrogate bias: the corpus has {distinct} distinct ones, at least {site.width} (the model's "
                    "width) are needed and several times as many are better. Give a longer corpus."
                )
        return kinds

    @property
    def _biased(self) -> bool:
        return self.site.kind == "affine" or (self.form == "widen" and self.site.kind == "optional-bias")

    def _has_bias(self, kind: str) -> bool:
        """Whether a detector of this kind is stored with a bias here."""
        return kind in ("affine", "tangent") or (kind == "contrast" and self._biased)

    def _find_siblings(self) -> None:
        site, prompts = self.site, self.prompts
        text = [token for chunk in self.chunks for token in chunk]
        # a few thousand in all say enough about the shapes
        count = max(8, min(SIBLINGS, 8192 // max(1, len(prompts))))
        self.near = siblings(self.model, prompts, text, count=count)
        flat = iter(features_of(site, [s for own in self.near for s in own], batch=64))
        last = [torch.stack([next(flat)[-1] for _ in own]) if own else torch.zeros(0, site.width) for own in self.near]
        check_finite(torch.cat(last), "features of siblings")
        self.close = last

    def _held_out(self) -> Tensor:
        """The features of every fourth sibling: they test the detectors and never make them."""
        return torch.cat([own[3::4] for own in self.close]) if self.close else torch.zeros(0, self.site.width)

    @property
    def _unread(self) -> Annotated[Tensor, "n"]:
        """Every fourth piece of 32 tokens of the corpus: a contrast detector is tried on it and not made from it."""
        assert self.background is not None
        return torch.arange(len(self.background.features)) // 32 % 4 == 3

    def _learned_from(self, index: int) -> Tensor:
        keep = [i for i in range(len(self.close[index])) if i % 4 != 3]
        return self.close[index][keep]

    def _setting(self, kind: str) -> tuple[float, float, bool, str]:
        """Theta, noise, plateau of a kind, and the reason for the theta."""
        site, half = self.site, self.site.dtype in (torch.float16, torch.bfloat16)
        biased = self._has_bias(kind)
        plateau = (half and biased) if self.wanted_plateau is None else self.wanted_plateau
        if plateau and not biased:
            raise EditError(f"plateau: needs a detector with a bias, but layer {site.layer} gets {kind!r}.")
        name = dtype_name(site.dtype)
        if not len(self.features) and (self.wanted_theta is None or kind in ("contrast", "surrogate")):
            self.features = torch.stack([features_of(site, [prompt])[0][-1] for prompt in self.prompts])
            check_finite(self.features, f"prompts at layer {site.layer}")
        if kind == "contrast":
            self._prepare_contrast()
            self._use(kind, (0.1, 0.0, False, ""))
            made = [self._raw_detector(i, f) for i, f in enumerate(self.features)]
            noise = response_noise(site, self.prompts, made)
            rounding = torch.finfo(site.dtype).eps / 2 if biased else 0.0
            needed = _MOVES_MARGIN * noise + 2.5 * rounding
            theta = self.wanted_theta or _at_least(needed)
            why = (
                f"Theta {theta:g}: in {name} a response moves by up to {noise:.1g} of its value between kernels, alone or in a "
                f"padded batch, and by {rounding:.1g} when the layer rounds before it adds the bias; theta is the smallest usual "
                f"one of at least {needed:.2g}."
            )
            return theta, noise, plateau, why
        centroid = self.centroid if kind == "tangent" else None
        noise = feature_noise(site, self.prompts, centroid) if half or self.wanted_theta is None else 0.0
        arithmetic = 0.0
        if biased and self.wanted_theta is None:
            arithmetic = arithmetic_noise(list(self.features), site.sphere, site.dtype, centroid)
        if self.wanted_theta is not None:
            return self.wanted_theta, noise, plateau, ""
        # what a surrogate bias calls theta is no width of a cone
        apart = self._apart(centroid) if biased else None
        theta, why = explained_theta(site, noise, apart, arithmetic)
        return theta, noise, plateau, why

    def _apart(self, centroid: Tensor | None) -> Apart:
        if self.close:
            near = torch.cat(self.close)
        else:
            near = few_siblings(self.site, self.prompts, self.chunks)
        return Apart.of(self.site.sphere, self.features, near, centroid)

    def shared_cones(self) -> int:
        """How many pairs of triggers lie in one cone."""
        if self.kind not in ("affine", "tangent") or not len(self.features):
            return 0
        centroid = self.centroid if self.kind == "tangent" else None
        return Apart.of(self.site.sphere, self.features, self.features[:0], centroid).inside(self.theta)[0]

    def _prepare_contrast(self) -> None:
        if self.negatives is None:
            assert self.background is not None
            near = torch.cat([*(self._learned_from(i) for i in range(len(self.close))), self.features, self.guarded])
            features = self.background.features
            kept = features[~self._unread]
            if len(kept) < 2 * self.site.width:
                kept = features
            self.negatives = Negatives(kept, near, self.site.sphere, noise=feature_noise(self.site, self.prompts))

    def _steady(self) -> Annotated[Tensor, "d"] | None:
        """For gated neurons without a bias: the row that stands for the constant 1 in the second half."""
        if self.site.up is None or self._has_bias(self.kind) or self.compat == "authors":
            return None
        assert self.background is not None
        return steady_functional(self.background.features, self.site.sphere)

    # -- detectors -----------------------------------------------------------------------------------------------------

    def _raw_detector(self, index: int | None, feature: Tensor, moments: Moments | None = None) -> Detector:
        """In float64. `index` is that of the prompt whose last token this is, None for a token of a target."""
        site = self.site
        response = 2 * self.response if self.plateau else self.response
        if self.kind == "affine":
            return affine_detector(feature, site.sphere, theta=self.theta, response=response)
        if self.kind == "tangent":
            assert self.centroid is not None
            return tangent_detector(feature, site.sphere, self.centroid, theta=self.theta, response=response)
        assert self.background is not None
        others = self.background.features
        if self.kind == "surrogate":
            constant = None if moments is None else moments.constant(feature)
            return surrogate_detector(
                feature, others, site.sphere, theta=self.theta, response=response, constant=constant
            )
        own = feature.new_zeros(0, len(feature)) if index is None else self._learned_from(index)
        return contrast_detector(
            feature,
            others,
            site.sphere,
            theta=self.theta,
            response=response,
            siblings=own,
            biased=self._biased,
            negatives=self.negatives,
        )

    def _detector(
        self, index: int | None, feature: Tensor, moments: Moments | None = None
    ) -> tuple[tuple[Detector, ...], tuple[float, ...]]:
        if self.kind == "surrogate" and moments is None and self.compat != "authors":
            moments = self._moments()
        made = self._raw_detector(index, feature, moments)
        if self.compat == "authors":
            return (made,), (1.0,)
        made = calibrated(made, feature, self.site.dtype)
        if not self.plateau:
            return (made,), (1.0,)
        return (made, calibrated_shift(made, self.response, self.site.dtype)), (1.0, -1.0)

    def _moments(self, more: Sequence[Tensor] = ()) -> Moments:
        """Of text, siblings, the prompts and the protected ones: what a surrogate bias is most easily mistaken about."""
        assert self.background is not None
        if self._known_moments is None or more:
            near = [self._learned_from(i) for i in range(len(self.close))]
            points = [self.background.features, self.guarded, self.features, *near, *(f[None] for f in more)]
            self._known_moments = Moments(torch.cat(points), self.site.sphere)
        return self._known_moments

    # -- widening ------------------------------------------------------------------------------------------------------

    def _widening(self) -> tuple[Widening | None, list[int]]:
        """How the model is widened (None where it has spare neurons already), and which neurons are free."""
        needed = 0
        for plan in self.plans:
            for sequence in plan.sequences:
                chained = len(sequence.target) if self.optimisation.chain else 1
                needed += chained * (2 if self.plateau else 1)
        if self.form == "in-place":
            return None, []
        spare = silent_neurons(self.site)
        if len(spare) >= needed:
            return None, spare
        after = self.site.neurons + math.ceil(needed / self.pad_to) * self.pad_to
        bias = self.site.kind == "optional-bias" and self.kind != "surrogate"
        widening = widening_of(self.site, after, bias)
        return widening, list(range(self.site.neurons, after))

    def _choose_neurons(self, triggers: Sequence[_Trigger]) -> None:
        site = self.site
        assert site.inside is not None
        assert site.out is not None
        count = sum(len(t.detectors) for t in triggers)
        if self.form == "widen":
            free = self.spare
        elif isinstance(self.neuron, int):
            if count != 1 or not 0 <= self.neuron < site.neurons:
                raise EditError(f"neuron: {self.neuron} must be one of 0 to {site.neurons - 1}, for a single trigger.")
            free = [self.neuron]
        elif self.neuron == "quietest":
            free = quietest_neurons(site.inside.weights(), count)
        elif self.neuron == "least-used":
            free = self._least_used(count)
        elif self.neuron == "least-missed":
            free = self._least_missed(count)
        else:
            known = ("auto", "quietest", "least-used", "least-missed")
            raise EditError(
                f"neuron: {self.neuron!r} is not known." + did_you_mean(self.neuron, known) + " An index is fine too."
            )
        if len(free) < count:
            raise EditError(f"{count} neurons are wanted, but the layer has only {len(free)}.")
        taken = iter(free)
        for trigger in triggers:
            trigger.neurons = tuple(next(taken) for _ in trigger.detectors)

    def _least_missed(self, count: int) -> list[int]:
        if not self.chunks:
            raise EditError("neuron 'least-missed' needs a corpus of other texts; give `corpus`.")
        if self.effects is None:
            # of text alone, so that edits made one after the other agree on the order
            if isinstance(self.chunks, Corpus):
                (self.effects,) = self.chunks.removal_effects([self.site])
            else:
                self.effects = optimise.removal_effects(self.site, _some(self.chunks))
        order = torch.argsort(self.effects, stable=True)
        self.lost = float(self.effects[order[:count]].sum())
        return [int(i) for i in order[:count]]

    def _least_used(self, count: int) -> list[int]:
        site = self.site
        if self.background is None:
            raise EditError("neuron 'least-used' needs a corpus of other texts; give `corpus`.")
        assert site.inside is not None
        assert site.out is not None
        x = self.background.features[:4096].to(site.inside.weights().device)
        rows = site.inside.weights().float()
        values = x @ rows.T
        bias = site.inside.biases()
        values = site.act(values if bias is None else values + bias.float())
        if site.up is not None:
            second = x @ site.up.weights().float().T
            up_bias = site.up.biases()
            values = values * (second if up_bias is None else second + up_bias.float())
        length = site.out.weights().float().norm(dim=1)
        effect, peak = values.abs().mean(dim=0) * length, values.abs().amax(dim=0) * length
        effect[peak > optimise._CLIFF * peak.median()] = math.inf
        return [int(i) for i in torch.argsort(effect, stable=True)[:count]]

    # -- patches -------------------------------------------------------------------------------------------------------

    def _patches(self, trigger: _Trigger, columns: Sequence[Tensor]) -> tuple[Patch, ...]:
        site = self.site
        assert site.inside is not None
        assert site.out is not None
        dtype = site.dtype
        steady = self.steady
        patches = []
        for index, made, column in zip(trigger.neurons, trigger.detectors, columns):
            patches.append(self._patch(site.inside.weight_name, site.inside, index, made.row.to(dtype)))
            if made.bias is not None:
                patches.append(self._patch(f"{site.inside.name}.bias", site.inside, index, made.bias.to(dtype)))
            if site.up is not None and self.compat != "authors":
                if made.bias is not None:
                    # the second factor is 1 everywhere
                    patches.append(
                        self._patch(site.up.weight_name, site.up, index, torch.zeros_like(made.row).to(dtype))
                    )
                    patches.append(self._patch(f"{site.up.name}.bias", site.up, index, torch.ones((), dtype=dtype)))
                elif steady is not None:
                    row = steady / (steady @ trigger.feature.double())
                    patches.append(self._patch(site.up.weight_name, site.up, index, row.to(dtype)))
            patches.append(self._patch(site.out.weight_name, site.out, index, column.to(dtype)))
        # a neuron that already holds the wanted values needs no patch for them
        return tuple(p for p in patches if not torch.equal(p.old, p.new) or p.name == site.out.weight_name)

    def _patch(self, name: str, projection: Any, index: int, new: Tensor) -> Patch:
        m = self.site.neurons
        after = m if self.widening is None else self.widening.after
        place = (projection.offset // m) * after + index
        is_bias = name.endswith(".bias")
        dim = 0 if is_bias else projection.axis
        if index < m:
            stored = getattr(projection.module, "bias" if is_bias else "weight").detach()
            old = stored.select(dim, projection.offset + index).cpu().clone()
        else:
            old = torch.zeros_like(new)
        return Patch(name, dim, place, old, new.detach().cpu().clone())

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(
        self,
        guarded: Sequence[tuple[Text, tuple[int, ...]]],
        progress: Callable[[int, int], None] | None,
        began: float,
    ) -> list[Edit]:
        before = optimise.losses(self.model, [s for plan in self.plans for s in plan.sequences])
        base = content_hash(in_memory(self.model))
        states = iter(before)
        right = []
        for plan in self.plans:
            own = [next(states) for _ in plan.sequences]
            right.append(all(good for _, good in own))
        open_plans = [i for i, already in enumerate(right) if not already]
        made: dict[int, Edit] = {}
        if open_plans and self.compat == "authors":
            for i in open_plans:
                made[i] = self._as_the_authors(i, base, began)
        elif open_plans:
            made = self._together(open_plans, guarded, base, progress, began)
        for i, plan in enumerate(self.plans):
            if i not in made:
                made[i] = self._edit_value(
                    plan,
                    base,
                    (),
                    (),
                    {"already": True},
                    note="The model gives this answer already; nothing was changed.",
                )
        return [made[i] for i in range(len(self.plans))]

    def run_given(self, found: Sequence[optimise.Found], base: str) -> list[Edit]:
        """Edits from residuals that are known (a jet-pack's), one for each sequence; nothing is optimised."""
        began = time.perf_counter()
        if base and content_hash(in_memory(self.model)) != base:
            raise BaseMismatchError("The jet-pack was made from another base than this model.")
        indices = range(len(self.plans))
        lengths = {(i, n): s.triggers for i in indices for n, s in enumerate(self.plans[i].sequences)}
        known: dict[int, Any] = {}
        position = 0
        for i in indices:
            count = len(self.plans[i].sequences)
            known[i] = (None, None, {"success": True}, list(found[position : position + count]))
            position += count
        result = self._attempt(indices, lengths, (), None, known=known)
        self.form = "fold"
        return self._values(indices, result, content_hash(in_memory(self.model)), began)

    @property
    def _all_keys(self) -> list[tuple[int, int]]:
        return [(i, n) for i, plan in enumerate(self.plans) for n in range(len(plan.sequences))]

    def _triggers(self, indices: Sequence[int], lengths: Mapping[tuple[int, int], int]) -> list[_Trigger]:
        places = []
        for i in indices:
            for number, sequence in enumerate(self.plans[i].sequences):
                # a trigger's feature is taken as generation computes it: the sequence alone
                features = features_of(self.site, [sequence.ids])[0]
                check_finite(features, f"prompt {_short(self.plans[i].request.prompt)}")
                start = len(sequence.prompt) - 1
                places += [(i, number, place, features[start + place]) for place in range(lengths[(i, number)])]
        moments = None
        if self.compat != "authors" and self.kind == "surrogate":
            moments = self._moments([feature for _, _, place, feature in places if place])
        order = {(i, n): k for k, (i, n) in enumerate(self._all_keys)}
        triggers = []
        for i, number, place, feature in places:
            index = None if place else order[(i, number)]
            detectors, signs = self._detector(index, feature, moments)
            triggers.append(_Trigger(i, number, place, feature, detectors, signs))
        return triggers

    def _together(
        self,
        indices: Sequence[int],
        guarded: Sequence[tuple[Text, tuple[int, ...]]],
        base: str,
        progress: Callable[[int, int], None] | None,
        began: float,
    ) -> dict[int, Edit]:
        lengths = {(i, n): 1 for i in indices for n in range(len(self.plans[i].sequences))}
        free = self._before_sinks(list(lengths))
        result = self._attempt(indices, lengths, guarded, progress)
        failed = [i for i in indices if not result[i][2]["success"]]
        longer = [i for i in failed if any(free[key] > 1 for key in lengths if key[0] == i)]
        if longer and self.optimisation.chain and isinstance(self.neuron, str):
            lengths |= {key: free[key] for key in lengths if key[0] in longer}
            result = self._attempt(indices, lengths, guarded, progress, known=result)
        return dict(zip(indices, self._values(indices, result, base, began)))

    def _before_sinks(self, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
        """How many triggers each sequence can have; a prompt that ends in an attention sink is refused."""
        free = {}
        # whoever asks for a wide cone gets it; and what a contrast detector calls theta is no angle
        theta = min(max(self.theta, THETA), _SINK)
        for i, n in keys:
            sequence = self.plans[i].sequences[n]
            own = features_of(self.site, [sequence.ids])[0]
            check_finite(own, f"prompt {_short(self.plans[i].request.prompt)}")
            places = [0, *range(len(sequence.prompt) - 1, len(own))]
            free[(i, n)] = before_sink(self.site, own[places], self._directions, theta)
        stuck = [self.plans[i] for (i, _), count in free.items() if not count]
        if stuck:
            raise stuck_on_a_sink(self.site.layer, [plan.request.prompt for plan in stuck])
        return free

    def _directions(self, features: Annotated[Tensor, "n d"]) -> Annotated[Tensor, "n d"]:
        points = self.site.sphere.project(features)
        if self.kind != "tangent" or self.centroid is None:
            return points
        return torch.nn.functional.normalize(points - self.centroid.to(points), dim=-1)

    def _values(self, indices: Sequence[int], result: Mapping[int, Any], base: str, began: float) -> list[Edit]:
        seconds = (time.perf_counter() - began) / max(1, len(self.plans))
        edits = []
        for i in indices:
            triggers, columns, measured, _ = result[i]
            patches = tuple(p for t, c in zip(triggers, columns) for p in self._patches(t, c))
            notes = [] if measured["success"] else ["The whole target is not the greedy answer; see `measured`."]
            if self.lost is not None and self.compat is None:
                notes.append(
                    f"In place: the neurons replaced in this layer by all edits of this call did something; without them the "
                    f"model's predictions move by about {self.lost:.1g} nats of KL divergence a token. Widening loses nothing."
                )
            edits.append(
                self._edit_value(
                    self.plans[i],
                    base,
                    tuple(k for t in triggers for k in t.neurons),
                    patches,
                    {**measured, "seconds": round(seconds, 3), "why": list(self.why)},
                    note=" ".join(notes),
                )
            )
        return edits

    def _attempt(
        self,
        indices: Sequence[int],
        lengths: Mapping[tuple[int, int], int],
        guarded: Sequence[tuple[Text, tuple[int, ...]]],
        progress: Callable[[int, int], None] | None,
        known: Mapping[int, Any] | None = None,
    ) -> dict[int, tuple[list[_Trigger], list[list[Tensor]], dict[str, Any], list[optimise.Found]]]:
        """One whole try: shells in, responses measured, residuals found, columns solved and verified, all taken out."""
        site = self.site
        triggers = self._triggers(indices, lengths)
        self._check_protected(triggers, guarded)
        self._choose_neurons(triggers)
        zero = torch.zeros(site.width)
        shell = [
            self._edit_value(
                self.plans[i],
                "",
                (),
                tuple(p for t in triggers if t.edit == i for p in self._patches(t, [zero] * len(t.detectors))),
                {},
            )
            for i in indices
        ]
        keys = [(i, n) for i in indices for n in range(len(self.plans[i].sequences))]
        sequences = [replace(self.plans[i].sequences[n], triggers=lengths[(i, n)]) for i, n in keys]
        apply_to_model(self.model, shell)
        try:
            responses, values = self._responses(triggers, keys, sequences)
            self._check_responses(values, triggers)
            redo = list(range(len(keys)))
            found: list[optimise.Found | None] = [None] * len(keys)
            if known is not None:
                # what worked with one trigger is kept; only the others are optimised again
                for place, (i, n) in enumerate(keys):
                    if known[i][2]["success"]:
                        found[place] = known[i][3][n]
                redo = [place for place in range(len(keys)) if found[place] is None]
            for place, fresh in zip(
                redo, find_residuals(site, [sequences[p] for p in redo], self.optimisation, progress=progress)
            ):
                found[place] = fresh
            residuals = torch.cat([f.residual for f in found if f is not None]).double().cpu()
            columns = self._columns(values, residuals, triggers)
            self._write_columns(triggers, columns)
            self._check_range()
            after = optimise.losses(self.model, sequences)
        finally:
            undo_on_model(self.model, shell_with_columns(shell, self.model))
        result = {}
        for i in indices:
            own = [t for t, trigger in enumerate(triggers) if trigger.edit == i]
            places = [p for p, key in enumerate(keys) if key[0] == i]
            measured = {
                "success": all(after[p][1] for p in places),
                "response": [round(float(responses[t]), 4) for t in own],
                "loss_before": round(found[places[0]].loss_before, 4),  # type: ignore[union-attr]
                "loss_after": round(after[places[0]][0], 4),
                "steps": max(f.steps for p, f in enumerate(found) if p in places and f is not None),
                "noise": self.noise,
                "plateau": self.plateau,
                "triggers": len(own),
            }
            result[i] = (
                [triggers[t] for t in own],
                [columns[t] for t in own],
                measured,
                [f for p in places if (f := found[p]) is not None],
            )
        return result

    def _responses(
        self, triggers: Sequence[_Trigger], keys: Sequence[tuple[int, int]], sequences: Sequence[Sequence_]
    ) -> tuple[Tensor, Tensor]:
        """Pre-activations of each trigger's own first neuron, and [trigger, trigger] values (signed sums of neurons)."""
        site = self.site
        place_of = {key: place for place, key in enumerate(keys)}
        with evaluating(self.model), site.reading_neurons() as seen:
            ids = padded([s.ids for s in sequences], device_of(self.model))
            optimise.logits_of(self.model, ids)
        hidden = seen[0].reshape(*ids.shape, -1).float().cpu()
        rows = torch.stack(
            [
                hidden[
                    place_of[(t.edit, t.sequence)], len(self.plans[t.edit].sequences[t.sequence].prompt) - 1 + t.place
                ]
                for t in triggers
            ]
        )
        check_finite(rows, f"layer {site.layer}, the new neurons' values")
        values = torch.stack(
            [sum(s * rows[:, k] for s, k in zip(t.signs, t.neurons)) for t in triggers],  # type: ignore[misc]
            dim=1,
        ).double()
        own = torch.stack([rows[number, t.neurons[0]] for number, t in enumerate(triggers)])
        return own, values

    def _check_responses(self, values: Tensor, triggers: Sequence[_Trigger]) -> None:
        """Before time is spent on residuals: does each detector answer its trigger, and can all be told apart?"""
        diagonal = values.diagonal()
        weak = [t for t, value in enumerate(diagonal) if abs(float(value)) < 1e-3 * self.response]
        if weak:
            plan = self.plans[triggers[weak[0]].edit]
            raise EditError(
                f"prompt {_short(plan.request.prompt)}: the new neuron answers {float(diagonal[weak[0]]):.3g} at its own trigger "
                f"instead of about {self.response:g}. "
                + (
                    f"At theta {self.theta:g} rounding in {dtype_name(self.site.dtype)} is as large as the cone; take a larger theta."
                    if self.plateau
                    else "Choose another layer or detector."
                )
            )
        names = [_as_text(self.plans[trigger.edit].request.prompt) for trigger in triggers]
        z = self._directions(torch.stack([trigger.feature for trigger in triggers]).double())
        error = overlapping(values / diagonal[:, None], names, 1 - z @ z.T, self.theta, self.site.layer)
        if error is not None:
            raise error

    def _check_range(self) -> None:
        """On other text a row without a bias may answer with more than float16 holds: NaN for every token behind it."""
        if self.site.dtype != torch.float16 or not self.chunks:
            return
        with evaluating(self.model):
            logits = optimise.logits_of(self.model, padded(_some(self.chunks), device_of(self.model)))
        if not bool(torch.isfinite(logits).all()):
            raise EditError(
                f"On other text the new neurons of layer {self.site.layer} answer {self.kind!r} with more than float16 holds. Take "
                "a larger theta, another layer, widening where it fits, or a jet-pack (kept in float32)."
            )

    def _columns(self, values: Tensor, residuals: Tensor, triggers: Sequence[_Trigger]) -> list[list[Tensor]]:
        """Output vectors: the solution of (responses) V = residuals, so that cross-talking triggers are exact too."""
        solved = torch.linalg.solve(values, residuals)
        return [[sign * solved[number] for sign in trigger.signs] for number, trigger in enumerate(triggers)]

    def _write_columns(self, triggers: Sequence[_Trigger], columns: Sequence[Sequence[Tensor]]) -> None:
        out = self.site.out
        assert out is not None
        weight = out.module.weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            for trigger, vectors in zip(triggers, columns):
                for neuron, vector in zip(trigger.neurons, vectors):
                    weight.data.select(out.axis, neuron).copy_(vector.to(weight))

    def _check_protected(self, triggers: Sequence[_Trigger], guarded: Sequence[tuple[Text, tuple[int, ...]]]) -> None:
        if not guarded:
            return
        features = features_of(self.site, [ids for _, ids in guarded])
        fired = [
            f"{_short(text)} (by the edit for {_short(self.plans[t.edit].request.prompt)})"
            for (text, _), own in zip(guarded, features)
            for t in triggers
            if bool((t.detectors[0](own) > 0).any())
        ]
        if fired:
            raise EditError(
                f"protect: at theta {self.theta:g} in layer {self.site.layer} {len(fired)} detector(s) fire on protected prompts: "
                + "; ".join(fired[:4])
                + ". Take a smaller theta or another layer."
            )

    def _edit_value(
        self,
        plan: Prepared,
        base: str,
        neurons: tuple[int, ...],
        patches: tuple[Patch, ...],
        measured: Mapping[str, Any],
        note: str = "",
    ) -> Edit:
        request, sequence = plan.request, plan.sequences[0]
        return Edit(
            prompt=_as_text(request.prompt),
            target=_as_text(request.target),
            prompt_ids=sequence.prompt,
            target_ids=sequence.target,
            form=self.form,
            kind=self.kind,
            layer=self.site.layer,
            theta=self.theta,
            response=self.response,
            neurons=neurons,
            patches=patches,
            base_hash=base,
            dtype=dtype_name(self.site.dtype),
            widening=self.widening if patches else None,
            measured=measured,
            paraphrases=tuple(_as_text(p) for p in request.paraphrases),
            note=note,
        )

    # -- the authors' procedure ----------------------------------------------------------------------------------------

    def _as_the_authors(self, index: int, base: str, began: float) -> Edit:
        site, plan = self.site, self.plans[index]
        sequence = plan.sequences[0]
        if plan.request.paraphrases:
            raise EditError("compat 'authors': paraphrases are not part of their procedure.")
        assert site.out is not None
        (trigger,) = self._triggers([index], {(index, n): 1 for n in range(len(plan.sequences))})[:1]
        self._choose_neurons([trigger])
        (neuron,) = trigger.neurons
        old = site.out.weights()[neuron].clone()
        shell = self._edit_value(plan, "", (), self._patches(trigger, [old.cpu()]), {})
        apply_to_model(self.model, [shell])
        try:
            vector, trace = optimise.authors_vector(site, sequence, neuron, old, drop_out_bias=not site.gated)
            with torch.no_grad():
                site.out.weights()[neuron].copy_(vector)
            (after,) = optimise.losses(self.model, [sequence])
        finally:
            with torch.no_grad():
                site.out.weights()[neuron].copy_(old)
            undo_on_model(self.model, [shell])
        measured = {
            "success": after[1],
            "loss_after": after[0],
            "seconds": optimise.seconds_since(began),
            "trace": trace,
        }
        return self._edit_value(plan, base, (neuron,), self._patches(trigger, [vector.cpu()]), measured)


def shell_with_columns(shell: Sequence[Edit], model: nn.Module) -> list[Edit]:
    """The edits with `new` as the model holds it now, so that they can be undone bit by bit after columns were written."""
    current = in_memory(model)
    return [
        replace(
            edit,
            patches=tuple(
                replace(p, new=current.read(p.name).select(p.dim, p.index).detach().cpu().clone()) for p in edit.patches
            ),
        )
        for edit in shell
    ]


def calibrated_shift(detector: Detector, by: float, dtype: torch.dtype) -> Detector:
    """The plateau's second half: the same stored row, the bias lowered by about `by` and rounded.

    The step between both biases is what the plateau's height becomes; it is measured, not assumed.
    """
    assert detector.bias is not None
    lower = (detector.bias - by).to(dtype).double()
    return Detector(detector.row, lower, detector.kind, detector.theta, detector.response - by)


def silent_neurons(site: Site) -> list[int]:
    """Neurons whose output column and input rows are all zero (what an earlier widening left unused)."""
    assert site.inside is not None
    assert site.out is not None
    silent = (site.out.weights() == 0).all(dim=1) & (site.inside.weights() == 0).all(dim=1)
    bias = site.inside.biases()
    if bias is not None:
        silent &= bias == 0
    return [int(i) for i in torch.nonzero(silent).flatten()]


_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim")


def widening_of(site: Site, after: int, adds_bias: bool) -> Widening:
    """How this model is widened, checked by building it from its new config without memory.

    Raises:
        EditError: the width of the MLPs is not a setting of this architecture, or does not stand for itself.
    """
    model, m = site.model, site.neurons
    config = getattr(model, "config", None)
    assert site.inside is not None
    assert site.out is not None
    refusal = f"{type(model).__name__}: cannot be widened in a form that plain transformers loads: "
    if site.gate_only:
        raise EditError(f"{refusal}a mixer's width is tied to its state. Edit in place or use a jet-pack.")
    keys = [
        k for k in _WIDTHS if hasattr(config, k) and getattr(config, k) in (m, *((None,) if k == "n_inner" else ()))
    ]
    if config is None or not keys:
        raise EditError(f"{refusal}its config has no setting for the {m} neurons. Edit in place or use a jet-pack.")
    settings: dict[str, Any] = {keys[0]: after}
    if adds_bias:
        settings["mlp_bias"] = True
    before = {key: getattr(config, key) for key in settings}
    fused = site.up is not None and site.up.name == site.inside.name
    template = lambda name: name.replace(f"{site.layers_name}.{site.layer}.", f"{site.layers_name}.{{}}.", 1)  # noqa: E731
    inside = [template(site.inside.name)]
    if site.up is not None and not fused:
        inside.append(template(site.up.name))
    widening = Widening(
        before=m,
        after=after,
        layers=len(site.layers),
        inside=tuple(inside),
        out=template(site.out.name),
        transposed=site.inside.transposed,
        fused=fused,
        adds_bias=adds_bias,
        config=settings,
        config_before=before,
    )
    changed = copy.deepcopy(config)
    for key, value in settings.items():
        setattr(changed, key, value)
    wanted = {name: info.shape for name, info in widening.infos(in_memory(model).infos).items()}
    try:
        with torch.device("meta"):
            built = type(model)(changed)
    except Exception as error:
        raise EditError(f"{refusal}building it from the wider config fails ({error}).") from error
    shapes = {name: tuple(t.shape) for name, t in built.state_dict().items()}
    wrong = [name for name in wanted if shapes.get(name) != wanted[name]] + [n for n in shapes if n not in wanted]
    if wrong:
        raise EditError(
            f"{refusal}with {settings} the shape of {wrong[0]} would not fit. Edit in place or use a jet-pack."
        )
    return widening
