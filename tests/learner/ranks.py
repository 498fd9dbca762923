"""A few optimizer steps of policy and critic on fixed groups: in this process, or on several ranks as a script.

`torchrun --nproc-per-node 2 tests/learner/ranks.py MODEL OUTPUT` trains under every ZeRO stage in turn. Rank 0 writes
{"outcomes": {stage: Outcome as a dict}, "skipped": {stage: whether one rank's infinite loss made all skip the step}}
to OUTPUT.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import learner.distributed.deepspeed_engine
from buffer.process import exit_now
from buffer.trajectory import TrajectoryGroup
from learner.algorithms.base import AdvantageInputs, Algorithm
from learner.algorithms.metrics import MetricSums, summarize
from learner.algorithms.ppo import PPO
from learner.batches.batch import TrainingBatch
from learner.config import OptimizerConfig
from learner.distributed.collectives import all_reduce_max, all_reduce_sum, any_rank, rank_and_world_size
from learner.distributed.deepspeed_engine import TrainingEngine, init_distributed, shut_down_distributed
from learner.models.policy import PolicyModel, ValueModel
from learner.passes import Annotations, critic_step, policy_step, score_batch
from tests.learner.samples import CPU, make_batch, make_group

STAGES = (0, 2, 3)
LEARNING_RATE = 0.1
NUM_STEPS = 2
# A large epsilon keeps Adam's step proportional to the gradient; a small one blows rounding noise up to a full step.
OPTIMIZER = OptimizerConfig(learning_rate=LEARNING_RATE, eps=1.0, max_grad_norm=0.0)


@dataclass(frozen=True)
class Outcome:
    """Weights of policy and critic, gradient norms of both per step, and the last step's metrics."""

    policy: dict[str, Tensor]
    critic: dict[str, Tensor]
    norms: list[float]
    metrics: dict[str, float]


def fixed_groups() -> list[TrajectoryGroup]:
    """Four groups of four ragged trajectories."""
    return [make_group(f"g{i}", i) for i in range(4)]


def policy_engine(
    folder: Path, optimizer: OptimizerConfig, stage: int, dtype: torch.dtype, *, offload: bool = False
) -> TrainingEngine:
    """The policy in `folder` under DeepSpeed, at temperature 0.8."""
    model = PolicyModel.load(folder, dtype=dtype, temperature=0.8, checkpointing=False)
    return _engine(model, optimizer, stage, dtype, offload)


def critic_engine(
    folder: Path, optimizer: OptimizerConfig, stage: int, dtype: torch.dtype, *, offload: bool = False
) -> TrainingEngine:
    """A critic on the decoder in `folder` under DeepSpeed."""
    return _engine(ValueModel.load(folder, dtype=dtype, checkpointing=False), optimizer, stage, dtype, offload)


def _engine(
    model: torch.nn.Module, optimizer: OptimizerConfig, stage: int, dtype: torch.dtype, offload: bool
) -> TrainingEngine:
    # With the default every parameter of so small a model would stay gathered.
    learner.distributed.deepspeed_engine.PERSISTENT_ELEMENTS = 0
    bfloat16 = dtype == torch.bfloat16
    return TrainingEngine(model, optimizer, zero_stage=stage, bfloat16=bfloat16, cpu_offload=offload, device=CPU)


def annotate(algorithm: Algorithm, batch: TrainingBatch, values: Tensor) -> Annotations:
    """Advantages and returns over all ranks."""
    inputs = AdvantageInputs(
        rewards=batch.rewards,
        group_index=batch.group_index,
        sequence_index=batch.sequence_index,
        behavior_logprobs=batch.behavior_logprobs,
        values=values,
        reduce=all_reduce_sum,
    )
    outputs = algorithm.advantages(inputs)
    return Annotations(outputs.advantages, outputs.returns, values, None, None)


def one_step(
    policy: TrainingEngine, critic: TrainingEngine, algorithm: Algorithm, batch: TrainingBatch, budget: int
) -> tuple[list[float], MetricSums]:
    """One optimizer step of both networks on the whole batch: (gradient norms, metrics)."""
    annotations = annotate(algorithm, batch, score_batch(critic, batch, budget))
    part = range(len(batch.trajectories))
    sums = critic_step(critic, algorithm, batch, part, annotations, budget)
    sums = sums + policy_step(policy, algorithm, batch, part, annotations, budget)
    return [critic.step(LEARNING_RATE), policy.step(LEARNING_RATE)], sums


def train(
    folder: Path,
    groups: list[TrajectoryGroup],
    *,
    stage: int = 0,
    budget: int = 10_000,
    optimizer: OptimizerConfig = OPTIMIZER,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> Outcome:
    """`NUM_STEPS` PPO steps on this rank's groups."""
    policy, critic = (make(folder, optimizer, stage, dtype, offload=offload) for make in (policy_engine, critic_engine))
    algorithm, batch = PPO(value_clip=None, entropy_coef=0.1), make_batch(groups)
    norms: list[float] = []
    sums = MetricSums()
    for _ in range(NUM_STEPS):
        step_norms, sums = one_step(policy, critic, algorithm, batch, budget)
        norms += step_norms
    metrics = summarize(sums.totals(reduce_sum=all_reduce_sum, reduce_max=all_reduce_max))
    return Outcome(dict(policy.gather(torch.float32)), dict(critic.gather(torch.float32)), norms, metrics)


def skips_together(folder: Path, groups: list[TrajectoryGroup], stage: int, rank: int) -> bool:
    """Whether an infinite loss on rank 1 alone leaves every rank's weights as they were."""
    policy, batch = policy_engine(folder, OPTIMIZER, stage, torch.float32), make_batch(groups)
    before = dict(policy.gather(torch.float32))
    micro = batch.microbatches(range(len(batch.trajectories)), 10_000)[0]
    logprobs, _ = policy.forward(micro)
    policy.backward(logprobs.sum() + (math.inf if rank == 1 else 0.0), last=True)
    finite = math.isfinite(policy.step(LEARNING_RATE))
    same = all(torch.equal(tensor, before[name]) for name, tensor in policy.gather(torch.float32))
    return not any_rank(finite or not same, CPU)


def main(folder: Path, output: Path) -> None:
    """Rank 0 holds three groups and rank 1 one, so that rank 1 has fewer microbatches."""
    torch.set_num_threads(1)
    init_distributed(CPU)
    rank, _ = rank_and_world_size()
    share = fixed_groups()[3:] if rank else fixed_groups()[:3]
    outcomes = {stage: asdict(train(folder, share, stage=stage, budget=40)) for stage in STAGES}
    skipped = {stage: skips_together(folder, share, stage, rank) for stage in STAGES}
    if rank == 0:
        torch.save({"outcomes": outcomes, "skipped": skipped}, output)
    shut_down_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    exit_now(0)
