"""Checkpoints as sources: a file, a sharded folder, a transformers folder, a hub id, a `.bin` read with weights_only.

Opening reads headers only. Tensors are read with positioned reads into memory of our own, not through a mapping: a
file that shrinks while it is read is then an error with a name instead of a SIGBUS, pages of the inputs never count
against the memory budget, and the copy from the page cache is the only one. Headers are parsed here, because every
promise a header makes (offsets, lengths, names) is checked before a byte of tensor data is believed.
"""

import json
import math
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from taskvec.ahead import SEGMENT as SEGMENT
from taskvec.ahead import Extent, Identity, identity
from taskvec.errors import (
    ChangedFileError,
    CorruptFileError,
    MissingTensorError,
    NotAModelError,
    NotFoundError,
    SourceError,
    UnsafeFileError,
    UsageError,
    did_you_mean,
    shortened,
)
from taskvec.source import InMemory, TensorInfo, TensorSource, in_memory, shared_storage

MOST_ELEMENTS = (1 << 63) - 1  # torch counts in signed 64 bits, strides of empty tensors too
HEADER_LIMIT = 100 << 20  # the safetensors library refuses longer headers too

_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, kind)
    for name, kind in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U8": "uint8",
        "U16": "uint16",
        "U32": "uint32",
        "U64": "uint64",
        "BOOL": "bool",
        "C64": "complex64",
    }.items()
    if hasattr(torch, kind)
}
SAFETENSORS_NAMES: dict[torch.dtype, str] = {kind: name for name, kind in _DTYPES.items()}

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|npz|tflite|ot)(\.index\.json)?$")
# what transformers and its users keep beside the weights and expect beside a merged model
_COMPANION = re.compile(r"\.(json|txt|model|jinja|tiktoken|spm|vocab|yaml|yml)$")
_NOT_COMPANIONS = {
    "taskvec.json",
    "adapter_config.json",
    "mergekit_config.yml",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one tensor lies in its file."""

    file: "_File"
    offset: int
    info: TensorInfo


class _File:
    """An open safetensors file: its header checked, its bytes read by position."""

    def __init__(self, path: Path):
        self.path, self._fd = path, -1
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise SourceError(f"{path}: cannot be opened ({error.strerror}).") from error
        status = os.fstat(self._fd)
        self.size, self.identity = status.st_size, identity(status)
        self.metadata: dict[str, str] = {}
        try:
            self.places = self._header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["_File"], tuple[Path]]:
        return _File, (self.path,)  # a copy opens the file itself: two that share a descriptor would both close it

    def _header(self) -> dict[str, _Place]:
        if self.size < 8:
            raise CorruptFileError(f"{self.path}: {self.size} bytes is too short for a safetensors file.")
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > self.size - 8:
            raise CorruptFileError(
                f"{self.path}: the header says it is {length} bytes long, but the file has {self.size}. "
                "The file is truncated or not in safetensors format; download or save it again."
            )
        if length > HEADER_LIMIT:
            raise CorruptFileError(f"{self.path}: a header of {length} bytes is over the limit of {HEADER_LIMIT}.")
        try:
            header = json.loads(self._bytes(8, length), object_pairs_hook=self._unique)
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{self.path}: the header is not JSON ({error}).") from error
        if not isinstance(header, dict):
            raise CorruptFileError(f"{self.path}: the header is not a JSON object.")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CorruptFileError(f"{self.path}: `__metadata__` in the header must map texts to texts.")
        self.metadata = metadata
        data = self.size - 8 - length
        places = {name: self._place(name, entry, 8 + length, data) for name, entry in header.items()}
        self._check_cover(places, data)
        return places

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise CorruptFileError(f"{self.path}: the header names {shortened(twice)} more than once.")
        return found

    def _place(self, name: str, entry: Any, start: int, data: int) -> _Place:
        where = f"{self.path}: tensor {name!r}"
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise CorruptFileError(f"{where}: the name is no text (half a surrogate pair), so nothing could store it.")
        try:
            kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise CorruptFileError(f"{where}: header entry without dtype, shape and two data_offsets.") from error
        if not isinstance(kind, str) or kind not in _DTYPES:
            raise SourceError(f"{where} has dtype {kind!r}, which cannot be read here. Known: {', '.join(_DTYPES)}.")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in [*shape, first, last]):
            raise CorruptFileError(f"{where}: shape and offsets must be whole numbers, none negative.")
        if math.prod(max(n, 1) for n in shape) > MOST_ELEMENTS:
            raise CorruptFileError(f"{where}: no tensor has the shape {shape}.")
        info = TensorInfo(tuple(shape), _DTYPES[kind])
        if not first <= last <= data:
            raise CorruptFileError(
                f"{where}: bytes {first} to {last} lie outside the file's {data} bytes of data. The file is truncated; "
                "download or save it again."
            )
        if last - first != info.nbytes:
            raise CorruptFileError(
                f"{where}: {last - first} bytes for shape {shape} of {kind}, expected {info.nbytes}."
            )
        return _Place(self, start + first, info)

    def _check_cover(self, places: Mapping[str, _Place], data: int) -> None:
        end, last = 0, ""
        base = self.size - data
        for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].info.nbytes)):
            first = place.offset - base
            if first < end:
                raise CorruptFileError(f"{self.path}: tensors {last!r} and {name!r} overlap.")
            if first > end:
                raise CorruptFileError(f"{self.path}: {first - end} bytes before tensor {name!r} belong to no tensor.")
            end, last = first + place.info.nbytes, name
        if end != data:
            raise CorruptFileError(f"{self.path}: {data - end} bytes after the last tensor belong to no tensor.")

    def _bytes(self, offset: int, count: int) -> bytes:
        return os.pread(self._fd, count, offset)

    def read(self, place: _Place, start: int, stop: int) -> Tensor:
        raw = torch.empty((stop - start) * place.info.dtype.itemsize, dtype=torch.uint8)
        self.read_into(place, start, raw)
        return raw.view(place.info.dtype)

    def read_into(self, place: _Place, start: int, raw: Tensor) -> None:
        view = raw.numpy().data
        offset, done = place.offset + start * place.info.dtype.itemsize, 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                raise ChangedFileError(f"{self.path}: the file became shorter while it was read.")
            done += count

    @property
    def descriptor(self) -> int:
        """For positioned reads, while this object lives."""
        return self._fd

    def ahead(self, place: _Place, start: int, stop: int) -> None:
        size = place.info.dtype.itemsize
        os.posix_fadvise(self._fd, place.offset + start * size, (stop - start) * size, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        if _content(identity(os.fstat(self._fd))) != _content(self.identity):
            raise ChangedFileError(
                f"{self.path}: the file was written to while it was read. Nothing was kept; run again."
            )


def _content(state: Identity) -> tuple[int, ...]:
    """Without the time of status, which also a new link or owner changes."""
    return state[:4]


class Checkpoint:
    """A checkpoint on disk (or in the hub's cache) as a source. Make one with `Checkpoint.open`.

    Attributes:
        label: the path or hub id, as given; names the checkpoint in messages.
        path: the file or folder that is read.
        infos: name to `TensorInfo`, in file order.
        aliases: tied names to the name they share their tensor with.
        companions: the files beside the weights that a merged model should carry (config, tokenizer, chat template).
    """

    def __init__(
        self,
        label: str,
        path: Path,
        places: Mapping[str, _Place],
        *,
        pickled: Mapping[str, InMemory] | None = None,
        companions: Iterable[Path] = (),
    ):
        self.label, self.path = label, path
        self._places = dict(places)
        self._pickled = dict(pickled or {})
        self.companions = tuple(companions)
        self.infos: Mapping[str, TensorInfo] = {
            **{name: place.info for name, place in self._places.items()},
            **{name: source.infos[name] for name, source in self._pickled.items()},
        }
        if not self.infos:
            raise NotAModelError(f"{label}: the checkpoint holds no tensors.")
        self._digests: dict[str, str] = {}
        self._lock = threading.Lock()

    # -- opening ---------------------------------------------------------------------------------------------------

    @overload
    @classmethod
    def open(cls, path_or_hub_id: "str | os.PathLike[str]", revision: str | None = None) -> "Checkpoint": ...
    @overload
    @classmethod
    def open(
        cls, path_or_hub_id: "Mapping[str, Tensor] | torch.nn.Module", revision: str | None = None
    ) -> InMemory: ...
    @overload
    @classmethod
    def open(
        cls,
        path_or_hub_id: "str | os.PathLike[str] | Mapping[str, Tensor] | torch.nn.Module",
        revision: str | None = None,
    ) -> "Checkpoint | InMemory": ...
    @classmethod
    def open(
        cls,
        path_or_hub_id: "str | os.PathLike[str] | Mapping[str, Tensor] | torch.nn.Module",
        revision: str | None = None,
    ) -> "Checkpoint | InMemory":
        """Opens a checkpoint, reading its headers only.

        Args:
            path_or_hub_id: a `.safetensors`, `.bin`, `.pt` or `.pth` file; a folder with one or with shards and their
                index; a hub id, taken from the hub or, without a network, from its cache; a state dict or a module.
            revision: branch, tag or commit of a hub id.

        Raises:
            NotFoundError: no such path, and not a hub id we can reach.
            NotAModelError: nothing in there that holds tensors.
            CorruptFileError: header, index or length contradict each other.
            UnsafeFileError: a pickle that would have to run code, or an index that points outside its folder.
        """
        if isinstance(path_or_hub_id, Mapping | torch.nn.Module):
            return in_memory(path_or_hub_id)
        if not isinstance(path_or_hub_id, str | os.PathLike) or not os.fspath(path_or_hub_id):
            raise UsageError(
                f"{path_or_hub_id!r} is no checkpoint: expected a path, a hub id, a state dict or a torch module"
            )
        label = os.fspath(path_or_hub_id)
        path = Path(label).expanduser()
        if not path.exists():
            path = _from_hub(label, revision)
        elif revision is not None:
            raise SourceError(f"{label}: `revision` is for hub ids, but this is a path on this machine.")
        if path.is_dir():
            return cls._open_folder(label, path)
        if not stat.S_ISREG(path.stat().st_mode):
            raise NotAModelError(f"{label}: neither a file nor a folder.")
        return cls._open_files(label, path, [path], ())

    @classmethod
    def open_file(cls, path: Path) -> "Checkpoint":
        """One weight file as a checkpoint, without what lies beside it."""
        return cls._open_files(os.fspath(path), path, [path], ())

    @classmethod
    def _open_folder(cls, label: str, folder: Path) -> "Checkpoint":
        companions = _companions(folder)
        for single, index in (
            ("model.safetensors", "model.safetensors.index.json"),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ):
            if (folder / single).is_file() and (folder / index).is_file():
                raise SourceError(
                    f"{label}: both {single} and {index} are there, from two different saves. Loaders disagree on which "
                    "counts; delete the stale one."
                )
            if (folder / index).is_file():
                return cls._open_sharded(label, folder, folder / index, companions)
            if (folder / single).is_file():
                return cls._open_files(label, folder, [folder / single], companions)
        if (folder / "adapter_config.json").is_file():
            raise NotAModelError(
                f"{label}: this is a PEFT adapter, not a whole model. Use it as a task together with its base "
                "(`base:` in the recipe, `--base` on the command line)."
            )
        found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", *_PICKLES))
        safe = [path for path in found if path.suffix == ".safetensors"]
        if len(safe) == 1 or (not safe and len(found) == 1):
            return cls._open_files(label, folder, safe or found, companions)
        if found:
            raise NotAModelError(
                f"{label}: several weight files ({shortened([path.name for path in found])}) and no index that says which "
                "belong together. Name one file, or add model.safetensors.index.json."
            )
        other = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".gguf", ".h5", ".msgpack", ".onnx", ".npz")]
        hint = (
            f" It holds {shortened(other)}, a format that is not read here; convert it to safetensors." if other else ""
        )
        empty = "the folder is empty" if not any(folder.iterdir()) else "no weights in this folder"
        raise NotAModelError(
            f"{label}: {empty} (looked for model.safetensors, model.safetensors.index.json, pytorch_model.bin).{hint}"
        )

    @classmethod
    def _open_sharded(cls, label: str, folder: Path, index: Path, companions: tuple[Path, ...]) -> "Checkpoint":
        try:
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{index}: not an index with a `weight_map` ({error}).") from error
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).is_absolute() or ".." in Path(shard).parts:
                raise UnsafeFileError(f"{index}: the shard {shard!r} lies outside the model's folder. Refused.")
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise CorruptFileError(
                f"{label}: {shortened(missing)} named in {index.name} but not there. Download again."
            )
        opened = cls._open_files(label, folder, [folder / shard for shard in shards], companions)
        where = opened.shards()
        problems = [
            f"{name}: {index.name} says {weight_map.get(name, 'nothing')}, found in {where.get(name, 'no shard')}"
            for name in sorted(weight_map.keys() | where.keys())
            if weight_map.get(name) != where.get(name)
        ]
        if problems:
            raise CorruptFileError(
                f"{label}: the index and the shards disagree on {len(problems)} tensors: " + "; ".join(problems[:4])
            )
        return opened

    @classmethod
    def _open_files(cls, label: str, path: Path, files: list[Path], companions: tuple[Path, ...]) -> "Checkpoint":
        places: dict[str, _Place] = {}
        pickled: dict[str, InMemory] = {}
        for file in files:
            if file.suffix == ".safetensors":
                opened = _File(file)
                twice = places.keys() & opened.places.keys()
                if twice:
                    raise CorruptFileError(f"{label}: {shortened(sorted(twice))} stored in more than one shard.")
                places.update(sorted(opened.places.items(), key=lambda item: item[1].offset))
            elif file.suffix in _PICKLES:
                source = _unpickled(file)
                pickled.update(dict.fromkeys(source.infos, source))
            else:
                raise NotAModelError(
                    f"{file}: not a .safetensors file, nor one of {', '.join(_PICKLES)}." + _format_hint(file.suffix)
                )
        return cls(label, path, places, pickled=pickled, companions=companions)

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, name: str) -> Tensor:
        """The whole tensor in its stored dtype."""
        info = self._info(name)
        if name in self._pickled:
            return self._pickled[name].read(name)
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` in row-major order, stored dtype, one-dimensional."""
        self._info(name)
        if name in self._pickled:
            return self._pickled[name].read_flat(name, start, stop)
        place = self._places[name]
        return place.file.read(place, start, stop)

    def read_into(self, name: str, start: int, stop: int, into: Tensor) -> None:
        """The same, into memory of the caller's (pinned, say): `into` is flat, of the stored dtype and the right length."""
        self._info(name)
        if name in self._pickled:
            into.copy_(self._pickled[name].read_flat(name, start, stop))
        else:
            self._places[name].file.read_into(self._places[name], start, into.view(torch.uint8))

    def origin(self, name: str) -> "tuple[Checkpoint, str] | None":
        """Itself: what it hands on is what it stores (`taskvec.source.origin_of`)."""
        return (self, name) if name in self.infos else None

    def extent(self, name: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """File descriptor, offset and bytes of these elements; None where they do not lie in a file as they are."""
        place = self._places.get(name)
        if place is None:
            return None
        size = place.info.dtype.itemsize
        return place.file.descriptor, place.offset + start * size, (stop - start) * size

    def read_ahead(self, name: str, start: int, stop: int) -> None:
        """Tells the operating system that these elements are wanted soon."""
        if name in self._places:
            place = self._places[name]
            place.file.ahead(place, start, stop)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.infos:
            raise MissingTensorError(f"{self.label} has no tensor {name!r}." + did_you_mean(name, self.infos))
        return self.infos[name]

    # -- what else is known ----------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as a dictionary, empty when there is none. Nothing in it is ever executed."""
        for companion in self.companions:
            if companion.name == "config.json":
                try:
                    config = json.loads(companion.read_text("utf-8"))
                except ValueError as error:
                    raise CorruptFileError(f"{companion}: not JSON ({error}).") from error
                return config if isinstance(config, dict) else {}
        return {}

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """Tied names: same storage in a pickle, or a head stored beside the embeddings that config.json says it shares."""
        found: dict[str, str] = {}
        if self._pickled:
            found |= shared_storage({name: source.read(name) for name, source in self._pickled.items()})
        text = self.config.get("text_config")
        tied = self.config.get(
            "tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None
        )
        if tied:
            found |= {name: to for name, to in self._stored_twice().items() if name not in found}
        return found

    def _stored_twice(self) -> dict[str, str]:
        heads = [
            name for name in self.infos if re.search(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$", name)
        ]
        tables = [
            name
            for name in self.infos
            if re.search(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|shared)\.weight$", name)
        ]
        return {
            head: table
            for head in heads
            for table in tables[:1]
            if self.infos[head] == self.infos[table]
            and bool(self.read(head).view(torch.uint8).equal(self.read(table).view(torch.uint8)))
        }

    @property
    def metadata(self) -> dict[str, str]:
        """The `__metadata__` of the safetensors headers, of the first file that has any."""
        for place in self._places.values():
            if place.file.metadata:
                return dict(place.file.metadata)
        return {}

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files."""
        files = {place.file.path: None for place in self._places.values()}
        return (*files, *{Path(source.label): None for source in self._pickled.values()})

    def shards(self) -> dict[str, str]:
        """Tensor name to the name of the file that holds it."""
        return {name: place.file.path.name for name, place in self._places.items()} | {
            name: Path(source.label).name for name, source in self._pickled.items()
        }

    def record_digest(self, name: str, digest: str) -> None:
        """Keeps a digest that a pass over the tensor made anyway."""
        with self._lock:
            self._digests[name] = digest

    def take_digests(self, found: Mapping[Identity, Mapping[Extent, bytes]]) -> None:
        """Keeps digests of segments that were made before this was opened (`taskvec.ahead`), where files are the same."""
        for name, place in self._places.items():
            known = found.get(place.file.identity)
            if known is None or name in self._digests:
                continue
            digest, size = SegmentDigest(place.info), place.info.dtype.itemsize
            for index in range(digest.count):
                start, stop = index * SEGMENT, min((index + 1) * SEGMENT, place.info.numel)
                segment = known.get((place.offset + start * size, (stop - start) * size))
                if segment is None:
                    break
                if digest.add(index, segment):
                    self.record_digest(name, digest.hexdigest())

    def digests(self) -> dict[str, str]:
        """Name to content digest of each tensor; those not known from an earlier pass are read now."""
        for name in self.infos:
            if name not in self._digests:
                self.record_digest(name, tensor_digest(self, name))
        return {name: self._digests[name] for name in self.infos}

    def knows_digest(self, name: str) -> bool:
        """Whether the tensor's content need not be hashed any more."""
        return name in self._digests

    def known_digests(self) -> dict[str, str]:
        """The digests that are known so far."""
        with self._lock:
            return dict(self._digests)

    def content_hash(self) -> str:
        """One hash of all tensors: the same for every file layout, shard plan and format."""
        return content_hash(self)

    def check_unchanged(self) -> None:
        """Raises ChangedFileError if a weight file was written to since it was opened."""
        for file in {id(place.file): place.file for place in self._places.values()}.values():
            file.check_unchanged()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}, {len(self.infos)} tensors)"


def as_source(model: "TensorSource | str | os.PathLike[str] | Mapping[str, Tensor] | torch.nn.Module") -> TensorSource:
    """A source as it is; a path, hub id, state dict or module opened (`Checkpoint.open`)."""
    return model if isinstance(model, TensorSource) else Checkpoint.open(model)


# -- hashes ------------------------------------------------------------------------------------------------------------


class SegmentDigest:
    """Digest of one tensor, fed with its segments in any order.

    Each segment of SEGMENT elements is hashed by itself (blake3) and the digests are hashed in order, so pieces can be
    hashed by several threads while a tensor is read for another purpose, and a digest never costs a pass of its own.
    """

    def __init__(self, info: TensorInfo):
        self._segments: list[bytes | None] = [None] * max(1, -(-info.numel // SEGMENT))
        self._left = len(self._segments)
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """How many segments there are."""
        return len(self._segments)

    def add(self, index: int, digest: bytes) -> bool:
        """Records one segment; True when that was the last."""
        with self._lock:
            self._left -= self._segments[index] is None
            self._segments[index] = digest
            return self._left == 0

    def hexdigest(self) -> str:
        from blake3 import blake3

        return blake3(b"".join(digest or b"" for digest in self._segments)).hexdigest()


def raw_bytes(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    if values.numel() == 0:
        return memoryview(b"")
    return values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_digest(source: TensorSource, name: str) -> str:
    """The content digest of one tensor of any source (bytes of its stored dtype, row-major)."""
    from blake3 import blake3

    info = source.infos[name]
    digest = SegmentDigest(info)
    for index, start in enumerate(range(0, max(info.numel, 1), SEGMENT)):
        piece = source.read_flat(name, start, min(start + SEGMENT, info.numel))
        digest.add(index, blake3(raw_bytes(piece.cpu())).digest())
    return digest.hexdigest()


def combined_hash(infos: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> str:
    """One hash over names, dtypes, shapes and digests, in name order."""
    from blake3 import blake3

    lines = (
        f"{name} {SAFETENSORS_NAMES[infos[name].dtype]} {list(infos[name].shape)} {digests[name]}\n"
        for name in sorted(infos)
    )
    return blake3("".join(lines).encode()).hexdigest()


def content_hash(source: TensorSource) -> str:
    """One hash of all tensors of a source, tied ones once.

    The same for every file layout, shard plan and format: a checkpoint and its state dict in memory have one hash.
    """
    digests = source.digests() if isinstance(source, Checkpoint) else {}
    names = [name for name in source.infos if name not in source.aliases]
    return combined_hash(
        {name: source.infos[name] for name in names},
        {name: digests.get(name) or tensor_digest(source, name) for name in names},
    )


# -- pieces of opening -------------------------------------------------------------------------------------------------


def _unpickled(file: Path) -> InMemory:
    """A state dict from a pickle, with torch's restricted unpickler and memory mapping, or a refusal."""
    import pickle
    import zipfile

    if not zipfile.is_zipfile(file):
        raise UnsafeFileError(
            f"{file}: not a zip-format checkpoint of torch (a file in the format of before torch 1.6, or truncated). It cannot "
            "be mapped into memory; save it again with a current torch, best as safetensors."
        )
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f" It asks for {unsafe.group(1)}." if unsafe else ""
        raise UnsafeFileError(
            f"{file}: refused, because loading it would execute code that the file names.{named} Only plain state dicts are "
            "read (torch.load with weights_only=True); convert it to safetensors where you trust it."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CorruptFileError(f"{file}: torch cannot read it ({str(error).splitlines()[0]}).") from error
    for key in ("state_dict", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise NotAModelError(f"{file}: holds {type(loaded).__name__}, not a state dict of named tensors.")
    others = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise NotAModelError(f"{file}: {shortened(others)} are not tensors; a state dict of named tensors is needed.")
    return InMemory({str(name): tensor for name, tensor in loaded.items()}, label=str(file))


def _format_hint(suffix: str) -> str:
    if suffix == ".gguf":
        return " GGUF files are quantised for inference; merge the original checkpoint instead."
    return ""


def _companions(folder: Path) -> tuple[Path, ...]:
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in _NOT_COMPANIONS
        and not _WEIGHTS.search(path.name)
        and not path.name.endswith(".index.json")
        and _COMPANION.search(path.name)
    ]
    for sub in ("additional_chat_templates", "1_Pooling"):
        if (folder / sub).is_dir():
            found += sorted(path for path in (folder / sub).iterdir() if path.is_file())
    return tuple(found)


def not_of_a_model(folder: Path) -> list[str]:
    """What lies in a folder beside the weights and files of a model: what a new model in its place would destroy."""
    model = ("additional_chat_templates", "1_Pooling")
    return [
        path.name + ("/" if path.is_dir() else "")
        for path in sorted(folder.iterdir())
        if (path.is_dir() and path.name not in model)
        or (
            not path.is_dir()
            and not path.name.startswith((".", "README", "LICENSE"))
            and path.suffix not in (".safetensors", ".py", ".lock")
            and not path.name.startswith("pytorch_model")
            and not _COMPANION.search(path.name)
        )
    ]


def _from_hub(label: str, revision: str | None) -> Path:
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", label):
        raise NotFoundError(f"{label}: no such file or folder.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    companions = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
    try:
        found = Path(
            snapshot_download(label, revision=revision, allow_patterns=["*.safetensors", *companions], etag_timeout=10)
        )
        if not any(found.glob("*.safetensors")):
            snapshot_download(label, revision=revision, allow_patterns=["pytorch_model*.bin"], etag_timeout=10)
        return found
    except RepositoryNotFoundError as error:
        raise NotFoundError(f"{label}: no such file or folder, and no such repository on the hub.") from error
    except RevisionNotFoundError as error:
        raise NotFoundError(f"{label}: the hub has no revision {revision!r} of it.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        pass  # no network, or the hub refused: what is in the cache still serves
    try:
        return Path(snapshot_download(label, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise NotFoundError(
            f"{label}: no such file or folder; as a hub id it is not in the local cache and the hub cannot be reached."
        ) from error
