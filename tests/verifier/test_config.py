"""The verifier's configuration: its checks, and that OmegaConf accepts it."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from verifier.config import VerifierConfig


def test_omegaconf_carries_it() -> None:
    schema = OmegaConf.structured(VerifierConfig)
    values = {"deadline_seconds": 2, "on_timeout": "retry", "on_error": "skip", "max_retries": 3}
    config = OmegaConf.to_object(OmegaConf.merge(schema, values))
    assert config == VerifierConfig(deadline_seconds=2.0, on_timeout="retry", on_error="skip", max_retries=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_workers": 0}, "num_workers is 0"),
        ({"deadline_seconds": 0.0}, "deadline_seconds is 0"),
        ({"deadline_seconds": float("inf")}, "deadline_seconds is inf"),
        ({"memory_bytes": 1000}, "memory_bytes is 1000"),
        ({"on_timeout": "zero"}, "on_timeout is 'zero'; choose one of wrong, no_answer, skip, retry"),
        ({"on_error": "zero"}, "on_error is 'zero'"),
        ({"max_retries": 0}, "max_retries is 0"),
    ],
)
def test_rules(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VerifierConfig(**change)
