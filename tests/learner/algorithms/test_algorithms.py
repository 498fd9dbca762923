import dataclasses
import math
from typing import Any

import hydra.utils
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.base import Algorithm, LossInputs, ValueLossInputs
from learner.algorithms.cispo import CISPO
from learner.algorithms.corrections import (
    TOPR,
    ClippedTIS,
    Correction,
    DecoupledTIS,
    NoCorrection,
    PPOBehavior,
    SequenceMask,
    SequenceTIS,
    TokenMask,
    VTrace,
)
from learner.algorithms.grpo import GRPO
from learner.algorithms.gspo import GSPO
from learner.algorithms.losses import batch_counts
from learner.algorithms.metrics import summarize
from learner.algorithms.ppo import PPO
from learner.algorithms.reinforce_pp import ReinforcePP
from tests.references import (
    Ragged,
    RaggedBatch,
    aggregate,
    cispo_terms,
    clipped_terms,
    clipped_weight,
    decoupled_weight,
    gradient,
    gspo_terms,
    icepop_weight,
    kl_term,
    ragged_batches,
    sequence_ratio,
    topr_weight,
    value_terms,
)

KL_COEF, ENTROPY_COEF = 0.3, 0.05
CORRECTIONS: dict[str, Correction] = {
    "decoupled_tis": DecoupledTIS(max_importance_weight=1.5),
    "clipped_tis": ClippedTIS(low=0.7, high=1.3, max_importance_weight=1.5),
    "token_mask": TokenMask(low=0.5, high=2.0),
    "ppo_behavior": PPOBehavior(),
    "none": NoCorrection(),
    "sequence_mask": SequenceMask(low=0.7, high=1.5),
    "sequence_tis": SequenceTIS(max_importance_weight=1.5),
    "topr": TOPR(),
    "vtrace": VTrace(rho_bar=1.2),
}
SENSELESS = {("PPO", "topr"), ("GSPO", "ppo_behavior"), *((n, "vtrace") for n in ("GRPO", "GSPO", "CISPO"))}
PAIRS = [
    (make, name) for make in (PPO, GRPO, GSPO, CISPO) for name in CORRECTIONS if (make.__name__, name) not in SENSELESS
]


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
        sequence_index=index[part],
        proximal_logprobs=batch.packed("proximal")[part],
        ref_logprobs=batch.packed("ref")[part] if algorithm.needs_reference else None,
    )


def reference_weights(correction: str, batch: RaggedBatch) -> list[list[float]]:
    found = []
    for i, mask in enumerate(batch.mask):
        proximal, behavior = batch.rows["proximal"][i], batch.rows["behavior"][i]
        pairs = list(zip(proximal, behavior, strict=True))
        triples = zip(proximal, behavior, batch.rows["advantages"][i], strict=True)
        ratios = {kind: sequence_ratio(proximal, behavior, mask, kind) for kind in ("product", "geometric")}
        geometric = ratios["geometric"] if 0.7 <= ratios["geometric"] <= 1.5 else 0.0
        tapered = topr_weight(ratios["product"], batch.rows["advantages"][i], mask)
        found.append(
            {
                "decoupled_tis": [decoupled_weight(p, b, 1.5) for p, b in pairs],
                "clipped_tis": [clipped_weight(*triple, 0.7, 1.3, 1.5) for triple in triples],
                "token_mask": [icepop_weight(p, b, 0.5, 2.0) for p, b in pairs],
                "vtrace": [decoupled_weight(p, b, 1.2) for p, b in pairs],
                "sequence_mask": [geometric] * len(mask),
                "sequence_tis": [min(ratios["product"], 1.5)] * len(mask),
                "topr": [tapered] * len(mask),
            }.get(correction, [1.0] * len(mask))
        )
    return found


def reference_loss(algorithm: Algorithm, batch: RaggedBatch, correction: str) -> tuple[float, list[float]]:
    denominator = batch.rows["behavior" if correction == "ppo_behavior" else "proximal"]
    weights, advantages = reference_weights(correction, batch), batch.rows["advantages"]
    clips = algorithm.clip_low, algorithm.clip_high

    def loss(logprobs: Ragged) -> Tensor:
        if isinstance(algorithm, GSPO):
            terms = gspo_terms(logprobs, denominator, weights, advantages, batch.mask, *clips)
        elif isinstance(algorithm, CISPO):
            terms = cispo_terms(logprobs, denominator, weights, advantages, *clips)
        else:
            terms = clipped_terms(logprobs, denominator, weights, advantages, *clips)
        for i, row in enumerate(terms):
            for t in range(len(row)):
                row[t] = row[t] - ENTROPY_COEF * batch.rows["entropy"][i][t]
                if algorithm.kl == "loss":
                    kind = algorithm.kl_kind or "k3"
                    row[t] = row[t] + KL_COEF * kl_term(logprobs[i][t], batch.rows["ref"][i][t], kind)
        return aggregate(terms, batch.mask, algorithm.aggregation, 7)

    return gradient(loss, batch.rows["logprobs"])


@given(
    ragged_batches(),
    st.sampled_from(PAIRS),
    st.sampled_from([("off", None), ("reward", "k1"), ("loss", None), ("loss", "k1"), ("loss", "k2"), ("loss", "k3")]),
    st.sampled_from(["token_mean", "sequence_mean", "constant"]),
)
@settings(max_examples=200)
def test_loss_agrees_with_the_equations(batch: RaggedBatch, pair: Any, kl: Any, aggregation: Any) -> None:
    make, correction = pair
    algorithm = make(
        correction=CORRECTIONS[correction],
        clip_low=0.1,
        clip_high=0.28,
        kl=kl[0],
        kl_kind=kl[1],
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


def test_a_scheduled_coefficient_takes_the_place_of_the_fixed_one() -> None:
    batch, fixed = RaggedBatch.random([4, 6], 0.3, 5), GRPO(kl="loss", kl_coef=0.7)
    given = dataclasses.replace(loss_inputs(fixed, batch), kl_coef=0.7)
    scheduled = GRPO(kl="loss", kl_coef=0.1).loss(given)
    assert scheduled.loss.item() == fixed.loss(loss_inputs(fixed, batch)).loss.item()
    shown = summarize(scheduled.metrics.totals())
    assert shown["policy/kl_penalty"] == scheduled.metrics.sums["kl_penalty"].item() > 0


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
        algorithm = PPO(correction=correction) if name == "vtrace" else GRPO(correction=correction)
        shown[name] = summarize(algorithm.loss(loss_inputs(algorithm, batch)).metrics.totals())
    assert shown["decoupled_tis"]["importance/fraction_capped"] > 0
    assert shown["token_mask"]["importance/fraction_masked"] > 0
    assert shown["sequence_tis"]["importance/fraction_capped"] in (0.0, 1.0)
    for name in ("none", "ppo_behavior"):
        assert shown[name]["importance/fraction_capped"] == shown[name]["importance/fraction_masked"] == 0
    assert len({metrics["importance/weight_mean"] for metrics in shown.values()}) == 1
    assert shown["ppo_behavior"]["policy/ratio_mean"] != shown["none"]["policy/ratio_mean"]


def test_hydra_builds_algorithms_from_plain_words() -> None:
    config = {
        "_target_": "learner.algorithms.ppo.PPO",
        "correction": {"_target_": "learner.algorithms.corrections.DecoupledTIS", "max_importance_weight": 3.0},
        "kl": "reward",
        "kl_coef": 0.01,
        "value_clip": None,
    }
    built = hydra.utils.instantiate(config)
    expected = PPO(correction=DecoupledTIS(max_importance_weight=3.0), kl="reward", kl_coef=0.01, value_clip=None)
    assert built == expected
    assert hydra.utils.instantiate({"_target_": "learner.algorithms.grpo.GRPO", "normalize_std": False}) == GRPO(
        normalize_std=False
    )


def test_what_algorithms_need() -> None:
    assert PPO().needs_critic and not GRPO().needs_critic
    assert GRPO().min_group_size == 2 and PPO().min_group_size == 1
    assert [GRPO(kl=kl, kl_coef=0.1).needs_reference for kl in ("off", "reward", "loss")] == [False, True, True]


def test_a_missing_annotation_is_named() -> None:
    batch = RaggedBatch.random([3], 0.0, 1)
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
        ({"reward_scale": 0.0}, "reward_scale=0.0"),
        ({"clip_high": math.nan}, "clip_high=nan"),
        ({"reward_scale": math.inf}, "reward_scale=inf"),
        ({"reward_shift": math.nan}, "reward_shift=nan"),
        ({"entropy_coef": math.nan}, "entropy_coef=nan"),
        ({"reward_clip": -1.0}, "reward_clip=-1.0"),
        ({"correction": TOPR()}, "TOPR asks whether a completion as a whole was good.*critic of PPO.*algorithm=rloo"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPO(**fields)


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (GRPO, {"correction": VTrace()}, "GRPO has no critic whose targets VTrace could correct; .*algorithm=ppo"),
        (GRPO, {"baseline": "mean"}, "baseline is 'mean'; choose group_mean or leave_one_out"),
        (GRPO, {"baseline": "leave_one_out"}, "leave_one_out with normalize_std=True"),
        (GSPO, {"correction": PPOBehavior()}, "1 - 0.0003 and 1 .* correction=decoupled_tis"),
        (ReinforcePP, {"gamma": 1.5}, "gamma=1.5"),
    ],
)
def test_pairs_that_make_no_sense_are_refused_with_the_reason(
    make: type[Algorithm], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**fields)
