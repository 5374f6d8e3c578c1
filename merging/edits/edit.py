"""An edit as a value: replaced rows and columns, with what they replaced, so that every edit can be listed and undone.

Edits are applied to a checkpoint while it is streamed (`EditedSource`), to a model in memory (`applied_to`), and kept
in one safetensors file with their description as JSON in its header. An edited checkpoint is again a source.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from merging.edits.stored import as_stored_names, hash_as_loaded
from taskvec.checkpoint import Checkpoint, content_hash
from taskvec.errors import BaseMismatchError, CorruptFileError, EditError, NotFoundError, OutputError, shortened
from taskvec.precision import dtype_name
from taskvec.source import InMemory, TensorInfo, TensorSource, in_memory, paths_of

if TYPE_CHECKING:
    from merging.edits.report import Report

FORMAT, VERSION = "taskvec-edits", "1"
_VALUES: Mapping[str, Any] = {
    **dict.fromkeys(("prompt", "target", "form", "kind", "base_hash", "dtype", "note"), str),
    **dict.fromkeys(("theta", "response"), (int, float)),
    "layer": int,
    "measured": dict,
}
_LISTS: Mapping[str, type] = {"prompt_ids": int, "target_ids": int, "neurons": int, "paraphrases": str}
RECORD = "edits.safetensors"
"""Name of the file beside the weights in which an edited checkpoint carries its own edits."""


@dataclass(frozen=True, eq=False)
class Patch:
    """One row, column or entry of a tensor, before and after.

    Attributes:
        name: tensor name in the checkpoint.
        dim, index: `new` replaces `tensor.select(dim, index)`.
        old, new: the values, in the checkpoint's dtype.
    """

    name: str
    dim: int
    index: int
    old: Tensor
    new: Tensor

    def place(self) -> str:
        return f"{self.name}[{':, ' * self.dim}{self.index}]"


@dataclass(frozen=True)
class Widening:
    """Every layer's MLP made wider by silent neurons (zero rows and columns), in a form that transformers loads.

    Attributes:
        before, after: neurons a layer.
        layers: number of layers.
        inside, out: tensor name prefixes with `{}` for the layer; `inside` lists gate (or in) and up projections.
        transposed: weights are stored in × out.
        fused: gate and up are the halves of one weight.
        adds_bias: MLP biases, all zero, are new (`mlp_bias=True`).
        config: what config.json says afterwards.
        config_before: what it said.
    """

    before: int
    after: int
    layers: int
    inside: tuple[str, ...]
    out: str
    transposed: bool
    fused: bool
    adds_bias: bool
    config: Mapping[str, Any]
    config_before: Mapping[str, Any]

    def _axes(self) -> dict[str, tuple[int, bool]]:
        """Tensor name to (axis that grows, made of two halves)."""
        axes: dict[str, tuple[int, bool]] = {}
        for layer in range(self.layers):
            for prefix in self.inside:
                axes[prefix.format(layer) + ".weight"] = (int(self.transposed), self.fused)
                axes[prefix.format(layer) + ".bias"] = (0, self.fused)
            axes[self.out.format(layer) + ".weight"] = (int(not self.transposed), False)
        return axes

    def new_biases(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors that the widening adds, by name."""
        if not self.adds_bias:
            return {}
        added = {}
        for layer in range(self.layers):
            for prefix in (*self.inside, self.out):
                if f"{prefix.format(layer)}.weight" not in infos:
                    raise BaseMismatchError(
                        f"There is no {prefix.format(layer)}.weight, which the edit widens. Another base."
                    )
            for prefix in self.inside:
                name = prefix.format(layer)
                added[f"{name}.bias"] = TensorInfo((self.after,), infos[f"{name}.weight"].dtype)
            out = infos[self.out.format(layer) + ".weight"]
            added[self.out.format(layer) + ".bias"] = TensorInfo((out.shape[int(self.transposed)],), out.dtype)
        return added

    def infos(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Names, shapes and dtypes after the widening, new biases behind the weights they belong to."""
        axes = self._axes()
        added = self.new_biases(infos)
        wide: dict[str, TensorInfo] = {}
        for name, info in infos.items():
            wide[name] = info
            if name in axes:
                axis, halves = axes[name]
                grown = self._check(name, info, axis, halves, self.before)
                shape = list(info.shape)
                shape[axis] = grown
                wide[name] = TensorInfo(tuple(shape), info.dtype)
            bias = name.removesuffix(".weight") + ".bias"
            if bias != name and bias in added:
                wide[bias] = added[bias]
        return wide

    def narrow_infos(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The inverse of `infos`."""
        axes = self._axes()
        dropped = self.new_biases(infos)
        narrow = {}
        for name, info in infos.items():
            if name in dropped:
                continue
            narrow[name] = info
            if name in axes:
                axis, halves = axes[name]
                self._check(name, info, axis, halves, self.after)
                shape = list(info.shape)
                shape[axis] = self.before * (2 if halves else 1)
                narrow[name] = TensorInfo(tuple(shape), info.dtype)
        return narrow

    def _check(self, name: str, info: TensorInfo, axis: int, halves: bool, neurons: int) -> int:
        size = neurons * (2 if halves else 1)
        if info.shape[axis] != size:
            raise BaseMismatchError(
                f"{name}: shape {list(info.shape)}, but the edit was made for a base with {size} along axis {axis}."
            )
        return self.after * (2 if halves else 1)

    def widened(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with zeros for the new neurons (itself, if it does not grow)."""
        grows = self._axes().get(name)
        if grows is None:
            return tensor
        axis, halves = grows
        pieces = tensor.chunk(2, dim=axis) if halves else (tensor,)
        shape = list(pieces[0].shape)
        shape[axis] = self.after - self.before
        zeros = tensor.new_zeros(shape)
        return torch.cat([part for piece in pieces for part in (piece, zeros)], dim=axis)

    def narrowed(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor without the new neurons, which must be silent.

        Raises:
            EditError: a neuron that would be dropped is in use.
        """
        grows = self._axes().get(name)
        if grows is None:
            return tensor
        axis, halves = grows
        kept = []
        for piece in tensor.chunk(2, dim=axis) if halves else (tensor,):
            rest = piece.narrow(axis, self.before, self.after - self.before)
            if bool((rest != 0).any()):
                raise EditError(
                    f"{name}: neurons beyond {self.before} are in use, so the widening cannot be taken back. Undo the edits "
                    "that use them first."
                )
            kept.append(piece.narrow(axis, 0, self.before))
        return torch.cat(kept, dim=axis) if halves else kept[0].contiguous()


@dataclass(frozen=True, eq=False)
class Edit:
    """One corrected answer: what was replaced, where, for which prompt, and what was measured.

    Attributes:
        prompt, target: the texts (or their ids as text, where ids were given).
        prompt_ids, target_ids: the ids that were joined.
        form: "in-place", "widen" or "fold".
        kind: detector kind ("affine", "tangent", "surrogate", "contrast").
        layer, theta, response: where and how sharp.
        neurons: indices of the neurons it uses.
        patches: rows, columns and entries, with old and new values; empty where the answer was right already.
        widening: how the layers were widened first, or None.
        base_hash: content hash of the checkpoint it was made from.
        dtype: storage dtype of the patches.
        measured: response at the trigger, success, loss, time and the like.
        paraphrases: further prompts that trigger it.
        note: why there is no patch, or what to know.
    """

    prompt: str
    target: str
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    form: str
    kind: str
    layer: int
    theta: float
    response: float
    neurons: tuple[int, ...]
    patches: tuple[Patch, ...]
    base_hash: str
    dtype: str
    widening: Widening | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    paraphrases: tuple[str, ...] = ()
    note: str = ""

    @property
    def changes_nothing(self) -> bool:
        return not self.patches

    def check(self, model: nn.Module, tokenizer: Any = None, **options: Any) -> "Report":
        """Checks this edit alone on its base `model`; see `merging.edits.report.check`."""
        from merging.edits.report import check

        return check(model, [self], tokenizer, **options)

    def save(self, path: str | PathLike[str]) -> None:
        save_edits([self], path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Edit":
        """The one edit of a file.

        Raises:
            EditError: the file holds several; use `load_edits`.
        """
        edits = load_edits(path)
        if len(edits) != 1:
            raise EditError(f"{path}: holds {len(edits)} edits, one was expected. Use load_edits for all of them.")
        return edits[0]

    def summary(self) -> dict[str, Any]:
        """What `taskvec edit list` says of it."""
        return {
            "prompt": self.prompt,
            "target": self.target,
            "form": self.form,
            "kind": self.kind,
            "layer": self.layer,
            "theta": self.theta,
            "response": self.response,
            "neurons": list(self.neurons),
            "places": [patch.place() for patch in self.patches],
            "entries": sum(patch.new.numel() for patch in self.patches),
            "dtype": self.dtype,
            "base_hash": self.base_hash,
            "paraphrases": list(self.paraphrases),
            "measured": dict(self.measured),
            "note": self.note,
        }


# -- files -------------------------------------------------------------------------------------------------------------


def save_edits(edits: Sequence[Edit], path: str | PathLike[str]) -> None:
    """Writes edits to one safetensors file: values as tensors, everything else as JSON in the header.

    Raises:
        OutputError: the file cannot be written. It appears whole or not at all.
    """
    from taskvec.writer import write_atomically

    write_atomically(path, _as_bytes(edits), overwrite=True)


def _as_bytes(edits: Sequence[Edit]) -> bytes:
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    described = []
    for number, edit in enumerate(edits):
        entry = {k: v for k, v in asdict(replace(edit, patches=(), widening=None)).items() if k != "patches"}
        entry["widening"] = None if edit.widening is None else asdict(edit.widening)
        entry["patches"] = [{"name": p.name, "dim": p.dim, "index": p.index} for p in edit.patches]
        for place, patch in enumerate(edit.patches):
            tensors[f"{number}.{place}.old"] = patch.old.detach().cpu().contiguous().clone()
            tensors[f"{number}.{place}.new"] = patch.new.detach().cpu().contiguous().clone()
        described.append(entry)
    metadata = {"format": FORMAT, "version": VERSION, "edits": json.dumps(described, ensure_ascii=False)}
    return save(tensors, metadata=metadata)


def check_replaceable(path: str | PathLike[str]) -> None:
    """Raises OutputError where a file of edits would take the place of anything else than one."""
    file = Path(path)
    if file.is_dir():
        raise OutputError(f"{path}: is a folder; a file of edits is written to a file.")
    try:
        if file.exists():
            load_edits(file)
    except (EditError, CorruptFileError) as error:
        raise OutputError(f"{path}: is no file of edits; refusing to replace it. Choose another name.") from error


def _check_no_jetpack(path: str | PathLike[str]) -> None:
    if (Path(path) / "jetpack.json").is_file():
        raise EditError(
            f"{path}: a jet-pack, which changes no weights. It is attached to a model (`JetPack.load(folder).attach(model)`), or made "
            "anew as plain neurons with `taskvec edit jetpack --fold`."
        )


def load_edits(path: str | PathLike[str]) -> list[Edit]:
    """Reads the edits of a file, or those that an edited checkpoint's folder carries.

    Raises:
        NotFoundError: no such file, or a folder without edits.
        EditError: a safetensors file that holds no edits.
        CorruptFileError: values are missing, NaN or of another kind, or the file is of a later version.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if file.is_dir():
        file = file / RECORD
        if not file.is_file():
            _check_no_jetpack(path)
            raise NotFoundError(f"{path}: carries no edits (no {RECORD} in the folder).")
    if not file.is_file():
        raise NotFoundError(f"{path}: no such file. A file that `edit stealth` wrote is needed.")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise EditError(f"{path}: not a file of edits (its header does not say {FORMAT!r}).")
            described = json.loads(metadata["edits"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptFileError(f"{path}: cannot be read as a file of edits ({error}).") from error
    if metadata.get("version") != VERSION:
        raise CorruptFileError(
            f"{path}: version {metadata.get('version')!r} of the format; this program reads {VERSION!r}. Update it."
        )
    edits = []
    for number, entry in enumerate(described if isinstance(described, list) else [described]):
        try:
            edits.append(_edit_from(entry, number, tensors))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{path}: edit {number} is incomplete or damaged ({error}).") from error
        for patch in edits[-1].patches:
            if not bool(torch.isfinite(patch.new).all()):
                raise CorruptFileError(f"{path}: edit {number} would write NaN or infinity to {patch.place()}.")
    return edits


def _edit_from(entry: Any, number: int, tensors: Mapping[str, Tensor]) -> Edit:
    """One edit from its description; files come from strangers, so every value is looked at."""
    if not isinstance(entry, dict):
        raise TypeError("it is no object")
    rest = dict(entry)
    places, wide = rest.pop("patches"), rest.pop("widening")
    for name, kinds in _VALUES.items():
        value = rest.get(name)
        if name in rest and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise TypeError(f"{name} is {value!r}")
    for name, kind in _LISTS.items():
        values = rest.get(name, ())
        if not isinstance(values, list | tuple) or not all(type(value) is kind for value in values):
            raise TypeError(f"{name} is {values!r}")
        rest[name] = tuple(values)
    patches = []
    for i, place in enumerate(places):
        patch = Patch(**place, old=tensors[f"{number}.{i}.old"], new=tensors[f"{number}.{i}.new"])
        if not (isinstance(patch.name, str) and type(patch.dim) is type(patch.index) is int):
            raise TypeError(f"patch {i} lies at {place!r}")
        if patch.dim not in (0, 1) or patch.index < 0:
            raise ValueError(f"patch {i} lies at {place!r}")
        if patch.old.shape != patch.new.shape or patch.old.dtype != patch.new.dtype:
            raise ValueError(f"old and new values of {patch.place()} differ in shape or dtype")
        patches.append(patch)
    return Edit(**rest, patches=tuple(patches), widening=None if wide is None else _widening_from(wide))


def _widening_from(value: Any) -> Widening:
    made = Widening(**{**value, "inside": tuple(value["inside"])})
    if not all(type(count) is int for count in (made.before, made.after, made.layers)):
        raise TypeError("the widening's counts are no integers")
    if not (0 < made.before < made.after and made.layers > 0):
        raise ValueError(f"a widening from {made.before} to {made.after} neurons in {made.layers} layers")
    for prefix in (*made.inside, made.out):
        if not isinstance(prefix, str) or prefix.count("{}") != 1 or prefix.count("{") + prefix.count("}") != 2:
            raise ValueError(f"{prefix!r} is no tensor name with {{}} for the layer")
    if not isinstance(made.config, dict) or not isinstance(made.config_before, dict):
        raise TypeError("the widening's config is no object")
    return made


# -- composition -------------------------------------------------------------------------------------------------------


def check_compatible(edits: Sequence[Edit]) -> Widening | None:
    """Raises EditError if edits contradict each other; returns the widening that they share.

    Raises:
        EditError: two edits replace the same row or column, or cross in one tensor, or widen differently.
        BaseMismatchError: they were made from different bases.
    """
    bases = {edit.base_hash for edit in edits}
    if len(bases) > 1:
        raise BaseMismatchError(
            f"The edits were made from {len(bases)} different bases; make them from one, or apply them one after another."
        )
    widenings = {json.dumps(asdict(e.widening), sort_keys=True): e.widening for e in edits if e.widening is not None}
    if len(widenings) > 1:
        raise EditError("The edits widen the model differently. Make them in one call, or on the model edited first.")
    taken: dict[tuple[str, int, int], Edit] = {}
    axes: dict[str, int] = {}
    for edit in edits:
        for patch in edit.patches:
            key = (patch.name, patch.dim, patch.index)
            other = taken.get(key)
            if other is not None:
                raise EditError(
                    f"Conflict: {patch.place()} is replaced by the edit for {other.prompt!r} and by the one for "
                    f"{edit.prompt!r}. Make both in one call, or make the second on the model edited first."
                )
            taken[key] = edit
            if axes.setdefault(patch.name, patch.dim) != patch.dim:
                raise EditError(f"Conflict: edits replace rows and columns of {patch.name}, which cross.")
    return next(iter(widenings.values()), None)


def _selected(tensor: Tensor, patch: Patch) -> Tensor:
    return tensor.select(patch.dim, patch.index)


def _check_patch(name: str, info: TensorInfo, patch: Patch) -> None:
    if patch.dim >= len(info.shape) or patch.index >= info.shape[patch.dim]:
        raise BaseMismatchError(
            f"{name}: shape {list(info.shape)}, but the edit replaces {patch.place()}. Another base."
        )
    if patch.new.dtype != info.dtype:
        raise BaseMismatchError(
            f"{name}: stored in {dtype_name(info.dtype)}, but the edit was made for {dtype_name(patch.new.dtype)}. An edit is "
            "calibrated for one dtype; make it again on this checkpoint."
        )
    rest = info.shape[: patch.dim] + info.shape[patch.dim + 1 :]
    if tuple(patch.new.shape) != rest:
        raise BaseMismatchError(
            f"{name}: {patch.place()} has shape {list(rest)}, the edit has {list(patch.new.shape)}."
        )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class EditedSource:
    """A source with edits applied or undone while it is read. Tensors without a patch pass through untouched.

    Args:
        source: the checkpoint: the base to apply to, or the edited one to undo.
        edits: which.
        undo: put the old values back.
        narrow: with `undo`, take the widening back too (only if no other edit uses it).
        verify: compare the content hash of the base (applying only), as it is stored or as transformers loads it; the values
            at the patches are always compared.

    Raises:
        BaseMismatchError: not the checkpoint that the edits were made from.
        EditError: conflicts among the edits.
    """

    def __init__(
        self,
        source: TensorSource,
        edits: Sequence[Edit],
        *,
        undo: bool = False,
        narrow: bool = True,
        verify: bool = True,
    ):
        self.source, self.edits, self.undo = source, tuple(edits), undo
        self.label = f"{source.label} {'without' if undo else 'with'} {len(edits)} edit{'s' * (len(edits) != 1)}"
        edits = as_stored_names(edits, source.infos)
        self.widening = check_compatible(edits)
        self._narrow = self.widening if undo and narrow else None
        self._widen = self.widening if not undo else None
        if not undo and verify and edits:
            found, wanted = content_hash(source), edits[0].base_hash
            loaded = found if found == wanted else hash_as_loaded(source)
            if loaded != wanted:
                unknown = (
                    " Or transformers stacks tensors of this file (experts) when it loads it; a jet-pack fits then."
                )
                raise BaseMismatchError(
                    f"{source.label}: not the base of these edits (content hash {found[:12]}…, the edits were made from "
                    f"{wanted[:12]}…). An edit fits one set of weights; make it again on this checkpoint."
                    + (unknown if loaded is None and getattr(source, "config", None) else "")
                )
        self._last: tuple[str, Tensor] | None = None
        self._patches: dict[str, list[Patch]] = {}
        for edit in edits:
            for patch in edit.patches:
                self._patches.setdefault(patch.name, []).append(patch)
        wide = self._widen.infos(source.infos) if self._widen is not None else dict(source.infos)
        for name, patches in self._patches.items():
            if name not in wide:
                raise BaseMismatchError(f"{source.label}: has no tensor {name!r}, which the edit replaces part of.")
            for patch in patches:
                _check_patch(name, wide[name], patch)
        self._added = self._widen.new_biases(source.infos) if self._widen is not None else {}
        self.infos: Mapping[str, TensorInfo] = wide if self._narrow is None else self._narrow.narrow_infos(wide)
        self.aliases: Mapping[str, str] = {
            name: to for name, to in source.aliases.items() if name not in self._patches and to not in self._patches
        }

    def read(self, name: str) -> Tensor:
        """The tensor with the edits in it, in its stored dtype.

        Raises:
            BaseMismatchError: a row or column does not hold what the edit expects there.
        """
        if name in self._added:
            tensor = torch.zeros(self._added[name].shape, dtype=self._added[name].dtype)
        else:
            tensor = self.source.read(name)
        if self._widen is not None and name not in self._added:
            tensor = self._widen.widened(name, tensor)
        patches = self._patches.get(name)
        if patches:
            tensor = tensor.clone()
            for patch in patches:
                expected, put = (patch.new, patch.old) if self.undo else (patch.old, patch.new)
                place = _selected(tensor, patch)
                if not torch.equal(_bits(place), _bits(expected.to(place.device))):
                    raise BaseMismatchError(
                        f"{self.source.label}: {patch.place()} does not hold the {'edited' if self.undo else 'original'} values "
                        f"that the edit expects there. {'It was changed since' if self.undo else 'It is another base'}; nothing "
                        "was written."
                    )
                place.copy_(put)
        if self._narrow is not None:
            tensor = self._narrow.narrowed(name, tensor)
        return tensor

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop`; a tensor that is edited or widened is read whole for it."""
        untouched = name not in self._patches and name not in self._added
        if untouched and self.infos[name] == self.source.infos[name]:
            return self.source.read_flat(name, start, stop)
        # a writer asks for one tensor piece by piece; the last one is kept so that it is edited once
        if self._last is None or self._last[0] != name:
            self._last = (name, self.read(name).reshape(-1))
        return self._last[1][start:stop]

    @property
    def config(self) -> dict[str, Any]:
        """config.json as it must be beside these tensors."""
        config = dict(getattr(self.source, "config", {}) or {})
        if config and self.widening is not None:
            if self._widen is not None:
                config.update(self._widen.config)
            elif self._narrow is not None:
                for key, value in self._narrow.config_before.items():
                    config[key] = value
        return config

    @property
    def companions(self) -> tuple[Path, ...]:
        return tuple(getattr(self.source, "companions", ()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)


def check_narrows(edits: Sequence[Edit], remaining: Sequence[Edit]) -> bool:
    """Whether undoing `edits` should also take back the widening: nobody else uses it."""
    return any(e.widening is not None for e in edits) and not any(e.widening is not None for e in remaining)


# -- in memory ---------------------------------------------------------------------------------------------------------


def base_source(model: "nn.Module | TensorSource | Mapping[str, Tensor]") -> TensorSource:
    """A model, state dict or source as a source."""
    return in_memory(model) if isinstance(model, nn.Module | Mapping) else model


def set_tensor(model: nn.Module, name: str, value: Tensor | None) -> None:
    """Puts a tensor in place of a parameter of any shape (or removes it), with the module's declared sizes kept true."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if value is None:
        setattr(module, leaf, None)
        return
    old = getattr(module, leaf, None)
    device = next(module.parameters()).device if old is None else old.device
    frozen = old is not None and not old.requires_grad
    parameter = nn.Parameter(value.detach().to(device), requires_grad=value.is_floating_point() and not frozen)
    setattr(module, leaf, parameter)
    if leaf == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = value.shape
    elif leaf == "weight" and hasattr(module, "nf"):
        module.nx, module.nf = value.shape  # type: ignore[assignment]


def apply_to_model(model: nn.Module, edits: Sequence[Edit], *, verify: bool = False) -> None:
    """Applies edits to a model in memory, in place; also its config, where layers are widened.

    Args:
        model: the base that the edits were made from.
        edits: which.
        verify: compare the content hash as well (hashes the whole model).
    """
    _swap(model, EditedSource(in_memory(model), edits, verify=verify))


def undo_on_model(model: nn.Module, edits: Sequence[Edit], *, narrow: bool = True) -> None:
    """Takes edits back on a model in memory, bit by bit."""
    _swap(model, EditedSource(in_memory(model), edits, undo=True, narrow=narrow))


def _swap(model: nn.Module, edited: EditedSource) -> None:
    before = edited.source.infos
    # everything is computed before anything is written, so that a refusal leaves the model as it was
    changed = {
        name: edited.read(name)
        for name, info in edited.infos.items()
        if name in edited._patches or name not in before or before[name] != info
    }
    gone = [name for name in before if name not in edited.infos]
    with torch.no_grad():
        for name, value in changed.items():
            if name in before and before[name] == edited.infos[name]:
                model.get_parameter(name).copy_(value)
            else:
                set_tensor(model, name, value)
        for name in gone:
            set_tensor(model, name, None)
    if edited.widening is not None and getattr(model, "config", None) is not None:
        if edited._widen is not None:
            settings = edited._widen.config
        elif edited._narrow is not None:
            settings = edited._narrow.config_before
        else:
            settings = {}
        for key, value in settings.items():
            setattr(model.config, key, value)


def check_fits(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Raises what applying the edits to this model would raise; nothing is changed."""
    trial = EditedSource(in_memory(model), edits, verify=False)
    for name in dict.fromkeys(patch.name for edit in edits for patch in edit.patches):
        trial.read(name)


@contextmanager
def edited(model: nn.Module, edits: Sequence[Edit]) -> Iterator[nn.Module]:
    """The model with edits inside the block, and exactly as it was afterwards."""
    apply_to_model(model, edits)
    try:
        yield model
    finally:
        undo_on_model(model, edits)


# -- on disk -----------------------------------------------------------------------------------------------------------


def record_of(checkpoint: str | PathLike[str]) -> list[Edit]:
    """The edits that a checkpoint's folder carries; none if it carries no record."""
    record = Path(checkpoint) / RECORD
    return load_edits(record) if record.is_file() else []


def apply_edits(
    checkpoint: str | PathLike[str],
    edits: Sequence[Edit] | str | PathLike[str],
    out: str | PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint with edits in it, streamed: one tensor in memory at a time. No input is written to.

    Args:
        checkpoint: the base, or one that carries edits of the same base already.
        edits: edits, or the path of a file of them.
        out: a new folder. It carries its edits in `edits.safetensors`, so that they can be listed and undone.
        overwrite: replace `out`.

    Raises:
        BaseMismatchError: the edits were made from another base.
        EditError: they conflict, among themselves or with those the checkpoint carries, or none changes anything.
        OutputError: `out` is taken, or is one of the inputs.
    """
    from taskvec.writer import check_output

    chosen = load_edits(edits) if isinstance(edits, str | PathLike) else list(edits)
    source = Checkpoint.open(checkpoint)
    check_output(Path(out), _inputs(source, edits), overwrite=overwrite)
    present = record_of(checkpoint)
    active = [edit for edit in chosen if not edit.changes_nothing]
    if not active:
        raise EditError("None of the edits changes anything; there is nothing to write.")
    base: TensorSource = source
    again = [edit for edit in active if any(_is_same(edit, other) for other in present)]
    if again:
        raise EditError(f"{checkpoint}: carries the edit for {again[0].prompt!r} already.")
    if present and {edit.base_hash for edit in present} == {edit.base_hash for edit in active}:
        # made beside those that are in there already: compose from the base
        check_compatible([*present, *active])
        base = EditedSource(source, present, undo=True)
        return _write(source, EditedSource(base, [*present, *active]), [*present, *chosen], out, overwrite)
    return _write(source, EditedSource(base, active), [*present, *chosen], out, overwrite)


def _inputs(source: Checkpoint | InMemory, edits: object) -> list[Path]:
    return [*paths_of(source), *([Path(edits)] if isinstance(edits, str | PathLike) else [])]


def _is_same(one: Edit, other: Edit) -> bool:
    """Whether two edits write the same values to the same places of the same base."""
    return (
        one.base_hash == other.base_hash
        and len(one.patches) == len(other.patches)
        and all(
            p.place() == q.place() and p.new.dtype == q.new.dtype and torch.equal(p.new, q.new)
            for p, q in zip(one.patches, other.patches)
        )
    )


def undo_edits(
    checkpoint: str | PathLike[str],
    out: str | PathLike[str],
    which: Sequence[int | str] | None = None,
    *,
    edits: Sequence[Edit] | str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint without (some of) its edits, streamed. What is undone gets its old bytes back.

    Args:
        checkpoint: an edited checkpoint.
        out: a new folder.
        which: indices or prompts; None undoes all.
        edits: the edits that were applied, if the checkpoint does not carry them itself.
        overwrite: replace `out`.

    Raises:
        EditError: no such edit, or one that later edits build upon.
        BaseMismatchError: the places no longer hold what the edit wrote.
        OutputError: `out` is taken, or is one of the inputs.
    """
    from taskvec.writer import check_output

    present = record_of(checkpoint)
    if edits is None and not present:
        _check_no_jetpack(checkpoint)
    source = Checkpoint.open(checkpoint)
    check_output(Path(out), _inputs(source, edits), overwrite=overwrite)
    if edits is not None:
        present = load_edits(edits) if isinstance(edits, str | PathLike) else list(edits)
    if not present:
        raise EditError(f"{checkpoint}: carries no edits, and no file of edits was given.")
    chosen = present if which is None else list({id(e): e for e in (_find(present, one) for one in which)}.values())
    remaining = [edit for edit in present if not any(edit is other for other in chosen)]
    generations = list(dict.fromkeys(edit.base_hash for edit in present))
    last = {edit.base_hash for edit in chosen if not edit.changes_nothing}
    later = [e for e in remaining for h in last if generations.index(e.base_hash) > generations.index(h)]
    if later:
        raise EditError(
            f"The edit for {later[0].prompt!r} was made on top of those to be undone; undo it first (or all at once)."
        )
    current: TensorSource = source
    for generation in reversed(generations):
        group = [e for e in chosen if e.base_hash == generation and not e.changes_nothing]
        if group:
            left = [e for e in remaining if e.base_hash == generation]
            current = EditedSource(current, group, undo=True, narrow=check_narrows(group, left))
    return _write(source, current, remaining, out, overwrite)


def _find(edits: Sequence[Edit], which: int | str) -> Edit:
    if isinstance(which, int) or which.isdecimal():
        if 0 <= int(which) < len(edits):
            return edits[int(which)]
        raise EditError(f"edit {which}: there are edits 0 to {len(edits) - 1}.")
    found = [edit for edit in edits if edit.prompt == which]
    if not found:
        raise EditError(f"No edit for the prompt {which!r}. Known: {problems_of(edits)}.")
    return found[0]


class _AllTensors:
    """A source whose tied tensors are written as they are stored, so that undoing gives back every byte."""

    def __init__(self, source: TensorSource):
        self._source = source
        self.label, self.infos = source.label, source.infos
        self.aliases: Mapping[str, str] = {}

    def read(self, name: str) -> Tensor:
        return self._source.read(name)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.read_flat(name, start, stop)


def _write(
    source: Checkpoint | InMemory,
    edited: TensorSource,
    record: Sequence[Edit],
    out: str | PathLike[str],
    overwrite: bool,
) -> Path:
    from taskvec.writer import write

    companions = getattr(source, "companions", ())
    files: dict[str, str | bytes] = {}
    config = getattr(edited, "config", None)
    if config and config != getattr(source, "config", None):
        files["config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    if record:
        files[RECORD] = _as_bytes(record)
    metadata = getattr(source, "metadata", None) or {"format": "pt"}
    return write(
        _AllTensors(edited),
        out,
        metadata=metadata,
        companions=companions,
        files=files,
        overwrite=overwrite,
    )


def problems_of(edits: Iterable[Edit]) -> str:
    """A short list of the prompts, for messages."""
    return shortened([repr(edit.prompt) for edit in edits])
