from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from buffer.config import RENAMED_KEYS, BufferConfig, load_run_config, read_section, with_present_keys


@dataclass(frozen=True)
class Inner:
    rate: float
    steps: int = 3


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weights: dict[str, float] = field(default_factory=dict)
    given: Inner = field(default_factory=lambda: Inner(1.0, 1))

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("outer.name is bad; choose another")


def test_a_section_becomes_frozen_dataclasses():
    values = {"inner": {"rate": 1}, "betas": [1, 2], "weights": {"correct": 1}, "given": {"steps": 9}}
    read = read_section(Outer, values, "outer")
    assert read == Outer(Inner(1.0), None, (1.0, 2.0), {"correct": 1.0}, Inner(1.0, 9))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"inner": {"rate": 1, "rat": 2}},
            "outer.inner.rat is not a known setting; the settings there are rate, steps",
        ),
        ({"inner": {"rate": 1}, "nam": 2}, "outer.nam is not a known setting; the settings there are betas, given,"),
        ({"inner": {"steps": 1}}, "outer.inner.rate is missing; set it"),
        ({}, "outer.inner.rate is missing; set it"),
        ({"inner": {"rate": "fast"}}, "outer.inner.rate is not valid: Value 'fast'"),
        ({"inner": {"rate": 1, "steps": 1.5}}, "outer.inner.steps is not valid: Value '1.5'"),
        ({"inner": {"rate": None}}, "outer.inner.rate is not valid"),
        ({"inner": 3}, "outer is not valid"),
        ({"inner": {"rate": 1}, "name": "bad"}, "outer.name is bad; choose another"),
    ],
)
def test_a_wrong_section_gives_one_sentence(values: dict[str, Any], sentence: str):
    with pytest.raises(ValueError) as caught:
        read_section(Outer, values, "outer")
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_staleness": -1}, "buffer.max_staleness is -1"),
        ({"max_staleness": 1, "updates_per_batch": 2}, "would act like 0; set max_staleness to 0, or to 2 or more"),
        ({"durability": "none"}, "choose one of full, normal, memory"),
        ({"groups_per_batch": 0}, "buffer.groups_per_batch is 0"),
        ({"num_prompts": 0}, "buffer.num_prompts is 0"),
        ({"num_batches": -1}, "buffer.num_batches is -1"),
        ({"lease_seconds": 0.0}, "buffer.lease_seconds is 0.0"),
        ({"max_uses": 0}, "buffer.max_uses is 0"),
        ({"max_uses": 3}, "fresh enough for 2 batches at most; lower max_uses, or raise max_staleness to 2 or more"),
        ({"max_uses": 2, "max_staleness": 0}, "for 1 batches at most"),
        ({"sampler": "lifo"}, "buffer.sampler is 'lifo'; choose one of fifo, uniform, freshest, prioritized"),
        ({"on_stale": "skip"}, "choose one of wait, drop, mask"),
        ({"on_stale": "mask", "max_staleness": 0}, r"on_stale is 'mask', but with max_staleness 0 \(or mode=sync\)"),
        ({"sampler": "uniform", "max_staleness": 0}, "leave it at fifo, or raise max_staleness"),
        ({"max_reissues": -1}, "buffer.max_reissues is -1"),
        ({"max_no_signal": -1}, "buffer.max_no_signal is -1"),
    ],
)
def test_rules_between_the_settings(make_config: Any, changes: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make_config(**changes)


def test_staleness_of_at_least_one_batch_or_none_is_allowed(make_config: Any):
    assert make_config(max_staleness=0, updates_per_batch=4).max_staleness == 0
    assert make_config(max_staleness=4, updates_per_batch=4).max_staleness == 4


def test_the_runs_configuration_is_read_resolved(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("seed: 3\nbuffer:\n  seed: ${seed}\n")
    assert load_run_config(tmp_path) == {"seed": 3, "buffer": {"seed": 3}}


def test_classes_of_older_runs_are_read_by_their_present_paths(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(
        "algorithm:\n  _target_: learner.ppo.PPO\n  correction: {_target_: learner.corrections.DecoupledTIS, high: 2}\n"
        "correction: {_target_: learner.algorithms.corrections.VTrace}\n"
        "own: [{_target_: learner.opo.OPO, note: learner.ppo.PPO}]\n"
    )
    assert load_run_config(tmp_path) == {
        "algorithm": {
            "_target_": "learner.algorithms.ppo.PPO",
            "correction": {"_target_": "learner.algorithms.corrections.DecoupledTIS", "high": 2},
        },
        "correction": {"_target_": "learner.algorithms.corrections.VTrace"},
        "own": [{"_target_": "learner.opo.OPO", "note": "learner.ppo.PPO"}],
    }


def test_renamed_keys_of_older_runs_are_read_by_their_present_names(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(
        "learner:\n  seed: 1\n  optimizer: {clip_norm: 0.5, floor: 0.1, eps: 1.0}\n  critic_optimizer: {floor: 0.2}\n"
        "other: {optimizer: {floor: 3}}\n"
    )
    assert load_run_config(tmp_path) == {
        "learner": {
            "seed": 1,
            "optimizer": {"max_grad_norm": 0.5, "min_lr_ratio": 0.1, "eps": 1.0},
            "critic_optimizer": {"min_lr_ratio": 0.2},
        },
        "other": {"optimizer": {"floor": 3}},
    }


def test_an_old_key_replaces_the_present_one_unless_that_is_settled():
    sections = {"learner": {"optimizer": {"floor": 0.1, "min_lr_ratio": 0.2}}}
    assert with_present_keys(sections) == {"learner": {"optimizer": {"min_lr_ratio": 0.1}}}
    settled = with_present_keys(sections, ["learner.optimizer.min_lr_ratio"])
    assert settled == {"learner": {"optimizer": {"min_lr_ratio": 0.2}}}
    assert sections["learner"]["optimizer"]["floor"] == 0.1
    for new in RENAMED_KEYS.values():
        assert new not in RENAMED_KEYS


@pytest.mark.parametrize(
    ("text", "complaint"),
    [(None, "does not exist"), ("- 1\n", "no mapping"), ("a: ${b}\n", "cannot be read"), ("a: [", "cannot be read")],
)
def test_a_missing_or_broken_configuration_gives_one_sentence(tmp_path: Path, text: str | None, complaint: str):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        load_run_config(tmp_path)


def test_the_defaults_are_valid():
    config = BufferConfig("run", "tcp://127.0.0.1:5555", 10, "abc", 4, 2)
    assert (config.durability, config.updates_per_batch, config.num_batches) == ("normal", 1, 0)
