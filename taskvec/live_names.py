"""From paths of modules in a live model to names of tensors in a checkpoint, and to how their matrices lie."""

from collections.abc import Iterator, Sequence

from taskvec.blocks import is_embedding, layer_key, layer_of
from taskvec.errors import SourceError
from taskvec.source import TensorSource

# names that transformers gives a module in memory and on disk, where they differ
_RENAMED = (
    (".mlp.", ".block_sparse_moe."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.visual.", "visual."),
)
# vision encoders of transformers 5 (ViT, DeiT, BEiT, DINOv2, Swin and kin): parts of a name in memory, and on disk.
# Some of them have renamed their attention alone, some their layers and feed-forward blocks as well.
_ATTENTION = (
    *(
        (f".attention.{letter}_proj", f".attention.attention.{word}")
        for letter, word in zip("qkv", ("query", "key", "value"))
    ),
    (".attention.o_proj", ".attention.output.dense"),
)
_SELF_ATTENTION = tuple(
    (memory, disk.replace(".attention.attention.", ".attention.self.")) for memory, disk in _ATTENTION
)
_FEED_FORWARD = ((".mlp.fc1", ".intermediate.dense"), (".mlp.fc2", ".output.dense"))
_ENCODERS = (
    _ATTENTION,
    (*_SELF_ATTENTION, *_FEED_FORWARD),
    ((".layers.", ".encoder.layer."), *_ATTENTION, *_FEED_FORWARD),
)


class Names:
    """From a module's path in the live model to its name in the base.

    The paths may differ by a prefix (a checkpoint saved without `transformer.`, or with `model.`), which is found
    from all of the adapter's modules together, and by the few renamings that transformers makes between disk and
    memory.
    """

    def __init__(self, base: TensorSource):
        self.base = base
        self.modules: set[str] = set()
        for name in base.infos:
            parts = name.split(".")
            self.modules.update(".".join(parts[:length]) for length in range(1, len(parts)))
        self.rule = ("", "")

    def _spellings(self, path: str) -> Iterator[str]:
        yield path
        for memory, disk in _RENAMED:
            for old, new in ((memory, disk), (disk, memory)):
                if path.startswith(old) or (old.startswith(".") and old in path):
                    yield path.replace(old, new, 1)
        for parts in _ENCODERS:
            for pairs in (parts, [(disk, memory) for memory, disk in parts]):
                spelled = f".{path}"
                for old, new in pairs:
                    spelled = spelled.replace(old, new, 1)
                if spelled != f".{path}":
                    yield spelled[1:]

    def _has(self, path: str) -> bool:
        return path in self.modules or path in self.base.infos

    def _ruled(self, path: str, rule: tuple[str, str]) -> str | None:
        strip, add = rule
        if strip and not path.startswith(f"{strip}."):
            return None
        bare = path[len(strip) + 1 :] if strip else path
        return f"{add}.{bare}" if add else bare

    def find(self, path: str) -> str | None:
        """The base's name for a module or parameter of the live model, or None."""
        for spelling in self._spellings(path):
            if self._has(spelling):
                return spelling
        for spelling in self._spellings(path):
            ruled = self._ruled(spelling, self.rule)
            if ruled is not None and self._has(ruled):
                return ruled
        return None

    def learn(self, paths: Sequence[str]) -> None:
        """Finds the one prefix that makes most of the paths fit the base.

        Raises:
            SourceError: two prefixes fit equally well (an adapter of one tower on a model of two).
        """
        missing = [path for path in paths if self.find(path) is None]
        # where one layer fits as it is, the others are not under another prefix: they are missing
        if not missing or any(layer_of(path) is not None and self.find(path) for path in paths):
            return
        rules: set[tuple[str, str]] = set()
        known = self.modules | set(self.base.infos)
        for path in missing[:4] + missing[-4:]:
            for spelling in self._spellings(path):
                parts = spelling.split(".")
                for cut in range(min(4, len(parts))):
                    strip, bare = ".".join(parts[:cut]), ".".join(parts[cut:])
                    # a bare last part (`dense`, `weight`) fits anywhere and says nothing
                    if len(parts) - cut < min(2, len(parts)):
                        continue
                    for name in known:
                        if name == bare:
                            rules.add((strip, ""))
                        elif name.endswith(f".{bare}") and name[: -len(bare) - 1].count(".") < 3:
                            rules.add((strip, name[: -len(bare) - 1]))

        def fits(rule: tuple[str, str]) -> int:
            ruled = [self._ruled(spelling, rule) for path in missing for spelling in self._spellings(path)]
            return sum(path is not None and self._has(path) for path in ruled)

        def length(rule: tuple[str, str]) -> int:
            return sum(part.count(".") + 1 for part in rule if part)

        ranked = sorted(((-fits(rule), length(rule), rule) for rule in rules), key=lambda entry: entry)
        ranked = [entry for entry in ranked if entry[0]]
        if not ranked:
            return
        best = [rule for count, size, rule in ranked if (count, size) == ranked[0][:2]]
        if len(best) > 1:
            ways = " or ".join(f"{strip or '(nothing)'} → {add or '(nothing)'}" for strip, add in best)
            raise SourceError(
                f"The adapter's module {missing[0]} fits {self.base.label} in more than one way (prefix {ways}). Open "
                "the adapter over the part of the model that it was trained on."
            )
        self.rule = best[0]

    def nearest(self, path: str) -> str:
        """`nearest: a, b` among the base's names, judged by their last parts first."""
        from difflib import get_close_matches

        names = {".".join(reversed(name.split("."))): name for name in self.base.infos}
        close = get_close_matches(".".join(reversed(path.split("."))), names, n=2, cutoff=0.5)
        return f"; nearest in the base: {', '.join(names[name] for name in close)}" if close else ""


class Layouts:
    """Whether the base stores a module's matrix as [in, out] (GPT-2's Conv1D), where its shape does not tell.

    PEFT goes by the type of the live module; a checkpoint has no types, but its biases tell: in a matrix that is not
    square, the bias has as many entries as there are outputs. Modules of one layer are of one type.
    """

    def __init__(self, base: TensorSource):
        self.base = base
        self.votes: dict[str, set[bool]] = {}
        for name, info in base.infos.items():
            bias = base.infos.get(name.removesuffix("weight") + "bias") if name.endswith(".weight") else None
            if bias is None or len(info.shape) != 2 or info.shape[0] == info.shape[1] or is_embedding(name):
                continue
            if bias.shape in ((info.shape[0],), (info.shape[1],)):
                self.votes.setdefault(layer_key(name), set()).add(bias.shape == (info.shape[1],))

    def votes_on(self, name: str) -> set[bool]:
        """What the biases around a tensor say: {True} for [in, out], {False} for [out, in], both, or nothing."""
        own = self.votes.get(layer_key(name), set())
        # a layer without biases is of the type of the others; a head outside the layers need not be
        return own if own or layer_of(name) is None else own.union(*self.votes.values())

    def stored_in_out(self, name: str) -> bool:
        """Whether the matrix `name` is stored as [in, out], as far as the base's names and shapes tell."""
        shape, bias = self.base.infos[name].shape, self.base.infos.get(f"{name.removesuffix('weight')}bias")
        if bias is not None and shape[0] != shape[1]:
            return bias.shape == (shape[1],)
        return self.votes_on(name) == {True}
