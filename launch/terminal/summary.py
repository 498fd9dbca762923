"""The results of a run: RUN_DIR/summary.json and the table at the end."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from buffer.ledger.audit import audit
from buffer.transport.messages import EvaluationReport, Status


@dataclass(frozen=True)
class Summary:
    """Rates and idle fractions are measured from the end of the first step; None: not measured."""

    pass_at_1_before: float | None
    pass_at_1_after: float | None
    policy_version: int
    samples_per_second: float | None
    tokens_per_second: float | None
    """Completion tokens trained on per second."""
    actor_idle_fraction: float | None
    """Share of time without any request in the engine, mean over actors."""
    learner_idle_fraction: float | None
    """Share of time spent waiting for batches."""
    staleness_mean: float
    staleness_max: int
    wall_seconds: float


def summarize_run(run_dir: Path, status: Status, wall_seconds: float) -> Summary:
    """Summarize the buffer's final status and the ledger's file."""
    reports = sorted(status.reports, key=lambda report: report.requested_version)
    learner = next((peer.metrics for peer in status.peers if peer.name == "learner-0"), {})
    ledger = audit(run_dir)
    before = reports[0].pass_at_1 if reports and reports[0].policy_version == 0 else None
    return Summary(
        pass_at_1_before=before,
        pass_at_1_after=_last(reports, status.policy_version),
        policy_version=status.policy_version,
        samples_per_second=learner.get("samples_per_second"),
        tokens_per_second=learner.get("tokens_per_second"),
        actor_idle_fraction=status.actors.metrics.get("idle_fraction"),
        learner_idle_fraction=learner.get("idle_fraction"),
        staleness_mean=ledger.staleness_mean,
        staleness_max=ledger.staleness_max,
        wall_seconds=wall_seconds,
    )


def _last(reports: list[EvaluationReport], policy_version: int) -> float | None:
    return next((report.pass_at_1 for report in reversed(reports) if report.policy_version == policy_version), None)


def write_summary(summary: Summary, run_dir: Path) -> None:
    """Write RUN_DIR/summary.json."""
    (run_dir / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")


def print_summary(summary: Summary, run_dir: Path, checkpoint: Path | None, console: Console) -> None:
    """Print the table, the checkpoint's folder and the command that shows the curves."""
    table = Table(show_header=False, title=f"run {escape(run_dir.name)}", title_justify="left")
    table.add_row(
        "pass@1 on held-out prompts",
        f"{_number(summary.pass_at_1_before)} before, "
        f"{_number(summary.pass_at_1_after)} after {summary.policy_version} steps",
    )
    table.add_row(
        "samples/s, tokens/s", f"{_number(summary.samples_per_second, 0)}, {_number(summary.tokens_per_second, 0)}"
    )
    table.add_row(
        "idle: actors, learner", f"{_percent(summary.actor_idle_fraction)}, {_percent(summary.learner_idle_fraction)}"
    )
    table.add_row("staleness", f"{summary.staleness_mean:.2f} mean, {summary.staleness_max} max")
    table.add_row("wall clock", f"{summary.wall_seconds:.0f} s")
    console.print(table)
    # Not in the table, so that they can be copied from a narrow terminal in one piece.
    if checkpoint is not None:
        console.print(f"checkpoint: {checkpoint / 'policy'}", soft_wrap=True, markup=False)
    command = shlex.join(["tensorboard", "--logdir", str(run_dir / "tensorboard")])
    console.print(f"curves: {command}", soft_wrap=True, markup=False)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
