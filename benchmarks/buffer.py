"""Measures the throughput of the buffer, in groups per second from an actor to the learner, by durability.

A group has 8 trajectories of 1,024 tokens (74 kB). It takes the whole path: the actor's connection, the socket, the
ledger, a shard, the learner's connection. Actor, buffer and learner are processes of their own.

Compared, alternating: the same frames through a ZeroMQ process that stores nothing on disk, and, where installed, Redis
with its append-only file and a Ray queue. `--peers-python` names an interpreter that has Redis and Ray.

`--actors 1 100 1000 5000` instead measures groups per second, the length of the buffer's turns and its memory with
that many connected actors, each with a heartbeat every second (`benchmarks/parts/buffer/crowd.py`). Groups are small
(10 kB), batches large, and a launcher asks for the status four times a second.

`--memory-groups N` instead sends N small groups through the buffer, and records the memory of its process and the size
of its files, in MB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_any
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

# The root of the project comes first, because this file has the name of a package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgpack
import numpy as np
import psutil
import zmq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.parts.buffer.crowd import crowd
from benchmarks.parts.figures import command, machine, versions, wide_console, write
from buffer.config import BufferConfig
from buffer.service.server import Server
from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from buffer.transport import messages
from buffer.transport.connection import Connection
from buffer.transport.credentials import Credentials, RunKeys
from buffer.transport.packed_group import PackedGroup, pack_group

ROOT = Path(__file__).resolve().parent.parent
GROUPS_PER_BATCH = 32
MAX_STALENESS = 3
COMMIT_EVERY = 4
IN_FLIGHT = 64
WARM_UP_BATCHES = 6
CROWD_SHAPE = (8, 128)
CROWD_BATCH = 256
CROWD_STALENESS = 16
CROWD_PROCESSES = 2
CROWD_SECONDS, QUICK_SECONDS = 15.0, 2.0
PROCESSES = multiprocessing.get_context("spawn")


def pattern(num_trajectories: int, num_tokens: int) -> PackedGroup:
    """The group that is sent again and again: random tokens, the first ones a prompt."""
    rng = np.random.default_rng(0)
    mask = np.arange(num_tokens) >= min(64, num_tokens // 2)
    trajectories = tuple(
        Trajectory(
            trajectory_id=f"0.0.{i}",
            group_id="0.0",
            prompt_id=0,
            token_ids=rng.integers(0, 150_000, num_tokens).astype(np.int32),
            loss_mask=mask,
            behavior_logprobs=np.where(mask, -rng.random(num_tokens), 0.0).astype(np.float32),
            policy_versions=(VersionSpan(0, 0),),
            reward=float(i % 2),
            reward_breakdown={"correct": float(i % 2)},
            verdict="correct" if i % 2 else "wrong",
            finish_reason=FinishReason.STOP,
            actor_id="actor-0",
        )
        for i in range(num_trajectories)
    )
    return pack_group(TrajectoryGroup("0.0", 0, trajectories))


def named(group: PackedGroup, lease: messages.Lease, policy_version: int) -> PackedGroup:
    """The same contents as the group of a lease, sampled by `policy_version`."""
    details = tuple((*detail[:7], ((0, policy_version),)) for detail in group.header.details)
    header = replace(
        group.header,
        group_id=lease.group_id,
        prompt_id=lease.prompt_id,
        oldest_version=policy_version,
        details=details,
    )
    fields = [header.group_id, header.prompt_id, policy_version, header.num_tokens, header.rewards, details]
    return PackedGroup(header, msgpack.packb(fields, use_bin_type=True), group.arrays_frame)


# --- the processes ---


def serve(config: BufferConfig, credentials: Credentials, ready: Any) -> None:
    server = Server(config, credentials)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    ready.set()
    server.run()


class TimedServer(Server):
    """A server that writes how long its turns took to RUN_DIR/turns.json when a file RUN_DIR/measure appears."""

    def __init__(self, config: BufferConfig, credentials: Credentials) -> None:
        super().__init__(config, credentials)
        self._turns_seconds: list[float] = []
        self._folder = Path(config.run_dir)

    def _turn(self) -> None:
        begin = time.perf_counter()
        super()._turn()
        self._turns_seconds.append(time.perf_counter() - begin)
        if len(self._turns_seconds) % 50 == 0 and (self._folder / "measure").exists():
            (self._folder / "measure").unlink()
            (self._folder / "turns.json.incomplete").write_text(json.dumps(self._turns_seconds))
            (self._folder / "turns.json.incomplete").replace(self._folder / "turns.json")
            self._turns_seconds.clear()


def serve_timed(config: BufferConfig, credentials: Credentials, address: Any) -> None:
    server = TimedServer(config, credentials)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    address.put(server.address)
    server.run()


def act(address: str, credentials: Credentials, shape: tuple[int, int], policy_version: Any) -> None:
    """Lease and deliver groups as an actor does, until the buffer closes."""
    contents = pattern(*shape)
    receipts: deque[Future[messages.Message]] = deque()
    held: deque[str] = deque()
    with Connection(address, "actor-0", credentials) as buffer:
        version, lease = -1, None
        while True:
            newest = policy_version.value
            if newest != version:
                version = newest
                buffer.request(messages.Heartbeat("actor", "actor-0", version, "", {}, tuple(held)))
            wanted = messages.LeaseRequest("actor-0", version, IN_FLIGHT // 2, "prompts", tuple(held))
            lease = lease or buffer.request(wanted)
            wait_for_any([lease], timeout=0.002)
            if not lease.done():
                continue
            reply, lease = lease.result(), None
            assert isinstance(reply, messages.LeaseReply)
            if reply.closing:
                return
            for granted in reply.leases:
                receipts.append(buffer.request(messages.GroupDelivery("actor-0", named(contents, granted, version))))
                held.append(granted.group_id)
            while len(receipts) > IN_FLIGHT:
                assert receipts.popleft().result().outcome == "stored"
                held.popleft()


def relay(address: str, ready: Any) -> None:
    """Forward the same frames through plain ZeroMQ sockets, from memory, in batches as the learner asks for them."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(address)
        ready.set()
        kept: deque[list[bytes]] = deque()
        asking: bytes | None = None
        while True:
            identity, kind, *frames = socket.recv_multipart()
            if kind == b"put":
                kept.append(frames)
                socket.send_multipart([identity, b"stored"])
            else:
                asking = identity
            if asking is not None and len(kept) >= GROUPS_PER_BATCH:
                batch = [frame for _ in range(GROUPS_PER_BATCH) for frame in kept.popleft()]
                socket.send_multipart([asking, *batch], copy=False)
                asking = None


def put(address: str, shape: tuple[int, int]) -> None:
    """Send the frames of one group again and again, with at most IN_FLIGHT unacknowledged."""
    contents = pattern(*shape)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(address)
        in_flight = 0
        while True:
            socket.send_multipart([b"put", contents.header_frame, contents.arrays_frame], copy=False)
            in_flight += 1
            while in_flight > IN_FLIGHT:
                socket.recv_multipart()
                in_flight -= 1


@contextmanager
def started(*commands: tuple[Callable[..., None], tuple[Any, ...]]) -> Iterator[list[Any]]:
    """Start a process for every (function, arguments), and end them when the context ends."""
    processes = [PROCESSES.Process(target=target, args=arguments, daemon=True) for target, arguments in commands]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.terminate()
            process.join(10)
            process.kill()


# --- the measurements ---


def through_the_buffer(
    durability: str,
    keys: RunKeys,
    num_groups: int,
    shape: tuple[int, int],
    watch: Callable[..., None] = lambda *_: None,
) -> float:
    """Returns the groups per second through the buffer.

    Args:
        durability: the buffer's setting: full, normal or memory.
        keys: of the sockets.
        num_groups: groups to measure, after the warm-up.
        shape: (trajectories per group, tokens per trajectory).
        watch: called with the buffer's process, its folder and the number of groups so far.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        address = f"ipc://{folder}/socket"
        config = BufferConfig(
            run_dir=folder,
            address=address,
            num_prompts=10**6,
            data_fingerprint="prompts",
            groups_per_batch=GROUPS_PER_BATCH,
            max_staleness=MAX_STALENESS,
            durability=durability,
            lease_seconds=600.0,
        )
        ready, policy_version = PROCESSES.Event(), PROCESSES.Value("q", 0)
        with started((serve, (config, keys.buffer, ready))) as (server,):
            ready.wait(60)
            acting = (act, (address, keys.clients["actor"], shape, policy_version))
            with Connection(address, "learner", keys.clients["learner"]) as learner, started(acting):
                welcome = learner.call(messages.LearnerHello(0))
                assert isinstance(welcome, messages.LearnerWelcome)
                learner.epoch = welcome.epoch
                taken, begin, batch = 0, 0.0, 0
                while taken < num_groups:
                    shard = learner.call(messages.BatchRequest(batch, 0, 1))
                    assert isinstance(shard, messages.Shard)
                    batch += 1
                    policy_version.value = batch
                    if batch % COMMIT_EVERY == 0:
                        learner.request(messages.CheckpointCommitted(batch))
                    if batch <= WARM_UP_BATCHES:
                        begin = time.perf_counter()
                        continue
                    taken += len(shard.groups)
                    watch(psutil.Process(server.pid), Path(folder), taken)
                return taken / (time.perf_counter() - begin)


def with_many_actors(num_actors: int, keys: RunKeys, seconds: float, heartbeat_seconds: float) -> dict[str, float]:
    """Returns rate, turns and memory of a buffer with `num_actors` connected actors, measured over `seconds`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        config = BufferConfig(
            run_dir=folder,
            address="tcp://127.0.0.1:*",
            num_prompts=10**6,
            data_fingerprint="prompts",
            groups_per_batch=CROWD_BATCH,
            max_staleness=CROWD_STALENESS,
            lease_seconds=600.0,
        )
        found, policy_version = PROCESSES.Queue(), PROCESSES.Value("q", 0)
        contents = pattern(*CROWD_SHAPE)
        names = [f"actor-{number}" for number in range(num_actors)]
        with started((serve_timed, (config, keys.buffer, found))) as (server,):
            address = found.get(timeout=60)
            shares = [names[first::CROWD_PROCESSES] for first in range(min(CROWD_PROCESSES, num_actors))]
            like = keys.clients["actor"], contents, named, policy_version, heartbeat_seconds
            acting = [(crowd, (address, share, *like)) for share in shares]
            with (
                Connection(address, "learner", keys.clients["learner"]) as learner,
                Connection(address, "launcher", keys.clients["observer"]) as launcher,
                started(*acting),
            ):
                return _watch_crowd(num_actors, learner, launcher, Path(folder), server.pid, policy_version, seconds)


def _watch_crowd(
    num_actors: int,
    learner: Connection,
    launcher: Connection,
    folder: Path,
    server_pid: int,
    policy_version: Any,
    seconds: float,
) -> dict[str, float]:
    """Train, and ask for the status four times a second. Measuring begins when every actor has sent a heartbeat."""
    welcome = learner.call(messages.LearnerHello(0))
    assert isinstance(welcome, messages.LearnerWelcome)
    learner.epoch = welcome.epoch
    process = psutil.Process(server_pid)
    asked, ask_at, taken, batch, begin, connected = launcher.request(messages.StatusRequest()), 0.0, 0, 0, 0.0, 0
    started_at, used = time.monotonic(), 0.0
    while not begin or time.monotonic() - begin < seconds:
        shard = learner.call(messages.BatchRequest(batch, 0, 1), 120)
        assert isinstance(shard, messages.Shard) and not shard.rest
        batch += 1
        policy_version.value = batch
        if batch % COMMIT_EVERY == 0:
            learner.request(messages.CheckpointCommitted(batch))
        taken += len(shard.groups)
        if asked.done() and time.monotonic() >= ask_at:
            status = asked.result()
            assert isinstance(status, messages.Status)
            connected = status.actors.num_actors
            asked, ask_at = launcher.request(messages.StatusRequest()), time.monotonic() + 0.25
        if not begin and connected == num_actors and batch > WARM_UP_BATCHES:
            begin, taken, arrived = time.monotonic(), 0, time.monotonic() - started_at
            used = sum(process.cpu_times()[:2])
            (folder / "measure").touch()
            while not (folder / "turns.json").exists():
                time.sleep(0.01)
            (folder / "turns.json").unlink()
        elif not begin and time.monotonic() - started_at > 300:
            raise RuntimeError(f"only {connected} of {num_actors} actors are connected")
    elapsed = time.monotonic() - begin
    used = sum(process.cpu_times()[:2]) - used
    (folder / "measure").touch()
    deadline = time.monotonic() + 60
    while not (folder / "turns.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    turns = np.array(json.loads((folder / "turns.json").read_text())) * 1e3
    memory = process.memory_info()
    return {
        "actors": num_actors,
        "groups_per_second": taken / elapsed,
        "turns_per_second": len(turns) / elapsed,
        "turn_ms_median": float(np.median(turns)),
        "turn_ms_p99": float(np.quantile(turns, 0.99)),
        "turn_ms_max": float(turns.max()),
        "cores_used": used / elapsed,
        "memory_mb": memory.rss / 1e6,
        "anonymous_mb": (memory.rss - memory.shared) / 1e6,
        "seconds_until_all_connected": arrived,
    }


def through_zeromq(num_groups: int, shape: tuple[int, int]) -> float:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        address, ready = f"ipc://{folder}/socket", PROCESSES.Event()
        with started((relay, (address, ready))):
            ready.wait(60)
            with started((put, (address, shape))), zmq.Context() as context, context.socket(zmq.DEALER) as socket:
                socket.connect(address)
                taken, begin = -WARM_UP_BATCHES * GROUPS_PER_BATCH, 0.0
                while taken < num_groups:
                    if taken <= 0:
                        begin = time.perf_counter()
                    socket.send_multipart([b"get"])
                    taken += len(socket.recv_multipart()) // 2
                return taken / (time.perf_counter() - begin)


def through_a_peer(python: str, name: str, num_groups: int, shape: tuple[int, int]) -> float | str:
    """Returns the groups per second through another system, or the reason why it cannot be measured."""
    script, contents = ROOT / "benchmarks" / "parts" / "buffer" / "peers.py", pattern(*shape)
    command = [python, str(script), name, str(num_groups)]
    frames = msgpack.packb([contents.header_frame, contents.arrays_frame])
    ended = subprocess.run(command, input=frames, capture_output=True, check=False, timeout=600)
    if ended.returncode:
        return (ended.stderr.decode(errors="replace").strip().splitlines() or ["it ended without an output"])[-1][-200:]
    measured: float = json.loads(ended.stdout.splitlines()[-1])
    return measured


def compare(repeats: int, num_groups: int, peers_python: str) -> dict[str, Any]:
    """Measure every way once per round, for `repeats` rounds."""
    shape, plain, encrypted = (8, 1_024), RunKeys.new("benchmark", encrypted=False), RunKeys.new("benchmark")
    num_bytes = pattern(*shape).num_bytes
    ways: dict[str, Callable[[], float | str]] = {
        f"buffer, {name}": lambda name=name: through_the_buffer(name, plain, num_groups, shape)
        for name in ("full", "normal", "memory")
    }
    ways["buffer, normal, CURVE"] = lambda: through_the_buffer("normal", encrypted, num_groups, shape)
    ways["ZeroMQ, nothing kept"] = lambda: through_zeromq(num_groups * 4, shape)
    for label, name in (
        ("Redis, AOF always", "redis-always"),
        ("Redis, AOF every second", "redis-everysec"),
        ("Ray queue", "ray"),
    ):
        ways[label] = lambda name=name: through_a_peer(peers_python, name, num_groups, shape)
    measured: dict[str, list[float]] = {label: [] for label in ways}
    skipped: dict[str, str] = {}
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=repeats * len(ways))
        for _ in range(repeats):
            for label, measure in ways.items():
                progress.update(task, description=label)
                outcome = skipped.get(label) or measure()
                if isinstance(outcome, str):
                    skipped[label] = outcome
                else:
                    measured[label].append(outcome)
                progress.advance(task)
    rates = {
        label: {
            "groups_per_second": statistics.median(values),
            "spread": [min(values), max(values)],
            "megabytes_per_second": statistics.median(values) * num_bytes / 1e6,
            "tokens_per_second": statistics.median(values) * shape[0] * shape[1],
        }
        for label, values in measured.items()
        if values
    }
    return {"group_bytes": num_bytes, "groups": num_groups, "repeats": repeats, "rates": rates, "skipped": skipped}


def many_actors(numbers: list[int], repeats: int, seconds: float, heartbeat_seconds: float) -> dict[str, Any]:
    """Measure with each number of actors, unencrypted and encrypted, alternating."""
    ways = {"plain": RunKeys.new("benchmark", encrypted=False), "CURVE": RunKeys.new("benchmark")}
    found: dict[str, dict[int, list[dict[str, float]]]] = {way: {number: [] for number in numbers} for way in ways}
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=repeats * len(ways) * len(numbers))
        for _ in range(repeats):
            for way, keys in ways.items():
                for number in numbers:
                    progress.update(task, description=f"{number} actors, {way}")
                    found[way][number].append(with_many_actors(number, keys, seconds, heartbeat_seconds))
                    progress.advance(task)
    medians = {
        way: [{name: statistics.median(row[name] for row in rows) for name in rows[0]} for rows in by_number.values()]
        for way, by_number in found.items()
    }
    group_bytes = pattern(*CROWD_SHAPE).num_bytes
    return {
        "group_bytes": group_bytes,
        "repeats": repeats,
        "seconds": seconds,
        "heartbeat_seconds": heartbeat_seconds,
        "many_actors": medians,
        "runs": found,
    }


def watch_memory(num_groups: int) -> dict[str, Any]:
    """Record the memory of the buffer's process and the size of its files while `num_groups` small groups pass."""
    samples: list[dict[str, float]] = []
    with Progress(TextColumn("groups"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=num_groups)

        def watch(process: psutil.Process, folder: Path, taken: int) -> None:
            progress.update(task, completed=min(taken, num_groups))
            if taken >= len(samples) * num_groups / 100:
                sizes = {suffix: (folder / f"ledger.sqlite{suffix}").stat().st_size / 1e6 for suffix in ("", "-wal")}
                memory = process.memory_info()
                samples.append(
                    {
                        "groups": taken,
                        "anonymous_mb": (memory.rss - memory.shared) / 1e6,
                        "resident_mb": memory.rss / 1e6,
                        "ledger_mb": sizes[""],
                        "log_mb": sizes["-wal"],
                    }
                )

        rate = through_the_buffer("normal", RunKeys.new("benchmark", encrypted=False), num_groups, (2, 16), watch)
    first, last = samples[len(samples) // 10], samples[-1]
    grown = last["groups"] - first["groups"]
    return {
        "memory_groups": num_groups,
        "groups_per_second": rate,
        "memory_bytes_per_group": 1e6 * (last["anonymous_mb"] - first["anonymous_mb"]) / grown,
        "ledger_bytes_per_group": 1e6 * (last["ledger_mb"] - first["ledger_mb"]) / grown,
        "log_mb_max": max(sample["log_mb"] for sample in samples),
        "samples": samples,
    }


# --- the report ---


def show_many_actors(figures: dict[str, Any], console: Console) -> None:
    table = Table(title=f"connected actors, groups of {figures['group_bytes'] / 1e3:.0f} kB")
    names = (
        "actors",
        "groups/s",
        "of one",
        "turn ms, median",
        "p99",
        "turns/s",
        "cores",
        "memory MB",
        "connected in s",
    )
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    for way, rows in figures["many_actors"].items():
        for row in rows:
            rate, first = row["groups_per_second"], rows[0]["groups_per_second"]
            turns = (f"{row['turn_ms_median']:.1f}", f"{row['turn_ms_p99']:.1f}", f"{row['turns_per_second']:,.0f}")
            more = (f"{row['cores_used']:.2f}", f"{row['memory_mb']:,.0f}", f"{row['seconds_until_all_connected']:.1f}")
            table.add_row(way, f"{row['actors']:,.0f}", f"{rate:,.0f}", f"{rate / first:.2f}", *turns, *more)
    console.print(table)


def plot_many_actors(figures: dict[str, Any], axes: Any) -> None:
    memory = axes.twinx()
    for way, rows in figures["many_actors"].items():
        numbers, style = [row["actors"] for row in rows], "-" if way == "plain" else "--"
        for name, color in (("turn_ms_median", "#1f6f8b"), ("turn_ms_p99", "#99c1d6")):
            label = f"{name.removeprefix('turn_ms_')} of a turn, {way}"
            axes.plot(numbers, [row[name] for row in rows], style, color=color, marker="o", label=label)
        label = f"memory, {way}"
        memory.plot(numbers, [row["memory_mb"] for row in rows], style, color="#c8743a", marker="s", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("connected actors")
    axes.set_ylabel("milliseconds")
    axes.set_ylim(bottom=0)
    memory.set_ylabel("MB")
    memory.set_ylim(bottom=0)
    axes.legend(loc="upper left")
    memory.legend(loc="lower right")


def show(figures: dict[str, Any], console: Console) -> None:
    table = Table(title=f"groups of 8 x 1,024 tokens ({figures['group_bytes'] / 1e3:.0f} kB), client to client")
    for column in ("", "groups/s", "spread", "MB/s", "million tokens/s"):
        table.add_column(column, justify="left" if not column else "right")
    for label, rate in figures["rates"].items():
        low, high = rate["spread"]
        cells = (f"{rate['groups_per_second']:,.0f}", f"{low:,.0f} to {high:,.0f}")
        more = (f"{rate['megabytes_per_second']:,.0f}", f"{rate['tokens_per_second'] / 1e6:.1f}")
        table.add_row(label, *cells, *more)
    for label, reason in figures["skipped"].items():
        table.add_row(label, f"skipped: {reason}")
    console.print(table)


def plot(figures: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    if "many_actors" in figures:
        figure, axes = pyplot.subplots(figsize=(8, 4))
        plot_many_actors(figures, axes)
    elif "rates" in figures:
        figure, axes = pyplot.subplots(figsize=(8, 4))
        labels = list(reversed(figures["rates"]))
        medians = [figures["rates"][label]["groups_per_second"] for label in labels]
        spreads = [figures["rates"][label]["spread"] for label in labels]
        errors = [
            [m - s[0] for m, s in zip(medians, spreads, strict=True)],
            [s[1] - m for m, s in zip(medians, spreads, strict=True)],
        ]
        colors = ["#1f6f8b" if label.startswith("buffer") else "#b8b8b8" for label in labels]
        axes.barh(labels, medians, xerr=errors, color=colors)
        axes.set_xlabel("groups of 8 x 1,024 tokens per second")
    else:
        figure, axes = pyplot.subplots(figsize=(8, 4))
        groups = [sample["groups"] for sample in figures["samples"]]
        for name, label in (("anonymous_mb", "memory"), ("ledger_mb", "ledger"), ("log_mb", "write-ahead log")):
            axes.plot(groups, [sample[name] for sample in figures["samples"]], label=label)
        axes.set_xlabel("groups trained on")
        axes.set_ylabel("MB")
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a plot here (.png or .svg)")
    parser.add_argument("--quick", action="store_true", help="one short measurement of each way; about a minute")
    parser.add_argument("--repeats", type=int, default=5, help="number of measurements of each way, alternating")
    parser.add_argument("--groups", type=int, default=4_000, help="groups per measurement")
    parser.add_argument("--peers-python", default=sys.executable, help="a Python with redis, ray, numpy and msgpack")
    parser.add_argument(
        "--memory-groups", type=int, default=0, metavar="N", help="measure memory and files over N groups instead"
    )
    parser.add_argument(
        "--actors", type=int, nargs="+", metavar="N", help="measure with these numbers of connected actors instead"
    )
    parser.add_argument(
        "--heartbeat-seconds", type=float, default=1.0, help="interval of an actor's heartbeats, with --actors"
    )
    options = parser.parse_args()
    repeats, groups = (1, min(options.groups, 600)) if options.quick else (options.repeats, options.groups)
    console = wide_console()
    if options.actors:
        seconds = QUICK_SECONDS if options.quick else CROWD_SECONDS
        figures = many_actors(options.actors, repeats, seconds, options.heartbeat_seconds)
        show_many_actors(figures, console)
    elif options.memory_groups:
        figures = watch_memory(options.memory_groups)
        console.print({name: value for name, value in figures.items() if name != "samples"})
    else:
        figures = compare(repeats, groups, options.peers_python)
        show(figures, console)
    figures |= {
        "command": command(),
        "machine": machine(),
        "versions": versions(("pyzmq", "msgpack", "numpy"))
        | {"sqlite": sqlite3.sqlite_version, "zeromq": zmq.zmq_version()},
    }
    write(options.json, figures)
    if options.plot:
        plot(figures, options.plot)


if __name__ == "__main__":
    main()
