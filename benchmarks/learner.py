"""How much of the machine does one optimizer step use, next to other ways of making the same one?

The same model, batch and loss through this learner (from received groups to metrics), TRL's GRPO trainer
(`--peers-python` names a Python that has it; generation is left out), padded and packed steps written by hand with
PyTorch, and the matrix products of the linear layers alone: a process each, in turns. All ways must give the same
gradient. Then how cost and memory of our step grow with the batch and with the length, and what the head takes with a
large vocabulary.

With one thread a rate is tokens per second of processor time, which a busy machine changes little; with more it is
wall-clock time.
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

# Before this folder, which has files with the names of packages.
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
"""Tokens up to which a batch's longest sequence makes a short step."""
VOCABULARY, HEAD_TOKENS, HEAD_HIDDEN = 151_936, 16_384, 64
SAME = 1e-6
"""Largest 1 - cosine between two gradients that count as the same."""


class Way:
    """A process that makes one step per turn."""

    def __init__(self, label: str, work: Work, python: str) -> None:
        script, self.name = WAYS[label]
        # As the launcher starts a learner; the others as their users do.
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
        """What the process says next; None when it has ended."""
        assert self._process.stdout
        return next(heard(self._process.stdout), None)

    def turn(self) -> dict[str, float]:
        """One step."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        said = self.read()
        if said is None:
            raise RuntimeError(f"{self.name} ended in the middle of a step: {self.complaint()}")
        return said

    def complaint(self) -> str:
        """The last line of its errors."""
        return (self._errors.read_text().strip().splitlines() or ["it said nothing"])[-1]

    def end(self) -> None:
        """No more turns."""
        with self._process:
            assert self._process.stdin
            self._process.stdin.close()


def compare(work: Work, labels: Sequence[str], repeats: int, peers_python: str) -> dict[str, Any]:
    """Steps of every way in turns, after one each that is not counted."""
    ways, skipped = {}, {}
    for label in labels:
        way = Way(label, work, peers_python if label == "TRL" else sys.executable)
        if way.read() is None:
            skipped[label] = way.complaint()
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
    clock = "cpu_seconds" if work.num_threads == 1 else "seconds"
    tokens = sequences(work).num_tokens
    rates = [tokens / turn[clock] for turn in turns]
    return {
        "tokens_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "peak_mb": max(turn["peak_mb"] for turn in turns),
    }


def gradients(work: Work, names: Sequence[str]) -> dict[str, float]:
    """1 - cosine of each way's first gradient against the first way's; one that is clipped already is only shorter."""
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
    """Operations per second of large float32 products, the best of some."""
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
    """Our step alone: more sequences of one length, and longer sequences."""
    counts, lengths = ((8, 16), (32, 64)) if quick else ((8, 32, 128, 512), (32, 128, 512, 2048))
    shapes = [("batch", count, 64) for count in counts] + [("length", 8, length) for length in lengths]
    found = []
    for axis, count, length in shapes:
        grown = replace(work, num_sequences=count, shortest=length, longest=length)
        rates = compare(grown, [OURS], 1 if quick else 3, "")["rates"][OURS]
        found.append({"axis": axis, "num_sequences": count, "length": length, **rates})
    return found


def heads(quick: bool) -> dict[str, Any]:
    """Peak memory and time of the head, ours and naive; the naive one at the full size is on the line of its others."""
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
    work = Work(folder, 64, 128, 344, 4, 4, 16, 128, 16 if options.quick else 64, 1, 2048, 8)
    save_model(work)
    cases = []
    for shortest, longest in [(16, 64)] if options.quick else LENGTHS:
        for num_threads in (1,) if options.quick else options.threads:
            chosen = replace(work, shortest=shortest, longest=longest, num_threads=num_threads)
            # Short steps vary more, and cost less to repeat.
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
    parser.add_argument("--quick", action="store_true", help="one small measurement of each: about a minute")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each way, in turns; of short ones 3 times")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="OpenMP threads of each way")
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
