import datetime
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

import learner.distributed.deepspeed_engine
from learner.algorithms.base import LossInputs, ValueLossInputs
from learner.algorithms.losses import batch_counts
from learner.algorithms.ppo import PPO
from learner.batches.batch import MicroBatch
from learner.distributed.deepspeed_engine import TrainingEngine, init_distributed
from learner.models.policy import PolicyModel, ValueModel
from tests.learner.ranks import (
    LEARNING_RATE,
    NUM_STEPS,
    OPTIMIZER,
    STAGES,
    Outcome,
    annotate,
    critic_engine,
    fixed_groups,
    one_step,
    policy_engine,
    train,
)
from tests.learner.samples import CPU, make_batch, plain_model
from tests.learner.torchrun import run_ranks

pytestmark = pytest.mark.usefixtures("one_rank")


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_outcome(actual: Outcome, expected: Outcome) -> None:
    assert_same_weights(actual.policy, expected.policy)
    assert_same_weights(actual.critic, expected.critic)
    assert actual.norms == pytest.approx(expected.norms, rel=1e-4)
    assert actual.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-5)


def named(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def plain_training(
    folder: Path, max_grad_norm: float = 0.0
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """The same steps with torch's AdamW and the whole batch in one backward pass: (policy, critic, norms)."""
    batch, algorithm = make_batch(fixed_groups()), PPO(value_clip=None, entropy_coef=0.1)
    policy = PolicyModel.load(folder, dtype=torch.float32, temperature=0.8, checkpointing=False)
    critic = ValueModel.load(folder, dtype=torch.float32, checkpointing=False)
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1.0, weight_decay=0.0)
        for m in (critic, policy)
    ]
    everything = range(len(batch.trajectories))
    (micro,) = batch.microbatches(everything, 10_000)
    inputs = (micro.token_ids, micro.position_ids, micro.boundaries, micro.targets)
    mask = torch.ones(batch.num_scored_tokens, dtype=torch.bool)
    counts = batch_counts(mask, batch.sequence_index).tolist()
    weights = algorithm.token_weights(mask, batch.sequence_index, num_tokens=counts[0], num_sequences=counts[1]).float()
    norms = []
    for _ in range(NUM_STEPS):
        values = critic(*inputs)
        notes = annotate(algorithm, batch, values.detach())
        assert notes.returns is not None and notes.old_values is not None
        logprobs, entropy = policy(*inputs)
        policy_loss = algorithm.loss(
            LossInputs(logprobs, entropy, batch.behavior_logprobs, notes.advantages, weights, batch.sequence_index)
        )
        value_loss = algorithm.value_loss(ValueLossInputs(values, notes.old_values, notes.returns, weights))
        for module, optimizer, loss in zip((critic, policy), optimizers, (value_loss, policy_loss), strict=True):
            optimizer.zero_grad()
            loss.loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm or float("inf"))))
            optimizer.step()
    return named(policy), named(critic), norms


@pytest.fixture(scope="module")
def whole(model_folder: Path, one_rank: None) -> Outcome:
    """One rank, ZeRO 0, one microbatch."""
    return train(model_folder, fixed_groups())


def test_deepspeed_makes_the_steps_that_plain_torch_makes(model_folder: Path, whole: Outcome):
    policy, critic, norms = plain_training(model_folder)
    assert_same_weights(whole.policy, policy)
    assert_same_weights(whole.critic, critic)
    assert whole.norms == pytest.approx(norms, rel=1e-4)


def test_the_steps_move_the_weights_far_enough_to_be_compared(model_folder: Path, whole: Outcome):
    start = named(PolicyModel.load(model_folder, dtype=torch.float32, temperature=1.0, checkpointing=False))
    assert max(float((whole.policy[name] - start[name]).abs().max()) for name in start) > 0.01


@pytest.mark.parametrize(
    ("stage", "budget", "offload"),
    [(0, 1, False), (0, 40, False), (2, 1, False), (2, 40, True), (3, 1, False), (3, 40, True)],
)
def test_neither_zero_stage_nor_microbatches_nor_offloading_change_the_result(
    model_folder: Path, whole: Outcome, stage: int, budget: int, offload: bool
):
    assert_same_outcome(train(model_folder, fixed_groups(), stage=stage, budget=budget, offload=offload), whole)


def test_parameters_are_gathered_once_per_microbatch_also_where_passes_that_score_come_first(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    policy, batch = policy_engine(model_folder, OPTIMIZER, 3, torch.float32), make_batch(fixed_groups())
    numbers: list[int] = []
    gather = "_PartitionedParameterCoordinator__all_gather_params_"
    coordinator = type(policy._engine.optimizer.parameter_offload.get_param_coordinator())
    ungathered = getattr(coordinator, gather)

    def counting(self: Any, parameters: Any, *arguments: Any, **named: Any) -> None:
        numbers.append(sum(p.ds_numel for p in parameters if p.ds_status.name == "NOT_AVAILABLE"))
        ungathered(self, parameters, *arguments, **named)

    monkeypatch.setattr(coordinator, gather, counting)
    (micro,) = batch.microbatches(range(len(batch.trajectories)), 10_000)
    for _ in range(3):
        numbers.clear()
        with torch.no_grad():
            policy.forward(micro)
        logprobs, _ = policy.forward(micro)
        policy.backward(logprobs.sum(), last=True)
        policy.step(0.0)
    # Parameters that were gathered for scoring are still gathered for training.
    assert sum(numbers) == sum(p.ds_numel for p in policy._engine.module.parameters())


@pytest.mark.system
def test_two_ranks_with_unequal_shares_make_the_same_steps_as_one(model_folder: Path, whole: Outcome, tmp_path: Path):
    output = tmp_path / "outcomes.pt"
    run_ranks("ranks.py", 2, model_folder, output)
    saved = torch.load(output, weights_only=True)
    outcomes = saved["outcomes"]
    assert set(outcomes) == set(STAGES)
    assert saved["skipped"] == dict.fromkeys(STAGES, True)
    for outcome in outcomes.values():
        assert_same_outcome(Outcome(**outcome), whole)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_clipped_to_the_global_norm_and_reported_unclipped(model_folder: Path, stage: int):
    clipping = replace(OPTIMIZER, max_grad_norm=0.3)
    policy, critic, norms = plain_training(model_folder, max_grad_norm=0.3)
    assert min(norms) > 0.3
    outcome = train(model_folder, fixed_groups(), stage=stage, budget=40, optimizer=clipping)
    assert outcome.norms == pytest.approx(norms, rel=1e-3)
    assert_same_weights(outcome.policy, policy)
    assert_same_weights(outcome.critic, critic)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_keeps_float32_master_weights(model_folder: Path, stage: int):
    """Sixty steps of 1e-4 move a weight of 1 by 6e-3; bfloat16 has steps of 8e-3 there and would lose each of them."""
    optimizer = replace(OPTIMIZER, learning_rate=1e-4, eps=1e-8)
    engine = policy_engine(model_folder, optimizer, stage, torch.bfloat16)
    micro = MicroBatch(torch.arange(3, 9), torch.arange(6), (0, 6), torch.arange(1, 6), slice(0, 5))
    name = "causal_lm.model.norm.weight"
    start = dict(engine.gather(torch.float32))[name]
    for _ in range(60):
        logprobs, _ = engine.forward(micro)
        engine.backward(-logprobs.sum(), last=True)
        engine.step(1e-4)
    assert (dict(engine.gather(torch.float32))[name] != start).float().mean() > 0.5


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adams_first_step_is_the_learning_rate(model_folder: Path, stage: int, dtype: torch.dtype):
    engine = policy_engine(model_folder, replace(OPTIMIZER, eps=1e-8), stage, dtype)
    micro = MicroBatch(torch.arange(3, 9), torch.arange(6), (0, 6), torch.arange(1, 6), slice(0, 5))
    logprobs, _ = engine.forward(micro)
    engine.backward(-logprobs.sum(), last=True)
    engine.step(0.01)
    # Biases are 0 in a new model.
    moved = dict(engine.gather(torch.float32))["causal_lm.model.layers.0.self_attn.v_proj.bias"].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-2, atol=0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_copies_every_parameter_in_the_wanted_dtype(
    model_folder: Path, stage: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(learner.distributed.deepspeed_engine, "GATHER_ELEMENTS", 2000)
    engine = policy_engine(model_folder, OPTIMIZER, stage, torch.float32)
    expected = {f"causal_lm.{name}": p.detach().to(dtype) for name, p in plain_model(model_folder).named_parameters()}
    gathered = list(engine.gather(dtype))
    assert [name for name, _ in gathered] == list(expected)
    for name, tensor in gathered:
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name
        tensor.zero_()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in engine.gather(dtype))


def test_loading_a_folder_without_a_state_says_so(model_folder: Path, tmp_path: Path):
    engine: TrainingEngine = policy_engine(model_folder, OPTIMIZER, 0, torch.float32)
    with pytest.raises(FileNotFoundError, match="holds no training state"):
        engine.load(tmp_path)
    assert engine.world_size == 1 and engine.device == CPU


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_is_skipped_and_leaves_no_trace(model_folder: Path, stage: int, dtype: torch.dtype):
    """Weights and optimizer state: later steps equal those of an engine that never made the skipped step."""
    batch, algorithm = make_batch(fixed_groups()), PPO()

    def engines() -> tuple[TrainingEngine, TrainingEngine]:
        settings = replace(OPTIMIZER, eps=1e-8), stage, dtype
        return policy_engine(model_folder, *settings), critic_engine(model_folder, *settings)

    pair, undisturbed = engines(), engines()
    (first, *_) = batch.microbatches(range(len(batch.trajectories)), 60)
    for step in range(2):
        for two in (pair, undisturbed):
            one_step(*two, algorithm, batch, 60)
        before = dict(pair[0].gather(torch.float32))
        # Infinite with a finite gradient, and a gradient that is NaN; in the first microbatch of two.
        for bad in (
            lambda logprobs: logprobs.sum() + math.inf,
            lambda logprobs: (logprobs - logprobs.max()).sqrt().sum(),
        ):
            pair[0].backward(bad(pair[0].forward(first)[0]), last=False)
            pair[0].backward(pair[0].forward(first)[0].sum(), last=True)
            assert not math.isfinite(pair[0].step(0.1)), step
            assert all(torch.equal(tensor, before[name]) for name, tensor in pair[0].gather(torch.float32))
    one_step(*pair, algorithm, batch, 60)
    one_step(*undisturbed, algorithm, batch, 60)
    expected = dict(undisturbed[0].gather(torch.float32))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pair[0].gather(torch.float32))


def test_ranks_wait_for_work_that_rank_0_does_alone_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch):
    given: list[Any] = []
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **named: given.append(named["timeout"]))
    init_distributed(CPU)
    # Digesting and flushing the checkpoint of a model of 70B parameters takes rank 0 half an hour.
    assert given[0] >= datetime.timedelta(hours=12)
