import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.metrics import (
    MetricSums,
    importance_weights,
    policy_metrics,
    reference_kl,
    summarize,
    value_metrics,
)
from tests.references import RaggedBatch, deviation, effective_sample_size, mean, ragged_batches

LOW, HIGH, CAP = 0.2, 0.3, 1.5


def policy_sums(batch: RaggedBatch, part: slice = slice(None)) -> MetricSums:
    def take(name: str) -> Tensor:
        return batch.packed(name)[part]

    weights = (take("proximal") - take("behavior")).exp()
    return policy_metrics(
        logprobs=take("logprobs"),
        proximal_logprobs=take("proximal"),
        behavior_logprobs=take("behavior"),
        ratio_logprobs=take("proximal"),
        advantages=take("advantages"),
        entropy=take("entropy"),
        importance_weights=weights * (weights > 0.5),
        capped=weights > CAP,
        loss_mask=batch.packed_mask[part],
        clip_low=LOW,
        clip_high=HIGH,
    )


def value_sums(batch: RaggedBatch, part: slice = slice(None), value_clip: float | None = 0.3) -> MetricSums:
    sums = value_metrics(
        values=batch.packed("values")[part],
        old_values=batch.packed("old_values")[part],
        returns=batch.packed("returns")[part],
        loss_mask=batch.packed_mask[part],
        value_clip=value_clip,
    )
    return sums + MetricSums({"value_loss": torch.tensor(0.25)})


@given(ragged_batches())
def test_policy_metrics_agree_with_their_definitions(batch: RaggedBatch) -> None:
    pi, prox, mu = (batch.select(name) for name in ("logprobs", "proximal", "behavior"))
    advantages = batch.select("advantages")
    weights = [math.exp(p - b) for p, b in zip(prox, mu, strict=True)]
    ratios = [math.exp(x - p) for x, p in zip(pi, prox, strict=True)]
    steps = [x - b for x, b in zip(pi, mu, strict=True)]
    signed = list(zip(ratios, advantages, strict=True))
    expected = {
        "policy/num_tokens": len(pi),
        "policy/entropy": mean(batch.select("entropy")),
        "policy/advantage_mean": mean(advantages),
        "policy/advantage_std": deviation(advantages),
        "policy/ratio_mean": mean(ratios),
        "policy/ratio_max": max(ratios),
        "policy/fraction_clipped_low": mean([float(u < 1 - LOW and a < 0) for u, a in signed]),
        "policy/fraction_clipped_high": mean([float(u > 1 + HIGH and a > 0) for u, a in signed]),
        "importance/behavior_kl_k1": mean([-s for s in steps]),
        "importance/behavior_kl_k3": mean([math.exp(s) - 1 - s for s in steps]),
        "importance/effective_sample_size": effective_sample_size(weights),
        "importance/weight_mean": mean(weights),
        "importance/weight_std": deviation(weights),
        "importance/weight_max": max(weights),
        "importance/fraction_capped": mean([float(w > CAP) for w in weights]),
        "importance/fraction_masked": mean([float(w <= 0.5) for w in weights]),
    }
    found = summarize(policy_sums(batch).totals())
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert 0 < found["importance/effective_sample_size"] <= 1 + 1e-12


@given(ragged_batches(), st.sampled_from([0.3, 0.0, None]))
def test_value_metrics_agree_with_their_definitions(batch: RaggedBatch, value_clip: float | None) -> None:
    values, old, returns = (batch.select(name) for name in ("values", "old_values", "returns"))
    errors = [r - v for r, v in zip(returns, values, strict=True)]
    spread = deviation(returns)
    expected = {
        "value/value_loss": 0.25,
        "value/value_mean": mean(values),
        "value/return_mean": mean(returns),
        "value/return_std": spread,
        "value/error_rms": math.sqrt(mean([e * e for e in errors])),
        "value/explained_variance": 1 - (deviation(errors) / spread) ** 2 if len(returns) > 1 else 0.0,
        "value/fraction_clipped": mean(
            [float(abs(v - o) > (value_clip or math.inf)) for v, o in zip(values, old, strict=True)]
        ),
    }
    assert summarize(value_sums(batch, value_clip=value_clip).totals()) == pytest.approx(expected, rel=1e-7, abs=1e-7)


@given(ragged_batches(), st.integers(0, 20))
def test_microbatches_and_ranks_add_up(batch: RaggedBatch, cut: int) -> None:
    whole = summarize(policy_sums(batch).totals())
    parts = [policy_sums(batch, slice(0, cut)), policy_sums(batch, slice(cut, None))]
    assert summarize((parts[0] + parts[1]).totals()) == pytest.approx(whole, rel=1e-9, abs=1e-9)

    stacked: dict[str, list[Tensor]] = {"sum": [], "max": []}
    for part in parts:
        part.totals(
            reduce_sum=lambda tensor: (stacked["sum"].append(tensor), tensor)[1],
            reduce_max=lambda tensor: (stacked["max"].append(tensor), tensor)[1],
        )
    assert len(stacked["sum"]) == len(stacked["max"]) == 2
    reduced = parts[0].totals(
        reduce_sum=lambda _: stacked["sum"][0] + stacked["sum"][1],
        reduce_max=lambda _: torch.maximum(*stacked["max"]),
    )
    assert summarize(reduced) == pytest.approx(whole, rel=1e-9, abs=1e-9)


def test_policy_and_critic_sums_go_together() -> None:
    batch = RaggedBatch.random([3, 4], 0.0, 1)
    together = summarize((policy_sums(batch) + value_sums(batch)).totals())
    assert together == summarize(policy_sums(batch).totals()) | summarize(value_sums(batch).totals())


def test_metrics_do_not_hold_the_graph() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    mask = torch.ones(2, dtype=torch.bool)
    fixed = logprobs.detach()
    sums = policy_metrics(
        logprobs=logprobs,
        proximal_logprobs=logprobs,
        behavior_logprobs=fixed,
        ratio_logprobs=fixed,
        advantages=fixed,
        entropy=logprobs,
        importance_weights=fixed,
        capped=mask,
        loss_mask=mask,
        clip_low=0.2,
        clip_high=0.2,
    )
    assert not any(value.requires_grad for value in (sums.sums | sums.maxima).values())


def test_a_step_without_tokens_shows_nothing() -> None:
    batch = RaggedBatch.random([3], 0.0, 1)
    for sums in (policy_sums(batch, slice(0, 0)), MetricSums()):
        assert summarize(sums.totals()) == {}
        assert importance_weights(sums.totals()) is None and reference_kl(sums.totals()) is None


def test_the_results_that_control_a_run_are_those_that_are_shown() -> None:
    totals = policy_sums(RaggedBatch.random([3, 4], 0.0, 1)).totals()
    assert reference_kl(totals) is None
    totals |= {"reference_kl_k1": 3.0, "reference_kl_k3": 2.0, "num_sequences": 2.0}
    shown, weights, kl = summarize(totals), importance_weights(totals), reference_kl(totals)
    assert weights is not None and kl is not None
    names = ("effective_sample_size", "weight_mean", "weight_std")
    assert [shown[f"importance/{name}"] for name in names] == [weights.effective_sample_size, weights.mean, weights.std]
    assert (kl.per_sequence, kl.num_sequences) == (1.5, 2.0)
    assert (shown["policy/reference_kl_per_sequence"], shown["policy/num_sequences"]) == (1.5, 2.0)


def test_constants_have_no_deviation_and_explain_nothing() -> None:
    ones = torch.full((5,), 0.1)
    sums = value_metrics(
        values=torch.zeros(5),
        old_values=torch.zeros(5),
        returns=ones,
        loss_mask=ones > 0,
        value_clip=None,
    )
    found = summarize((sums + MetricSums({"value_loss": torch.tensor(0.0)})).totals())
    assert found["value/return_std"] == 0 and found["value/explained_variance"] == 0
