"""The weight store: immutable policy versions, written before they are announced, pulled by whoever wants them.

The learner calls `publish` with host copies of its parameters and goes on; a background thread writes the file under a
temporary name, renames it and only then announces it, so what a reader finds is whole. Actors on this host map the
file, others pull chunks. A slow or dead actor costs the learner nothing.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import zmq
from torch import Tensor

from buffer.client import host_id
from buffer.server import bind_router
from buffer.wire import (
    Chunk,
    ChunkRequest,
    Manifest,
    ManifestRequest,
    Message,
    NoNewVersion,
    Refused,
    TensorEntry,
    WireError,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

ALIGNMENT_BYTES = 64
TICK_SECONDS = 0.2
"""How late the end of a parked request's time, or of the store, may be noticed."""
NamedTensors = Sequence[tuple[str, Tensor]]


class WeightStore:
    """Writes versions to `directory` and serves them at `address`.

    Args:
        directory: where versions lie, one file each; emptied of older runs' versions at the start.
        address: ZeroMQ endpoint to bind, such as tcp://127.0.0.1:5556.
        keep_versions: files kept and served; an actor that pulls an older one is told to ask for the newest.

    Raises:
        ValueError: when the address is in use or is none.
    """

    def __init__(self, directory: Path, address: str, keep_versions: int = 3) -> None:
        self._directory = directory
        self._keep_versions = keep_versions
        self._store_id = uuid.uuid4().hex[:8]
        self._host_id = host_id()
        self._kept: dict[int, Manifest] = {}
        self._lock = threading.Lock()
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("v*.weights*"):
            leftover.unlink()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._socket = bind_router(self._context, address)
        except ValueError:
            self._context.term()
            raise
        self._wake_address = f"inproc://published-{self._store_id}"
        self._wake_receiver = self._context.socket(zmq.PULL)
        self._wake_receiver.bind(self._wake_address)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="publish", initializer=self._connect_wake)
        self._closing = threading.Event()
        self._server = threading.Thread(target=self._serve, name="weight-store", daemon=True)
        self._server.start()

    def _connect_wake(self) -> None:
        self._wake_sender = self._context.socket(zmq.PUSH)
        self._wake_sender.setsockopt(zmq.LINGER, 0)
        self._wake_sender.connect(self._wake_address)

    def publish(self, policy_version: int, tensors: NamedTensors) -> Future[Manifest]:
        """Write and announce a version in the background.

        Args:
            policy_version: completed optimizer steps behind these weights.
            tensors: (Hugging Face name, contiguous host tensor that nobody else changes).
        """
        return self._writer.submit(self._write, policy_version, tensors)

    def _write(self, policy_version: int, tensors: NamedTensors) -> Manifest:
        started = time.monotonic()
        path = self._directory / f"v{policy_version:08d}-{self._store_id}.weights"
        temporary = path.with_suffix(".weights.tmp")
        entries, offset = [], 0
        with temporary.open("wb") as file:
            for name, tensor in tensors:
                file.write(bytes(-offset % ALIGNMENT_BYTES))
                offset += -offset % ALIGNMENT_BYTES
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
                file.write(data)
                dtype = str(tensor.dtype).removeprefix("torch.")
                entries.append(TensorEntry(name, dtype, tuple(tensor.shape), offset, len(data), zlib.crc32(data)))
                offset += len(data)
        temporary.rename(path)
        publication = f"{self._store_id}:{policy_version}"
        manifest = Manifest(policy_version, publication, str(path.resolve()), self._host_id, offset, tuple(entries))
        with self._lock:
            self._kept[policy_version] = manifest
            retired = [self._kept.pop(version) for version in list(self._kept)[: -self._keep_versions]]
        self._wake_sender.send(b"")
        for old in retired:
            Path(old.path).unlink()
        seconds = time.monotonic() - started
        logger.info("policy %d published in %.3f s (%.1f MB)", policy_version, seconds, offset / 1e6)
        return manifest

    def _serve(self) -> None:
        """Answers requests until `close`. Waits for: a message, a publication, or a parked request's time."""
        parked: dict[bytes, tuple[int, str, float]] = {}
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_receiver, zmq.POLLIN)
        while not self._closing.is_set():
            ready = dict(poller.poll(int(TICK_SECONDS * 1000)))
            if self._wake_receiver in ready:
                self._wake_receiver.recv()
            if self._socket in ready:
                self._receive(parked)
            self._answer_parked(parked)

    def _receive(self, parked: dict[bytes, tuple[int, str, float]]) -> None:
        identity, *frames = self._socket.recv_multipart()
        try:
            message, number = decode(frames)
        except WireError as error:
            logger.warning("weight store: dropped a message of %d frames: %s", len(frames), error)
            return
        match message:
            case ManifestRequest(known_publication=known, wait_seconds=seconds):
                parked[identity] = (number, known, time.monotonic() + min(max(seconds, 0.0), 60.0))
            case ChunkRequest():
                self._reply(identity, number, self._chunk(message))
            case _:
                self._reply(identity, number, Refused(f"the weight store does not answer {type(message).__name__}"))

    def _answer_parked(self, parked: dict[bytes, tuple[int, str, float]]) -> None:
        with self._lock:
            newest = next(reversed(self._kept.values()), None)
        now = time.monotonic()
        for identity, (number, known, deadline) in list(parked.items()):
            if newest is not None and newest.publication != known:
                self._reply(identity, number, newest)
            elif now >= deadline:
                self._reply(identity, number, NoNewVersion())
            else:
                continue
            del parked[identity]

    def _chunk(self, request: ChunkRequest) -> Message:
        # Read under the lock, because the writer removes a file once its version is not kept.
        with self._lock:
            manifest = self._kept.get(request.policy_version)
            if manifest is None:
                return Refused(f"version {request.policy_version} is not kept here; ask for the manifest again")
            if request.offset < 0 or not 0 < request.num_bytes <= manifest.num_bytes - request.offset:
                return Refused(f"bytes {request.offset}+{request.num_bytes} lie outside {manifest.num_bytes}")
            with Path(manifest.path).open("rb") as file:
                file.seek(request.offset)
                return Chunk(request.policy_version, request.offset, file.read(request.num_bytes))

    def _reply(self, identity: bytes, number: int, message: Message) -> None:
        self._socket.send_multipart([identity, *encode(message, number)])

    def close(self) -> None:
        """Finish the publication under way and stop serving."""
        self._writer.shutdown(wait=True)
        self._closing.set()
        self._server.join(timeout=5)
        self._context.destroy(linger=0)
