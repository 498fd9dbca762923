"""Every sensible pair of algorithm and correction makes a real step; the others are refused."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException

from learner.algorithms.base import AdvantageInputs
from learner.algorithms.metrics import summarize
from learner.batches.batch import TrainingBatch
from learner.distributed.deepspeed_engine import TrainingEngine
from learner.passes import Annotations, critic_step, policy_step, score_batch
from tests.learner.algorithms.pairs import REFUSED, SENSIBLE, build
from tests.learner.ranks import OPTIMIZER, critic_engine, fixed_groups, policy_engine
from tests.learner.samples import make_batch

pytestmark = pytest.mark.usefixtures("one_rank")

BUDGET = 200
ALWAYS_SHOWN = {
    *(f"importance/behavior_kl_{kind}" for kind in ("k1", "k3")),
    *(f"importance/weight_{what}" for what in ("mean", "std", "max")),
    *(f"importance/fraction_{what}" for what in ("capped", "masked")),
    *(f"policy/fraction_clipped_{side}" for side in ("low", "high")),
    "importance/effective_sample_size",
}


@pytest.fixture(scope="module")
def engines(one_rank: None, model_folder: Path) -> tuple[TrainingEngine, TrainingEngine]:
    return tuple(make(model_folder, OPTIMIZER, 0, torch.float32) for make in (policy_engine, critic_engine))


@pytest.fixture(scope="module")
def batch(engines: tuple[TrainingEngine, TrainingEngine]) -> TrainingBatch:
    """Off-policy as from a stale actor: some ratios are beyond every cap and mask."""
    made = make_batch(fixed_groups()[:2])
    logprobs = score_batch(engines[0], made, BUDGET)
    return replace(made, behavior_logprobs=logprobs + 0.3 * torch.sin(torch.arange(made.num_scored_tokens)))


@pytest.mark.parametrize(("name", "correction"), SENSIBLE)
def test_a_sensible_pair_takes_a_step_and_shows_how_far_off_policy_it_was(
    engines: tuple[TrainingEngine, TrainingEngine], batch: TrainingBatch, name: str, correction: str
):
    policy, critic = engines
    algorithm = build(name, correction)
    values = score_batch(critic, batch, BUDGET) if algorithm.needs_critic else None
    proximal = score_batch(policy, batch, BUDGET) if algorithm.needs_proximal else None
    outputs = algorithm.advantages(
        AdvantageInputs(
            batch.rewards,
            batch.group_index,
            batch.sequence_index,
            batch.behavior_logprobs,
            values=values,
            proximal_logprobs=proximal,
        )
    )
    notes = Annotations(outputs.advantages, outputs.returns, values, proximal, None)
    everything = range(len(batch.trajectories))
    sums = policy_step(policy, algorithm, batch, everything, notes, BUDGET)
    norms = [policy.step(1e-3)]
    if algorithm.needs_critic:
        sums = sums + critic_step(critic, algorithm, batch, everything, notes, BUDGET)
        norms.append(critic.step(1e-3))
    assert all(0 < norm < math.inf for norm in norms), norms
    shown = summarize(sums.totals())
    assert shown.keys() >= ALWAYS_SHOWN
    assert all(math.isfinite(value) for value in shown.values())


@pytest.mark.parametrize(("name", "correction"), REFUSED)
def test_a_senseless_pair_is_refused_with_the_reason(name: str, correction: str):
    with pytest.raises(InstantiationException, match=REFUSED[name, correction]):
        build(name, correction)
