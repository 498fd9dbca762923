"""The terminal while a run goes on: one live table where there is a terminal, one line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from buffer.wire import Peer, Status

PLAIN_SECONDS = 10.0
"""Between lines where standard output is not a terminal."""
SILENT_SECONDS = 5.0
"""Silence after which a process is shown as such."""


class Display:
    """Use as a context manager around the run."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total_steps = total_steps
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, auto_refresh=False, speed_estimate_period=60)
        self._bar = self._progress.add_task("starting", total=total_steps)
        # Refreshed by the supervising loop: a thread of its own could be caught in a fork.
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._next_line = 0.0
        self._last_version = -1

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._live.stop()

    def pretraining(self, step: int, steps: int, loss: float) -> None:
        """The base model is being made."""
        self._progress.update(self._bar, description="pretraining the base model", completed=step, total=steps)
        if self._console.is_terminal:
            self._live.update(Group(self._progress, f"loss {loss:.3f}"), refresh=True)
        elif time.monotonic() >= self._next_line or step == steps:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            self._console.print(f"pretraining the base model: step {step}/{steps}, loss {loss:.3f}")

    def starting(self, seconds: float) -> None:
        """The processes are not up yet."""
        if self._console.is_terminal:
            text = f"starting vLLM and DeepSpeed, {seconds:.0f} s (about half a minute)"
            self._progress.update(self._bar, description=text, completed=0, total=self._total_steps)
            self._live.update(self._progress, refresh=True)

    def status(self, status: Status) -> None:
        """What the buffer knows of everybody."""
        if self._console.is_terminal:
            self._progress.update(
                self._bar, description="training", completed=status.policy_version, total=self._total_steps
            )
            self._live.update(Group(self._progress, _table(status)), refresh=True)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            self._console.print(_line(status, self._total_steps), soft_wrap=True)


def _line(status: Status, total_steps: int) -> str:
    learner = _learner_metrics(status)
    waits = ", ".join(f"{peer.name} waits for {peer.waiting_for}" for peer in status.peers if peer.waiting_for)
    parts = [f"step {status.policy_version}/{total_steps}"]
    if "reward" in learner:
        parts.append(f"reward {learner['reward']:.3f}, staleness {learner['staleness']:.2f}")
    if "tokens_per_second" in learner:
        parts.append(f"{learner['samples_per_second']:.0f} samples/s, {learner['tokens_per_second']:.0f} tokens/s")
    if status.reports:
        newest = status.reports[-1]
        parts.append(f"pass@1 {newest.pass_at_1:.3f} at policy {newest.policy_version}")
    return "; ".join([*parts, *([waits] if waits else [])])


def _table(status: Status) -> Table:
    learner = _learner_metrics(status)
    table = Table.grid(padding=(0, 2))
    if "reward" in learner:
        table.add_row("reward", f"{learner['reward']:.3f}", "staleness", f"{learner['staleness']:.2f}")
    if "tokens_per_second" in learner:
        table.add_row(
            "samples/s", f"{learner['samples_per_second']:.0f}", "tokens/s", f"{learner['tokens_per_second']:.0f}"
        )
    if status.reports:
        first, newest = status.reports[0], status.reports[-1]
        reports = f"{first.pass_at_1:.3f} at policy {first.policy_version}"
        table.add_row("pass@1", reports, "now", f"{newest.pass_at_1:.3f} at policy {newest.policy_version}")
    counts = status.counts
    ledger = ", ".join(f"{state} {counts.get(state, 0)}" for state in ("pending", "leased", "ready", "used", "done"))
    dropped = {name: count for name, count in counts.items() if name.startswith("dropped:")}
    table.add_row("ledger", ledger, *(["dropped", str(sum(dropped.values()))] if dropped else []))
    for peer in status.peers:
        table.add_row(peer.name, _doing(peer), "policy", str(peer.policy_version))
    return table


def _doing(peer: Peer) -> str:
    if peer.silent_seconds > SILENT_SECONDS:
        return f"silent for {peer.silent_seconds:.0f} s"
    return f"waits for {peer.waiting_for}" if peer.waiting_for else "working"


def _learner_metrics(status: Status) -> dict[str, float]:
    """Of rank 0, which reports for all."""
    return next((peer.metrics for peer in status.peers if peer.name == "learner-0"), {})
