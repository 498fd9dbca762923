"""Reports of one learner rank: heartbeats on every rank; event files, status and evaluations on rank 0.

The training loop owns the `Observer`. The buffer's answers are collected one step later, so that no step waits for
them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from buffer.transport.connection import Connection
from buffer.transport.messages import (
    Close,
    EvaluationQuery,
    EvaluationReport,
    EvaluationReports,
    EvaluationRequest,
    Message,
    Status,
    StatusRequest,
)
from learner.batches.batch import TrainingBatch
from learner.monitoring.heartbeat import Heartbeats
from learner.monitoring.patient_requests import PatientRequests
from learner.monitoring.tensorboard import Reporter, StepClock

logger = logging.getLogger(__name__)

TROUBLES = (
    "learner/bad_steps",
    "learner/failed_checkpoints",
    "reward/batches_without_signal",
    "importance/far_batches",
    "weights/logprob_alarms",
)
"""Metrics that the heartbeat sends to the display while they are not 0."""


class Observer:
    """Heartbeats, reports and requests for evaluations of one rank.

    Args:
        buffer: connection to the buffer.
        heartbeats: of this rank; `close` ends them.
        requests: for what cannot go unanswered.
        directory: folder of the event files.
        first_version: the policy version that the learner starts at.
        rank, world_size: only rank 0 reports.
    """

    def __init__(
        self,
        buffer: Connection,
        heartbeats: Heartbeats,
        requests: PatientRequests,
        directory: Path,
        first_version: int,
        *,
        rank: int,
        world_size: int,
    ) -> None:
        self._buffer, self._requests, self._world_size = buffer, requests, world_size
        self._heartbeats = heartbeats
        self._reporter = Reporter(directory, first_version) if rank == 0 else None
        self._clock = StepClock()
        self._evaluated: set[tuple[int, int]] = set()
        self._status: Future[Message] | None = None

    def heartbeat(self, policy_version: int, waiting_for: str = "", activity: str | None = None) -> Future[Message]:
        """Tell the buffer now that this rank is alive at `policy_version`, and what it waits for or does.

        The arguments are those of `Heartbeats.say`. A thread repeats the heartbeat every second.
        """
        self._heartbeats.say(policy_version, waiting_for=waiting_for, activity=activity)
        return self._heartbeats.send()

    def doing(self, policy_version: int, activity: str) -> None:
        """Note what this rank does from now on, in words that complete "learner-0". The next heartbeat says so."""
        self._heartbeats.say(policy_version, activity=activity)

    def report(self, batch: TrainingBatch, metrics: Mapping[str, float], policy_version: int) -> None:
        """Report the metrics of the batch that led to `policy_version`; does nothing except on rank 0."""
        if self._reporter is None:
            return
        self._clock.step(
            wait_seconds=metrics["learner/wait_seconds"],
            num_samples=len(batch.trajectories) * self._world_size,
            num_tokens=batch.num_scored_tokens * self._world_size,
        )
        rates = self._clock.summary()
        shown = {"reward": metrics["reward/mean"], "staleness": metrics["staleness/mean"], **rates}
        shown |= {name.partition("/")[2]: metrics[name] for name in TROUBLES if metrics.get(name)}
        self._heartbeats.metrics = shown
        self._reporter.scalars(
            {**metrics, **{f"learner/{name}": value for name, value in rates.items()}}, policy_version
        )
        self._reporter.staleness(batch, policy_version)
        self._collect_answers(policy_version)

    def _collect_answers(self, policy_version: int) -> None:
        if self._status is not None and self._status.done():
            status = self._status.result()
            if isinstance(status, Status) and self._reporter is not None:
                self._reporter.status(status, policy_version)
                self._report_evaluations(status.reports)
        if self._status is None or self._status.done():
            self._status = self._buffer.request(StatusRequest(), timeout_seconds=math.inf)

    def request_evaluation(self, policy_version: int) -> None:
        """Ask for an evaluation on the held-out prompts; does nothing except on rank 0.

        Returns at once: the connection repeats the request until the buffer has it.
        """
        if self._reporter is not None:
            self._buffer.request(EvaluationRequest(policy_version), timeout_seconds=math.inf)

    def last_evaluation(self, policy_version: int, timeout_seconds: float, stopping: threading.Event) -> None:
        """Close the run to new groups and evaluate its last version; does nothing except on rank 0.

        Waits for: an actor's report, as long as an actor evaluates. Unblocked by: the report or `stopping`. Gives up
        after: `timeout_seconds` in which no actor evaluates anything.
        """
        if self._reporter is None:
            return
        self.request_evaluation(policy_version)
        self._requests.ask(Close(), "the buffer to end the run")
        idle_since = time.monotonic()
        while not stopping.is_set():
            self.heartbeat(policy_version, "the last evaluation")
            reports = self._requests.ask(EvaluationQuery(policy_version), "the last evaluation")
            if isinstance(reports, EvaluationReports) and reports.reports:
                self._report_evaluations(reports.reports)
                return
            if isinstance(reports, EvaluationReports) and reports.is_running:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since >= timeout_seconds:
                break
            time.sleep(0.2)
        logger.warning("policy %d was not evaluated in time", policy_version)

    def _report_evaluations(self, reports: Sequence[EvaluationReport]) -> None:
        for report in reports:
            key = (report.requested_version, report.policy_version)
            if key not in self._evaluated and self._reporter is not None:
                self._evaluated.add(key)
                self._reporter.evaluation(report)
                logger.info(
                    "policy %d: pass@1 %.3f on %d held-out prompts",
                    report.policy_version,
                    report.pass_at_1,
                    report.num_prompts,
                )

    def say_goodbye(self, policy_version: int) -> None:
        """Send the last heartbeat, from which the launcher makes its summary.

        Waits for: the buffer's answer, since this process may end at once.
        """
        if self._reporter is not None:
            self._heartbeats.say(policy_version, activity="")
            self._requests.ask(self._heartbeats.message(), "the buffer to hear of the end")

    def close(self) -> None:
        """End the heartbeats; flush and close the event files."""
        self._heartbeats.close()
        if self._reporter is not None:
            self._reporter.close()
