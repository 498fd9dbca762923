"""Continues the training of policy and critic at the newest checkpoint: `continued.py MODEL CHECKPOINTS STAGE STEP...`.

torchrun starts this script, which trains to each STEP in turn and saves a checkpoint there. The data of a step depends
on the step's number and on the random generators. So a continued run equals an uninterrupted one only if all state is
restored.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch

from learner.algorithms.base import AdvantageInputs
from learner.algorithms.ppo import PPO
from learner.checkpoints.manifest import newest_checkpoint
from learner.config import LoraConfig, ModelConfig, OptimizerConfig
from learner.distributed.collectives import all_reduce_sum, rank_and_world_size
from learner.distributed.deepspeed_engine import init_distributed, shut_down_distributed
from learner.models.policy import PolicyModel
from learner.networks import Networks
from learner.passes import Annotations, critic_step, policy_step, score_batch
from tests.learner.ranks import critic_engine, policy_engine
from tests.learner.samples import CPU, make_batch, make_group

TOTAL_STEPS = 4
REFRESH_EVERY = 1
"""With 1, the step after a checkpoint has the checkpoint's policy as the reference."""
BUDGET = 60
OPTIMIZER = OptimizerConfig(1e-2, schedule="cosine", warmup_steps=1)


class Run:
    """One rank's engines and reference, at the newest checkpoint."""

    def __init__(self, folder: Path, checkpoints: Path, stage: int) -> None:
        self.folder, self.checkpoints = folder, checkpoints
        self.policy = policy_engine(folder, OPTIMIZER, stage, torch.float32)
        self.critic = critic_engine(folder, OPTIMIZER, stage, torch.float32)
        reference = PolicyModel.load(folder, dtype=torch.float32, temperature=0.8, checkpointing=False)
        frozen = reference.requires_grad_(False)
        self.networks = Networks(self.policy, self.critic, frozen, REFRESH_EVERY, LoraConfig())
        self.algorithm = PPO(kl="loss", kl_coef=0.1)
        self.version = 0
        checkpoint = newest_checkpoint(checkpoints)
        if checkpoint is not None:
            self.networks.restore(checkpoint)
            self.version = int(checkpoint.name)

    def step(self) -> None:
        """One step on groups drawn with the random generators."""
        rank, world_size = rank_and_world_size()
        noise = int(random.random() * 1e6) + int(np.random.rand() * 1e6) + int(torch.rand(()) * 1e6)
        batch = make_batch([make_group(f"{i}.0", i, seed=noise + self.version) for i in range(rank, 4, world_size)])
        assert self.networks.reference is not None
        values = score_batch(self.critic, batch, BUDGET)
        reference = score_batch(self.networks.reference, batch, BUDGET)
        outputs = self.algorithm.advantages(
            AdvantageInputs(
                batch.rewards,
                batch.group_index,
                batch.sequence_index,
                batch.behavior_logprobs,
                values=values,
                ref_logprobs=reference,
                reduce=all_reduce_sum,
            )
        )
        notes = Annotations(outputs.advantages, outputs.returns, values, None, reference)
        everything = range(len(batch.trajectories))
        critic_step(self.critic, self.algorithm, batch, everything, notes, BUDGET)
        policy_step(self.policy, self.algorithm, batch, everything, notes, BUDGET)
        for network in (self.critic, self.policy):
            network.step(OPTIMIZER.rate(self.version, TOTAL_STEPS))
        self.version += 1
        self.networks.refresh_reference(self.version, 1)

    def save(self) -> None:
        """A checkpoint of the version reached."""
        self.networks.save(
            self.checkpoints,
            self.version,
            model=ModelConfig(str(self.folder)),
            state={},
            keep=9,
            may_be_named=lambda: True,
        )


def main(folder: Path, checkpoints: Path, stage: int, stops: list[int]) -> None:
    """Train to each stop."""
    torch.set_num_threads(1)
    init_distributed(CPU)
    rank, _ = rank_and_world_size()
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    run = Run(folder, checkpoints, stage)
    for stop in stops:
        while run.version < stop:
            run.step()
        run.save()
    shut_down_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), [int(stop) for stop in sys.argv[4:]])
