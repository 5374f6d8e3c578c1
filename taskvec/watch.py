"""Hashing of what a sweep reads, on the way."""

import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from taskvec.checkpoint import SEGMENT, Checkpoint, SegmentDigest, raw_bytes
from taskvec.source import TensorSource


class Digests:
    """The digests of tensors that several threads read, each its own segments."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], SegmentDigest] = {}
        self._lock = threading.Lock()

    def of(self, checkpoint: Checkpoint, name: str) -> SegmentDigest:
        """The digest of one tensor, made when it is first asked for."""
        with self._lock:
            return self._found.setdefault((id(checkpoint), name), SegmentDigest(checkpoint.infos[name]))


class Watch:
    """Hashes what is read of one segment, so that the inputs' digests cost no pass of their own.

    Args:
        found: the digests of all inputs that a sweep reads.
        stored: where each source has the tensor, by the source's id.
        segment: the number of the segment that is read, or of the first.
    """

    def __init__(self, found: Digests, stored: Mapping[int, tuple[Checkpoint, str]], segment: int):
        self._found, self._stored, self._segment = found, stored, segment
        self._hashers: dict[int, tuple[Any, int]] = {}
        self._at: dict[int, int] = {}  # segments that are whole, where a tensor of several is read at once

    def __call__(self, source: TensorSource, name: str, raw: "Tensor | memoryview") -> None:
        stored = self._stored.get(id(source))
        if stored is None:
            return
        from blake3 import blake3

        data = raw if isinstance(raw, memoryview) else raw_bytes(raw)
        size = source.infos[name].dtype.itemsize
        hasher, room = self._hashers.get(id(source)) or (blake3(), SEGMENT)
        done = 0
        while len(data) // size - done >= room:  # whole tensors cross segments
            hasher.update(data[done * size : (done + room) * size])
            self._end(id(source), hasher)
            done, room, hasher = done + room, SEGMENT, blake3()
        hasher.update(data[done * size :])
        self._hashers[id(source)] = (hasher, room - (len(data) // size - done))

    def _end(self, source: int, hasher: Any) -> None:
        checkpoint, own = self._stored[source]
        digest = self._found.of(checkpoint, own)
        at = self._at.get(source, self._segment)
        self._at[source] = at + 1
        if at < digest.count and digest.add(at, hasher.digest()):
            checkpoint.record_digest(own, digest.hexdigest())

    def close(self) -> None:
        for source, (hasher, room) in list(self._hashers.items()):
            checkpoint, own = self._stored[source]
            if room < SEGMENT or checkpoint.infos[own].numel == 0:
                self._end(source, hasher)
        self._hashers.clear()


__all__ = ["Digests", "Watch"]
