"""The jet-pack: a side block that adds to one MLP's output, and only at its triggers.

y = W2 ReLU(W1 ψ(x) + b1) with ψ(x) = (φ(x) − c)/|φ(x) − c|: a cone around every trigger in centred, re-normalised
coordinates, exact whatever the host's activation or bias, kept in float32 beside a model of any dtype. Triggers and wanted
changes are stored, not the matrices, so edits can be added and removed one by one and the output weights solved anew.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from merging.edits import optimise, stealth
from merging.edits.edit import Edit
from merging.edits.features import RESPONSE, THETA, Sphere, check_finite, check_theta
from merging.edits.optimise import Found, Optimisation, Sequence_, find_residuals
from merging.edits.requests import Request, Requests, Text, requests_of
from merging.edits.site import Site
from merging.edits.stealth import Background, Prepared
from taskvec.checkpoint import content_hash
from taskvec.errors import BaseMismatchError, CorruptFileError, EditError, NotFoundError
from taskvec.precision import dtype_name
from taskvec.source import in_memory

FORMAT, VERSION = "taskvec-jetpack", 1
WEIGHTS, DESCRIPTION = "jetpack.safetensors", "jetpack.json"


@dataclass(frozen=True)
class Entry:
    """One edit of a jet-pack: what it answers, and how many triggers (rows) it has."""

    prompt: str
    target: str
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    rows: int = 1
    paraphrases: tuple[str, ...] = ()
    paraphrase_ids: tuple[tuple[int, ...], ...] = ()
    lengths: tuple[int, ...] = (1,)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def sequences(self) -> tuple[Sequence_, ...]:
        prompts = (self.prompt_ids, *self.paraphrase_ids)
        return tuple(Sequence_(p, self.target_ids, n) for p, n in zip(prompts, self.lengths))


class JetPack:
    """A side block for one layer. Make one with `JetPack.fit` (from a model) or `JetPack.from_features`.

    Attributes:
        layer: the layer beside whose MLP it sits.
        sphere: geometry of the features.
        centroid: [d], centre of the cone on the sphere.
        theta, response: width in (centred) cosine, and ReLU output at a trigger.
        triggers: [n, d], MLP inputs that fire.
        residuals: [n, d], wanted change of the MLP output there.
        entries: one for each edit, in the order of the rows.
        plateau: the hidden values stop growing at `response`, which they reach half-way into the cone.
        active: an attached block that is not active adds nothing.
        renormalise: divide by |φ(x) − c| (the authors' default).
        why: reasons for its layer, form and theta, where the library chose them.
    """

    def __init__(
        self,
        layer: int,
        sphere: Sphere,
        centroid: Annotated[Tensor, "d"],
        triggers: Annotated[Tensor, "n d"],
        residuals: Annotated[Tensor, "n d"],
        entries: Sequence[Entry],
        *,
        theta: float = THETA,
        response: float = RESPONSE,
        plateau: bool = False,
        renormalise: bool = True,
        compat: Literal["authors"] | None = None,
        base_hash: str = "",
        dtype: str = "",
        skipped: Sequence[Entry] = (),
        why: Sequence[str] = (),
    ):
        check_theta(theta, response)
        check_finite(triggers, "jet-pack triggers")
        check_finite(residuals, "jet-pack residuals")
        if triggers.shape != residuals.shape or triggers.shape[0] != sum(entry.rows for entry in entries):
            raise EditError(
                f"A jet-pack needs one residual and one entry a trigger: {list(triggers.shape)} triggers, "
                f"{list(residuals.shape)} residuals, {sum(e.rows for e in entries)} rows."
            )
        self.layer, self.sphere, self.centroid = layer, sphere, centroid.detach().double()
        self.triggers, self.residuals = triggers.detach().float(), residuals.detach().float()
        self.entries, self.skipped = list(entries), list(skipped)
        self.theta, self.response, self.plateau = theta, response, plateau
        self.renormalise, self.compat, self.base_hash, self.dtype = renormalise, compat, base_hash, dtype
        self.why = list(why)
        self.active = True
        self._handles: list[Any] = []
        self._build()

    @classmethod
    def from_features(
        cls,
        triggers: Annotated[Tensor, "n d"],
        residuals: Annotated[Tensor, "n d"],
        sphere: Sphere,
        centroid: Annotated[Tensor, "d"],
        *,
        layer: int = 0,
        theta: float = THETA,
        response: float = RESPONSE,
        **options: Any,
    ) -> "JetPack":
        """A jet-pack from features alone, one edit a row.

        Args:
            triggers: [n, d], MLP inputs.
            residuals: [n, d], wanted change of the MLP output at each.
            sphere, centroid: geometry.
            layer, theta, response: as the attributes.
            options: `plateau`, `renormalise`, `compat` ("authors": output weights by elementwise reciprocals).
        """
        entries = [Entry(f"trigger {i}", "", (), ()) for i in range(triggers.shape[0])]
        return cls(layer, sphere, centroid, triggers, residuals, entries, theta=theta, response=response, **options)

    # -- the block -----------------------------------------------------------------------------------------------------

    @property
    def slope(self) -> float:
        """A = Δ/θ; twice that on a plateau, which is reached half-way into the cone."""
        return self.response / self.theta * (2 if self.plateau else 1)

    def _build(self) -> None:
        z = self.directions(self.triggers.double())
        # at its own trigger a detector answers Δ (2Δ under a plateau), whatever the length of z
        self.W1 = self.slope * z
        self.b1 = self.slope * (self.theta - (z * z).sum(dim=1))
        responses = self.hidden(self.triggers.double())
        if self.compat == "authors":
            inverse = torch.where(responses == 0, torch.zeros_like(responses), 1 / responses)
            self.W2 = (inverse @ self.residuals.double()).T
        else:
            self._check_distinct(responses)
            self.W2 = torch.linalg.solve(responses, self.residuals.double()).T if len(z) else self.residuals.double().T
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor, Tensor, Sphere]] = {}

    def _check_distinct(self, responses: Annotated[Tensor, "n n"]) -> None:
        if not len(responses):
            return
        names = [entry.prompt for entry in self.entries for _ in range(entry.rows)]
        z = self.directions(self.triggers.double())
        scaled = responses / responses.diagonal()[:, None]
        error = stealth.overlapping(scaled, names, 1 - z @ z.T, self.theta, self.layer)
        if error is not None:
            raise error

    def directions(self, features: Annotated[Tensor, "... d"]) -> Annotated[Tensor, "... d"]:
        """ψ(x): centred (and re-normalised) points on the sphere, in the features' dtype."""
        points = self.sphere.project(features) - self.centroid.to(features)
        if not self.renormalise:
            return points
        return points / points.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    def hidden(self, features: Annotated[Tensor, "... d"]) -> Annotated[Tensor, "... n"]:
        """ReLU outputs: positive where an edit's detector fires."""
        values = torch.relu(self.directions(features) @ self.W1.T.to(features) + self.b1.to(features))
        return values.clamp_max(self.response) if self.plateau else values

    def __call__(self, features: Annotated[Tensor, "... d"]) -> Annotated[Tensor, "... d"]:
        """What the block adds to the MLP's output at these MLP inputs; computed in at least float32."""
        x = features if features.dtype == torch.float64 else features.float()
        W1, b1, W2, centroid, sphere = self._on(x)
        points = sphere.project(x) - centroid
        if self.renormalise:
            points = points / points.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        values = torch.relu(points @ W1.T + b1)
        if self.plateau:
            values = values.clamp_max(self.response)
        return values @ W2.T

    def _on(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Sphere]:
        """The block's tensors in x's dtype and on its device, copied there once."""
        key = (x.device, x.dtype)
        if key not in self._copies:
            shift = self.sphere.shift
            self._copies[key] = (
                self.W1.to(x),
                self.b1.to(x),
                self.W2.to(x),
                self.centroid.to(x),
                Sphere(self.sphere.scale.to(x), None if shift is None else shift.to(x), self.sphere.own_length),
            )
        return self._copies[key]

    def rates(self, features: Annotated[Tensor, "n d"]) -> tuple[Annotated[Tensor, "edit"], float]:
        """Share of features on which each row fires, and on which any does."""
        fires = self.hidden(features.double()) > 0
        return fires.double().mean(dim=0), float(fires.any(dim=1).double().mean())

    def cross_talk(self) -> list[tuple[int, int]]:
        """Pairs (row, other row) whose detector also fires at the other's trigger."""
        fires = self.hidden(self.triggers.double()) > 0
        fires.fill_diagonal_(False)
        return [(int(i), int(j)) for j, i in torch.nonzero(fires)]

    def __len__(self) -> int:
        return len(self.entries)

    # -- making --------------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        requests: Requests,
        tokenizer: Any = None,
        *,
        corpus: Sequence[Text],
        layer: int | None = None,
        theta: float | None = None,
        response: float = RESPONSE,
        plateau: bool | None = None,
        to_fold: bool = False,
        protect: Sequence[Text] = (),
        optimisation: Optimisation | None = None,
        chat: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "JetPack":
        """A jet-pack with many edits of one layer. The model is unchanged; `attach` puts the block beside it.

        Args:
            model: a causal model, in the dtype and on the device where it will run.
            requests: `{prompt, target}` mappings or pairs, or the path of a JSONL file.
            tokenizer: for texts.
            corpus: other texts (or ids): their features give the cone's centre.
            layer: index; None chooses by the metric.
            theta: half-width of the centred cone; None chooses from the feature noise of the dtype.
            response: ReLU output at a trigger.
            plateau: hidden values level off half-way into the cone, so feature noise has no effect. None: in 16-bit dtypes.
            to_fold: choose a theta at which folded neurons work in the model's dtype, too (they are stored in it).
            protect: prompts on which no detector may fire.
            optimisation, chat, progress: as for `edit_widen`.

        Raises:
            EditError: requests that do not fit the model, two whose triggers cannot be told apart, or one whose trigger is an
                attention sink and would fire on every text.
        """
        began = time.perf_counter()
        wanted, _ = requests_of(requests)
        plans = stealth.prepared(model, tokenizer, wanted, chat=chat)
        stealth._check_duplicates(plans)
        chunks = stealth.corpus_ids(tokenizer, corpus)
        if layer is None:
            layer = stealth.chosen_layer(model, chunks, theta or THETA)
        site = Site.find(model, layer)
        if to_fold:
            _check_folds(site)
        centroid = Background.of(site, chunks).centroid(site.sphere)
        half = site.dtype in (torch.float16, torch.bfloat16)
        why: list[str] = []
        if theta is None:
            prompts = [s.prompt for p in plans for s in p.sequences]
            triggers = torch.stack([own[-1] for own in stealth.features_of(site, prompts)])
            check_finite(triggers, f"prompts at layer {layer}")
            rounding = stealth.arithmetic_noise(list(triggers), site.sphere, site.dtype, centroid) if to_fold else 0.0
            apart = stealth.Apart.of(site.sphere, triggers, stealth.few_siblings(site, prompts, chunks), centroid)
            theta, reason = stealth.explained_theta(
                site, stealth.feature_noise(site, prompts, centroid), apart, rounding
            )
            why.append(reason)
        pack = cls(
            site.layer,
            Sphere(
                site.sphere.scale.cpu(),
                None if site.sphere.shift is None else site.sphere.shift.cpu(),
                site.sphere.own_length,
            ),
            centroid,
            torch.zeros(0, site.width),
            torch.zeros(0, site.width),
            [],
            theta=theta,
            response=response,
            plateau=half if plateau is None else plateau,
            base_hash=content_hash(in_memory(model)),
            dtype=dtype_name(site.dtype),
            why=why,
        )
        pack._learn(model, site, plans, protect, tokenizer, optimisation or Optimisation(), chat, progress, began)
        return pack

    def add(
        self,
        model: nn.Module,
        requests: Requests,
        tokenizer: Any = None,
        *,
        protect: Sequence[Text] = (),
        optimisation: Optimisation | None = None,
        chat: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Adds edits to the block; those that it has stay exact, since the output weights are solved anew."""
        began = time.perf_counter()
        wanted, _ = requests_of(requests)
        plans = stealth.prepared(model, tokenizer, wanted, chat=chat)
        stealth._check_duplicates(plans)
        present = {ids: e.prompt for e in self.entries for ids in (e.prompt_ids, *e.paraphrase_ids) if ids}
        for plan in plans:
            for sequence in plan.sequences:
                if sequence.prompt in present:
                    raise EditError(
                        f"prompt {present[sequence.prompt]!r}: the jet-pack has an edit for it. Remove it first."
                    )
        attached = bool(self._handles)
        self.detach()
        site = Site.find(model, self.layer)
        self._learn(model, site, plans, protect, tokenizer, optimisation or Optimisation(), chat, progress, began)
        if attached:
            self.attach(model)

    def remove(self, which: int | str) -> Entry:
        """Takes one edit out, by index or prompt.

        Raises:
            EditError: no such edit.
        """
        index = (
            which if isinstance(which, int) else next((i for i, e in enumerate(self.entries) if e.prompt == which), -1)
        )
        if not 0 <= index < len(self.entries):
            raise EditError(f"{which!r}: the jet-pack has no such edit; it has {len(self.entries)}.")
        start = sum(entry.rows for entry in self.entries[:index])
        entry = self.entries.pop(index)
        keep = torch.ones(len(self.triggers), dtype=torch.bool)
        keep[start : start + entry.rows] = False
        self.triggers, self.residuals = self.triggers[keep], self.residuals[keep]
        self._build()
        return entry

    def _learn(
        self,
        model: nn.Module,
        site: Site,
        plans: Sequence[Prepared],
        protect: Sequence[Text],
        tokenizer: Any,
        optimisation: Optimisation,
        chat: bool,
        progress: Callable[[int, int], None] | None,
        began: float,
    ) -> None:
        states = iter(optimise.losses(model, [s for plan in plans for s in plan.sequences]))
        open_plans = []
        for plan in plans:
            own = [next(states) for _ in plan.sequences]
            if all(good for _, good in own):
                self.skipped.append(_entry(plan, {"already": True}))
            else:
                open_plans.append(plan)
        if not open_plans:
            return
        features = {
            (i, n): self._features(site, plan, sequence)
            for i, plan in enumerate(open_plans)
            for n, sequence in enumerate(plan.sequences)
        }
        free = {key: self._before_sink(site, own) for key, own in features.items()}
        stuck = [open_plans[i].sequences[n].prompt for (i, n), count in free.items() if not count]
        if stuck:
            raise stealth.stuck_on_a_sink(
                self.layer, [tokenizer.decode(list(ids)) if tokenizer else ids for ids in stuck]
            )
        before = (self.triggers, self.residuals, list(self.entries))
        lengths = {(i, n): 1 for i, plan in enumerate(open_plans) for n in range(len(plan.sequences))}
        try:
            found = self._put(model, site, before, open_plans, features, lengths, {}, optimisation, progress, began)
            failed = [
                i
                for i, plan in enumerate(open_plans)
                if len(plan.sequences[0].target) > 1 and not self.entries[len(before[2]) + i].measured["success"]
            ]
            longer = {key for key, count in free.items() if key[0] in failed and count > 1}
            if longer and optimisation.chain:
                lengths |= {key: free[key] for key in longer}
                kept = {key: value for key, value in found.items() if key not in longer}
                self._put(model, site, before, open_plans, features, lengths, kept, optimisation, progress, began)
            cut = {key[0] for key, own in features.items() if key[0] in failed and free[key] < len(own) - 1}
            if cut and optimisation.chain:
                self.why.append(
                    f"{len(cut)} targets have no trigger behind a token that is an attention sink: it would fire on every text."
                )
            self._check_protected(site, protect, tokenizer, chat)
        except BaseException:
            self.triggers, self.residuals, self.entries = before
            self._build()
            raise

    @staticmethod
    def _features(site: Site, plan: Prepared, sequence: Sequence_) -> Annotated[Tensor, "1+target d"]:
        """MLP inputs at the first token and at every place where a trigger can be, as generation computes them: alone."""
        own = stealth.features_of(site, [sequence.ids])[0]
        check_finite(own, f"prompt {plan.request.prompt!r}")
        return own[[0, *range(len(sequence.prompt) - 1, len(own))]]

    def _before_sink(self, site: Site, features: Annotated[Tensor, "1+target d"]) -> int:
        return stealth.before_sink(site, features, self.directions, max(self.theta, THETA))

    def _put(
        self,
        model: nn.Module,
        site: Site,
        before: tuple[Tensor, Tensor, list[Entry]],
        plans: Sequence[Prepared],
        seen: Mapping[tuple[int, int], Tensor],
        lengths: Mapping[tuple[int, int], int],
        known: Mapping[tuple[int, int], Found],
        optimisation: Optimisation,
        progress: Callable[[int, int], None] | None,
        began: float,
    ) -> dict[tuple[int, int], Found]:
        keys = list(lengths)
        sequences = {(i, n): replace(plans[i].sequences[n], triggers=lengths[(i, n)]) for i, n in keys}
        features = {key: seen[key][1 : 1 + lengths[key]] for key in keys}
        # two prompts that cannot be told apart are refused before time is spent on them
        rows = torch.cat([before[0], *(features[key] for key in keys)])
        entries = before[2] + [
            replace(
                _entry(plan, {}),
                rows=sum(lengths[(i, n)] for n in range(len(plan.sequences))),
                lengths=tuple(lengths[(i, n)] for n in range(len(plan.sequences))),
            )
            for i, plan in enumerate(plans)
        ]
        self.triggers, self.entries = rows, entries
        self.residuals = torch.cat([before[1], torch.zeros(len(rows) - len(before[1]), rows.shape[1])])
        self._build()
        fresh = [key for key in keys if key not in known]
        results = dict(known)
        for key, value in zip(
            fresh, find_residuals(site, [sequences[k] for k in fresh], optimisation, progress=progress)
        ):
            results[key] = value
        self.residuals = torch.cat([before[1], *(results[key].residual.cpu() for key in keys)])
        self._build()
        with self.attached(model):
            after = dict(zip(keys, optimise.losses(model, [sequences[key] for key in keys])))
        seconds = (time.perf_counter() - began) / len(plans)
        for i in range(len(plans)):
            own_keys = [key for key in keys if key[0] == i]
            self.entries[len(before[2]) + i] = replace(
                entries[len(before[2]) + i],
                measured={
                    "success": all(after[key][1] for key in own_keys),
                    "loss_before": round(results[own_keys[0]].loss_before, 4),
                    "loss_after": round(after[own_keys[0]][0], 4),
                    "steps": max(results[key].steps for key in own_keys),
                    "seconds": round(seconds, 3),
                },
            )
        return results

    def _check_protected(self, site: Site, protect: Sequence[Text], tokenizer: Any, chat: bool) -> None:
        if not protect:
            return
        ids = [stealth.prompt_ids(tokenizer, p, chat=chat) for p in protect]
        fired = [
            repr(text)
            for text, own in zip(protect, stealth.features_of(site, ids))
            if bool((self.hidden(own.double()) > 0).any())
        ]
        if fired:
            raise EditError(
                f"protect: at theta {self.theta:g} in layer {self.layer} the jet-pack fires on {len(fired)} protected prompts: "
                + "; ".join(fired[:4])
                + ". Take a smaller theta or another layer."
            )

    # -- beside a model ------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> "JetPack":
        """Puts the block beside the model's MLP (forward hooks; no weight is touched). `detach` takes it off.

        Raises:
            EditError: it is attached already.
            BaseMismatchError: the layer's width or norm is not the one the block was made for.
        """
        if self._handles:
            raise EditError("The jet-pack is attached already; detach it first.")
        site = Site.find(model, self.layer)
        if site.width != self.sphere.width:
            raise BaseMismatchError(
                f"The jet-pack is {self.sphere.width} wide, layer {self.layer} is {site.width} wide."
            )
        if site.sphere.own_length != self.sphere.own_length or not torch.allclose(
            site.sphere.scale.cpu(), self.sphere.scale.float().cpu(), rtol=1e-2, atol=1e-3
        ):
            raise BaseMismatchError(
                f"The norm before the MLP of layer {self.layer} is not the one this jet-pack was made behind: another base."
            )
        given: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.append(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)))

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            if not self.active:
                given.clear()
                return output
            added = whole + self(given.pop()).to(whole.dtype).reshape(whole.shape)
            return (added, *output[1:]) if isinstance(output, tuple) else added

        self._handles = [
            site.reads.register_forward_pre_hook(before, with_kwargs=True),
            site.adds.register_forward_hook(after),
        ]
        return self

    def detach(self) -> "JetPack":
        """Takes the block off the model it is attached to (nothing happens if there is none)."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the block inside the `with`."""
        self.attach(model)
        try:
            yield model
        finally:
            self.detach()

    # -- folding -------------------------------------------------------------------------------------------------------

    def fold(self, model: nn.Module, *, pad_to: int = 64, plateau: bool | None = None) -> list[Edit]:
        """The block as plain neurons of a widened model, one an edit (two with a plateau), that plain transformers loads.

        Each neuron is the tangent plane of its cone at the trigger: it fires only where the jet-pack fires and answers the
        same there. The host's activation replaces ReLU. Residuals are taken over, nothing is optimised anew.

        Args:
            model: the base the block was made from.
            pad_to: new neurons a layer are a multiple of this.
            plateau: as the block's own by default.

        Raises:
            EditError: the architecture has no bias for its neurons, so that they cannot be tangent planes.
        """
        if not self.entries:
            raise EditError("The jet-pack holds no edits; there is nothing to fold.")
        attached = bool(self._handles)
        self.detach()
        site = Site.find(model, self.layer)
        _check_folds(site)
        plans, found, start = [], [], 0
        for entry in self.entries:
            sequences = entry.sequences()
            plans.append(Prepared(Request(entry.prompt, entry.target, entry.paraphrases), sequences))
            for sequence in sequences:
                rows = self.residuals[start : start + sequence.triggers]
                found.append(Found(rows, 0.0, float(entry.measured.get("loss_before", 0.0)), True, 0))
                start += sequence.triggers
        session = stealth._Session(
            "widen",
            site,
            plans,
            None,
            self.theta,
            None,
            "tangent",
            "quietest",
            self.plateau if plateau is None else plateau,
            pad_to,
            Optimisation(),
            None,
            centroid=self.centroid,
        )
        try:
            return session.run_given(found, self.base_hash)
        finally:
            if attached:
                self.attach(model)

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, folder: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes `jetpack.safetensors` (triggers, residuals, geometry) and `jetpack.json` into a folder of its own.

        Args:
            folder: a new or empty folder, or one that holds a jet-pack and nothing else, which is replaced. It appears whole
                or not at all.
            overwrite: replace a folder that holds a model, too.

        Raises:
            OutputError: the folder holds something else, or cannot be written.
        """
        from safetensors.torch import save

        from taskvec.writer import check_output, write_folder_atomically

        target = Path(folder)
        own = target.is_dir() and all(path.name in (WEIGHTS, DESCRIPTION) for path in target.iterdir())
        if not own:
            check_output(target, [], overwrite=overwrite)
        tensors = {
            "triggers": self.triggers,
            "residuals": self.residuals,
            "centroid": self.centroid,
            "norm.scale": self.sphere.scale.float(),
        }
        if self.sphere.shift is not None:
            tensors["norm.shift"] = self.sphere.shift.float()
        description = {
            "format": FORMAT,
            "version": VERSION,
            "layer": self.layer,
            "theta": self.theta,
            "response": self.response,
            "plateau": self.plateau,
            "renormalise": self.renormalise,
            "compat": self.compat,
            "own_length": self.sphere.own_length,
            "base_hash": self.base_hash,
            "dtype": self.dtype,
            "why": self.why,
            "edits": [asdict(entry) for entry in self.entries],
            "already_right": [asdict(entry) for entry in self.skipped],
        }
        write_folder_atomically(
            target,
            {
                WEIGHTS: save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}),
                DESCRIPTION: (json.dumps(description, indent=2, ensure_ascii=False) + "\n").encode(),
            },
            overwrite=True,
        )

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "JetPack":
        """Reads what `save` wrote.

        Raises:
            NotFoundError: the folder lacks one of the two files.
            CorruptFileError: they do not fit together.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        source = Path(folder)
        for name in (WEIGHTS, DESCRIPTION):
            if not (source / name).is_file():
                raise NotFoundError(f"{folder}: not a jet-pack, {name} is missing.")
        try:
            text = json.loads((source / DESCRIPTION).read_text("utf-8"))
            if text.get("format") != FORMAT or text.get("version") != VERSION:
                raise ValueError(
                    f"`format` {text.get('format')!r}, `version` {text.get('version')!r}; {VERSION} is read here"
                )
            tensors = load_file(source / WEIGHTS)
            return cls(
                text["layer"],
                Sphere(tensors["norm.scale"], tensors.get("norm.shift"), text["own_length"]),
                tensors["centroid"],
                tensors["triggers"],
                tensors["residuals"],
                [_entry_from(e) for e in text["edits"]],
                theta=text["theta"],
                response=text["response"],
                plateau=text["plateau"],
                renormalise=text["renormalise"],
                compat=text["compat"],
                base_hash=text["base_hash"],
                dtype=text["dtype"],
                why=text.get("why", ()),
                skipped=[_entry_from(e) for e in text["already_right"]],
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{folder}: cannot be read as a jet-pack ({error}).") from error


def _check_folds(site: Site) -> None:
    site.require_neurons("folding")
    if site.kind == "surrogate":
        raise EditError(
            f"layer {site.layer}: folding does not fit here: {site.reason} A fold's neuron is exact only with a bias; keep the "
            "jet-pack beside the model."
        )


def _entry(plan: Prepared, measured: Mapping[str, Any]) -> Entry:
    request, sequences = plan.request, plan.sequences
    return Entry(
        prompt=stealth._as_text(request.prompt),
        target=stealth._as_text(request.target),
        prompt_ids=sequences[0].prompt,
        target_ids=sequences[0].target,
        rows=len(sequences),
        paraphrases=tuple(stealth._as_text(p) for p in request.paraphrases),
        paraphrase_ids=tuple(s.prompt for s in sequences[1:]),
        lengths=(1,) * len(sequences),
        measured=measured,
    )


def _entry_from(value: Mapping[str, Any]) -> Entry:
    return Entry(
        **{
            **value,
            "prompt_ids": tuple(value["prompt_ids"]),
            "target_ids": tuple(value["target_ids"]),
            "paraphrases": tuple(value["paraphrases"]),
            "paraphrase_ids": tuple(tuple(ids) for ids in value["paraphrase_ids"]),
            "lengths": tuple(value["lengths"]),
        }
    )
