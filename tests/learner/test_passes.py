from pathlib import Path

import pytest
import torch
from torch import Tensor

from learner.algorithms.corrections import NoCorrection
from learner.algorithms.grpo import GRPO
from learner.algorithms.ppo import PPO
from learner.batches.batch import TrainingBatch
from learner.models.policy import PolicyModel
from learner.passes import Annotations, critic_step, policy_step, score_batch
from tests.learner.ranks import LEARNING_RATE, OPTIMIZER, critic_engine, fixed_groups, policy_engine
from tests.learner.samples import make_batch, plain_model, plain_scores

pytestmark = pytest.mark.usefixtures("one_rank")


def expected_logprobs(folder: Path, batch: TrainingBatch, temperature: float) -> Tensor:
    model = plain_model(folder)
    with torch.no_grad():
        return torch.cat(
            [
                plain_scores(model, t.token_ids, temperature)[0][torch.from_numpy(t.loss_mask[1:])]
                for t in batch.trajectories
            ]
        )


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_a_scored_batch_keeps_the_order_of_its_tokens(model_folder: Path, stage: int, budget: int):
    batch = make_batch(fixed_groups())
    scores = score_batch(policy_engine(model_folder, OPTIMIZER, stage, torch.float32), batch, budget)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, expected_logprobs(model_folder, batch, 0.8), rtol=1e-5, atol=1e-5)


def test_a_module_of_this_rank_is_scored_without_the_other_ranks(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    batch = make_batch(fixed_groups())
    reference = PolicyModel.load(model_folder, dtype=torch.float32, temperature=1.0, checkpointing=False)

    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("a collective call")

    monkeypatch.setattr("learner.passes.all_reduce_max", refuse)
    scores = score_batch(reference, batch, 40)
    torch.testing.assert_close(scores, expected_logprobs(model_folder, batch, 1.0), rtol=1e-5, atol=1e-5)


def grpo_step(folder: Path, batch: TrainingBatch, part: range, notes: Annotations) -> dict[str, Tensor]:
    engine = policy_engine(folder, OPTIMIZER, 0, torch.float32)
    policy_step(engine, GRPO(), batch, part, notes, 30)
    engine.step(LEARNING_RATE)
    return dict(engine.gather(torch.float32))


def test_a_minibatch_is_weighed_by_its_own_tokens_alone(model_folder: Path):
    """The second half of a batch trains exactly like a batch of that half."""
    batch, half = make_batch(fixed_groups()), make_batch(fixed_groups()[2:])
    advantages = torch.linspace(-2, 2, batch.num_scored_tokens)
    part = batch.split(2)[1]
    inside = batch.scored_slice(part)
    in_batch = grpo_step(model_folder, batch, part, Annotations(advantages, None, None, None, None))
    alone = grpo_step(
        model_folder, half, range(len(half.trajectories)), Annotations(advantages[inside], None, None, None, None)
    )
    for name, tensor in in_batch.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-7)
    other = grpo_step(model_folder, batch, batch.split(2)[0], Annotations(advantages, None, None, None, None))
    assert any(not torch.allclose(other[name], alone[name], atol=1e-4) for name in alone)


def test_a_critic_step_needs_values_and_returns(model_folder: Path):
    batch = make_batch(fixed_groups())
    nothing = Annotations(batch.behavior_logprobs, None, None, None, None)
    critic = critic_engine(model_folder, OPTIMIZER, 0, torch.float32)
    with pytest.raises(ValueError, match="values and returns"):
        critic_step(critic, PPO(), batch, range(1), nothing, 100)


def test_the_critic_learns_the_returns(model_folder: Path):
    batch = make_batch(fixed_groups())
    critic = critic_engine(model_folder, OPTIMIZER, 0, torch.float32)
    returns = torch.linspace(-1, 1, batch.num_scored_tokens)
    everything = range(len(batch.trajectories))

    def error() -> float:
        return float((score_batch(critic, batch, 100) - returns).square().mean())

    before = error()
    for _ in range(10):
        notes = Annotations(returns, returns, score_batch(critic, batch, 100), None, None)
        critic_step(critic, PPO(value_clip=None), batch, everything, notes, 100)
        critic.step(0.1)
    assert error() < 0.8 * before


def test_tokens_with_positive_advantages_become_likelier(model_folder: Path):
    batch = make_batch(fixed_groups())
    engine = policy_engine(model_folder, OPTIMIZER, 0, torch.float32)
    advantages = torch.where(batch.group_index[batch.sequence_index] < 2, 1.0, -1.0)
    before = score_batch(engine, batch, 100)
    notes = Annotations(advantages, None, None, None, None)
    policy_step(engine, GRPO(correction=NoCorrection()), batch, range(len(batch.trajectories)), notes, 100)
    engine.step(LEARNING_RATE)
    change = score_batch(engine, batch, 100) - before
    assert float(change[advantages > 0].mean()) > 0 > float(change[advantages < 0].mean())
