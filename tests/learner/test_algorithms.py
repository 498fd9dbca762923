import dataclasses
from typing import Any

import hydra.utils
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.advantages import whiten
from learner.algorithm import AdvantageInputs, Algorithm, LossInputs, ValueLossInputs
from learner.grpo import GRPO
from learner.importance import Correction, DecoupledTIS, NoCorrection, PPOBehavior, TokenMask
from learner.losses import batch_counts
from learner.metrics import summarize
from learner.ppo import PPO
from tests.references import (
    Ragged,
    RaggedBatch,
    aggregate,
    clipped_terms,
    decoupled_weight,
    gae_advantages,
    gradient,
    group_advantages,
    icepop_weight,
    kl_term,
    ragged_batches,
    value_terms,
    whitened,
)

KL_COEF, ENTROPY_COEF = 0.3, 0.05
CORRECTIONS: dict[str, Correction] = {
    "decoupled_tis": DecoupledTIS(max_importance_weight=1.5),
    "token_mask": TokenMask(low=0.5, high=2.0),
    "ppo_behavior": PPOBehavior(),
    "none": NoCorrection(),
}


def rewards_of(batch: RaggedBatch) -> list[float]:
    return [row[0] for row in batch.rows["rewards"]]


def groups_of(batch: RaggedBatch) -> list[int]:
    return [i // 2 for i in range(len(batch.lengths))]


def advantage_inputs(batch: RaggedBatch, **changes: Any) -> AdvantageInputs:
    inputs = AdvantageInputs(
        rewards=torch.tensor(rewards_of(batch), dtype=torch.float64),
        group_index=torch.tensor(groups_of(batch)),
        sequence_index=batch.sequence_index,
        values=batch.packed("values"),
        behavior_logprobs=batch.packed("behavior"),
        proximal_logprobs=batch.packed("proximal"),
        ref_logprobs=batch.packed("ref"),
    )
    return dataclasses.replace(inputs, **changes)


def expected_token_rewards(batch: RaggedBatch, logprobs: str, kl_coef: float) -> list[list[float]]:
    rows = []
    for i, reward in enumerate(rewards_of(batch)):
        row = [
            -kl_coef * (x - ref) if kl_coef else 0.0
            for x, ref in zip(batch.rows[logprobs][i], batch.rows["ref"][i], strict=True)
        ]
        row[-1] += reward
        rows.append(row)
    return rows


def loss_inputs(algorithm: Algorithm, batch: RaggedBatch, part: slice = slice(None)) -> LossInputs:
    mask, index = batch.packed_mask, batch.sequence_index
    num_tokens, num_sequences = batch_counts(mask, index).tolist()
    weights = algorithm.token_weights(mask, index, num_tokens=num_tokens, num_sequences=num_sequences)
    return LossInputs(
        logprobs=batch.packed("logprobs")[part].requires_grad_(),
        entropy=batch.packed("entropy")[part].requires_grad_(),
        behavior_logprobs=batch.packed("behavior")[part],
        advantages=batch.packed("advantages")[part],
        token_weights=weights[part],
        proximal_logprobs=batch.packed("proximal")[part],
        ref_logprobs=batch.packed("ref")[part] if algorithm.needs_reference else None,
    )


def reference_loss(algorithm: Algorithm, batch: RaggedBatch, correction: str) -> tuple[float, list[float]]:
    denominator = "behavior" if correction == "ppo_behavior" else "proximal"
    weigh = {
        "decoupled_tis": lambda p, b: decoupled_weight(p, b, 1.5),
        "token_mask": lambda p, b: icepop_weight(p, b, 0.5, 2.0),
    }.get(correction, lambda p, b: 1.0)

    def loss(logprobs: Ragged) -> Tensor:
        weights = [
            [weigh(p, b) for p, b in zip(*rows, strict=True)]
            for rows in zip(batch.rows["proximal"], batch.rows["behavior"], strict=True)
        ]
        clips = algorithm.clip_low, algorithm.clip_high
        terms = clipped_terms(logprobs, batch.scalars(denominator), weights, batch.scalars("advantages"), *clips)
        for i, row in enumerate(terms):
            for t in range(len(row)):
                row[t] = row[t] - ENTROPY_COEF * batch.rows["entropy"][i][t]
                if algorithm.kl == "loss":
                    row[t] = row[t] + KL_COEF * kl_term(logprobs[i][t], batch.rows["ref"][i][t], "k3")
        return aggregate(terms, batch.mask, algorithm.aggregation, 7)

    return gradient(loss, batch.rows["logprobs"])


@given(
    ragged_batches(),
    st.sampled_from(sorted(CORRECTIONS)),
    st.sampled_from(["off", "reward", "loss"]),
    st.sampled_from(["token_mean", "sequence_mean", "constant"]),
)
def test_loss_agrees_with_the_equations(batch: RaggedBatch, correction: str, kl: Any, aggregation: Any) -> None:
    algorithm = GRPO(
        correction=CORRECTIONS[correction],
        clip_high=0.28,
        kl=kl,
        kl_coef=KL_COEF,
        entropy_coef=ENTROPY_COEF,
        aggregation=aggregation,
        constant_length=7,
    )
    inputs = loss_inputs(algorithm, batch)
    outputs = algorithm.loss(inputs)
    value, slope = reference_loss(algorithm, batch, correction)
    assert outputs.loss.item() == pytest.approx(value, abs=1e-12)
    found, entropy_slope = torch.autograd.grad(outputs.loss, [inputs.logprobs, inputs.entropy])
    assert found.tolist() == pytest.approx(slope, abs=1e-10)
    assert entropy_slope.tolist() == pytest.approx((-ENTROPY_COEF * inputs.token_weights).tolist(), abs=1e-12)


@given(ragged_batches(), st.integers(0, 5), st.sampled_from(["token_mean", "sequence_mean", "constant"]))
def test_microbatches_add_up_to_the_whole(batch: RaggedBatch, first_part: int, aggregation: Any) -> None:
    algorithm = PPO(kl="loss", kl_coef=KL_COEF, entropy_coef=0.1, aggregation=aggregation, constant_length=7)
    cut = sum(batch.lengths[:first_part])
    whole = algorithm.loss(loss_inputs(algorithm, batch))
    parts = [algorithm.loss(loss_inputs(algorithm, batch, p)) for p in (slice(0, cut), slice(cut, None))]
    assert (parts[0].loss + parts[1].loss).item() == pytest.approx(whole.loss.item(), abs=1e-12)
    summed = summarize((parts[0].metrics + parts[1].metrics).totals())
    assert summed == pytest.approx(summarize(whole.metrics.totals()), rel=1e-9, abs=1e-9)
    assert summed["policy/total_loss"] == pytest.approx(whole.loss.item(), abs=1e-12)


@given(ragged_batches(), st.sampled_from([0.0, KL_COEF]), st.booleans(), st.booleans())
def test_ppo_advantages_agree(batch: RaggedBatch, kl_coef: float, whitening: bool, has_proximal: bool) -> None:
    algorithm = PPO(
        gamma=0.97,
        lam=0.9,
        kl="reward" if kl_coef else "off",
        kl_coef=kl_coef,
        whiten_advantages=whitening,
    )
    inputs = advantage_inputs(batch, **({} if has_proximal else {"proximal_logprobs": None}))
    outputs = algorithm.advantages(inputs)
    rewards = expected_token_rewards(batch, "proximal" if has_proximal else "behavior", kl_coef)
    estimates = [
        gae_advantages(r, v, [True] * len(v), 0.97, 0.9) for r, v in zip(rewards, batch.rows["values"], strict=True)
    ]
    advantages = [x for row, _ in estimates for x in row]
    assert outputs.token_rewards.tolist() == pytest.approx([x for row in rewards for x in row], abs=1e-12)
    assert outputs.returns is not None
    assert outputs.returns.tolist() == pytest.approx([x for _, row in estimates for x in row], abs=1e-12)
    if whitening:
        advantages = whitened(advantages)
    assert outputs.advantages.tolist() == pytest.approx(advantages, rel=1e-8, abs=1e-10 if whitening else 1e-12)


def test_ppo_whitens_over_all_ranks() -> None:
    batch = RaggedBatch.random([3, 5], 0.0, 3)
    raw = PPO(whiten_advantages=False).advantages(advantage_inputs(batch)).advantages
    ones = torch.ones_like(raw, dtype=torch.bool)
    other_rank = torch.tensor([4.0, 10.0, 40.0], dtype=torch.float64)
    shared = PPO().advantages(advantage_inputs(batch, reduce=lambda tensor: tensor + other_rank)).advantages
    assert torch.equal(shared, whiten(raw, ones, reduce=lambda tensor: tensor + other_rank))
    assert not torch.allclose(shared, whiten(raw, ones))


@given(ragged_batches(), st.sampled_from([0.0, KL_COEF]), st.booleans())
def test_grpo_advantages_agree(batch: RaggedBatch, kl_coef: float, normalize_std: bool) -> None:
    algorithm = GRPO(kl="reward" if kl_coef else "off", kl_coef=kl_coef, normalize_std=normalize_std)
    outputs = algorithm.advantages(advantage_inputs(batch))
    token_rewards = expected_token_rewards(batch, "proximal", kl_coef)
    expected = group_advantages([sum(row) for row in token_rewards], groups_of(batch), normalize_std)
    per_token = [a for a, length in zip(expected, batch.lengths, strict=True) for _ in range(length)]
    assert outputs.returns is None
    assert outputs.advantages.tolist() == pytest.approx(per_token, rel=1e-9, abs=1e-11)
    assert outputs.token_rewards.tolist() == pytest.approx([x for row in token_rewards for x in row], abs=1e-12)


@given(ragged_batches())
def test_ppo_value_loss_agrees(batch: RaggedBatch) -> None:
    algorithm = PPO(value_clip=0.3, aggregation="sequence_mean")
    weights = loss_inputs(algorithm, batch).token_weights
    values = batch.packed("values").requires_grad_()
    outputs = algorithm.value_loss(
        ValueLossInputs(values, batch.packed("old_values"), batch.packed("returns"), weights)
    )

    def reference(rows: Ragged) -> Tensor:
        terms = value_terms(rows, batch.scalars("old_values"), batch.scalars("returns"), 0.3)
        return aggregate(terms, batch.mask, "sequence_mean")

    value, slope = gradient(reference, batch.rows["values"])
    assert outputs.loss.item() == pytest.approx(value, abs=1e-12)
    assert torch.autograd.grad(outputs.loss, values)[0].tolist() == pytest.approx(slope, abs=1e-10)
    assert summarize(outputs.metrics.totals())["value/value_loss"] == pytest.approx(value, abs=1e-12)


def test_without_proximal_logprobs_the_trained_policy_is_its_own_proximal() -> None:
    batch, algorithm = RaggedBatch.random([4, 6], 0.3, 5), GRPO()
    implicit = dataclasses.replace(loss_inputs(algorithm, batch), proximal_logprobs=None)
    explicit = dataclasses.replace(implicit, proximal_logprobs=implicit.logprobs.detach())
    outputs = algorithm.loss(implicit)
    assert outputs.loss.item() == algorithm.loss(explicit).loss.item()
    assert summarize(outputs.metrics.totals())["policy/ratio_max"] == 1.0


def test_reference_kl_is_shown_but_not_in_the_loss_when_it_is_in_the_reward() -> None:
    batch, plain = RaggedBatch.random([4, 6], 0.0, 5), GRPO()
    penalized = GRPO(kl="reward", kl_coef=0.5)
    inputs = loss_inputs(penalized, batch)
    outputs = penalized.loss(inputs)
    assert outputs.loss.item() == plain.loss(loss_inputs(plain, batch)).loss.item()
    shown = summarize(outputs.metrics.totals())
    pairs = zip(batch.scalars("logprobs"), batch.rows["ref"], strict=True)
    k3 = [kl_term(x, r, "k3").item() for row, refs in pairs for x, r in zip(row, refs, strict=True)]
    assert shown["policy/reference_kl_k3"] == pytest.approx(sum(k3) / len(k3), abs=1e-12)
    assert shown["policy/kl_penalty"] == 0
    without = penalized.loss(dataclasses.replace(inputs, ref_logprobs=None))
    assert "policy/reference_kl_k3" not in summarize(without.metrics.totals())


def test_corrections_show_what_they_did() -> None:
    batch = RaggedBatch.random([50], 0.0, 5)
    shown = {}
    for name, correction in CORRECTIONS.items():
        algorithm = GRPO(correction=correction)
        shown[name] = summarize(algorithm.loss(loss_inputs(algorithm, batch)).metrics.totals())
    assert shown["decoupled_tis"]["importance/fraction_capped"] > 0
    assert shown["token_mask"]["importance/fraction_masked"] > 0
    for name in ("none", "ppo_behavior"):
        assert shown[name]["importance/fraction_capped"] == shown[name]["importance/fraction_masked"] == 0
    assert len({metrics["importance/weight_mean"] for metrics in shown.values()}) == 1
    assert shown["ppo_behavior"]["policy/ratio_mean"] != shown["none"]["policy/ratio_mean"]


def test_hydra_builds_algorithms_from_plain_words() -> None:
    config = {
        "_target_": "learner.ppo.PPO",
        "correction": {"_target_": "learner.importance.DecoupledTIS", "max_importance_weight": 3.0},
        "kl": "reward",
        "kl_coef": 0.01,
        "value_clip": None,
    }
    built = hydra.utils.instantiate(config)
    expected = PPO(correction=DecoupledTIS(max_importance_weight=3.0), kl="reward", kl_coef=0.01, value_clip=None)
    assert built == expected
    assert hydra.utils.instantiate({"_target_": "learner.grpo.GRPO", "normalize_std": False}) == GRPO(
        normalize_std=False
    )


def test_what_algorithms_need() -> None:
    assert PPO().needs_critic and not GRPO().needs_critic
    assert GRPO().min_group_size == 2 and PPO().min_group_size == 1
    assert [GRPO(kl=kl, kl_coef=0.1).needs_reference for kl in ("off", "reward", "loss")] == [False, True, True]


def test_missing_annotations_are_named() -> None:
    batch = RaggedBatch.random([3], 0.0, 1)
    with pytest.raises(ValueError, match="PPO needs values"):
        PPO().advantages(advantage_inputs(batch, values=None))
    with pytest.raises(ValueError, match="GRPO needs ref_logprobs"):
        GRPO(kl="reward", kl_coef=0.1).advantages(advantage_inputs(batch, ref_logprobs=None))
    algorithm = GRPO(kl="loss", kl_coef=0.1)
    with pytest.raises(ValueError, match="GRPO needs ref_logprobs"):
        algorithm.loss(dataclasses.replace(loss_inputs(algorithm, batch), ref_logprobs=None))
    with pytest.raises(TypeError, match="GRPO has no critic"):
        GRPO().value_loss(ValueLossInputs(*[torch.zeros(1)] * 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"clip_high": -0.1}, "clip_high=-0.1"),
        ({"kl": False}, "in YAML with quotes"),
        ({"kl": "loss"}, "kl_coef=0.0 punishes nothing"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0"),
        ({"aggregation": "mean"}, "choose token_mean"),
        ({"aggregation": "constant"}, "constant_length=0"),
        ({"gamma": 1.01}, "gamma=1.01"),
        ({"lam": -0.5}, "lam=-0.5"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPO(**fields)
