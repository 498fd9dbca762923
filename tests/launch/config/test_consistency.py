"""Settings that contradict their source, are computed, or have no effect are refused with the setting to use."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.config.compose import CONFIG_DIR
from launch.config.consistency import COMPUTED, COPIES, NEEDS
from launch.config.plan import plan_run


def refusal(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        plan_run(overrides)
    return str(caught.value)


def references(section: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The settings in configs/ that are only a reference to another setting, by dotted path."""
    found = {}
    for name, value in section.items():
        if isinstance(value, dict):
            found |= references(value, f"{prefix}{name}.")
        elif isinstance(value, str) and (match := re.fullmatch(r"\$\{([a-z_.]+)\}", value)):
            found[f"{prefix}{name}"] = match[1]
    return found


@pytest.mark.parametrize("learner", sorted(path.stem for path in (CONFIG_DIR / "learner").glob("*.yaml")))
def test_the_table_of_copies_is_what_configs_refers_to(learner: str):
    whole = yaml.safe_load((CONFIG_DIR / "config.yaml").read_text())
    whole["learner"] = yaml.safe_load((CONFIG_DIR / "learner" / f"{learner}.yaml").read_text())
    # Actors may have another dtype than the learner.
    assert references(whole) == COPIES | {"actor.dtype": "model.dtype"}


@pytest.mark.parametrize("name", sorted(COPIES))
def test_a_copy_is_set_where_it_comes_from(name: str):
    value = {"learner.publish_dtype": "bfloat16", "learner.temperature": "0.5", "actor.temperature": "0.5"}.get(
        name, "3"
    )
    said = refusal(f"{name}={value}")
    assert said.startswith(f"{name}={value} contradicts {COPIES[name]}=")
    assert said.endswith(f"set {COPIES[name]} alone")


@pytest.mark.parametrize(("name", "source"), sorted(COMPUTED.items()))
def test_what_the_launcher_computes_cannot_be_set(name: str, source: str):
    value = {"learner.cpu_affinity": "[0,1]", "buffer.stages": "[{until_step:3},{}]"}.get(name, "7")
    said = refusal(f"{name}={value}")
    assert said.startswith(f"{name}=")
    assert f"it follows from {source}" in said


@pytest.mark.parametrize(
    ("name", "value", "enabled"),
    [
        ("buffer.max_no_signal", "5", ["buffer.drop_no_signal=true"]),
        ("buffer.max_reissues", "5", ["buffer.on_stale=drop"]),
        ("cluster.tensorboard_port", "0", ["cluster.tensorboard=true"]),
        ("verifier.max_retries", "2", ["verifier.on_error=retry"]),
        ("learner.critic_warmup_steps", "2", ["algorithm=ppo"]),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(name: str, value: str, enabled: list[str], make_plan: Any):
    without = ["algorithm=grpo"] if "critic" in name else []
    assert f"{name}={value} has no effect without {NEEDS[name][0]}" in refusal(f"{name}={value}", *without)
    section, key = name.split(".")
    assert str(make_plan(f"{name}={value}", *enabled).sections[section][key]) == value


@pytest.mark.parametrize("override", ["embedded.hidden_size=32", "pretraining.steps=3"])
def test_settings_of_the_small_model_mean_nothing_beside_a_model_of_the_users(override: str, model_folder: Path):
    assert f"{override} has no effect without a model that is made here" in refusal(
        f"model.path={model_folder}", override
    )


def test_a_synchronous_run_has_no_staleness_to_set(make_plan: Any):
    assert "max_staleness=5 has no effect without mode=async" in refusal("mode=sync", "max_staleness=5")
    assert make_plan("mode=sync", "max_staleness=0").sections["buffer"]["max_staleness"] == 0


def test_two_models_are_refused_with_both_names(model_folder: Path):
    said = refusal("model=tiny", f"model.path={model_folder}")
    assert "model=tiny makes a small model here" in said
    assert str(model_folder) in said


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("learner.nothing", "cannot be imported (module 'learner' has"),
        ("learner.algorithms.ppo.PPPO", "cannot be imported (module"),
        ("5", "cannot be imported"),
        ("learner.algorithms.losses.policy_loss", "is not a class"),
    ],
)
@pytest.mark.parametrize("more", [[], ["learner.critic_warmup_steps=1"]])
def test_an_algorithm_that_does_not_exist_is_one_sentence(target: str, expected: str, more: list[str]):
    said = refusal(f"algorithm._target_={target}", *more)
    assert said.startswith(f"algorithm._target_={target} ")
    assert expected in said


def test_every_needed_setting_was_tested():
    assert set(NEEDS) == {
        *("buffer.max_no_signal", "buffer.max_reissues", "cluster.tensorboard_port", "verifier.max_retries"),
        *("max_staleness", "embedded", "pretraining", "learner.critic_optimizer", "learner.critic_warmup_steps"),
    }
    said = refusal("algorithm=grpo", "learner.critic_optimizer.learning_rate=1e-3")
    assert "learner.critic_optimizer.learning_rate=0.001 has no effect without an algorithm with a critic" in said
