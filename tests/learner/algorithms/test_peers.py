"""The same batch through other projects' loss functions: equal where the definitions are; see docs/algorithms.md.

The tests are skipped where these projects are not installed; set-up does not install them. To run the tests, make an
environment with torch for the CPU, `pip install trl==1.16.0 verl==0.9.1 hypothesis pytest pytest-timeout`, then `python
-m pytest tests/learner/algorithms/test_peers.py`. The differences are asserted too, so that the page's list stays true.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.algorithms.advantages import gae, group_relative, leave_one_out, whiten
from learner.algorithms.corrections import Correction, DecoupledTIS, Distance, SequenceMask, SequenceTIS, TokenMask
from learner.algorithms.importance import truncated_weights
from learner.algorithms.losses import (
    batch_counts,
    cispo_loss,
    kl_estimate,
    policy_loss,
    sequence_denominator,
    value_loss,
)
from learner.algorithms.losses import token_weights as weights_of
from tests.references import RaggedBatch

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH = RaggedBatch.random([7, 3, 9, 5], 0.3, 11)
MASK = BATCH.padded_mask
PI, PROXIMAL, BEHAVIOR, REFERENCE, TOKEN_ADVANTAGES, VALUES, OLD_VALUES, RETURNS = (
    BATCH.padded(name, 0.0)
    for name in ("logprobs", "proximal", "behavior", "ref", "advantages", "values", "old_values", "returns")
)
ADVANTAGES = TOKEN_ADVANTAGES[:, :1].expand_as(MASK)
WEIGHTS = truncated_weights(PROXIMAL, BEHAVIOR, MASK, max_importance_weight=2.0)
REWARDS, GROUPS = torch.tensor([1.0, -0.5, 0.25, 1.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
LONGEST = MASK.shape[1]
NEAR = PROXIMAL - 0.5 * torch.sin(torch.arange(1.0, MASK.numel() + 1, dtype=torch.float64)).view_as(PROXIMAL)
"""Another log mu, whose sequences lie on both sides of pi_prox."""


def token_weights(aggregation: Any) -> Tensor:
    num_tokens, num_sequences = batch_counts(MASK).tolist()
    counts = {"num_tokens": num_tokens, "num_sequences": num_sequences}
    return weights_of(MASK, aggregation=aggregation, constant_length=LONGEST, **counts)


def ours(kind: str, aggregation: str, leaf: Tensor, *, weights: Tensor = WEIGHTS) -> Tensor:
    common = {"importance_weights": weights, "token_weights": token_weights(aggregation)}
    if kind == "cispo":
        return cispo_loss(leaf, PROXIMAL, ADVANTAGES, MASK, clip_low=1.0, clip_high=0.5, **common)
    clips = {"clip_low": 0.2, "clip_high": 0.28} if kind == "token" else {"clip_low": 3e-4, "clip_high": 4e-4}
    denominator = PROXIMAL if kind == "token" else sequence_denominator(leaf, PROXIMAL, MASK)
    return policy_loss(leaf, denominator, ADVANTAGES, MASK, **clips, **common)


def assert_equal(found: Any, expected: Any) -> None:
    """Both losses have the same value and the same gradient."""
    leaves = [PI.clone().requires_grad_() for _ in range(2)]
    values = [make(leaf) for make, leaf in zip((found, expected), leaves, strict=True)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-7)
    slopes = [torch.autograd.grad(value, leaf)[0] for value, leaf in zip(values, leaves, strict=True)]
    assert float(slopes[0].abs().max()) > 0
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-9)


# --- TRL ---


def trl_loss(
    leaf: Tensor, loss_type: str, *, level: str = "token", beta: float = 0.0, weights: Tensor | None
) -> Tensor:
    """The loss of TRL's trainer, for a model with the log-probabilities `leaf`."""
    trainer = pytest.importorskip("trl").GRPOTrainer
    clips = (3e-4, 4e-4) if level == "sequence" else (0.2, 1.5 if loss_type == "cispo" else 0.28)
    alone = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda value: value.reshape(-1),
        reduce=lambda value, **_: value,
    )
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type=loss_type,
        epsilon_low=clips[0],
        epsilon_high=clips[1],
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        _entropy_bonus_enabled=False,
        accelerator=alone,
        _metrics={"train": defaultdict(list)},
    )
    one = torch.ones(len(MASK), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": one,
        "prompt_mask": one,
        "completion_ids": torch.ones_like(MASK, dtype=torch.int64),
        "completion_mask": MASK.to(torch.int64),
        "advantages": ADVANTAGES[:, 0],
        "old_per_token_logps": PROXIMAL,
        "ref_per_token_logps": REFERENCE,
        "importance_sampling_ratio": weights,
        "num_items_in_batch": MASK.sum(),
    }
    return trainer._compute_loss(fake, None, inputs)


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [("grpo", "sequence_mean"), ("bnpo", "token_mean"), ("dapo", "token_mean"), ("dr_grpo", "constant")],
)
@pytest.mark.parametrize("corrected", [True, False])
def test_the_clipped_loss_is_trls(loss_type: str, aggregation: str, corrected: bool) -> None:
    weights = WEIGHTS if corrected else torch.ones_like(WEIGHTS)
    assert_equal(
        lambda leaf: ours("token", aggregation, leaf, weights=weights),
        lambda leaf: trl_loss(leaf, loss_type, weights=weights if corrected else None),
    )


def test_gspo_is_trls_where_the_weights_belong_to_sequences() -> None:
    weights = WEIGHTS[:, :1].expand_as(MASK).clamp(min=0.5)
    assert_equal(
        lambda leaf: ours("sequence", "sequence_mean", leaf, weights=weights),
        lambda leaf: trl_loss(leaf, "grpo", level="sequence", weights=weights),
    )


def test_cispo_is_trls() -> None:
    assert_equal(lambda leaf: ours("cispo", "token_mean", leaf), lambda leaf: trl_loss(leaf, "cispo", weights=WEIGHTS))


def test_the_kl_in_the_loss_is_trls() -> None:
    def with_kl(leaf: Tensor) -> Tensor:
        kl = torch.where(MASK, kl_estimate(leaf, REFERENCE, "k3"), 0.0)
        return ours("token", "token_mean", leaf) + 0.04 * (kl * token_weights("token_mean")).sum()

    assert_equal(with_kl, lambda leaf: trl_loss(leaf, "dapo", beta=0.04, weights=WEIGHTS))


# --- verl ---


def verl() -> Any:
    return pytest.importorskip("verl.trainer.ppo.core_algos")


def verl_config(low: float, high: float) -> Any:
    config = pytest.importorskip("verl.workers.config").ActorConfig
    clips = {"clip_ratio": low, "clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": 1e9}
    return config(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **clips)


VERLS = {"token_mean": "token-mean", "sequence_mean": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}


@pytest.mark.parametrize("aggregation", VERLS)
@pytest.mark.parametrize(
    ("kind", "name", "low", "high"),
    [("token", "vanilla", 0.2, 0.28), ("sequence", "gspo", 3e-4, 4e-4), ("cispo", "cispo", 1.0, 0.5)],
)
def test_the_policy_losses_are_verls(kind: str, name: str, low: float, high: float, aggregation: str) -> None:
    core, config = verl(), verl_config(low, high)
    theirs = getattr(core, f"compute_policy_loss_{name}")

    def loss(leaf: Tensor) -> Tensor:
        return theirs(PROXIMAL, leaf, ADVANTAGES, MASK.double(), VERLS[aggregation], config, WEIGHTS)[0]

    assert_equal(lambda leaf: ours(kind, aggregation, leaf), loss)


@pytest.mark.parametrize(
    ("correction", "level", "threshold"),
    [
        (DecoupledTIS(max_importance_weight=1.2), "token", "1.2"),
        (TokenMask(low=0.8, high=1.2), "token", "0.8_1.2"),
        (SequenceTIS(max_importance_weight=1.2), "sequence", "1.2"),
        (SequenceMask(ratio="product", low=0.5, high=1.4), "sequence", "0.5_1.4"),
    ],
)
def test_the_weights_of_the_corrections_are_verls(correction: Correction, level: str, threshold: str) -> None:
    peer = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    theirs, _ = peer.compute_rollout_correction_weights(PROXIMAL - NEAR, MASK.double(), level, threshold)
    found = correction.weights(Distance(PROXIMAL, NEAR, ADVANTAGES, MASK))
    uncut = correction.ratios(Distance(PROXIMAL, NEAR, ADVANTAGES, MASK))[MASK]
    assert not torch.allclose(found[MASK], uncut)
    assert not torch.allclose(found[MASK], torch.zeros(()).double())
    torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-12)


def test_verl_leaves_out_the_same_sequences_by_their_geometric_mean() -> None:
    peer = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    kept, _ = peer.compute_rollout_rejection_mask(PROXIMAL - NEAR, MASK.double(), "seq_mean_k1", "0.7_1.4")
    correction = SequenceMask(ratio="geometric", low=0.7, high=1.4)
    found = correction.weights(Distance(PROXIMAL, NEAR, ADVANTAGES, MASK)) > 0
    assert 0 < int(found.sum()) < int(MASK.sum())
    assert torch.equal(found, kept.bool())


def test_verl_bounds_a_negative_advantage_a_second_time_and_this_project_does_not() -> None:
    core, config = verl(), verl_config(0.2, 0.28)
    object.__setattr__(config, "clip_ratio_c", 1.1)
    theirs = core.compute_policy_loss_vanilla(PROXIMAL, PI, -ADVANTAGES.abs(), MASK.double(), "token-mean", config)[0]
    weights = {"importance_weights": torch.ones_like(PI), "token_weights": token_weights("token_mean")}
    ours = policy_loss(PI, PROXIMAL, -ADVANTAGES.abs(), MASK, clip_low=0.2, clip_high=0.28, **weights)
    assert theirs < ours - 1e-3


def test_the_value_loss_is_verls() -> None:
    theirs, _ = verl().compute_value_loss(VALUES, RETURNS, OLD_VALUES, MASK.double(), 0.2)
    means = token_weights("token_mean")
    found = value_loss(VALUES, OLD_VALUES, RETURNS, MASK, value_clip=0.2, token_weights=means)
    assert found.item() == pytest.approx(theirs.item())


def test_the_advantages_are_verls_but_for_the_denominator_of_the_variance() -> None:
    core, mask = verl(), MASK.double()
    ends = torch.zeros_like(PI)
    ends[:, 0] = REWARDS
    index = GROUPS.numpy().astype(object)

    def first(values: tuple[Tensor, Tensor]) -> Tensor:
        # One advantage per sequence: all unmasked tokens of a sequence have the same.
        return values[0].abs().amax(1) * values[0].sum(1).sign()

    for normalize_std in (True, False):
        theirs = core.compute_grpo_outcome_advantage(ends.clone(), mask, index, 1e-6, normalize_std)
        found = group_relative(REWARDS, GROUPS, normalize_std=normalize_std)
        torch.testing.assert_close(found, first(theirs), rtol=1e-9, atol=1e-9)
    theirs = core.compute_rloo_outcome_advantage(ends.clone(), mask, index)
    torch.testing.assert_close(leave_one_out(REWARDS, GROUPS), first(theirs))

    bessel = np.sqrt(1 - 1 / int(MASK.sum()))
    advantages, returns = gae(TOKEN_ADVANTAGES, VALUES, MASK, gamma=0.9, lam=0.8)
    theirs = core.compute_gae_advantage_return(TOKEN_ADVANTAGES, VALUES, mask, 0.9, 0.8)
    torch.testing.assert_close(returns[MASK], theirs[1][MASK])
    torch.testing.assert_close(whiten(advantages, MASK)[MASK] * bessel, theirs[0][MASK], rtol=1e-6, atol=1e-7)
    config = SimpleNamespace(gamma=0.9)
    theirs = core.compute_reinforce_plus_plus_outcome_advantage(TOKEN_ADVANTAGES, mask, config)
    sums, _ = gae(TOKEN_ADVANTAGES, torch.zeros_like(VALUES), MASK, gamma=0.9, lam=1.0)
    torch.testing.assert_close(whiten(sums, MASK)[MASK] * bessel, theirs[0][MASK], rtol=1e-6, atol=1e-7)
