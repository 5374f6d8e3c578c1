"""Writing a checkpoint so that it appears whole under its final name, or not at all.

Shapes and dtypes are known beforehand, so every shard's header is written first and tensors follow in any order at
known offsets. Everything goes into `OUT.partial-…` beside OUT; the last act is one rename. A lock tells two runs for
one OUT apart, and a journal of finished shards lets an interrupted run be resumed.
"""

import ctypes
import errno
import fcntl
import glob
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from taskvec.checkpoint import (
    SAFETENSORS_NAMES,
    SEGMENT,
    Checkpoint,
    SegmentDigest,
    as_source,
    combined_hash,
    not_of_a_model,
    raw_bytes,
)
from taskvec.direct import BLOCK, DirectFile, DirectWrites
from taskvec.errors import (
    DiskFullError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    TaskvecError,
    UsageError,
    VerificationError,
    shortened,
)
from taskvec.precision import all_finite, config_in, dtype_named, is_float, rounded
from taskvec.sizes import byte_count, bytes_text
from taskvec.source import TensorInfo, TensorSource, paths_of

DEFAULT_SHARD_SIZE = 5_000_000_000
_WRITE = 16 << 20  # bytes written by one call
_JOURNAL = "taskvec-journal.jsonl"


@dataclass(slots=True)
class _Shard:
    file: str
    names: list[str]
    header: int = 0
    size: int = 0
    left: int = 0
    fd: int = -1
    direct: DirectFile | None = None


def _shard_limit(shard_size: "int | str") -> int:
    """The largest size of a file in bytes.

    Raises:
        UsageError: it is no size, or leaves no room for a tensor.
    """
    try:
        limit = byte_count(shard_size)
    except UsageError as error:
        raise UsageError(f"shard_size: {error}") from None
    if not limit:
        raise UsageError(f"shard_size: {shard_size!r} leaves no room for a tensor. Write it like 5GB, 2GiB or 400MB.")
    return limit


def plan_shards(infos: Mapping[str, TensorInfo], shard_size: int) -> list[tuple[str, list[str]]]:
    """Which tensors go into which file, named and split as huggingface_hub does."""
    if sum(info.nbytes for info in infos.values()) <= shard_size:
        return [("model.safetensors", list(infos))]
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        dict(infos),
        get_storage_size=lambda info: info.nbytes,
        get_storage_id=lambda _: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    return list(plan.filename_to_tensors.items())


class CheckpointWriter:
    """Writes one checkpoint. Use it as a context manager and call `finish` last.

    Args:
        out: the folder to make, or a path ending in `.safetensors` for a single file.
        infos: name to shape and stored dtype of every tensor that will be written.
        shard_size: largest size of one file, in bytes or as text ("5GB").
        metadata: texts for the safetensors header; `reserve` bytes are kept free so that `finish` can replace them.
        companions: files copied beside the weights, with the folder they are relative to.
        inputs: paths that must not be written into.
        overwrite: replace an existing OUT (swapped in whole at the end).
        fingerprint: what this output is made from; a partial output with the same one can be resumed.
        resume: take over finished shards of an interrupted run, after checking their content.
        cached: leave the output in the page cache, for one that is read again at once.

    Raises:
        OutputExistsError: OUT is there and `overwrite` is not set, or another run is writing it.
        OutputError: OUT lies inside an input, or cannot be created.
        DiskFullError: not enough free space for the whole output.
    """

    def __init__(
        self,
        out: "str | os.PathLike[str]",
        infos: Mapping[str, TensorInfo],
        *,
        shard_size: "int | str" = DEFAULT_SHARD_SIZE,
        metadata: Mapping[str, str] | None = None,
        reserve: int = 0,
        companions: Sequence[Path] = (),
        companions_root: Path | None = None,
        inputs: Iterable[Path] = (),
        overwrite: bool = False,
        fingerprint: str = "",
        resume: bool = False,
        notice: Callable[[str], None] = lambda _: None,
        cached: bool = False,
    ):
        self.out = output_path(out)
        self.single = self.out.suffix == ".safetensors"
        self.infos = dict(infos)
        self._metadata = {"format": "pt", **(metadata or {})}
        self._reserve = reserve
        self._companions, self._root = tuple(companions), companions_root
        self._overwrite, self._fingerprint, self._notice = overwrite, fingerprint, notice
        self.done: set[str] = set()
        self._resumed: dict[str, str] = {}
        self.saturated: dict[str, int] = {}
        self._digests = {name: SegmentDigest(info) for name, info in self.infos.items()}
        self._hashers: dict[tuple[str, int], tuple[Any, int]] = {}
        self._broken: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._finished = False
        limit = _shard_limit(shard_size)
        check_output(self.out, inputs, overwrite=overwrite)
        self._shards: list[_Shard] = []
        self._plan(limit)
        self._direct = None if cached else DirectWrites()
        self._partial = self.out.with_name(f"{self.out.name}.partial-{fingerprint[:12] or 'new'}")
        self._stop = threading.Event()
        self._flusher = threading.Thread(target=self._flush, name="taskvec-flush", daemon=True)
        self._lock_fd = _locked(self.out)
        try:
            self._prepare(resume)
            self._check_space()
            for shard in self._shards:
                self._create(shard)
            self._flusher.start()
        except BaseException:
            self._stop.set()
            self._discard()
            raise

    # -- before the first byte ---------------------------------------------------------------------------------------

    def _plan(self, shard_size: int) -> None:
        plan = plan_shards(self.infos, shard_size if not self.single else 1 << 62)
        self._shards = [_Shard(file, names) for file, names in plan]
        self._place: dict[str, tuple[_Shard, int]] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        for shard in self._shards:
            # wide dtypes first, so that every tensor is aligned to its own item size
            shard.names.sort(key=lambda name: -self.infos[name].dtype.itemsize)
            offset, entries = 0, {}
            for name in shard.names:
                info = self.infos[name]
                kind = SAFETENSORS_NAMES.get(info.dtype)
                if kind is None:
                    raise OutputError(f"{name}: dtype {info.dtype} cannot be stored in safetensors.")
                entries[name] = {
                    "dtype": kind,
                    "shape": list(info.shape),
                    "data_offsets": [offset, offset + info.nbytes],
                }
                self._place[name] = (shard, offset)
                offset += info.nbytes
            self._entries[shard.file] = entries
            shard.header = len(self._header(shard, self._metadata)) + self._reserve
            shard.header += -(8 + shard.header) % BLOCK  # so that tensors begin with a block of the disk
            shard.size, shard.left = 8 + shard.header + offset, len(shard.names)

    def _header(self, shard: _Shard, metadata: Mapping[str, str]) -> bytes:
        header = {"__metadata__": dict(metadata), **self._entries[shard.file]}
        return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()

    def _prepare(self, resume: bool) -> None:
        """Makes the folder to write into; deals with what an earlier run left."""
        stale = sorted(self.out.parent.glob(glob.escape(self.out.name) + ".partial-*"))
        wanted = self._partial
        for path in stale:
            if resume and self._fingerprint and path == wanted:
                self._adopt(path)
                self._notice(
                    f"found {path.name} of an interrupted run: {len(self.done)} of {len(self.infos)} tensors are finished "
                    "and verified; going on from there"
                )
                continue
            self._notice(
                f"found {path.name} of an interrupted run: removed" + (" (other inputs or recipe)" if resume else "")
            )
            shutil.rmtree(path)
        if resume and wanted not in stale:
            self._notice(
                "nothing to resume: no partial output of this recipe and these inputs was found; starting afresh"
            )
        try:
            wanted.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.out}: cannot create {wanted.name} ({error.strerror}).") from error

    def _adopt(self, partial: Path) -> None:
        journal = partial / _JOURNAL
        lines = journal.read_text("utf-8").splitlines() if journal.is_file() else []
        for line in lines:
            try:
                entry = json.loads(line)
                shard = next(shard for shard in self._shards if shard.file == entry["shard"])
                found = Checkpoint.open_file(partial / shard.file)
                assert_digests(found, entry["digests"], partial / shard.file)
            except (ValueError, KeyError, StopIteration, TaskvecError):
                continue  # torn line or damaged shard: it is simply made again
            if list(found.infos.items()) == [(name, self.infos[name]) for name in shard.names]:
                self.done.update(shard.names)
                shard.left = 0
                self._resumed.update(entry["digests"])

    def _check_space(self) -> None:
        needed = sum(shard.size for shard in self._shards if shard.left) + (16 << 20)
        free = shutil.disk_usage(self._partial).free
        if needed > free:
            raise DiskFullError(
                f"{self.out}: the output needs {bytes_text(needed)}, but only {bytes_text(free)} are free there. "
                "Free some space or choose another place."
            )

    def _create(self, shard: _Shard) -> None:
        path = self._partial / shard.file
        if not shard.left and shard.names:
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        with self._errors(shard):
            shard.fd = os.open(path, flags, 0o666)
            try:
                os.posix_fallocate(shard.fd, 0, shard.size)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise DiskFullError(f"{self.out}: no space left for {bytes_text(shard.size)}.") from error
                os.ftruncate(shard.fd, shard.size)  # file systems without fallocate
        self._put(
            shard, 0, shard.header.to_bytes(8, "little") + self._header(shard, self._metadata).ljust(shard.header)
        )
        if self._direct is not None:
            shard.direct = self._direct.open(path, shard.fd, shard.size)

    # -- writing -----------------------------------------------------------------------------------------------------

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Writes elements of one tensor from element `start` on, rounding once to its stored dtype.

        Pieces may come in any order and from several threads; each element must be written once. Within a segment of
        2^22 elements ascending pieces are hashed as they pass; others are read back at the end.
        """
        info = self.infos[name]
        values = values.reshape(-1)
        if values.dtype != info.dtype:
            values, saturated = rounded(values, info.dtype, where=name)
            if saturated:
                with self._lock:
                    self.saturated[name] = self.saturated.get(name, 0) + saturated
        shard, offset = self._place[name]
        data = raw_bytes(values.cpu())
        size = info.dtype.itemsize
        self._put(shard, 8 + shard.header + offset + start * size, data, once=True)
        stop = start + values.numel()
        for segment in range(start // SEGMENT, max(start, stop - 1) // SEGMENT + 1):
            first, last = max(start, segment * SEGMENT), min(stop, (segment + 1) * SEGMENT)
            self._hash(name, segment, first, last, data[(first - start) * size : (last - start) * size])

    def _put(self, shard: _Shard, offset: int, data: "bytes | memoryview", *, once: bool = False) -> None:
        """Writes bytes; those of tensors, which come once, go past the page cache where that is possible."""
        view, done = memoryview(data), 0
        with self._errors(shard):
            if once and shard.direct is not None:
                shard.direct.write(offset, view)
                return
            while done < len(view):
                done += os.pwrite(shard.fd, view[done : done + _WRITE], offset + done)

    @contextmanager
    def _errors(self, shard: _Shard) -> Iterator[None]:
        """Says of what the system refuses what it means for the output."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(f"{self.out}: the disk is full. Nothing was left under that name.") from error
            raise OutputError(f"{self.out}: writing {shard.file} failed ({error.strerror}).") from error

    def _drain(self, shard: _Shard) -> None:
        """Waits for what threads are still writing."""
        if shard.direct is not None:
            with self._errors(shard):
                shard.direct.drain()

    def _close(self, shard: _Shard) -> None:
        if shard.direct is not None:
            shard.direct.close()
            shard.direct = None
        if shard.fd >= 0:
            os.close(shard.fd)
            shard.fd = -1

    def _hash(self, name: str, segment: int, first: int, last: int, data: memoryview) -> None:
        from blake3 import blake3

        key, numel = (name, segment), self.infos[name].numel
        end = min((segment + 1) * SEGMENT, numel)
        hasher, at = self._hashers.pop(key, (None, segment * SEGMENT))
        if first != at:
            self._broken.add(key)
            self._hashers[key] = (hasher, -1)
            at = -1
        else:
            hasher = hasher or blake3()
            hasher.update(data)
            at = last
            if at < end:
                self._hashers[key] = (hasher, at)
        if at == end and self._digests[name].add(segment, hasher.digest()):
            self._complete(name)

    def _complete(self, name: str) -> None:
        shard, _ = self._place[name]
        with self._lock:
            self.done.add(name)
            shard.left -= 1
            whole = shard.left == 0
        if whole and self._fingerprint:
            self._record(shard)

    def _record(self, shard: _Shard) -> None:
        self._drain(shard)
        os.fsync(shard.fd)
        digests = {name: self._digests[name].hexdigest() for name in shard.names}
        with self._lock, open(self._partial / _JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps({"shard": shard.file, "digests": digests}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _flush(self) -> None:
        """Pushes written pages to the disk while others are computed, so that the last fsync finds little to do."""
        while not self._stop.wait(0.05):
            for shard in self._shards:
                if shard.fd >= 0 and shard.direct is None:
                    with suppress(OSError):
                        os.fdatasync(shard.fd)

    # -- the end -------------------------------------------------------------------------------------------------------

    def digests(self) -> dict[str, str]:
        """Name to content digest of what was written."""
        return {name: self._resumed.get(name) or self._digests[name].hexdigest() for name in self.infos}

    def shard_hashes(self) -> dict[str, str]:
        """File name to the combined hash of its tensors."""
        digests = self.digests()
        return {s.file: combined_hash({name: self.infos[name] for name in s.names}, digests) for s in self._shards}

    def settle(self) -> None:
        """Checks that every element was written, and hashes what did not come in order. Call before `digests`."""
        for shard in self._shards:
            self._drain(shard)
        self._rehash()
        missing = [name for name in self.infos if name not in self.done]
        if missing:
            raise OutputError(f"{self.out}: {len(missing)} tensors were never written: {shortened(missing)}.")

    def _rehash(self) -> None:
        from blake3 import blake3

        for name, segment in sorted(self._broken):
            shard, offset = self._place[name]
            info = self.infos[name]
            first, last = segment * SEGMENT, min((segment + 1) * SEGMENT, info.numel)
            size = info.dtype.itemsize
            data = os.pread(shard.fd, (last - first) * size, 8 + shard.header + offset + first * size)
            if self._digests[name].add(segment, blake3(data).digest()):
                self._complete(name)
        self._broken.clear()

    def finish(
        self,
        *,
        metadata: Mapping[str, str] | None = None,
        files: Mapping[str, "str | bytes"] | None = None,
    ) -> Path:
        """Makes everything durable and gives the output its name.

        Args:
            metadata: replaces the header metadata, where it fits the space that was reserved for it.
            files: further files by name (taskvec.json, README.md); they win over companions of the same name.

        Returns:
            The path of the output.
        """
        self.settle()
        self._stop.set()
        self._flusher.join()
        for shard in self._shards:
            if shard.fd < 0:
                shard.fd = os.open(self._partial / shard.file, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            if metadata is not None:
                header = self._header(shard, {"format": "pt", **metadata})
                if len(header) <= shard.header:
                    self._put(shard, 8, header.ljust(shard.header))
            os.fsync(shard.fd)
            self._close(shard)
        (self._partial / _JOURNAL).unlink(missing_ok=True)
        if self.single:
            _publish(self._partial / self._shards[0].file, self.out, overwrite=self._overwrite)
        else:
            self._beside(files or {})
            _publish(self._partial, self.out, overwrite=self._overwrite)
        self._finished = True
        self._discard()
        return self.out

    def _beside(self, files: Mapping[str, "str | bytes"]) -> None:
        contents: dict[str, bytes] = {}
        for path in self._companions:
            name = str(path.relative_to(self._root)) if self._root else path.name
            contents[name] = path.read_bytes()
        if len(self._shards) > 1 or self._shards[0].file != "model.safetensors":
            total = sum(info.nbytes for info in self.infos.values())
            where = {name: shard.file for shard in self._shards for name in shard.names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            contents["model.safetensors.index.json"] = (json.dumps(index, indent=2) + "\n").encode()
        for name, content in files.items():
            # a path whose bytes are no UTF-8 stands in texts as its escapes
            contents[name] = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
        for name, content in contents.items():
            write_durably(self._partial / name, content)
        _sync_folder(self._partial)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._finished:
            return
        self._stop.set()
        self._flusher.join()
        for shard in self._shards:
            self._close(shard)
        interrupted = kind is not None and not issubclass(kind, TaskvecError)
        self._discard(keep=interrupted and bool(self._fingerprint) and (self._partial / _JOURNAL).is_file())

    def _discard(self, *, keep: bool = False) -> None:
        for shard in self._shards:
            self._close(shard)
        if self._direct is not None:
            self._direct.close()
        if not keep:
            shutil.rmtree(self._partial, ignore_errors=True)
        if self._lock_fd >= 0:
            _lock_path(self.out).unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = -1


def write(
    source: "TensorSource | Mapping[str, Tensor] | torch.nn.Module",
    out: "str | os.PathLike[str]",
    *,
    dtype: "torch.dtype | str | None" = None,
    shard_size: "int | str" = DEFAULT_SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
    companions: Sequence[Path] | None = None,
    files: Mapping[str, "str | bytes"] | None = None,
    overwrite: bool = False,
) -> Path:
    """Streams a source to disk as safetensors: a folder, or one file if `out` ends in `.safetensors`.

    Args:
        source: anything with named tensors (a state dict or module too); its own dtypes are kept unless `dtype` is given (floats only).
        out: the folder or file to make. It appears whole or not at all.
        dtype: stored dtype of floating tensors.
        shard_size: largest size of one file.
        metadata: texts for the safetensors header.
        companions: files copied beside the weights; default: those of the source.
        files: further files by name and content.
        overwrite: replace what is there.

    Returns:
        The path that was written.

    Raises:
        NonFiniteError: a task vector has NaN or infinity.
        OutputError: the output is one of the files that the source reads, or lies in or around one.
        UsageError: there are no tensors.
    """
    source = as_source(source)
    if not source.infos:
        raise UsageError(f"{source.label}: there are no tensors to write")
    stored = None if dtype is None else dtype_named(dtype)
    kept = getattr(source, "aliases", {})
    infos = {
        name: TensorInfo(info.shape, stored if stored is not None and is_float(info.dtype) else info.dtype)
        for name, info in source.infos.items()
        if name not in kept or isinstance(source, Checkpoint)
    }
    beside = getattr(source, "companions", ()) if companions is None else companions
    root = getattr(source, "path", None)
    if stored is not None:
        files = {**_restated(beside, stored), **(files or {})}
    is_vector = hasattr(source, "low_rank")  # what is stored already is copied as it is
    exact = source.read_flat if stored is None else getattr(source, "read_unrounded", source.read_flat)
    with CheckpointWriter(
        out,
        infos,
        shard_size=shard_size,
        metadata=metadata,
        companions=beside,
        companions_root=root if beside else None,
        inputs=paths_of(source),
        overwrite=overwrite,
    ) as writer:
        for name, info in infos.items():
            for start in range(0, max(info.numel, 1), SEGMENT):
                values = exact(name, start, min(start + SEGMENT, info.numel))
                if is_vector and not all_finite(values):
                    raise NonFiniteError(name, source.label, int((~torch.isfinite(values)).sum()))
                writer.write(name, values, start)
        return writer.finish(files=files)


def _restated(companions: Sequence[Path], stored: torch.dtype) -> dict[str, str]:
    """config.json anew, where the dtype that it says is not the one that is stored."""
    for path in companions:
        if path.name == "config.json":
            config = json.loads(path.read_text("utf-8"))
            if isinstance(config, dict) and (restated := config_in(config, stored)) != config:
                return {path.name: json.dumps(restated, indent=2) + "\n"}
    return {}


# -- pieces --------------------------------------------------------------------------------------------------------------


def output_path(out: "str | os.PathLike[str]") -> Path:
    """Where an output goes, as an absolute path.

    Raises:
        UsageError: the name is empty, or none that a file can have.
    """
    name = os.fspath(out)
    if not name or "\0" in name:
        raise UsageError(f"{name!r} is no name for an output: expected the path of a folder or a .safetensors file")
    return Path(os.path.abspath(os.path.expanduser(name)))


def check_output(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuses an output that exists, lies in or around an input, or cannot be created; makes nothing.

    Raises:
        OutputExistsError: the path is taken.
        OutputError: it would touch an input, or its place cannot be written.
    """
    real = Path(os.path.realpath(out))
    for path in inputs:
        other = Path(os.path.realpath(path))
        if real == other:
            raise OutputError(f"{out}: this is one of the inputs. Choose another output; inputs are never written to.")
        if other in real.parents and other.is_dir():
            raise OutputError(
                f"{out}: lies inside the input {path}. Choose a place outside; inputs are never written to."
            )
        if real in other.parents:
            raise OutputError(f"{out}: contains the input {path}. Choose another output; inputs are never written to.")
    if os.path.lexists(out):
        if not overwrite:
            raise OutputExistsError(
                f"{out}: exists already. Choose another name, or pass --overwrite (overwrite=True)."
            )
        if (
            out.is_dir()
            and any(out.iterdir())
            and not (
                (out / "taskvec.json").is_file()
                or any(out.glob("*.safetensors"))
                or any(out.glob("pytorch_model*.bin"))
            )
        ):
            raise OutputError(f"{out}: holds other things than a model; refusing to replace it. Choose another name.")
        if out.is_dir() and (others := not_of_a_model(out)):
            raise OutputError(
                f"{out}: holds more than a model ({shortened(others)}), which replacing it would destroy. Move that away, or "
                "choose another name."
            )
        is_file = out.is_file() and out.suffix == ".safetensors"
        if out.exists() and not out.is_dir() and not is_file:  # a device, a pipe
            raise OutputError(f"{out}: is a file, and no model; refusing to replace it. Choose another name.")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{out}: {parent} is not a folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: no permission to write in {parent}.")


def assert_digests(source: Checkpoint, expected: Mapping[str, str], where: "Path | str") -> None:
    """Compares content with recorded digests.

    Raises:
        VerificationError: names the tensors that differ, are missing, or are there beside them.
    """
    found = source.digests()
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    parts = [
        f"{len(names)} {what}: {shortened(names)}"
        for names, what in ((wrong, "tensors changed"), (missing, "tensors missing"), (extra, "tensors unknown"))
        if names
    ]
    if parts:
        raise VerificationError(f"{where}: content differs from what was recorded. " + "; ".join(parts))


def write_durably(path: Path, content: bytes) -> None:
    """Writes a small file and makes it durable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: "str | os.PathLike[str]", content: bytes, *, overwrite: bool = False) -> Path:
    """Writes a small file under a temporary name and renames it: it appears whole or not at all.

    Raises:
        OutputExistsError: the path is taken and `overwrite` is not set.
    """
    target = Path(path)
    if not overwrite and os.path.lexists(target):
        raise OutputExistsError(f"{target}: exists already. Choose another name, or pass overwrite.")
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}-{threading.get_ident()}")
    try:
        write_durably(temporary, content)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{target}: cannot be written ({error.strerror}).") from error
    _sync_folder(target.parent)
    return target


def write_folder_atomically(
    path: "str | os.PathLike[str]", files: Mapping[str, bytes], *, overwrite: bool = False
) -> Path:
    """The same for a folder of small files.

    Raises:
        OutputExistsError: the path is taken and `overwrite` is not set.
        OutputError: it cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        for name, content in files.items():
            write_durably(partial / name, content)
        _sync_folder(partial)
        _publish(partial, target, overwrite=overwrite)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _publish(made: Path, out: Path, *, overwrite: bool) -> None:
    """Gives what was made its final name, in the place of what has it where that is wanted."""
    if os.path.lexists(out) and not overwrite:
        raise OutputExistsError(f"{out}: appeared while this run was writing. Refusing to replace it.")
    if not os.path.lexists(out):
        os.rename(made, out)
    elif _exchange(made, out):
        _remove(made)
    else:
        old = out.with_name(f"{out.name}.replaced-{os.getpid()}")
        os.rename(out, old)
        try:
            os.rename(made, out)
        except OSError:
            os.rename(old, out)
            raise
        _remove(old)
    _sync_folder(out.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.taskvec-lock")


def _locked(out: Path) -> int:
    """An exclusive lock for this output, held by a file descriptor so that a killed run releases it."""
    path = _lock_path(out)
    for _ in range(20):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise OutputError(f"{out}: cannot be created ({error.strerror}).") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise OutputExistsError(f"{out}: another run is writing this output right now.") from None
        with suppress(OSError):
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)  # the holder before us removed the file between our open and our lock
        time.sleep(0.01)
    raise OutputExistsError(f"{out}: another run is writing this output right now.")


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one step (Linux); False where that is not possible."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
