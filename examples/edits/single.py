"""Edits in place measured as the paper does: one in the model at a time.

What an edit in place changes elsewhere has two causes, told apart here: the neuron that was replaced is gone, which is the same
for every edit that replaces it, and its detector fires on other prompts. A detector's pre-activation is usually thousands below
zero, where SiLU is exactly 0 in float32; on such a prompt the edited model computes bit for bit what the model without the
neuron computes, so only the other prompts are run again for each edit.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from merging.edits import Corpus, Edit, Optimisation, Site, edit_in_place, edited
from merging.edits.optimise import _shortcut, greedy_matches, padded
from merging.edits.requests import Request
from merging.edits.site import evaluating
from merging.edits.stealth import corpus_ids, features_of, prepared, prompt_ids

NOTHING = -120.0
"""Below it SiLU is exactly 0 in float32 (e^-120 is less than its smallest number)."""


class Rows:
    """Sequences as the layers from one on see them; what lies below that layer is computed once."""

    def __init__(self, site: Site, sequences: Sequence[Sequence[int]], places: Sequence[range], batch: int):
        self.site, self.sequences, self.places, self.batch = site, list(sequences), list(places), batch
        self.features = features_of(site, self.sequences, batch=batch)
        self.hidden = self._hidden()

    def _hidden(self) -> list[Tensor]:
        layer, found, seen = self.site.layers[self.site.layer], {}, []
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        try:
            with evaluating(self.site.model):
                for chosen in self._groups(range(len(self.sequences))):
                    self.site.model(input_ids=self._ids(chosen), use_cache=False)
                    whole = seen.pop()
                    found.update({i: whole[row, : len(self.sequences[i])].clone() for row, i in enumerate(chosen)})
        finally:
            handle.remove()
        return [found[i] for i in range(len(self.sequences))]

    def _ids(self, chosen: Sequence[int]) -> Tensor:
        return padded([self.sequences[i] for i in chosen], next(self.site.model.parameters()).device)

    def _groups(self, rows: Sequence[int]) -> list[list[int]]:
        order = sorted(rows, key=lambda i: len(self.sequences[i]))
        return [order[start : start + self.batch] for start in range(0, len(order), self.batch)]

    def logits(self, rows: Sequence[int]) -> dict[int, Tensor]:
        """Logits of the model as it is now, at each row's places."""
        model, layers, found = self.site.model, self.site.layers, {}
        with evaluating(model):
            for chosen in self._groups(rows):
                whole = torch.nn.utils.rnn.pad_sequence([self.hidden[i] for i in chosen], batch_first=True)
                at = torch.tensor([row for row, i in enumerate(chosen) for _ in self.places[i]])
                where = torch.tensor([place for i in chosen for place in self.places[i]])

                def features(whole: Tensor = whole) -> Tensor:
                    return whole

                with ExitStack() as stack:
                    for index in range(self.site.layer):
                        stack.enter_context(_shortcut(layers[index], features, False))
                    handle = model.lm_head.register_forward_pre_hook(
                        lambda _, args, to=(at, where): (args[0][to][None],)
                    )
                    stack.callback(handle.remove)
                    out = model(input_ids=self._ids(chosen), use_cache=False).logits[0].float()
                for i, own in zip(chosen, out.split([len(self.places[i]) for i in chosen])):
                    found[i] = own
        return found

    def not_silent(self, edit: Edit) -> list[int]:
        """Rows on which a new neuron of the edit is anything but exactly 0."""
        gate = [patch.new.float() for patch in edit.patches if "gate_proj" in patch.name]
        highest = [max(float((x @ row.to(x)).max()) for row in gate) for x in self.features]
        return [i for i, value in enumerate(highest) if value > NOTHING]


def one_by_one(
    model: Any,
    tokenizer: Any,
    facts: Sequence[tuple[str, str]],
    layer: int | None,
    corpus: Sequence[str],
    prompts: Sequence[str],
    continuations: Sequence[tuple[int, ...]],
    text: Sequence[str],
    batch: int,
) -> dict[str, Any]:
    """Each edit alone in the model: success, other prompts changed (by the removal, and in all), NLL ratio, seconds."""
    shared = Corpus.of(tokenizer, corpus)
    began, edits, seconds = time.perf_counter(), [], []
    for fact in facts:
        busy = time.process_time()
        edits.append(
            edit_in_place(
                model, Request(*fact), tokenizer, layer=layer, corpus=shared, optimisation=Optimisation(batch=batch)
            )
        )
        seconds.append(time.process_time() - busy)
    took = (time.perf_counter() - began) / len(facts)
    site = Site.find(model, edits[0].layer)
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    tokens = len(continuations[0])
    said = Rows(
        site,
        [ids + own[:-1] for ids, own in zip(asked, continuations)],
        [range(len(ids) - 1, len(ids) - 1 + tokens) for ids in asked],
        batch,
    )
    pieces = [piece for piece in corpus_ids(tokenizer, text) if len(piece) > 1]
    read = Rows(site, pieces, [range(len(piece) - 1) for piece in pieces], max(1, batch // 4))
    answers = {i: own.argmax(-1) for i, own in said.logits(range(len(asked))).items()}
    nll = _nll(read, range(len(pieces)))
    removals: dict[tuple[int, ...], tuple[dict[int, Tensor], dict[int, float]]] = {}
    rows = []
    for fact, edit in zip(facts, edits):
        if edit.neurons not in removals:
            removals[edit.neurons] = _without(site, edit.neurons, said, read)
        gone, gone_nll = removals[edit.neurons]
        with edited(model, [edit]):
            success = greedy_matches(model, prepared(model, tokenizer, [Request(*fact)])[0].sequences)[0]
            close, near = said.not_silent(edit), read.not_silent(edit)
            after = gone | {i: own.argmax(-1) for i, own in said.logits(close).items()}
            nll_after = gone_nll | _nll(read, near)
        differs = {i: own != answers[i] for i, own in after.items()}
        rows.append(
            {
                "prompt": fact[0],
                "neurons": list(edit.neurons),
                "kind": edit.kind,
                "success": success,
                "changed": sum(bool(d.any()) for d in differs.values()),
                "changed_next": sum(bool(d[0]) for d in differs.values()),
                "changed_by_removal": sum(bool((own != answers[i]).any()) for i, own in gone.items()),
                "close": len(close),
                "nll_ratio": sum(nll_after.values()) / sum(nll.values()),
            }
        )
    ratios = [row["nll_ratio"] for row in rows]
    return {
        "chosen": f"in-place {'/'.join(sorted({row['kind'] for row in rows}))}",
        "layer": site.layer,
        "edits": len(rows),
        "success": sum(row["success"] for row in rows) / len(rows),
        "prompts": len(prompts),
        "fired": sum(row["close"] for row in rows) / len(rows),
        "changed": sum(row["changed"] for row in rows) / len(rows),
        "changed_next": sum(row["changed_next"] for row in rows) / len(rows),
        "changed_by_removal": sum(row["changed_by_removal"] for row in rows) / len(rows),
        "outside": None,
        "nll_ratio": max(ratios, key=lambda ratio: abs(ratio - 1)),
        "text_tokens": sum(len(piece) - 1 for piece in pieces),
        "theta": edits[0].theta,
        "seconds_per_edit": round(took, 3),
        "cpu_seconds_per_edit": round(sum(seconds) / len(seconds), 3),
        "cpu_seconds_later": round(sum(seconds[1:]) / max(1, len(seconds) - 1), 3),
        "why": edits[0].measured.get("why"),
        "each": rows,
    }


def _nll(read: Rows, rows: Sequence[int]) -> dict[int, float]:
    found = {}
    for i, own in read.logits(rows).items():
        wanted = torch.tensor(read.sequences[i][1:], device=own.device)
        found[i] = float(F.cross_entropy(own, wanted, reduction="sum"))
    return found


def _without(site: Site, neurons: Sequence[int], said: Rows, read: Rows) -> tuple[dict[int, Tensor], dict[int, float]]:
    """What the model says without these neurons: their columns set to zero."""
    assert site.out is not None
    columns = site.out.weights()
    old = columns[list(neurons)].clone()
    with torch.no_grad():
        columns[list(neurons)] = 0
        try:
            answers = {i: own.argmax(-1) for i, own in said.logits(range(len(said.sequences))).items()}
            return answers, _nll(read, range(len(read.sequences)))
        finally:
            columns[list(neurons)] = old
