"""The versions and deltas that a weight server serves in chunks.

Chunks are sent from the version's segment without a copy. Such a segment is *lent* to ZeroMQ: it is returned for reuse
only when ZeroMQ has released all its chunks, so no reader receives bytes that are being overwritten. A stalled reader
holds its chunks until ZeroMQ drops the connection. Only one segment is therefore lent at a time; meanwhile chunks of
other versions are copies.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from buffer.transport.messages import Chunk, ChunkRequest, Manifest, Refused
from buffer.transport.schema import Frame
from buffer.weights.delta import encode
from buffer.weights.layout import checksum, layout_of
from buffer.weights.shared_memory import Segment, hold, let_go

log = logging.getLogger(__name__)

WORTHWHILE_SHARE = 0.5
"""Largest size of a delta, as a share of the version's size. A larger delta is not sent."""
LOW_PRIORITY = 10
"""Niceness of the thread that computes deltas, so that the training step has priority."""
Requester = tuple[bytes, int]
"""Name of a connection, and number of its request."""


class KeptVersions:
    """The newest versions and the deltas between them. Any thread may call.

    Args:
        keep_versions: number of versions kept.
        wake: called, in another thread, when a delta is ready.
    """

    def __init__(self, keep_versions: int, wake: Callable[[], None]) -> None:
        self._keep_versions, self._wake = keep_versions, wake
        self._kept: dict[str, tuple[Manifest, Segment]] = {}
        """By publication, newest last."""
        self._deltas: dict[tuple[str, str], Future[bytes]] = {}
        """By (base, publication)."""
        self._lent: Segment | None = None
        self._pieces: WeakValueDictionary[Requester, NDArray[np.uint8]] = WeakValueDictionary()
        """The chunks of `_lent` that a message or ZeroMQ still holds, by requester."""
        self._retiring: list[Segment] = []
        """Segments that are no longer served, but still lent."""
        self._lock = threading.Lock()
        """Guards all fields above, and the contents of every segment that is kept or lent."""
        self._encoder = ThreadPoolExecutor(1, "weight-deltas", initializer=_lower_priority)

    def add(self, manifest: Manifest, segment: Segment) -> list[Segment]:
        """Keep a complete version. Returns the segments that are no longer kept and not lent."""
        with self._lock:
            self._kept[manifest.publication] = (manifest, segment)
            surplus = list(self._kept)[: -self._keep_versions]
            retired = self._retiring + [self._kept.pop(publication)[1] for publication in surplus]
            for key in [key for key in self._deltas if key[1] in surplus]:
                del self._deltas[key]
            self._retiring = [segment for segment in retired if segment is self._lent and self._pieces]
            return [segment for segment in retired if segment not in self._retiring]

    def newest(self) -> Manifest | None:
        """Return the manifest that was added last; None before the first."""
        with self._lock:
            return next(reversed(self._kept.values()), (None, None))[0]

    def versions(self) -> dict[str, int]:
        """Return the policy version of every publication that is kept."""
        with self._lock:
            return {publication: manifest.policy_version for publication, (manifest, _) in self._kept.items()}

    def is_last(self, request: ChunkRequest) -> bool:
        """Return whether the requested bytes are the end of their publication or delta."""
        with self._lock:
            if request.publication not in self._kept:
                return False
            return request.offset + request.num_bytes == self._size(request)

    def _size(self, request: ChunkRequest) -> int:
        if not request.base:
            return self._kept[request.publication][0].num_bytes
        return len(self._delta(request))

    def _delta(self, request: ChunkRequest) -> bytes:
        delta = self._deltas.get((request.base, request.publication))
        return delta.result() if delta is not None and delta.done() else b""

    def chunk(self, request: ChunkRequest, requester: Requester) -> Chunk | Refused | None:
        """Return the requested bytes. Their segment is not reused as long as the chunk exists.

        Returns None when a chunk for this request is still being sent. Such a resend means that the link is slow, and a
        second answer would slow it further.
        """
        with self._lock:
            if requester in self._pieces:
                return None
            if request.publication not in self._kept:
                return Refused(f"publication {request.publication} is not kept here; ask for the manifest again")
            size, start, end = self._size(request), request.offset, request.offset + request.num_bytes
            if not start < end <= size:
                return Refused(f"bytes {request.offset}+{request.num_bytes} lie outside {size}")
            if request.base:
                data: Frame = memoryview(self._delta(request))[start:end]
            else:
                data = self._lend(self._kept[request.publication][1], start, end, requester)
        return Chunk(start, checksum(data), data)

    def _lend(self, segment: Segment, start: int, end: int, requester: Requester) -> Frame:
        piece = segment.array[start:end]
        if self._lent is not segment and self._pieces:
            return piece.tobytes()
        self._lent = segment
        self._pieces[requester] = piece
        return piece.data

    def delta(self, base: str, publication: str) -> Future[bytes]:
        """Return the delta between two kept versions, computed once; an empty one when either is not kept."""
        key = base, publication
        with self._lock:
            if key not in self._deltas:
                if base not in self._kept or publication not in self._kept:
                    nothing: Future[bytes] = Future()
                    nothing.set_result(b"")
                    return nothing
                old, new = self._kept[base][0], self._kept[publication][0]
                self._deltas[key] = self._encoder.submit(_compare, old, new)
                self._deltas[key].add_done_callback(lambda _: self._wake())
            return self._deltas[key]

    def close(self) -> list[Segment]:
        """Stop computing deltas. Returns all segments; they may be deleted but not reused, because they may be lent."""
        self._encoder.shutdown(wait=True, cancel_futures=True)
        return [*self._retiring, *(segment for _, segment in self._kept.values())]


def _lower_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)


def _compare(old: Manifest, new: Manifest) -> bytes:
    """Compute the delta between two published files; empty when it would be too large or a file cannot be read."""
    if layout_of(old.tensors) != layout_of(new.tensors) or old.num_bytes != new.num_bytes:
        return b""
    files: list[BinaryIO] = []
    try:
        for manifest in (old, new):
            files.append(hold(Path(manifest.path)))
        before, after = (
            np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8) for file in files
        )
        return encode(before, after, layout_of(new.tensors), int(WORTHWHILE_SHARE * new.num_bytes))
    except FileNotFoundError:
        return b""
    except OSError as error:
        # Readers then pull the whole version, from memory that is mapped already.
        log.warning("no delta from policy %d to %d: %s", old.policy_version, new.policy_version, error)
        return b""
    finally:
        for file in files:
            let_go(file)
