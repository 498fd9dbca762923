"""TensorBoard scalars by policy version, the metrics of a batch, and the rates for the live display."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

from buffer.trajectory import Trajectory
from buffer.transport.messages import EvaluationReport, Status
from learner.batches.batch import TrainingBatch
from learner.monitoring.event_file import open_summary_writer

LONG_WAIT_SECONDS = 1.0
"""Waits from this length on get a line of text; shorter ones are part of normal work."""
LAYOUT = {
    "How well does it do?": {
        "pass@1": ["Multiline", ["evaluation/pass_at_1", "reward/fraction_correct"]],
        "reward": ["Multiline", ["reward/mean"]],
        "completion tokens": ["Multiline", ["reward/completion_tokens_mean"]],
    },
    "How off-policy is this run?": {
        "staleness": ["Multiline", ["staleness/mean", "staleness/max"]],
        "versions passed while sampled, while queued": [
            "Multiline",
            ["staleness/in_flight_mean", "staleness/queued_mean"],
        ],
        "bounds crossed below (0: none)": ["Multiline", ["importance/warning"]],
        "effective sample size (below 0.3: warning)": [
            "Multiline",
            ["importance/effective_sample_size", "importance/bound_effective_sample_size"],
        ],
        "mean weight (outside 0.5 to 2: warning)": [
            "Multiline",
            ["importance/weight_mean", "importance/bound_weight_mean_low", "importance/bound_weight_mean_high"],
        ],
        "weight deviation (above 1: warning)": [
            "Multiline",
            ["importance/weight_std", "importance/bound_weight_std"],
        ],
        "KL(mu || pi)": ["Multiline", ["importance/behavior_kl_k1", "importance/behavior_kl_k3"]],
        "tokens capped, masked": ["Multiline", ["importance/fraction_capped", "importance/fraction_masked"]],
        "tokens clipped": ["Multiline", ["policy/fraction_clipped_low", "policy/fraction_clipped_high"]],
    },
    "Is anything wrong?": {
        "steps and checkpoints": ["Multiline", ["learner/bad_steps", "learner/failed_checkpoints"]],
        "batches without signal": ["Multiline", ["reward/batches_without_signal"]],
        "weight probe: difference of log-probabilities": ["Multiline", ["weights/logprob_probe"]],
        "weight probe: actors that sample with other weights": ["Multiline", ["weights/logprob_alarms"]],
        "completions not judged": [
            "Multiline",
            ["reward/fraction_timeout", "reward/fraction_crash", "reward/fraction_error"],
        ],
    },
    "Who waits for whom?": {
        "seconds of a step": [
            "Multiline",
            ["learner/wait_seconds", "learner/train_seconds", "learner/publish_seconds"],
        ],
        "ledger": ["Multiline", ["buffer/pending", "buffer/leased", "buffer/ready", "buffer/used"]],
        "seconds waited so far, by who waits": ["Multiline", ["waiting/.*"]],
    },
}


class Reporter:
    """Writes event files under `directory`; the x-axis is always the policy version."""

    def __init__(self, directory: Path, first_version: int) -> None:
        # A resumed run repeats steps; TensorBoard hides what the earlier attempt wrote from `first_version` + 1 on.
        self._writer = open_summary_writer(directory, first_version + 1)
        self._writer.add_custom_scalars(LAYOUT)

    def scalars(self, metrics: Mapping[str, float], policy_version: int) -> None:
        """Write one value per name."""
        # One event holds all values; one event per value costs ten times the processor time.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.file_writer.add_summary(Summary(value=values), policy_version)  # type: ignore[attr-defined]

    def staleness(self, batch: TrainingBatch, policy_version: int) -> None:
        """Write histograms: staleness over groups, and its two parts, in flight and queued, over trajectories."""
        in_flight, queued = _staleness_parts(batch)
        for name, values in (("groups", np.asarray(batch.staleness)), ("in_flight", in_flight), ("queued", queued)):
            edges = np.arange(int(values.max()) + 2) - 0.5
            self._writer.add_histogram(f"staleness/{name}", values, policy_version, bins=edges)

    def evaluation(self, report: EvaluationReport) -> None:
        """Write an evaluation on held-out prompts at the version that the actor evaluated."""
        metrics = {
            "evaluation/pass_at_1": report.pass_at_1,
            "evaluation/reward_mean": report.reward_mean,
            "evaluation/completion_tokens_mean": report.completion_tokens_mean,
            "evaluation/seconds": report.seconds,
        }
        self.scalars(metrics, report.policy_version)

    def status(self, status: Status, policy_version: int) -> None:
        """Write the ledger's counts and the actors' last metrics, summed over actors (shares and seconds: averaged)."""
        metrics = {f"buffer/{state.replace(':', '_')}": float(count) for state, count in status.counts.items()}
        metrics["buffer/stage"], metrics["buffer/success"] = float(status.stage.stage), status.stage.success
        metrics["buffer/prompts_passed_over"] = float(status.stage.num_passed_over)
        metrics |= {f"actor/{name}": value for name, value in status.actors.metrics.items()}
        if status.actors.num_actors:
            metrics["weights/actor_versions_behind"] = float(policy_version - status.actors.oldest_version)
        self.scalars(metrics, policy_version)
        self._waits(status, policy_version)

    def _waits(self, status: Status, policy_version: int) -> None:
        """Write the longest wait of every process as a curve, and what each one waits for as a page of text.

        With more actors than a status names, only the learner has curves.
        """
        longest: dict[str, float] = {}
        for wait in status.waits:
            longest[wait.who] = max(wait.seconds, longest.get(wait.who, 0.0))
        waiting = {peer.name for peer in status.peers} | longest.keys()
        if status.actors.num_actors > sum(peer.role == "actor" for peer in status.peers):
            waiting = {peer.name for peer in status.peers if peer.role != "actor"}
        self.scalars({f"waiting/{who}_seconds": longest.get(who, 0.0) for who in waiting}, policy_version)
        long = [w for w in status.waits if w.seconds >= LONG_WAIT_SECONDS]
        if long:
            lines = [f"- {w.who} waits for {w.for_what}, for {w.seconds:.0f} s" for w in long]
            self._writer.add_text("waits", "\n".join(lines), policy_version)

    def close(self) -> None:
        """Flush and close the event files."""
        self._writer.close()


def batch_metrics(batch: TrainingBatch) -> dict[str, float]:
    """Return metrics of rewards, verdicts, lengths and staleness of this rank's shard of a batch."""
    trajectories = batch.trajectories
    rewards = np.array([t.reward for t in trajectories])
    scored = np.diff(batch.scored_offsets)
    in_flight, queued = _staleness_parts(batch)
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/completion_tokens_mean": float(scored.mean()),
        "reward/completion_tokens_max": float(scored.max()),
        "reward/turns_mean": float(np.mean([t.num_turns for t in trajectories])),
        "reward/groups_without_signal": _zero_advantage_share(batch, rewards),
        "staleness/mean": float(np.mean(batch.staleness)),
        "staleness/max": float(np.max(batch.staleness)),
        "staleness/in_flight_mean": float(in_flight.mean()),
        "staleness/queued_mean": float(queued.mean()),
        "staleness/versions_per_sample_mean": float(np.mean([len(t.policy_versions) for t in trajectories])),
    }
    return metrics | _verdicts(trajectories) | _reward_parts(trajectories)


def _zero_advantage_share(batch: TrainingBatch, rewards: np.ndarray) -> float:
    groups = batch.group_index.cpu().numpy()
    all_equal = [np.ptp(rewards[groups == group]) == 0 for group in np.unique(groups)]
    return float(np.mean(all_equal))


def _verdicts(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    counts = Counter(t.verdict for t in trajectories)
    names = {"correct", "wrong", "no_answer", "truncated", "timeout", "crash", "error"} | set(counts)
    return {f"reward/fraction_{name}": counts[name] / len(trajectories) for name in sorted(names)}


def _staleness_parts(batch: TrainingBatch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, per trajectory, the numbers of versions published during its sampling and its wait in the buffer."""
    in_flight = [t.newest_version - t.oldest_version for t in batch.trajectories]
    queued = [max(batch.policy_version - t.newest_version, 0) for t in batch.trajectories]
    return np.array(in_flight), np.array(queued)


def _reward_parts(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    parts: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name, value in trajectory.reward_breakdown.items():
            parts.setdefault(name, []).append(value)
    return {f"reward/part_{name}": float(np.mean(values)) for name, values in parts.items()}


class StepClock:
    """Rates since the end of the first batch; earlier, the actors' start-up would count as time spent waiting."""

    def __init__(self) -> None:
        self._started = 0.0
        self._waited = 0.0
        self._samples = 0
        self._tokens = 0
        self._seconds = 0.0

    def step(self, *, wait_seconds: float, num_samples: int, num_tokens: int) -> None:
        """Count one batch; called after its last step."""
        now = time.monotonic()
        if not self._started:
            self._started = now
            return
        self._waited += wait_seconds
        self._samples += num_samples
        self._tokens += num_tokens
        self._seconds = now - self._started

    def summary(self) -> dict[str, float]:
        """Return rates per second and the share of time spent waiting for batches; empty before the second batch."""
        if not self._seconds:
            return {}
        return {
            "samples_per_second": self._samples / self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
            "idle_fraction": self._waited / self._seconds,
        }
