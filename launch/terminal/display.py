"""Shows a run's status: a live table on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from dataclasses import replace
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from buffer.transport.messages import Peer, StageStatus, Status

PLAIN_SECONDS = 10.0
"""Interval between lines if standard output is not a terminal."""
FORGOTTEN_SECONDS = 60.0
"""Silence after which an actor that the launcher did not start is no longer shown."""
LONG_WAIT_SECONDS = 5.0
"""Shortest wait that is shown with its length, and shortest work that is named; shorter ones are normal."""
WAITS_SHOWN = 5
WORKING = "working"
WARNINGS = {
    "verifier_timeouts": (1, "{:.0f} completions could not be scored in time"),
    "verifier_crashes": (1, "{:.0f} completions crashed a scoring process"),
    "verifier_errors": (1, "{:.0f} completions could not be scored"),
    "verifier_skipped": (1, "{:.0f} completions that could not be scored were left out"),
    "bad_steps": (1, "{:.0f} steps were skipped, their loss or gradient was not finite"),
    "failed_checkpoints": (1, "{:.0f} checkpoints could not be written"),
    "far_batches": (1, "batches far off-policy so far: {:.0f}, its log says by which bound"),
    "logprob_alarms": (1, "actors that sample with other weights than they name: {:.0f}, its log says which"),
    "batches_without_signal": (3, "nothing to learn from {:.0f} batches in a row, its log says why"),
}
"""Metrics of a process that are shown as a warning, each with its smallest value to show."""


class Display:
    """The output of one run. Use as a context manager around the run."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total_steps = total_steps
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, auto_refresh=False, speed_estimate_period=60)
        self._bar = self._progress.add_task("starting", total=total_steps)
        # The launcher's loop refreshes the table. A refreshing thread could hold a lock during a fork.
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._next_line = 0.0
        self._is_ending = False

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._live.stop()

    def pretraining(self, step: int, steps: int, loss: float) -> None:
        """Show the progress of the base model's pretraining."""
        self._progress.update(self._bar, description="pretraining the base model", completed=step, total=steps)
        if self._console.is_terminal:
            self._live.update(Group(self._progress, f"loss {loss:.3f}"), refresh=True)
        elif time.monotonic() >= self._next_line or step == steps:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            self._console.print(f"pretraining the base model: step {step}/{steps}, loss {loss:.3f}")

    def starting(self, seconds: float, notes: Sequence[str] = ()) -> None:
        """Show that the processes are starting."""
        if self._console.is_terminal:
            text = f"starting vLLM and DeepSpeed, {seconds:.0f} s (about half a minute)"
            self._progress.update(self._bar, description=text, completed=0, total=self._total_steps)
            self._live.update(Group(self._progress, *notes), refresh=True)
        elif notes:
            self._print_line(f"starting, {seconds:.0f} s; {'; '.join(notes)}")

    def status(self, status: Status, notes: Sequence[str] = (), started: Set[str] = frozenset()) -> None:
        """Show the status of all processes.

        Args:
            status: the buffer's answer.
            notes: the launcher's own sentences.
            started: names of the processes that the launcher started; other actors are hidden once they are silent.
        """
        shown = [
            peer
            for peer in status.peers
            if peer.role != "actor" or peer.name in started or peer.silent_seconds < FORGOTTEN_SECONDS
        ]
        status = replace(status, peers=tuple(shown))
        notes = [*status.notes, *_warnings(status), *notes]
        if self._console.is_terminal:
            self._progress.update(
                self._bar, description="training", completed=status.policy_version, total=self._total_steps
            )
            self._live.update(Group(self._progress, _table(status), *notes), refresh=True)
        else:
            self._print_line("; ".join([_line(status, self._total_steps), *notes]))

    def ending(self, text: str) -> None:
        """Show what the end of the run waits for."""
        if not self._is_ending:
            self._is_ending, self._next_line = True, 0.0
        if self._console.is_terminal:
            self._live.update(Group(self._progress, text), refresh=True)
        else:
            self._print_line(text)

    def _print_line(self, text: str) -> None:
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            self._console.print(text, soft_wrap=True, markup=False)


def _line(status: Status, total_steps: int) -> str:
    learner = _learner_metrics(status)
    doing = [(peer.name, _doing(peer, status)) for peer in status.peers]
    waits = ", ".join([*_others(status), *(f"{name} {what}" for name, what in doing if what != WORKING)])
    parts = [f"step {status.policy_version}/{total_steps}"]
    if "reward" in learner:
        parts.append(f"reward {learner['reward']:.3f}, staleness {learner['staleness']:.2f}")
    if "tokens_per_second" in learner:
        parts.append(f"{learner['samples_per_second']:.0f} samples/s, {learner['tokens_per_second']:.0f} tokens/s")
    parts += _stage(status.stage)
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
    table.add_row("ledger", ledger, *(["dropped", dropped] if (dropped := _dropped(status)) else []))
    for text in _stage(status.stage):
        table.add_row("curriculum", text)
    for peer in status.peers:
        table.add_row(
            peer.name, _doing(peer, status), "policy", str(peer.policy_version) if peer.policy_version >= 0 else "-"
        )
    for text in _others(status):
        table.add_row("", text)
    for wait in status.waits[:WAITS_SHOWN]:
        if wait.seconds >= LONG_WAIT_SECONDS and wait.who not in {peer.name for peer in status.peers}:
            table.add_row(wait.who, f"waits for {wait.for_what}{_since(wait.seconds)}")
    return table


def _others(status: Status) -> list[str]:
    """How many actors there are in all, if the status does not name each."""
    actors, shown = status.actors, sum(peer.role == "actor" for peer in status.peers)
    if actors.num_actors <= shown:
        return []
    return [f"{actors.num_actors} actors in all, {actors.num_waiting} waiting, {actors.num_silent} silent"]


def _dropped(status: Status) -> str:
    """Dropped groups by reason, such as `12 no_signal, 3 stale`; empty if none was dropped."""
    reasons = {name.partition(":")[2]: n for name, n in sorted(status.counts.items()) if name.startswith("dropped:")}
    return ", ".join(f"{number} {reason}" for reason, number in reasons.items() if number)


def _stage(stage: StageStatus) -> list[str]:
    """The state of the curriculum; empty if it has one stage and passes over no prompt."""
    if stage.num_stages == 1 and not stage.num_passed_over:
        return []
    text = f"stage {stage.stage} of {stage.num_stages}"
    if stage.num_groups:
        text += f", success {stage.success:.2f} over {stage.num_groups} groups"
    return [text + (f", {stage.num_passed_over} prompts passed over" if stage.num_passed_over else "")]


def _doing(peer: Peer, status: Status) -> str:
    """What a process does. A step that takes long is named, with its duration."""
    activity = ""
    if peer.activity_seconds >= LONG_WAIT_SECONDS:
        limit = f" (limit {peer.limit_seconds:.0f} s without progress)" if peer.limit_seconds else ""
        activity = f"{peer.activity}{_since(peer.activity_seconds)}{limit}"
    if peer.silent_seconds > status.actors.silent_after_seconds:
        return f"silent for {peer.silent_seconds:.0f} s" + (f", it {activity}" if activity else "")
    return f"waits for {peer.waiting_for}{_since(peer.waiting_seconds)}" if peer.waiting_for else activity or WORKING


def _since(seconds: float) -> str:
    return f" since {seconds:.0f} s" if seconds >= LONG_WAIT_SECONDS else ""


def _warnings(status: Status) -> list[str]:
    """A sentence for every metric in `WARNINGS` that is high enough."""
    found = []
    for peer in status.peers:
        for name, (least, text) in WARNINGS.items():
            if peer.metrics.get(name, 0) >= least:
                found.append(f"{peer.name}: {text.format(peer.metrics[name])}")
    return found


def _learner_metrics(status: Status) -> dict[str, float]:
    """Metrics of rank 0, which reports for all ranks."""
    return next((peer.metrics for peer in status.peers if peer.name == "learner-0"), {})
