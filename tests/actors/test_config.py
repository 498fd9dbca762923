"""Settings that `ActorConfig` refuses."""

from typing import Any

import pytest

from actors.config import ActorConfig

GIVEN: dict[str, Any] = {"model_path": "x", "samples_per_group": 2, "max_new_tokens": 8, "max_tokens": 16}


def test_the_least_that_must_be_said():
    assert ActorConfig(**GIVEN).temperature == 1.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_new_tokens": 16}, "max_new_tokens=16 leaves no room for a prompt .* 16 tokens; lower it"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"samples_per_group": 0}, "actor.samples_per_group=0 must be at least 1"),
        ({"max_new_tokens": 0}, "actor.max_new_tokens=0 must be at least 1"),
        ({"max_groups_in_flight": 0}, "actor.max_groups_in_flight=0 must be at least 1"),
        ({"tensor_parallel_size": 0}, "actor.tensor_parallel_size=0 must be at least 1"),
        ({"evaluation_prompts": 0}, "actor.evaluation_prompts=0 must be at least 1"),
        ({"chunk_bytes": 0}, "actor.chunk_bytes=0 must be at least 1"),
        ({"kv_cache": "drop"}, "actor.kv_cache=drop is unknown; use keep or recompute"),
        ({"evaluation_temperature": -1.0}, "actor.evaluation_temperature=-1.0 must not be below 0"),
        ({"evaluation_max_new_tokens": -1}, "actor.evaluation_max_new_tokens=-1 must not be below 0"),
    ],
)
def test_a_value_that_cannot_work_is_named(changes: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        ActorConfig(**(GIVEN | changes))
