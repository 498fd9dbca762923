"""The weight probe: now and then actors score one sequence, the canary, and the learner compares.

Weights that never arrive are silent: the actor names the new version and samples with old weights, and the loss
corrects for a distance that is not the true one. So the comparison goes on after the log-probability check.

The canary is a piece of a batch: the end of a prompt and the first tokens sampled after it. It stays the same while it
says anything, and the learner keeps its own log-probabilities under every version that it scored. So versions may move
on while a probe is under way. With a newly sampled completion they could not, because the learner keeps no old weights.
An actor scores the canary token by token, as it samples, at the sampling temperature. When the policy has become
certain of all its tokens, no version can be told from another, and a later batch gives another canary.

In a *round* the learner scores every version that it publishes, and the buffer asks actors in turn
(`buffer/service/probes.py`). An answer counts if the version that the engine names was scored. A pause after every
round keeps the cost of scoring below one percent of the time, on either side.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from buffer.service.probes import ACTORS_PER_ROUND
from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.messages import MOST_PROBED_TOKENS, Message, Probe, ProbeReport, ProbeReports, ProbeRequest
from learner.batches.batch import TrainingBatch
from learner.distributed.collectives import any_rank
from learner.monitoring.logprob_check import LogprobCheck, LogprobMismatchError

logger = logging.getLogger(__name__)

PROMPT_HEAD, PROMPT_TAIL = 4, 12
"""Tokens of a longer prompt's start and end that the canary keeps, so that scoring it is cheap for any model."""
LEAST_LIKELY = -2.0
"""A token counts as uncertain up to this log-probability; rarer tokens only carry more rounding."""
FLAT = 0.05
"""Nats per token of a canary that says nothing any more."""
TIMES_TOLERANCE = 2.0
"""The canary is short, so its mean difference may be this many times what a batch's may be."""
LEAST_SHARE = 0.01
"""Of the tolerance: differences below it are rounding, whatever version fits best."""
PAUSE_PER_COST = 100.0
"""Seconds from one round to the next, for every second that a round cost the learner or an actor."""
LONGEST_PAUSE_FOR_ACTORS = 600.0
"""Seconds; an actor's time includes waiting for its engine."""
MOST_VERSIONS, MOST_SECONDS = 8, 30.0
"""A round that has scored so many versions, and taken so long, ends without the missing answers."""
MOST_KEPT = 1000

Logprobs = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """An actor's log-probabilities against the learner's, as means over the canary's scored tokens."""

    difference: float
    """Mean of |actor - learner| under the version that the actor names."""
    best_version: int
    """The version whose log-probabilities are nearest to the actor's."""
    best_difference: float

    def is_alarm(self, tolerance: float) -> bool:
        """Return whether the actor computes something else: far off, or much nearer to another version."""
        other = self.best_difference < self.difference / 2 and self.difference > LEAST_SHARE * tolerance
        # Written so that nan is an alarm.
        return other or not self.difference <= TIMES_TOLERANCE * tolerance


def compare(kept: Mapping[int, Logprobs], policy_version: int, reported: Sequence[float]) -> Comparison:
    """Compare an actor's log-probabilities with the learner's `kept` ones, which hold `policy_version`."""
    actor = np.asarray(reported, dtype=np.float64)
    means = {version: float(np.abs(actor - logprobs).mean()) for version, logprobs in kept.items()}
    best = min(means, key=lambda version: (means[version], abs(version - policy_version)))
    return Comparison(means[policy_version], best, means[best])


def canary_of(batch: TrainingBatch) -> TrainingBatch:
    """Return a batch of one short sequence: the end of a prompt and up to 16 tokens that were sampled after it.

    Of the rank's trajectories the one whose tokens could most easily have been others, because there versions differ.
    """
    chosen = min(batch.trajectories, key=_certainty)
    start, length = _first_run(chosen)
    if start > PROMPT_HEAD + PROMPT_TAIL:
        prompt = np.concatenate([chosen.token_ids[:PROMPT_HEAD], chosen.token_ids[start - PROMPT_TAIL : start]])
    else:
        prompt = chosen.token_ids[:start]
    token_ids = np.concatenate([prompt, chosen.token_ids[start : start + length]])
    canary = Trajectory(
        trajectory_id="canary",
        group_id="canary",
        prompt_id=0,
        token_ids=token_ids,
        loss_mask=np.arange(len(token_ids)) >= len(prompt),
        behavior_logprobs=np.zeros(len(token_ids), np.float32),
        policy_versions=(VersionSpan(0, batch.policy_version),),
        reward=0.0,
        reward_breakdown={},
        verdict="",
        finish_reason=FinishReason.LENGTH,
    )
    group = TrajectoryGroup("canary", 0, (canary,))
    return TrainingBatch.from_groups([group], [0], batch.policy_version, batch.device)


def _certainty(trajectory: Trajectory) -> float:
    start, length = _first_run(trajectory)
    return float(np.maximum(trajectory.behavior_logprobs[start : start + length], LEAST_LIKELY).sum())


def _first_run(trajectory: Trajectory) -> tuple[int, int]:
    """Return the position of the first sampled token, and how many follow without a gap, at most 16."""
    mask = trajectory.loss_mask
    start = int(np.argmax(mask))
    ends = np.flatnonzero(~mask[start:])
    length = int(ends[0]) if len(ends) else len(mask) - start
    return start, min(length, MOST_PROBED_TOKENS)


@dataclass(slots=True)
class _Round:
    """What a round has cost and found so far."""

    started: float = field(default_factory=time.monotonic)
    num_versions: int = 0
    learner_seconds: float = 0.0
    actor_seconds: float = 0.0
    """Of the slowest actor."""
    compared: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Mean difference and version, by actor."""
    problem: str = ""
    """What an actor computed otherwise; empty: nothing."""


class WeightProbe:
    """The probe of one rank. All ranks score together; rank 0 asks, compares and warns.

    Args:
        buffer: connection to the buffer.
        score: returns the policy's log-probabilities of a batch's scored tokens; every rank must call it.
        tolerance: as `learner.logprob_tolerance`.
        rank: this rank.
        device: device of the networks.
    """

    def __init__(
        self,
        buffer: Connection,
        score: Callable[[TrainingBatch], Tensor],
        *,
        tolerance: float,
        rank: int,
        device: torch.device,
    ) -> None:
        self._buffer, self._score, self._tolerance = buffer, score, tolerance
        self._rank, self._device = rank, device
        self._canary: TrainingBatch | None = None
        self._kept: dict[int, Logprobs] = {}
        """The canary's log-probabilities by version."""
        self._probe: Probe | None = None
        """The round under way; None: a pause."""
        self._answer: Future[Message] | None = None
        self._due = 0.0
        """Monotonic time at which the next round may begin."""
        self._round = _Round()
        self._num_rounds = 0
        self._alarms: dict[str, int] = {}
        """Actors that computed something else at their last turn, with the number of that round."""
        self._agreed, self._refusal = False, ""
        """What rounds have found for the log-probability check: whether an actor agreed, and why none did."""

    def begin(self, batch: TrainingBatch) -> None:
        """Choose the canary before the first batch is trained on, and score it; every rank must call it.

        In a later pause this batch replaces a canary that says nothing any more.
        """
        if self._canary is not None and self._probe is None and self._is_flat():
            # Each rank may have a canary of its own, because only that of rank 0 is compared.
            self._canary = canary_of(batch)
            self._kept.clear()
        if self._canary is None:
            self._canary = canary_of(batch)
            self._score_canary(batch.policy_version)
            # The network's first pass takes longer than those that follow.
            self._round.learner_seconds = 0.0

    def see(self, policy_version: int, check: LogprobCheck) -> dict[str, float]:
        """Advance by one published version; every rank must call it. Never waits for the buffer or an actor.

        A round also finishes `check`, if no batch has done so before.

        Returns: the metrics to report; a difference only when a round has ended.

        Raises:
            LogprobMismatchError: `check` is not through, and no actor of the round computes what the learner does.
        """
        metrics = self._collect(check)
        wants = self._rank == 0 and (self._probe is not None or time.monotonic() >= self._due)
        if any_rank(wants, self._device):
            self._score_canary(policy_version)
        if wants:
            self._ask(policy_version)
        if not check.agreed:
            if any_rank(bool(self._refusal), self._device):
                raise LogprobMismatchError(self._refusal or "rank 0 names the difference")
            check.agreed = any_rank(self._agreed, self._device)
        return metrics | {"weights/logprob_alarms": float(len(self._alarms))}

    def _is_flat(self) -> bool:
        return bool(self._kept) and float(np.abs(self._kept[max(self._kept)]).mean()) < FLAT

    def _score_canary(self, policy_version: int) -> None:
        assert self._canary is not None
        started = time.monotonic()
        self._kept[policy_version] = self._score(self._canary).double().cpu().numpy()
        if len(self._kept) > MOST_KEPT:
            # The first version stays: weights that were never replaced are those.
            del self._kept[sorted(self._kept)[1]]
        self._round.num_versions += 1
        self._round.learner_seconds += time.monotonic() - started

    def _ask(self, policy_version: int) -> None:
        """Begin a round if none is under way, and ask for the reports."""
        if self._probe is None:
            assert self._canary is not None
            [trajectory] = self._canary.trajectories
            tokens = tuple(trajectory.token_ids.tolist())
            probe_id = secrets.randbelow(1 << 62)
            self._probe = Probe(probe_id, policy_version, tokens, int(trajectory.loss_mask.sum()))
            self._round.started = time.monotonic()
        if self._answer is None:
            self._answer = self._buffer.request(ProbeRequest(self._probe), timeout_seconds=60.0)

    def _collect(self, check: LogprobCheck) -> dict[str, float]:
        """Compare what has arrived. Returns metrics if the round has ended."""
        if self._answer is None or not self._answer.done():
            return {}
        answer, self._answer = self._answer, None
        try:
            reports = answer.result()
        except (TimeoutError, RequestRefused) as error:
            logger.info("the weight probe got no answer: %s", error)
            return {}
        assert isinstance(reports, ProbeReports)
        current = self._round
        for report in reports.reports:
            if report.policy_version in self._kept and report.actor_id not in current.compared:
                self._judge(report, check)
        is_long = current.num_versions >= MOST_VERSIONS and time.monotonic() - current.started > MOST_SECONDS
        if is_long or (reports.reports and not reports.num_unanswered):
            return self._end_round(reports.num_actors)
        return {}

    def _judge(self, report: ProbeReport, check: LogprobCheck) -> None:
        """Compare one report; warn when an actor begins or ceases to compute something else."""
        actor, version, current = report.actor_id, report.policy_version, self._round
        current.actor_seconds = max(current.actor_seconds, report.seconds)
        found = compare(self._kept, version, report.logprobs)
        if found.is_alarm(self._tolerance) and check.may_be_older(version):
            # After a rollback the actor may have loaded other weights under this number.
            return
        current.compared[actor] = (found.difference, version)
        if not found.is_alarm(self._tolerance):
            self._agreed = True
            if self._alarms.pop(actor, None) is not None:
                logger.info("%s: its log-probabilities under policy %d are the learner's again", actor, version)
            return
        current.problem = _sentence(actor, version, found, len(report.logprobs), self._tolerance)
        if actor not in self._alarms:
            logger.warning("%s", current.problem)
        self._alarms[actor] = self._num_rounds

    def _end_round(self, num_actors: int) -> dict[str, float]:
        ended, self._probe, self._round = self._round, None, _Round()
        self._num_rounds += 1
        self._refusal = "" if self._agreed else ended.problem
        turns = 2 + 2 * math.ceil(num_actors / ACTORS_PER_ROUND)
        self._alarms = {actor: turn for actor, turn in self._alarms.items() if self._num_rounds - turn <= turns}
        pause_for_actors = min(PAUSE_PER_COST * ended.actor_seconds, LONGEST_PAUSE_FOR_ACTORS)
        self._due = time.monotonic() + max(PAUSE_PER_COST * ended.learner_seconds, pause_for_actors)
        if not ended.compared:
            return {}
        difference, version = max(ended.compared.values())
        logger.info(
            "weight probe of %d actors: log-probabilities differ by %.2g at most (%.3f s here, %.3f s at an actor)",
            *(len(ended.compared), difference, ended.learner_seconds, ended.actor_seconds),
        )
        return {"weights/logprob_probe": difference, "weights/logprob_probe_version": float(version)}


def _sentence(actor: str, version: int, found: Comparison, num_tokens: int, tolerance: float) -> str:
    """Say what an actor computed instead of the learner's log-probabilities, and what to do."""
    if found.best_version != version and found.best_difference < found.difference / 2:
        return (
            f"{actor} names policy {version} but samples with other weights: over {num_tokens} probed tokens its"
            f" log-probabilities differ by {found.difference:.2g} on average from the learner's under policy {version},"
            f" and by {found.best_difference:.2g} from those under policy {found.best_version}; its newer weights never"
            " arrived, so end that actor and let a new one load them"
        )
    return (
        f"{actor}: over {num_tokens} probed tokens its log-probabilities differ by {found.difference:.2g} on average"
        f" from the learner's under policy {version}, more than {TIMES_TOLERANCE:g} x"
        f" learner.logprob_tolerance={tolerance}; check that it has the learner's model, dtype and temperature, or end"
        " that actor and let a new one load the weights"
    )
