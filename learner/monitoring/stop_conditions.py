"""Conditions that stop or warn about a run: skipped steps, zero-advantage batches, data that is far off-policy.

The training loop owns one object per condition on every rank and passes it the results of every batch. All ranks reach
the same decision, so they stop at the same batch.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch

from learner.batches.batch import TrainingBatch
from learner.distributed.collectives import all_reduce_max, any_rank, rank_and_world_size
from learner.monitoring.step_results import ImportanceWeights, StepResults

logger = logging.getLogger(__name__)

WARN_AFTER = 3
"""Consecutive batches that teach nothing after which a warning is logged."""
MIN_EFFECTIVE_SAMPLE_SIZE = 0.3
WEIGHT_MEAN_BOUNDS = (0.5, 2.0)
MAX_WEIGHT_STD = 1.0
"""Bounds of the weights pi_prox/mu. Outside them, data is so far off-policy that the estimates of every correction are
mostly noise or mostly bias."""
BOUNDS = {
    "importance/bound_effective_sample_size": MIN_EFFECTIVE_SAMPLE_SIZE,
    "importance/bound_weight_mean_low": WEIGHT_MEAN_BOUNDS[0],
    "importance/bound_weight_mean_high": WEIGHT_MEAN_BOUNDS[1],
    "importance/bound_weight_std": MAX_WEIGHT_STD,
}
"""The same bounds as metrics, which TensorBoard draws as lines beside the curves."""
NO_JUDGEMENT = frozenset({"timeout", "crash", "error"})
"""Verdicts that mean that the verifier did not judge the completion."""


class RunStoppedError(RuntimeError):
    """A stop condition ended the run. The exit status is 3, after which the supervisor does not restart the learner."""


class BadStepsError(RunStoppedError):
    """Too many consecutive batches had a step whose loss or gradient was not finite."""


class NoSignalError(RunStoppedError):
    """Too many consecutive batches, or groups in the buffer, taught nothing."""


class StepWatch:
    """Counts skipped optimizer steps.

    Args:
        max_bad_steps: number of consecutive batches with a skipped step that ends the run.
    """

    def __init__(self, max_bad_steps: int) -> None:
        self._max_bad_steps = max_bad_steps
        self._in_a_row = 0
        self._total = 0

    def see(self, policy_version: int, steps: Sequence[StepResults]) -> dict[str, float]:
        """Count the skipped steps of the batch that led to `policy_version`. Returns metrics to display."""
        of_network = {"policy": [step.policy for step in steps], "critic": [step.critic for step in steps]}
        skipped = [name for name, taken in of_network.items() if any(step and step.was_skipped for step in taken)]
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        self._total += bool(skipped)
        if skipped and rank_and_world_size()[0] == 0:
            logger.warning(
                "policy %d: the step of the %s was skipped, its loss or gradient was not finite (%d in a row of %d)",
                policy_version,
                " and of the ".join(skipped),
                self._in_a_row,
                self._max_bad_steps,
            )
        return {"learner/bad_steps": float(self._total)}

    @property
    def exhausted(self) -> bool:
        """Whether the run must end."""
        return self._in_a_row >= self._max_bad_steps


class DistanceWatch:
    """Logs a warning when the data becomes too far off-policy, and a message when it is near enough again."""

    def __init__(self) -> None:
        self._crossed: list[str] = []
        self._num_far = 0

    def see(self, policy_version: int, weights: ImportanceWeights | None) -> dict[str, float]:
        """Check the weights of the last step that led to `policy_version`. Returns metrics to display.

        The metrics are the number of bounds crossed, the number of batches so far that crossed one, and the bounds
        themselves as lines beside the curves. There are none for a step of the critic alone, which has no importance
        weights.
        """
        if weights is None:
            return {}
        crossed = bounds_crossed(weights)
        if rank_and_world_size()[0] == 0 and bool(crossed) != bool(self._crossed):
            if crossed:
                logger.warning(
                    "policy %d: this data is far off-policy: %s; lower max_staleness or the learning rate, or choose"
                    " another correction",
                    policy_version,
                    "; ".join(crossed),
                )
            else:
                logger.info("policy %d: the data is near enough to the policy again", policy_version)
        self._crossed = crossed
        self._num_far += bool(crossed)
        return {"importance/warning": float(len(crossed)), "importance/far_batches": float(self._num_far), **BOUNDS}


def bounds_crossed(weights: ImportanceWeights) -> list[str]:
    """Return one phrase per bound that the weights pi_prox/mu of a batch exceed."""
    sample_size, mean, std = weights.effective_sample_size, weights.mean, weights.std
    low, high = WEIGHT_MEAN_BOUNDS
    crossed = []
    if sample_size < MIN_EFFECTIVE_SAMPLE_SIZE:
        crossed.append(f"effective sample size {sample_size:.2g} is below {MIN_EFFECTIVE_SAMPLE_SIZE}")
    if not low <= mean <= high:
        crossed.append(f"mean weight {mean:.2g} is outside {low} to {high}")
    if std > MAX_WEIGHT_STD:
        crossed.append(f"weight deviation {std:.2g} is above {MAX_WEIGHT_STD}")
    return crossed


class SignalWatch:
    """Counts consecutive batches that teach nothing: all rewards are equal, or no completion was judged.

    Args:
        compares_groups: whether the algorithm compares rewards only within a group. If so, a batch of zero-advantage
            groups teaches nothing; if not, only a batch whose rewards are all equal does.
        max_batches: number of consecutive such batches that ends the run; 0: never.
    """

    def __init__(self, *, compares_groups: bool, max_batches: int) -> None:
        self._compares_groups, self._max_batches = compares_groups, max_batches
        self.num_batches = 0

    def see(self, batch: TrainingBatch) -> str | None:
        """Check one batch. Returns the reason why the run must end, or None."""
        reason = self._reason(batch)
        is_first_rank = rank_and_world_size()[0] == 0
        if reason is None:
            if self.num_batches >= WARN_AFTER and is_first_rank:
                logger.info(
                    "policy %d: there is something to learn again after %d batches without",
                    batch.policy_version,
                    self.num_batches,
                )
            self.num_batches = 0
            return None
        self.num_batches += 1
        said = f"policy {batch.policy_version}: nothing to learn from {self.num_batches} batches in a row: {reason}"
        if self.num_batches == WARN_AFTER and is_first_rank:
            logger.warning("%s", said)
        return said if self.num_batches == self._max_batches else None

    def _reason(self, batch: TrainingBatch) -> str | None:
        verdicts = Counter(trajectory.verdict for trajectory in batch.trajectories)
        if not any_rank(bool(verdicts.keys() - NO_JUDGEMENT), batch.device):
            shares = ", ".join(f"{name} {count / verdicts.total():.0%}" for name, count in verdicts.most_common())
            return f"the verifier judged no completion ({shares}); see verifier.deadline_seconds"
        if self._compares_groups:
            differ = any_rank(_differ_within_a_group(batch), batch.device)
        else:
            ends = all_reduce_max(torch.stack([batch.rewards.max(), -batch.rewards.min()]))
            differ = float(ends.sum()) > 0
        if differ:
            return None
        where = "within every group" if self._compares_groups else "of the batch"
        mean, (verdict, count) = float(batch.rewards.mean()), verdicts.most_common(1)[0]
        return f"all rewards {where} are equal (mean {mean:g}, verdict {verdict} {count / verdicts.total():.0%})"


def _differ_within_a_group(batch: TrainingBatch) -> bool:
    groups = [batch.rewards[batch.group_index == group] for group in range(len(batch.staleness))]
    return any(bool(rewards.max() > rewards.min()) for rewards in groups)
