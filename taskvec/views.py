"""Sources seen through a change of names or shapes, without a copy."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from taskvec.errors import MismatchError
from taskvec.source import TensorInfo, TensorSource


class Renamed:
    """A source whose tensor names get another prefix.

    Args:
        source: the source.
        prefixes: old prefix to new one; the first that fits a name replaces it.

    Raises:
        MismatchError: two tensors would get the same name, or a prefix fits none.
    """

    def __init__(self, source: TensorSource, prefixes: Mapping[str, str]):
        self.source, self.label = source, source.label
        self.path: Path | None = getattr(source, "path", None)
        self._old: dict[str, str] = {}
        used = set()
        for name in source.infos:
            prefix = next((p for p in prefixes if name.startswith(p)), None)
            new = name if prefix is None else prefixes[prefix] + name[len(prefix) :]
            used.add(prefix)
            if new in self._old:
                raise MismatchError([f"{source.label}: {self._old[new]} and {name} would both be called {new}"])
            self._old[new] = name
        unused = [p for p in prefixes if p not in used]
        if unused:
            raise MismatchError([f"{source.label}: no tensor name starts with {prefix!r}" for prefix in unused])
        new_of = {old: new for new, old in self._old.items()}
        self.infos: Mapping[str, TensorInfo] = {new: source.infos[old] for new, old in self._old.items()}
        self.aliases: Mapping[str, str] = {new_of[a]: new_of[b] for a, b in source.aliases.items()}

    def read(self, name: str) -> Tensor:
        return self.source.read(self._old[name])

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.read_flat(self._old[name], start, stop)


class Resized:
    """A source in which some tensors have more or fewer rows (first dimension).

    Rows beyond the source's own come from `filler`, so that their difference to it is zero.
    """

    def __init__(self, source: TensorSource, shapes: Mapping[str, tuple[int, ...]], filler: TensorSource):
        self.source, self.label, self.aliases = source, source.label, source.aliases
        self.path: Path | None = getattr(source, "path", None)
        self._filler, self._shapes = filler, dict(shapes)
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(self._shapes.get(name, info.shape), info.dtype) for name, info in source.infos.items()
        }

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        own = self.source.infos[name].numel
        if stop <= own:
            return self.source.read_flat(name, start, stop)
        rest = self._filler.read_flat(name, max(start, own), stop).to(self.infos[name].dtype)
        if start >= own:
            return rest
        return torch.cat([self.source.read_flat(name, start, own), rest])


class Only:
    """The tensors of a source whose names pass a test."""

    def __init__(self, source: TensorSource, wanted: Callable[[str], bool]):
        self.source, self.label = source, source.label
        self.path: Path | None = getattr(source, "path", None)
        self.infos: Mapping[str, TensorInfo] = {n: info for n, info in source.infos.items() if wanted(n)}
        self.aliases: Mapping[str, str] = {
            a: b for a, b in source.aliases.items() if a in self.infos and b in self.infos
        }

    def read(self, name: str) -> Tensor:
        return self.source.read(name)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.read_flat(name, start, stop)

    def read_ahead(self, name: str, start: int, stop: int) -> None:
        ahead = getattr(self.source, "read_ahead", None)
        if ahead is not None:
            ahead(name, start, stop)
