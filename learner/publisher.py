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
from buffer.credentials import Credentials
from buffer.gate import Gate
from buffer.wire import (
    Chunk,
    ChunkRequest,
    Manifest,
    ManifestRequest,
    Message,
    NoNewVersion,
    Refused,
    TensorEntry,
)

logger = logging.getLogger(__name__)

ALIGNMENT_BYTES = 64
MESSAGES_PER_TURN = 16
TICK_SECONDS = 0.2
"""How late the end of a parked request's time, or of the store, may be noticed."""
NamedTensors = Sequence[tuple[str, Tensor]]


class WeightStore:
    """Writes versions to `directory` and serves them at `address`.

    Args:
        directory: where versions lie, one file each; emptied of older runs' versions at the start.
        address: ZeroMQ endpoint to bind, such as tcp://127.0.0.1:5556.
        credentials: the run's id and the server's keys.
        keep_versions: files kept and served; an actor that pulls an older one is told to ask for the newest.

    Raises:
        ValueError: when the address is in use or is none, or is not local and the credentials have no keys.
    """

    def __init__(self, directory: Path, address: str, credentials: Credentials, keep_versions: int = 3) -> None:
        self._directory = directory
        self._keep_versions = keep_versions
        self._store_id = uuid.uuid4().hex[:8]
        self._host_id = host_id()
        self._kept: dict[int, Manifest] = {}
        self._lock = threading.Lock()
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("v*.weights*"):
            leftover.unlink()
        self._gate = Gate(address, credentials)
        self._wake_address = f"inproc://published-{self._store_id}"
        self._wake_receiver = self._gate.context.socket(zmq.PULL)
        self._wake_receiver.bind(self._wake_address)
        self._wake_sender = self._gate.context.socket(zmq.PUSH)
        self._wake_sender.connect(self._wake_address)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._closing = threading.Event()
        self._server = threading.Thread(target=self._serve, name="weight-store", daemon=True)
        self._server.start()

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
        try:
            entries, offset = _write_tensors(temporary, tensors)
            temporary.rename(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(
                f"policy {policy_version} cannot be published to {self._directory}: {error.strerror or error}; make"
                " room or restore the folder, a restarted learner goes on from its newest checkpoint"
            ) from error
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
        poller.register(self._gate.socket, zmq.POLLIN)
        poller.register(self._wake_receiver, zmq.POLLIN)
        while not self._closing.is_set():
            ready = dict(poller.poll(int(TICK_SECONDS * 1000)))
            if self._wake_receiver in ready:
                self._wake_receiver.recv()
            if self._gate.socket in ready:
                self._receive(parked)
            self._answer_parked(parked)

    def _receive(self, parked: dict[bytes, tuple[int, str, float]]) -> None:
        now = time.monotonic()
        messages, _ = self._gate.receive(MESSAGES_PER_TURN, now)
        for incoming in messages:
            identity, number = incoming.identity, incoming.number
            match incoming.message:
                case ManifestRequest(known_publication=known, wait_seconds=seconds):
                    parked[identity] = (number, known, now + min(max(seconds, 0.0), 60.0))
                case ChunkRequest() as request:
                    self._gate.send(identity, self._chunk(request), number)
                case other:
                    refused = Refused(f"the weight store does not answer {type(other).__name__}")
                    self._gate.send(identity, refused, number)

    def _answer_parked(self, parked: dict[bytes, tuple[int, str, float]]) -> None:
        with self._lock:
            newest = next(reversed(self._kept.values()), None)
        now = time.monotonic()
        for identity, (number, known, deadline) in list(parked.items()):
            if newest is not None and newest.publication != known:
                self._gate.send(identity, newest, number)
            elif now >= deadline:
                self._gate.send(identity, NoNewVersion(), number)
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

    def close(self) -> None:
        """Finish the publication under way and stop serving."""
        self._writer.shutdown(wait=True)
        self._closing.set()
        self._server.join(timeout=5)
        self._wake_receiver.close(linger=0)
        self._wake_sender.close(linger=0)
        self._gate.close()


def _write_tensors(path: Path, tensors: NamedTensors) -> tuple[list[TensorEntry], int]:
    """Where each tensor lies in the file, and the file's size in bytes."""
    entries, offset = [], 0
    with path.open("wb") as file:
        for name, tensor in tensors:
            file.write(bytes(-offset % ALIGNMENT_BYTES))
            offset += -offset % ALIGNMENT_BYTES
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            file.write(data)
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append(TensorEntry(name, dtype, tuple(tensor.shape), offset, len(data), zlib.crc32(data)))
            offset += len(data)
    return entries, offset
