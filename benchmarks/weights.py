"""Measures the publication of weights: seconds from the end of a training step until the last actor has the version.

A learner's process holds parameters with the shapes of Qwen2.5-0.5B (0.9 GiB in bfloat16) or 1.5B (2.9 GiB). One or
four actors receive every version. The columns of the table:

- ready s, GB/s: time until the last actor has the whole version, and the throughput in that time.
- stall s: time in which the learner waits.
- pause s: time in which an actor reads the version once, as loading it into an engine does.
- extra GiB: peak memory of all processes beyond the parameters.
- link GB: bytes that all actors pulled over the network.

Slipstream is measured over shared memory, over the network with whole versions, and over the network with deltas.
Between versions 3 % of the numbers change by one unit, as at a learning rate of 1e-6. Compared with it: safetensors
files on disk, a gloo broadcast, raw ZeroMQ, and a plain copy in memory. Everything runs on one machine; the network is
its loopback device.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.parts.figures import command, machine, versions, wide_console, write
from benchmarks.parts.model_sizes import MODELS
from benchmarks.parts.weights.deltas import measure_deltas
from benchmarks.parts.weights.ways import WAYS, Arrival, Place, Tensors, act
from buffer.machine import available_memory_bytes
from buffer.weights.config import MEMORY_VARIABLE
from launch.processes.guardian import Guardian

PROCESSES = multiprocessing.get_context("spawn")
MOVED_SHARE = 0.03
WARM_UP = 3
"""First versions, which are not measured: after them all reused memory has been written once."""
ARRIVAL_SECONDS = 600.0
GIB = 1 << 30
MOST_OF_MEMORY = 0.85
"""Share of the free memory that a measurement may use; other processes may need the rest."""


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a Qwen2 with tied embeddings, by name."""
    sizes = MODELS[model]
    hidden, inner, narrow = sizes["hidden"], sizes["inner"], sizes["key_value"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes["vocab"], hidden)}
    for layer in range(sizes["layers"]):
        name = f"model.layers.{layer}"
        for part, width in (("q", hidden), ("k", narrow), ("v", narrow)):
            shapes[f"{name}.self_attn.{part}_proj.weight"] = (width, hidden)
            shapes[f"{name}.self_attn.{part}_proj.bias"] = (width,)
        shapes[f"{name}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{name}.mlp.gate_proj.weight"] = shapes[f"{name}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{name}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{name}.input_layernorm.weight"] = shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,)}


def parameters(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Random parameters of the magnitude of a trained model's. A block of random numbers is repeated, to save time."""
    stretch = (torch.randn(1 << 20) * 0.02).to(torch.bfloat16)
    made = {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        made[name] = stretch.repeat(-(-size // len(stretch)))[:size].reshape(shape)
    return made


def step(tensors: Tensors, seed: int) -> None:
    """Change a few numbers by one unit, as an optimizer step with a small learning rate changes bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    stretch = (torch.rand(1 << 20, generator=generator) < MOVED_SHARE).to(torch.int16)
    for tensor in tensors.values():
        flat = tensor.view(-1).view(torch.int16)
        for start in range(0, len(flat), len(stretch)):
            part = flat[start : start + len(stretch)]
            part += stretch[: len(part)]


@contextmanager
def actors(name: str, place: Place, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[list[Pipe], list[int]]]:
    """Start the actors' processes and wait until they are ready; gives their pipes and process ids."""
    pipes, processes = [], []
    for number in range(place.num_actors):
        ours, theirs = PROCESSES.Pipe()
        process = PROCESSES.Process(target=act, args=(name, place, number, shapes, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            assert hear(pipe) == "up"
        yield pipes, [process.pid or 0 for process in processes]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def hear(pipe: Pipe) -> Any:
    """Returns the next message of an actor.

    Waits for: the actor. Gives up after: `ARRIVAL_SECONDS`, with a TimeoutError.
    """
    if not pipe.poll(ARRIVAL_SECONDS):
        raise TimeoutError(f"an actor said nothing for {ARRIVAL_SECONDS:.0f} s")
    return pipe.recv()


def memory_of(processes: list[int]) -> int:
    """Bytes of memory of these processes; memory that they share counts once."""
    return sum(psutil.Process(pid).memory_full_info().pss for pid in processes)


def measure(name: str, tensors: Tensors, num_actors: int, versions: int) -> list[dict[str, float]]:
    """Publishes `versions` versions in one way; returns one row of figures per version, after the warm-up."""
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    folder = Path(tempfile.mkdtemp(prefix="weights-", dir=os.environ["TMPDIR"]))
    memory = Path(tempfile.mkdtemp(prefix="weights-", dir=os.environ[MEMORY_VARIABLE]))
    place = Place(folder, memory, f"tcp://127.0.0.1:{free_port()}", num_actors)
    rows = []
    try:
        with actors(name, place, {key: tuple(tensor.shape) for key, tensor in tensors.items()}) as (pipes, children):
            before = memory_of([os.getpid(), *children])
            sender = WAYS[name].sender(place)
            for number in range(WARM_UP + versions):
                step(tensors, number)
                started = time.monotonic()
                finish = sender.send(number, tensors)
                stalled = time.monotonic()
                arrivals: list[Arrival] = [hear(pipe) for pipe in pipes]
                finish()
                rows.append(
                    {
                        "ready_seconds": max(arrival.ready_at for arrival in arrivals) - started,
                        "stall_seconds": stalled - started,
                        "pause_seconds": statistics.median(arrival.pause_seconds for arrival in arrivals),
                        "link_bytes": float(sum(arrival.pulled_bytes for arrival in arrivals)),
                        "extra_bytes": float(memory_of([os.getpid(), *children]) - before),
                    }
                )
                rows[-1]["gb_per_second"] = num_bytes / 1e9 / rows[-1]["ready_seconds"]
        sender.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)
    peak = max(row["extra_bytes"] for row in rows)
    return [row | {"extra_bytes": peak} for row in rows[WARM_UP:]]


def free_port() -> int:
    """A TCP port that is free at this moment."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def limits(tensors: Tensors, repeats: int) -> dict[str, list[float]]:
    """Seconds of a copy into memory that is already allocated, and of a copy of every tensor into new memory."""
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    found: dict[str, list[float]] = {"copy_seconds": [], "gather_seconds": []}
    for _ in range(repeats):
        started = time.monotonic()
        for name, tensor in tensors.items():
            target[name].copy_(tensor)
        copied = time.monotonic()
        gathered = [tensor.to("cpu", torch.bfloat16, copy=True) for tensor in tensors.values()]
        found["gather_seconds"].append(time.monotonic() - copied)
        found["copy_seconds"].append(copied - started)
        del gathered
    return found


def room_for(name: str, num_bytes: int, num_actors: int) -> str:
    """The reason why a measurement does not fit into memory; empty when it does."""
    # Copies that the learner's store keeps, and whole copies in the actors; the parameters exist already.
    store_copies = 4 if name.startswith("Slipstream") else 0
    needed = num_bytes * (store_copies + num_actors * WAYS[name].copies)
    # Free the stores of earlier measurements, and return freed memory from the C library to the system.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    available = available_memory_bytes()
    if needed < MOST_OF_MEMORY * available:
        return ""
    return f"needs {needed / GIB:.0f} GiB of memory, {available / GIB:.0f} GiB are free"


def compare(models: list[str], actor_counts: list[int], versions: int) -> list[dict[str, Any]]:
    """Measures every way with every model and number of actors."""
    results = []
    for model in models:
        tensors = parameters(shapes_of(model))
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        base = {"model": model, "gib": num_bytes / GIB}
        results.append(
            base | {"way": "copy in memory", "actors": 0, "skipped": ""} | spread(limits(tensors, versions + 2))
        )
        cases = [(count, name) for count in actor_counts for name in WAYS]
        for count, name in track(cases, description=f"{model}, {num_bytes / GIB:.1f} GiB"):
            skipped = room_for(name, num_bytes, count)
            rows = [] if skipped else measure(name, tensors, count, versions)
            columns = {key: [row[key] for row in rows] for key in rows[0]} if rows else {}
            results.append(base | {"way": name, "actors": count, "skipped": skipped} | spread(columns))
        del tensors
    return results


def spread(columns: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, least and most of each column."""
    return {
        key: {"median": statistics.median(values), "least": min(values), "most": max(values)}
        for key, values in columns.items()
    }


# --- the report ---


def show(figures: dict[str, Any], console: Console) -> None:
    table = Table(title="one version, from the end of a step to the last actor; medians")
    for column in ("", "GiB", "actors", "ready s", "spread", "GB/s", "stall s", "pause s", "extra GiB", "link GB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in figures["ways"]:
        name = [row["way"], f"{row['gib']:.2f}", str(row["actors"] or "")]
        if row["skipped"]:
            table.add_row(*name, f"skipped: {row['skipped']}")
        elif "copy_seconds" in row:
            copy = row["copy_seconds"]
            speed = row["gib"] * GIB / 1e9 / copy["median"]
            gather = row["gather_seconds"]["median"]
            width = f"{copy['least']:.3f} to {copy['most']:.3f}"
            table.add_row(*name, f"{copy['median']:.3f}", width, f"{speed:.1f}", f"gather {gather:.3f}")
        else:
            ready = row["ready_seconds"]
            table.add_row(
                *name,
                f"{ready['median']:.3f}",
                f"{ready['least']:.3f} to {ready['most']:.3f}",
                f"{row['gb_per_second']['median']:.2f}",
                *(f"{row[key]['median']:.3f}" for key in ("stall_seconds", "pause_seconds")),
                f"{row['extra_bytes']['median'] / GIB:.2f}",
                f"{row['link_bytes']['median'] / 1e9:.3f}",
            )
    console.print(table)
    table = Table(title="differences after real training steps")
    for column in ("", "learning rate", "versions behind", "changed", "times fewer bytes", "encode GB/s", "apply GB/s"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in figures["deltas"]:
        table.add_row(
            row["dtype"],
            f"{row['learning_rate']:g}",
            str(row["versions_behind"]),
            f"{100 * row['changed_share']:.1f} %",
            f"{row['times_fewer_bytes']:.1f}",
            f"{row['encode_gb_per_second']:.2f}",
            f"{row['apply_gb_per_second']:.2f}",
        )
    console.print(table)


def plot(figures: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    rows = [row for row in figures["ways"] if "ready_seconds" in row]
    labels = [f"{row['way']}, {row['gib']:.1f} GiB to {row['actors']}" for row in rows][::-1]
    ready = [row["ready_seconds"]["median"] for row in rows][::-1]
    stall = [row["stall_seconds"]["median"] for row in rows][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.28 * len(rows) + 1.5))
    axes.barh(labels, ready, color=["#1f6f8b" if label.startswith("Slip") else "#b8b8b8" for label in labels])
    axes.barh(labels, stall, height=0.3, color="#d1495b", label="of it the learner waits")
    axes.set_xlabel("seconds from the end of a step until the last of 1 or 4 actors has it")
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a plot here (.png or .svg)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one actor and one version; some seconds")
    parser.add_argument("--versions", type=int, default=5, help="number of measured versions of each way")
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=["0.5B", "1.5B"], help="model sizes to measure"
    )
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 4], help="numbers of actors to measure")
    options = parser.parse_args()
    if options.quick:
        options.models, options.actors, options.versions = ["tiny"], [1], 1
    torch.set_num_threads(1)
    console = wide_console()
    # The guardian removes gigabytes of shared memory even when this process is killed.
    guardian = Guardian(0.0, Path(tempfile.gettempdir()) / "compiled")
    os.environ.update(guardian.environment)
    try:
        _measure_all(options, console)
    finally:
        guardian.close()


def _measure_all(options: argparse.Namespace, console: Console) -> None:
    figures: dict[str, Any] = {
        "command": command(),
        "machine": f"{machine()}, 1 thread each",
        "versions": versions(("torch", "pyzmq", "safetensors", "xxhash", "zstandard", "numpy")),
        "ways": compare(options.models, options.actors, options.versions),
        "deltas": measure_deltas(options.quick),
    }
    show(figures, console)
    write(options.json, figures)
    if options.plot:
        plot(figures, options.plot)


if __name__ == "__main__":
    main()
