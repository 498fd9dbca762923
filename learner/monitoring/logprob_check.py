"""Checks that learner and actors compute the same log-probabilities under the same weights, until one batch passes.

If no batch can tell, because the actors are always a version behind, a round of `learner/monitoring/weight_probe.py`
finishes the check. That module also goes on with it.

Only trajectories that were sampled under a single version are compared, because after a change of weights tokens are
sampled on top of the older version's KV cache. After a rollback a version number may stand for other weights than
before. Groups that were begun before this learner started may therefore differ; while such groups can still arrive, a
mismatch is only reported.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from buffer.transport.connection import RequestRefused
from buffer.transport.messages import LearnerWelcome, Status, StatusRequest
from learner.batches.batch import TrainingBatch
from learner.checkpoints.checkpoint import CheckpointError
from learner.distributed.collectives import all_reduce_max, all_reduce_sum, any_rank, rank_and_world_size
from learner.monitoring.failed_batch import FailedBatch, hello
from learner.monitoring.patient_requests import PatientRequests
from learner.monitoring.stop_conditions import RunStoppedError

logger = logging.getLogger(__name__)

BUFFER = "the buffer to begin"


class LogprobMismatchError(RunStoppedError):
    """Learner and actors compute different log-probabilities under the same weights, so corrections would be wrong."""


class OlderGroups:
    """Groups begun before this learner started that may still arrive; equal on every rank.

    Args:
        number: groups that were leased or ready when the learner started.
        newest_version: the highest version that an actor may have from an earlier learner; -1 without one.
    """

    def __init__(self, number: int = 0, newest_version: int = -1) -> None:
        self._number, self._newest_version = number, newest_version

    def may_come(self, policy_version: int) -> bool:
        """Return whether a group may come from other weights than those that this learner calls `policy_version`."""
        return self._number > 0 or self.may_name(policy_version)

    def may_name(self, policy_version: int) -> bool:
        """Return whether an actor may still have other weights that it calls `policy_version`."""
        return policy_version <= self._newest_version

    def use(self, num_groups: int) -> None:
        """Count the `num_groups` groups of a trained batch as older groups that have arrived."""
        self._number -= num_groups


def say_hello(
    requests: PatientRequests,
    policy_version: int,
    updates_per_batch: int,
    device: torch.device,
    failed: FailedBatch | None = None,
) -> OlderGroups | None:
    """Tell the buffer, on rank 0, the version that the learner starts at. Returns, on every rank, the older groups.

    Reports too how the learner's last process `failed`. Sets the learner's epoch on every rank's connection. Also a
    barrier. None on every rank when the learner was told to end before the buffer answered.

    Raises:
        CheckpointError: the buffer refuses the version, because its ledger is older than the checkpoint.
    """
    first, number, newest_version, epoch = hello(policy_version, failed), 0, 0, 0
    while not epoch:
        older = torch.tensor([0, -1, 0], device=device)
        before = requests.ask_together(StatusRequest(), BUFFER)
        said = replace(first, after_epoch=before.epoch if isinstance(before, Status) else -1)
        try:
            welcome = before and requests.ask_together(said, BUFFER)
        except RequestRefused as error:
            raise CheckpointError(str(error)) from error
        if welcome is None:
            return None
        if isinstance(before, Status) and isinstance(welcome, LearnerWelcome):
            logger.info("starting at policy %d; %d groups are ready again", policy_version, welcome.num_rolled_back)
            newest = max(before.policy_version, before.actors.newest_version)
            if before.counts["issued"]:
                # An earlier learner may have published one more version than the buffer was told.
                older[1] = newest + updates_per_batch
            older[0], older[2] = welcome.num_outstanding, welcome.epoch
        # 0 on every rank when the hello of a dead learner has arrived since the status.
        number, newest_version, epoch = all_reduce_max(older).tolist()
    requests.begin_epoch(epoch)
    return OlderGroups(number, newest_version)


class LogprobCheck:
    """Compares the log-probabilities of batches until one batch is within the tolerance.

    The caller passes every batch to `compare`, or to `pass_over` if it has nothing to compare, until `agreed`.

    Args:
        tolerance: largest allowed mean of |log pi - log mu|.
        older: groups begun before this learner started that may still arrive.
    """

    def __init__(self, tolerance: float, older: OlderGroups) -> None:
        self._tolerance, self._older = tolerance, older
        self.agreed = False

    def can_tell(self, batch: TrainingBatch) -> bool:
        """Return whether any rank's shard has tokens to compare. Every rank must call it; costs no forward pass."""
        version = batch.policy_version
        here = any(t.oldest_version == t.newest_version == version and t.loss_mask.any() for t in batch.trajectories)
        return any_rank(here, batch.device)

    def may_be_older(self, policy_version: int) -> bool:
        """Return whether an actor may still have weights of an earlier learner that it calls `policy_version`."""
        return self._older.may_name(policy_version)

    def pass_over(self, batch: TrainingBatch) -> None:
        """Count a batch that has nothing to compare."""
        _, world_size = rank_and_world_size()
        self._older.use(len(batch.staleness) * world_size)

    def compare(self, batch: TrainingBatch, logprobs: Tensor) -> None:
        """Compare a batch's behavior_logprobs with `logprobs` [M], computed under the weights of the batch's version.

        Raises:
            LogprobMismatchError: they differ by more than the tolerance, and no older group can be the reason.
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
            logger.warning(
                "%s (the groups may be from before this learner started; the next batch is checked again)", message
            )
        elif sums[1]:
            self.agreed = True
            if rank_and_world_size()[0] == 0:
                logger.info("policy %d: log-probabilities agree (largest difference %.2g)", version, largest)
        self.pass_over(batch)
