"""The ways that `benchmarks/weights.py` measures to bring weights from a learner to actors.

Each way has a sender, in the learner's process, and a receiver, in the process of every actor. The receiver reports
when the whole version is in its host's memory, checked where the way has checksums. Then it reads all of the version
once, as loading it into an engine does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import zmq
from safetensors.torch import load_file, save_file

from actors.weights.client import WeightClient
from buffer.transport.connection import Connection, host_id
from buffer.transport.credentials import Credentials
from buffer.weights.config import WeightsConfig
from learner.weights.store import HostMemory, WeightStore

CREDENTIALS = Credentials.plain("benchmark")
CHUNK_BYTES = 1 << 20
"""Size of a message of raw ZeroMQ, which is fastest with this size."""
PULLED_BYTES = 4 << 20
"""Chunk size of our actor: the default of `ActorConfig.chunk_bytes`."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Folders and address of one measurement."""

    folder: Path
    """A folder on disk."""
    memory: Path
    """A folder in shared memory."""
    address: str
    """TCP address of the learner."""
    num_actors: int


@dataclass
class Arrival:
    """The figures of one version in one actor."""

    ready_at: float
    """Time of the monotonic clock, which all processes of a machine share, when the whole version was there."""
    pause_seconds: float = 0.0
    """Time to read the version once."""
    pulled_bytes: int = 0
    """Bytes pulled over the network."""


class Sender(Protocol):
    """The learner's side."""

    def send(self, version: int, tensors: Tensors) -> Callable[[], None]:
        """Publish a version. Returns when the learner may continue; the returned function waits until all is done."""

    def close(self) -> None:
        """Free everything."""


Receive = Callable[[Place, int, Tensors], Iterator[tuple[Arrival, Iterator[torch.Tensor]]]]
"""Takes (place, number of the actor, tensors of the right shapes) and yields every version: (arrival, its tensors)."""


# --- Slipstream ---


class Store:
    """Our sender: the learner's weight store."""

    def __init__(self, place: Place) -> None:
        config = WeightsConfig(place.address, keep_versions=2)
        directory = place.folder / "weights"
        self._store = WeightStore(directory, config, CREDENTIALS, HostMemory(directory, place.memory / "weights"))

    def send(self, version: int, tensors: Tensors) -> Callable[[], None]:
        """Copy the version; a background thread announces it."""
        future = self._store.publish(version, tensors.items())
        return lambda: _done(future.result())

    def close(self) -> None:
        """Remove all versions."""
        self._store.close()


def _done(_: object) -> None:
    """Ignores a result."""


def take(shared: bool, deltas: bool) -> Receive:
    """Our receiver: maps the file on the same host if `shared`, or pulls the version, as a delta if `deltas`."""

    def receive(place: Place, number: int, like: Tensors) -> Iterator[tuple[Arrival, Iterator[torch.Tensor]]]:
        with Connection(place.address, f"actor-{number}", CREDENTIALS) as connection, asyncio.Runner() as runner:
            client = WeightClient(
                connection,
                host_id=host_id() if shared else "another host",
                published=place.folder / "weights",
                chunk_bytes=PULLED_BYTES,
                deltas=deltas,
            )
            known, pulled = "", 0
            while True:
                manifest = runner.run(client.wait_for_new(known, 600.0))
                assert manifest is not None
                local = runner.run(client.fetch(manifest))
                arrival = Arrival(time.monotonic(), pulled_bytes=client.pulled_bytes - pulled)
                known, pulled = manifest.publication, client.pulled_bytes
                data = torch.from_numpy(np.memmap(local.path, np.uint8, mode="c"))
                yield arrival, (data[entry.offset : entry.offset + entry.num_bytes] for entry in manifest.tensors)
                local.release()

    return receive


# --- others ---


class SafetensorsFile:
    """Saves a safetensors file on disk, which actors find by its name."""

    def __init__(self, place: Place) -> None:
        self._folder = place.folder

    def send(self, version: int, tensors: Tensors) -> Callable[[], None]:
        """Save the file; the learner waits for it."""
        partial = self._folder / "partial.safetensors"
        save_file(tensors, partial)
        partial.rename(self._folder / f"v{version}.safetensors")
        (self._folder / f"v{version - 1}.safetensors").unlink(missing_ok=True)
        return lambda: None

    def close(self) -> None:
        """Nothing is open."""


def load_files(place: Place, number: int, like: Tensors) -> Iterator[tuple[Arrival, Iterator[torch.Tensor]]]:
    """Waits for the next file and loads it."""
    version = 0
    while True:
        path = place.folder / f"v{version}.safetensors"
        while not path.exists():
            time.sleep(0.002)
        loaded = load_file(path)
        # load_file maps lazily; the copy makes sure that all bytes were read.
        tensors = [tensor.clone() for tensor in loaded.values()]
        yield Arrival(time.monotonic()), iter(tensors)
        version += 1


class Broadcast:
    """Broadcasts with torch.distributed over gloo; the learner waits until every actor has taken part."""

    def __init__(self, place: Place) -> None:
        self._address = f"file://{place.folder}/gloo"
        self._world = place.num_actors + 1
        self._joined = False

    def send(self, version: int, tensors: Tensors) -> Callable[[], None]:
        """Broadcast tensor by tensor."""
        if not self._joined:
            dist.init_process_group("gloo", init_method=self._address, rank=0, world_size=self._world)
            self._joined = True
        for tensor in tensors.values():
            dist.broadcast(tensor, 0)
        return lambda: None

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()


def take_broadcast(place: Place, number: int, like: Tensors) -> Iterator[tuple[Arrival, Iterator[torch.Tensor]]]:
    """Takes part in every broadcast."""
    world = place.num_actors + 1
    dist.init_process_group("gloo", init_method=f"file://{place.folder}/gloo", rank=number + 1, world_size=world)
    while True:
        for tensor in like.values():
            dist.broadcast(tensor, 0)
        yield Arrival(time.monotonic()), iter(like.values())


class RawZeroMq:
    """Pushes chunks over TCP without a protocol or checksums: the lower bound of a transfer over the network."""

    def __init__(self, place: Place) -> None:
        self._context = zmq.Context()
        self._sockets = [self._context.socket(zmq.PUSH) for _ in range(place.num_actors)]
        port = int(place.address.rpartition(":")[2])
        for number, socket in enumerate(self._sockets):
            socket.setsockopt(zmq.SNDHWM, 8)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"tcp://127.0.0.1:{port + number}")

    def send(self, version: int, tensors: Tensors) -> Callable[[], None]:
        """Send all chunks; the learner waits until ZeroMQ has taken them."""
        for tensor in tensors.values():
            data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            for start in range(0, len(data), CHUNK_BYTES):
                for socket in self._sockets:
                    socket.send(data[start : start + CHUNK_BYTES], copy=False)
        return lambda: None

    def close(self) -> None:
        """Close the sockets."""
        self._context.destroy(linger=0)


def take_chunks(place: Place, number: int, like: Tensors) -> Iterator[tuple[Arrival, Iterator[torch.Tensor]]]:
    """Copies every chunk to its place."""
    context = zmq.Context()
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 8)
    socket.connect(f"tcp://127.0.0.1:{int(place.address.rpartition(':')[2]) + number}")
    pulled = 0
    while True:
        for tensor in like.values():
            data = tensor.view(-1).view(torch.uint8).numpy()
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = socket.recv(copy=False).buffer
                data[start : start + len(chunk)] = np.frombuffer(chunk, np.uint8)
                pulled += len(chunk)
        yield Arrival(time.monotonic(), pulled_bytes=pulled), iter(like.values())
        pulled = 0


@dataclass(frozen=True)
class Way:
    """One way to bring weights to actors."""

    sender: Callable[[Place], Sender]
    receive: Receive
    copies: int
    """Number of whole copies of the model in each actor."""


WAYS = {
    "Slipstream, same host": Way(Store, take(shared=True, deltas=False), 0),
    "Slipstream, network, whole": Way(Store, take(shared=False, deltas=False), 1),
    "Slipstream, network, deltas": Way(Store, take(shared=False, deltas=True), 1),
    "safetensors on disk": Way(SafetensorsFile, load_files, 2),
    "gloo broadcast": Way(Broadcast, take_broadcast, 1),
    "raw ZeroMQ": Way(RawZeroMq, take_chunks, 1),
}


def act(name: str, place: Place, number: int, shapes: dict[str, tuple[int, ...]], pipe: Pipe) -> None:
    """Main function of an actor's process: reports every arrival through `pipe` until the process is killed."""
    torch.set_num_threads(1)
    way = WAYS[name]
    like = {key: torch.zeros(shape if way.copies else 0, dtype=torch.bfloat16) for key, shape in shapes.items()}
    scratch = torch.empty(2 * max(torch.Size(shape).numel() for shape in shapes.values()), dtype=torch.uint8)
    pipe.send("up")
    for arrival, tensors in way.receive(place, number, like):
        started = time.monotonic()
        for tensor in tensors:
            scratch[: tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
        arrival.pause_seconds = time.monotonic() - started
        pipe.send(arrival)
