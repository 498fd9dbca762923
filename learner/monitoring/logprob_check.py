"""Whether the learner and the actors see the same log-probabilities under the same weights; asked until they do once.

Only trajectories sampled under one version alone can tell: tokens after a change of weights are sampled on top of the
older version's KV cache. Groups begun before this learner started may carry a version's number for other weights, those
of before a rollback, so while such groups may come a disagreement is only reported.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from buffer.transport.connection import Connection
from buffer.transport.messages import LearnerHello, LearnerWelcome, Status, StatusRequest
from learner.batches.batch import TrainingBatch
from learner.distributed.collectives import all_reduce_max, all_reduce_sum, rank_and_world_size
from learner.monitoring.stop_conditions import RunStoppedError

logger = logging.getLogger(__name__)


class LogprobMismatchError(RunStoppedError):
    """The learner and the actors disagree about the same weights, so every correction would be wrong."""


class OlderGroups:
    """What may still come from before this learner's start, on every rank alike.

    Args:
        number: groups that were leased or ready when it started.
        newest_version: the highest version that an actor may have had from an earlier learner; -1 without one.
    """

    def __init__(self, number: int = 0, newest_version: int = -1) -> None:
        self._number, self._newest_version = number, newest_version

    def may_come(self, policy_version: int) -> bool:
        """Whether a group of `policy_version` may be of other weights than this learner's of that number."""
        return self._number > 0 or policy_version <= self._newest_version

    def use(self, num_groups: int) -> None:
        """A batch of `num_groups` was trained on: as many of them as there were are gone."""
        self._number -= num_groups


def say_hello(
    buffer: Connection, policy_version: int, updates_per_batch: int, device: torch.device, rank: int
) -> OlderGroups:
    """Rank 0 tells the buffer where the learner starts; every rank learns what is older. Also a barrier.

    Waits for: the buffer. Gives up after: 60 s.
    """
    older = torch.tensor([0, -1], device=device)
    if rank == 0:
        before = buffer.call(StatusRequest(), timeout_seconds=60.0)
        welcome = buffer.call(LearnerHello(policy_version), timeout_seconds=60.0)
        assert isinstance(before, Status) and isinstance(welcome, LearnerWelcome)
        logger.info("starting at policy %d; %d groups are ready again", policy_version, welcome.num_rolled_back)
        newest = max([before.policy_version, *(peer.policy_version for peer in before.peers)])
        if before.counts["issued"]:
            # An earlier learner may have published once more than the buffer heard of.
            older[1] = newest + updates_per_batch
        older[0] = welcome.num_outstanding
    number, newest_version = all_reduce_max(older).tolist()
    return OlderGroups(number, newest_version)


class LogprobCheck:
    """Compares until one batch agrees.

    Args:
        tolerance: largest mean |log pi - log mu| that may be.
        older: what may still come from before this learner's start.
    """

    def __init__(self, tolerance: float, older: OlderGroups) -> None:
        self._tolerance, self._older = tolerance, older
        self.agreed = False

    def compare(self, batch: TrainingBatch, logprobs: Tensor) -> None:
        """`logprobs` [M] of the batch under the weights of its version.

        Raises:
            LogprobMismatchError: when they differ from the actors' and nothing older can be the reason.
        """
        version = batch.policy_version
        same = batch.of_one_version & (batch.token_versions == version)
        difference = torch.where(same, (logprobs - batch.behavior_logprobs).abs(), 0.0)
        sums = all_reduce_sum(torch.stack([difference.sum().double(), same.sum().double()])).tolist()
        largest = float(all_reduce_max(difference.max().clone()))
        mean = sums[0] / max(sums[1], 1.0)
        if not mean <= self._tolerance:
            message = (
                f"policy {version}: the learner's log-probabilities differ from the actors' by {mean:.4f} on average"
                f" and by {largest:.4f} at most over {int(sums[1])} tokens, more than"
                f" learner.logprob_tolerance={self._tolerance}; check that learner and actors use the same model, dtype"
                " and temperature"
            )
            if not self._older.may_come(version):
                raise LogprobMismatchError(message)
            logger.warning("%s (their groups may be of before this learner started; checked again)", message)
        elif sums[1]:
            self.agreed = True
            if rank_and_world_size()[0] == 0:
                logger.info("policy %d: log-probabilities agree (largest difference %.2g)", version, largest)
        _, world_size = rank_and_world_size()
        self._older.use(len(batch.staleness) * world_size)
