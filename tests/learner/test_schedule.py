import pytest

from learner.schedule import learning_rate


def test_warmup_rises_linearly_and_the_first_step_moves() -> None:
    rates = [learning_rate(s, base=8.0, warmup_steps=4, total_steps=10, schedule="constant") for s in range(6)]
    assert rates == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_linear_and_cosine_meet_their_ends_and_the_middle() -> None:
    for schedule in ("linear", "cosine"):
        settings = {"base": 2.0, "warmup_steps": 2, "total_steps": 12, "schedule": schedule, "min_lr_ratio": 0.1}
        rates = [learning_rate(step, **settings) for step in range(2, 15)]
        assert rates[0] == 2.0
        assert rates[5] == pytest.approx(1.1)
        assert rates[10:] == pytest.approx([0.2, 0.2, 0.2])
        assert rates[:11] == sorted(rates[:11], reverse=True)


def test_cosine_is_a_cosine() -> None:
    rate = learning_rate(3, base=1.0, warmup_steps=0, total_steps=12, schedule="cosine")
    assert rate == pytest.approx((1 + 2**-0.5) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, "choose constant, linear or cosine"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio=1.5"),
        ({"warmup_steps": 11}, "warmup_steps=11 must lie between 0 and total_steps=10"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    settings = {"base": 1.0, "warmup_steps": 0, "total_steps": 10, "schedule": "linear"} | changes
    with pytest.raises(ValueError, match=message):
        learning_rate(0, **settings)
