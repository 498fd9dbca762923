"""Measures one optimizer step on a CPU in tokens per second, in peak memory (MB), and as a share of the matmul rate.

The same model, batch and loss go through five ways, each a process of its own, alternating:

- this learner, from received groups to metrics;
- TRL's GRPO trainer, without generation (`--peers-python` names a Python with TRL);
- a padded and a packed step written by hand with PyTorch;
- the matrix products of the linear layers alone, which are the limit.

All ways must give the same gradient. Two more tables show how time and memory of our step grow with the number and the
length of sequences, and what the language-model head takes with a large vocabulary.

With one thread a rate is tokens per second of processor time, which other load on the machine hardly changes. With more
threads it is tokens per second of wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# The root of the project comes before this folder, where some files have the names of packages.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.parts.figures import command, machine, versions, wide_console, write
from benchmarks.parts.learner.report import OURS, PRODUCTS, plot, show
from benchmarks.parts.learner.work import Work, forward_flops, save_model, sequences
from benchmarks.parts.marked_lines import heard
from learner.models.cpu_heap import heap_environment

HERE = Path(__file__).resolve().parent
WAYS = {
    OURS: ("parts/learner/ways.py", "ours"),
    "TRL": ("parts/learner/with_trl.py", "trl"),
    "PyTorch, padded": ("parts/learner/ways.py", "padded"),
    "PyTorch, packed": ("parts/learner/ways.py", "packed"),
    PRODUCTS: ("parts/learner/ways.py", "limit"),
}
LENGTHS = ((16, 1024), (16, 128), (64, 128))
SHORT = 128
"""A step whose longest sequence has at most so many tokens is a short step and is repeated more often."""
VOCABULARY, HEAD_TOKENS, HEAD_HIDDEN = 151_936, 16_384, 64
SAME = 1e-6
"""Largest 1 - cosine of two gradients that count as equal."""


class Way:
    """A process that makes one optimizer step whenever `turn` is called (`benchmarks/parts/learner/work.py`)."""

    def __init__(self, label: str, work: Work, python: str) -> None:
        script, self.name = WAYS[label]
        # Our learner gets the environment that the launcher gives it, the other ways get none.
        environment = heap_environment() if label == OURS else {}
        specification = Path(work.folder, f"work-{self.name}.json")
        specification.write_text(json.dumps(asdict(work)))
        self._errors = Path(work.folder, f"errors-{self.name}.txt")
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [python, str(HERE / script), self.name, str(specification)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=work.folder,
                env={**os.environ, "OMP_NUM_THREADS": str(work.num_threads), **environment},
            )

    def read(self) -> dict[str, Any] | None:
        """The next message of the process; None when it has ended."""
        assert self._process.stdout
        return next(heard(self._process.stdout), None)

    def turn(self) -> dict[str, float]:
        """Make one step; returns its seconds, processor seconds and peak memory."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        message = self.read()
        if message is None:
            raise RuntimeError(f"{self.name} ended in the middle of a step: {self.last_error()}")
        return message

    def last_error(self) -> str:
        """The last line on its standard error."""
        return (self._errors.read_text().strip().splitlines() or ["it wrote no error"])[-1]

    def end(self) -> None:
        """End the process."""
        with self._process:
            assert self._process.stdin
            self._process.stdin.close()


def compare(work: Work, labels: Sequence[str], repeats: int, peers_python: str) -> dict[str, Any]:
    """Measure `repeats` steps of every way, alternating, after one step each for warm-up."""
    ways, skipped = {}, {}
    for label in labels:
        way = Way(label, work, peers_python if label == "TRL" else sys.executable)
        if way.read() is None:
            skipped[label] = way.last_error()
            way.end()
        else:
            ways[label] = way
    turns: dict[str, list[dict[str, float]]] = {label: [] for label in ways}
    for repeat in range(repeats + 1):
        for label, way in ways.items():
            made = way.turn()
            if repeat:
                turns[label].append(made)
    for way in ways.values():
        way.end()
    return {
        "lengths": [work.shortest, work.longest],
        "num_sequences": work.num_sequences,
        "num_threads": work.num_threads,
        "num_tokens": sequences(work).num_tokens,
        "rates": {label: rate(work, made) for label, made in turns.items()},
        "gradients": gradients(work, [WAYS[label][1] for label in ways if label != PRODUCTS]),
        "skipped": skipped,
    }


def rate(work: Work, turns: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Tokens per second (median and range) and peak memory of one way's steps."""
    clock = "cpu_seconds" if work.num_threads == 1 else "seconds"
    tokens = sequences(work).num_tokens
    rates = [tokens / turn[clock] for turn in turns]
    return {
        "tokens_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "peak_mb": max(turn["peak_mb"] for turn in turns),
    }


def gradients(work: Work, names: Sequence[str]) -> dict[str, float]:
    """Returns 1 - cosine of each gradient and the first way's. Some are clipped, which does not change the cosine.

    Raises:
        RuntimeError: when a way has another gradient.
    """
    flat = {}
    for name in names:
        found = torch.load(Path(work.folder, f"gradient-{name}.pt"), weights_only=True)
        flat[name] = torch.cat([found[key].flatten() for key in sorted(found)]).double()
    distances = {name: 1 - float(torch.cosine_similarity(flat[names[0]], other, dim=0)) for name, other in flat.items()}
    different = {name: distance for name, distance in distances.items() if not distance < SAME}
    if different:
        raise RuntimeError(f"these ways compute another gradient than {names[0]}: {different}")
    return distances


def matmul_flops(num_threads: int) -> float:
    """Operations per second of large float32 matrix products: the best of twelve."""
    torch.set_num_threads(num_threads)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(12):
        clock = time.process_time if num_threads == 1 else time.perf_counter
        began = clock()
        a @ b
        seconds.append(clock() - began)
    return float(2 * 1024**3 / min(seconds))


def growth(work: Work, quick: bool) -> list[dict[str, Any]]:
    """Measures our step alone with more sequences of one length, and with longer sequences."""
    counts, lengths = ((8, 16), (32, 64)) if quick else ((8, 32, 128, 512), (32, 128, 512, 2048))
    shapes = [("batch", count, 64) for count in counts] + [("length", 8, length) for length in lengths]
    found = []
    for axis, count, length in shapes:
        grown = replace(work, num_sequences=count, shortest=length, longest=length)
        rates = compare(grown, [OURS], 1 if quick else 3, "")["rates"][OURS]
        found.append({"axis": axis, "num_sequences": count, "length": length, **rates})
    return found


def heads(quick: bool) -> dict[str, Any]:
    """Measures peak memory and time of the head, ours and naive.

    The naive head would need too much memory at the full number of tokens, so its memory there is extrapolated from two
    smaller sizes.
    """
    vocabulary, most = (VOCABULARY // 8, 2048) if quick else (VOCABULARY, HEAD_TOKENS)
    sizes = {"ours": [most // 16, most // 8, most], "naive": [most // 32, most // 16, most // 8]}
    measured: dict[str, dict[int, dict[str, float]]] = {}
    for way, tokens in sizes.items():
        measured[way] = {}
        for count in tokens:
            command = [sys.executable, HERE / "parts" / "learner" / "head.py", way, count, vocabulary, HEAD_HIDDEN]
            printed = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
            measured[way][count] = json.loads(printed)
    _, fewer, more = sizes["naive"]
    slope = (measured["naive"][more]["peak_mb"] - measured["naive"][fewer]["peak_mb"]) / (more - fewer)
    naive = measured["naive"][more]["peak_mb"] + slope * (most - more)
    return {
        "vocabulary": vocabulary,
        "num_tokens": most,
        "measured": measured,
        "naive_mb_extrapolated": naive,
        "times_less": naive / measured["ours"][most]["peak_mb"],
    }


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    work = Work(
        folder=folder,
        vocabulary=64,
        hidden_size=128,
        intermediate_size=344,
        num_layers=4,
        num_heads=4,
        shortest=16,
        longest=128,
        num_sequences=16 if options.quick else 64,
        num_threads=1,
        tokens_per_microbatch=2048,
        rows_per_microbatch=8,
    )
    save_model(work)
    cases = []
    for shortest, longest in [(16, 64)] if options.quick else LENGTHS:
        for num_threads in (1,) if options.quick else options.threads:
            chosen = replace(work, shortest=shortest, longest=longest, num_threads=num_threads)
            # Short steps vary more and take less time, so they are repeated three times as often.
            repeats = 1 if options.quick else options.repeats * (1 if longest > SHORT else 3)
            case = compare(chosen, list(WAYS), repeats, options.peers_python)
            linear, attention = forward_flops(chosen, sequences(chosen))
            case["step_flops"] = 3 * (linear + attention)
            case["matmul_flops_per_second"] = matmul_flops(num_threads)
            for found in case["rates"].values():
                needed = case["step_flops"] / case["num_tokens"] * found["tokens_per_second"]
                found["share_of_matmul"] = needed / case["matmul_flops_per_second"]
            cases.append(case)
    return {"cases": cases, "growth": growth(work, options.quick), "head": heads(options.quick)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a plot here (.png or .svg)")
    parser.add_argument("--quick", action="store_true", help="one small measurement of each way; about a minute")
    parser.add_argument(
        "--repeats", type=int, default=5, help="steps of each way, alternating; three times as many short"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of OpenMP threads to measure")
    parser.add_argument("--peers-python", default=sys.executable, help="a Python with trl, torch and transformers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="learner-") as folder:
        figures = measure(options, folder)
    console = wide_console()
    show(figures, console)
    figures |= {
        "command": command(),
        "machine": machine(),
        "versions": versions(("torch", "transformers", "deepspeed")),
    }
    write(options.json, figures)
    if options.plot:
        plot(figures, options.plot)


if __name__ == "__main__":
    main()
