import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.grpo import GRPO
from learner.algorithms.kl import KLSchedule


def schedule(**keys: Any) -> KLSchedule:
    return GRPO(kl="loss", **keys).kl_coef_schedule


def test_a_fixed_coefficient_stays() -> None:
    settings = schedule(kl_coef=0.1)
    assert [settings.at(version, 9.0) for version in (0, 5, 1000)] == [0.1] * 3
    assert settings.adapt(0.1, 60.0, 1000) == 0.1


def test_a_linear_schedule_meets_both_ends() -> None:
    late = schedule(kl_coef=0.0, kl_schedule="linear", kl_final_coef=0.4, kl_schedule_steps=8)
    assert [late.at(version, 9.0) for version in (0, 2, 4, 8, 9, 100)] == [0.0, 0.1, 0.2, 0.4, 0.4, 0.4]
    falling = schedule(kl_coef=0.5, kl_schedule="linear", kl_schedule_steps=2)
    assert [falling.at(version, 9.0) for version in (0, 1, 2)] == [0.5, 0.25, 0.0]
    assert falling.adapt(0.5, 60.0, 1000) == 0.5


def adaptive(**changes: float) -> KLSchedule:
    return schedule(kl_coef=0.1, kl_schedule="adaptive", **changes)


@pytest.mark.parametrize(
    ("kl", "num_sequences", "expected"),
    [
        (6.0, 64, 0.2),
        (6.6, 1000, 0.2 * (1 + 0.1 * 0.1)),
        (5.4, 1000, 0.2 * (1 - 0.1 * 0.1)),
        (60.0, 1000, 0.2 * (1 + 0.2 * 0.1)),
        (-5.0, 1000, 0.2 * (1 - 0.2 * 0.1)),
        (math.nan, 1000, 0.2),
        (math.inf, 1000, 0.2),
    ],
)
def test_the_adaptive_coefficient_follows_ziegler(kl: float, num_sequences: int, expected: float) -> None:
    assert adaptive().adapt(0.2, kl, num_sequences) == pytest.approx(expected, rel=1e-12)
    assert adaptive().at(7, 0.2) == 0.2


@given(st.floats(0.1, 50.0), st.floats(0.001, 0.99))
def test_the_adaptive_coefficient_brings_the_kl_to_its_target(target: float, response: float) -> None:
    """A policy whose KL falls as the coefficient rises ends near the target, from either side."""
    settings = adaptive(kl_target=target, kl_horizon=100.0)
    for start in (1e-3, 1.0):
        coefficient = start
        for _ in range(4000):
            coefficient = settings.adapt(coefficient, target * response / coefficient, 10)
        assert coefficient == pytest.approx(response, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl": "loss", "kl_coef": 0.1, "kl_kind": "k4"}, "kl_kind is 'k4'; choose k1, k2 or k3"),
        ({"kl": "loss", "kl_coef": 0.1, "kl_schedule": "cosine"}, "kl_schedule is 'cosine'"),
        ({"kl": "reward", "kl_coef": 0.1, "kl_kind": "k3"}, "kl=reward takes the estimator k1"),
        ({"kl": "loss", "kl_final_coef": 0.1}, "kl_coef=0.0 punishes nothing"),
        ({"kl": "loss", "kl_coef": 0.1, "kl_final_coef": -0.1}, "punishes nothing"),
        ({"kl": "loss", "kl_schedule": "linear", "kl_final_coef": 0.1}, "kl_schedule_steps=0 never gets"),
        ({"kl": "loss", "kl_coef": 0.1, "kl_schedule": "adaptive", "kl_target": 0.0}, "kl_target=0.0"),
        ({"kl": "loss", "kl_coef": 0.1, "kl_schedule": "adaptive", "kl_horizon": 0.0}, "kl_horizon=0.0"),
        ({"kl_schedule": "adaptive"}, "kl_coef=0.0"),
        ({"reference_refresh_every": 5}, "reference_refresh_every=5 with kl=off refreshes nothing"),
        ({"kl": "loss", "kl_coef": 0.1, "reference_refresh_every": -1}, "reference_refresh_every=-1"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPO(**fields)


def test_only_a_penalty_needs_a_reference() -> None:
    assert not GRPO().needs_reference
    assert GRPO(kl="loss", kl_coef=0.1, kl_kind="k2").needs_reference
    assert GRPO(kl="reward", kl_coef=0.1, kl_kind="k1", reference_refresh_every=3).needs_reference
