"""The verifier's configuration: its rules, and that OmegaConf can carry it."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from verifier.base import RewardSpec
from verifier.config import VerifierConfig


def test_omegaconf_carries_it() -> None:
    schema = OmegaConf.structured(VerifierConfig)
    values = {"rewards": [{"name": "boxed_math", "weight": 2.0, "options": {"wrong": -0.1}}], "deadline_seconds": 2}
    config = OmegaConf.to_object(OmegaConf.merge(schema, values))
    assert config == VerifierConfig([RewardSpec("boxed_math", 2.0, {"wrong": -0.1})], deadline_seconds=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": []}, "exactly one grader"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"deadline_seconds": 0.0}, "deadline_seconds is 0"),
        ({"deadline_seconds": float("inf")}, "deadline_seconds is inf"),
        ({"memory_bytes": 1000}, "memory_bytes is 1000"),
        ({"on_timeout": "zero"}, "choose one of wrong, no_answer"),
    ],
)
def test_rules(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VerifierConfig(**({"rewards": [RewardSpec("boxed_math")]} | change))
