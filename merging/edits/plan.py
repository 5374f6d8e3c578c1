"""How exposed (and how editable) each layer of a model is: the dimension of its features over a corpus."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from merging.edits.dimension import THETAS, DimensionProfile, LayerDimension, dimension_profile
from merging.edits.optimise import device_of, padded
from merging.edits.requests import Text
from merging.edits.site import Site, decoder_layers, evaluating
from merging.edits.stealth import corpus_ids
from taskvec.errors import DataError, EditError


def dimension_by_layer(
    model: nn.Module,
    corpus: Sequence[Text],
    tokenizer: Any = None,
    *,
    thetas: Sequence[float] | Tensor = THETAS,
    layers: Sequence[int] | None = None,
    vectors: int = 5000,
    length: int = 128,
    batch: int = 16,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DimensionProfile:
    """The separability dimension of every layer's MLP inputs, raw and centred, in one pass over a corpus.

    Texts are cut into windows of `length` tokens. From them `vectors` positions are drawn at random, never the first
    of a window; the same positions in every layer. A text counts as one independent draw, and pairs within a text are
    left out, so give many short texts rather than few long ones: the certified bound comes from their number.

    Args:
        model: a causal model of transformers.
        corpus: texts, or token ids.
        tokenizer: for texts.
        thetas: thresholds, each in [0, 1].
        layers: indices, negative from the end; all by default.
        vectors: positions looked at, at most; the same number from each text that is long enough. Memory is
            layers * vectors * d * 4 bytes, time layers * vectors² * d.
        length: tokens a window.
        batch: windows run at once.
        confidence: of the interval.
        seed: of the draw of positions.
        progress: called with (done, all) layers.

    Raises:
        EditError: no layer list, a layer out of range, or no MLP of a known kind.
        DataError: fewer than two texts, or nothing but first positions.
    """
    count = len(decoder_layers(model)[1])
    chosen = range(count) if layers is None else [_checked(layer, count) for layer in layers]
    windows: list[tuple[int, ...]] = []
    owner: list[int] = []
    for number, text in enumerate(corpus):
        found = corpus_ids(tokenizer, [text], length=length)
        windows += found
        owner += [number] * len(found)
    places = [(w, t) for w, ids in enumerate(windows) for t in range(1, len(ids))]
    firsts = len(windows)
    if len({owner[w] for w, _ in places}) < 2:
        raise DataError(
            f"corpus: {len({owner[w] for w, _ in places})} texts of more than one token; the dimension compares "
            "positions of different texts, and its interval rests on their number. Give some hundreds of passages."
        )
    # as many from each text: the interval is much narrower for draws of equal size
    by_text: dict[int, list[tuple[int, int]]] = {}
    for w, t in places:
        by_text.setdefault(owner[w], []).append((w, t))
    share, generator = max(1, vectors // len(by_text)), torch.Generator().manual_seed(seed)
    places = [
        own[i]
        for own in by_text.values()
        for i in torch.randperm(len(own), generator=generator)[:share].sort().values.tolist()
    ]
    sites = {layer: Site.find(model, layer) for layer in chosen}
    kept: dict[int, list[Tensor]] = {layer: [] for layer in sites}
    wanted: dict[int, list[int]] = {}
    for w, t in places:
        wanted.setdefault(w, []).append(t)
    rows = sorted(wanted)
    with evaluating(model):
        for start in range(0, len(rows), batch):
            group = rows[start : start + batch]
            with ExitStack() as stack:
                seen = {layer: stack.enter_context(site.reading()) for layer, site in sites.items()}
                ids = padded([windows[w] for w in group], device_of(model))
                model(input_ids=ids, use_cache=False)
            for layer, site in sites.items():
                values = seen[layer][0].reshape(*ids.shape, -1)
                for row, w in enumerate(group):
                    kept[layer].append(site.sphere.project(values[row, wanted[w]].float()).cpu())
    owners = torch.tensor([owner[w] for w in rows for _ in wanted[w]])
    positions = torch.tensor([t for w in rows for t in wanted[w]])
    profiles: list[LayerDimension] = []
    for done, layer in enumerate(sites):
        one = dimension_profile(
            {layer: torch.cat(kept.pop(layer))}, thetas, sequences=owners, positions=positions, confidence=confidence
        )
        profiles += one.layers
        if progress is not None:
            progress(done + 1, len(sites))
    return DimensionProfile(tuple(sorted(profiles, key=lambda one: one.layer)), first_excluded=firsts)


def _checked(layer: int, count: int) -> int:
    if not -count <= layer < count:
        raise EditError(f"layer {layer}: the model has layers 0 to {count - 1}.")
    return layer % count
