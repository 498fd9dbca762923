from typing import Any

import pytest

from buffer.config import read_section
from learner.config import LearnerConfig, ModelConfig, OptimizerConfig

LEARNER: dict[str, Any] = {
    "total_steps": 12,
    "optimizer": {"learning_rate": 1e-3},
    "critic_optimizer": {"learning_rate": 2e-3},
    "groups_per_batch": 8,
    "samples_per_group": 4,
}


def test_a_section_becomes_frozen_dataclasses_with_defaults():
    config = read_section(LearnerConfig, LEARNER, "learner")
    assert config.optimizer == OptimizerConfig(1e-3) and config.critic_optimizer.learning_rate == 2e-3
    assert (config.zero_stage, config.updates_per_batch, config.temperature) == (0, 1, 1.0)
    with pytest.raises(AttributeError):
        config.total_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_stage": 4}, ["zero_stage=4", "0, 1, 2 or 3"]),
        ({"cpu_offload": True}, ["cpu_offload=true", "zero_stage=0", "1, 2 or 3"]),
        ({"publish_dtype": "float16"}, ["actor.dtype=float16", "learner.publish_dtype", "float32, bfloat16"]),
        ({"total_steps": 0}, ["total_steps=0", "at least 1"]),
        ({"num_ranks": 0}, ["num_ranks=0", "at least 1"]),
        ({"num_ranks": 3}, ["groups_per_batch=8", "num_ranks=3", "multiple of 3"]),
        ({"num_ranks": 2, "updates_per_batch": 3}, ["updates_per_batch=3", "multiple of 6"]),
        ({"updates_per_batch": 8}, ["total_steps=12", "updates_per_batch=8", "use 8"]),
        ({"total_steps": 2, "updates_per_batch": 4}, ["total_steps=2", "use 4"]),
        ({"temperature": 0.0}, ["temperature=0.0", "above 0"]),
        ({"optimizer": {"learning_rate": 0.0}}, ["learning_rate=0.0", "above 0"]),
        ({"optimizer": {"learning_rate": 1.0, "max_grad_norm": -1.0}}, ["max_grad_norm=-1.0", "0 (never clip)"]),
        ({"optimizer": {"learning_rate": 1.0, "schedule": "step"}}, ["learner.optimizer", "'step'", "cosine"]),
        (
            {"critic_optimizer": {"learning_rate": 1.0, "min_lr_ratio": 2.0}},
            ["learner.critic_optimizer", "min_lr_ratio=2.0"],
        ),
        ({"optimizer": {"learning_rate": 1.0, "warmup_steps": -1}}, ["learner.optimizer", "warmup_steps=-1"]),
        ({"optimzer": {}}, ["learner.optimzer is not a known setting", "optimizer"]),
        (
            {"optimizer": {"learning_rate": 1.0, "betta": 1}},
            ["learner.optimizer.betta is not a known setting", "betas"],
        ),
        ({"max_bad_steps": 0}, ["learner.max_bad_steps=0", "at least 1"]),
        ({"keep_checkpoints": 0}, ["learner.keep_checkpoints=0", "at least 1"]),
        ({"max_batches_without_signal": -1}, ["learner.max_batches_without_signal=-1", "at least 0"]),
    ],
)
def test_every_mistake_is_one_sentence_with_the_way_out(changes: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as error:
        read_section(LearnerConfig, LEARNER | changes, "learner")
    sentence = str(error.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence


def test_the_models_dtype_is_checked():
    assert ModelConfig("x", dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"model\.dtype=half is unknown; use one of float32, bfloat16"):
        ModelConfig("x", dtype="half")


def test_the_rate_follows_the_schedule_of_the_whole_run():
    optimizer = OptimizerConfig(8.0, schedule="linear", warmup_steps=4, min_lr_ratio=0.5)
    assert [optimizer.rate(step, 12) for step in (0, 1, 3, 4, 8, 12)] == [2.0, 4.0, 8.0, 8.0, 6.0, 4.0]


def test_a_run_shorter_than_the_warm_up_ends_in_it():
    optimizer = OptimizerConfig(8.0, schedule="cosine", warmup_steps=4)
    assert [optimizer.rate(step, 2) for step in (0, 1)] == [2.0, 4.0]
    read_section(LearnerConfig, LEARNER | {"optimizer": {"learning_rate": 1.0, "warmup_steps": 100}}, "learner")
