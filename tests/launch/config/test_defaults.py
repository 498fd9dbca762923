"""A dataclass's default and the default configuration agree on every setting that has both."""

from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, get_type_hints

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from launch.config.compose import compose_config, run_sections
from launch.config.consistency import OPEN_SECTIONS
from launch.config.sections import KNOWN, SECTIONS
from launch.config.settings import RunConfig

OF_THE_TASK = "configs/task/ chooses it for every task; the class says what a task without it gets"
OF_THE_MODEL_SIZE = (
    "configs/learner/tiny.yaml shapes the rate of a tiny model; large.yaml keeps the class's constant rate"
)
EXCEPTIONS = {
    "task.num_train": OF_THE_TASK,
    "task.num_held_out": OF_THE_TASK,
    "pretraining.error_rate": OF_THE_TASK,
    "pretraining.clean_share": OF_THE_TASK,
    "pretraining.num_traces": OF_THE_TASK,
    "pretraining.steps": OF_THE_TASK,
    "learner.optimizer.schedule": OF_THE_MODEL_SIZE,
    "learner.optimizer.warmup_steps": OF_THE_MODEL_SIZE,
    "learner.optimizer.min_lr_ratio": OF_THE_MODEL_SIZE,
    "learner.critic_optimizer.schedule": OF_THE_MODEL_SIZE,
    "learner.critic_optimizer.warmup_steps": OF_THE_MODEL_SIZE,
    "learner.critic_optimizer.min_lr_ratio": OF_THE_MODEL_SIZE,
    "actor.seeded_sampling": "null in configs/ stands for a value that follows from mode",
}


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration of a run without overrides."""
    monkeypatch.delenv("SLIPSTREAM_CACHE")
    return run_sections(compose_config([], KNOWN), [])


def defaults(cls: type[Any]) -> dict[str, Any]:
    """The defaults of a dataclass by key, those of nested dataclasses under `field.key`."""
    found: dict[str, Any] = {}
    for field in fields(cls):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        wanted = get_type_hints(cls)[field.name]
        if is_dataclass(wanted) and isinstance(wanted, type):
            nested = defaults(wanted) if default is MISSING else asdict(default)
            found |= {f"{field.name}.{key}": value for key, value in nested.items()}
        elif default is not MISSING:
            found[field.name] = list(default) if isinstance(default, tuple) else default
    return found


def differences(cls: type[Any], values: dict[str, Any], section: str = "") -> dict[str, tuple[Any, Any]]:
    """(the class's default, the value of the configuration) by key, where there are both and they differ."""
    found = {}
    for key, default in defaults(cls).items():
        value = OmegaConf.select(OmegaConf.create(values), key, default=default)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if value != default:
            found[f"{section}{key}"] = default, value
    return found


def test_the_classes_of_the_sections_have_the_defaults_of_configs(sections: dict[str, Any]):
    found = differences(RunConfig, sections)
    for section, cls in SECTIONS.items():
        found |= differences(cls, sections[section], f"{section}.")
    assert {key: pair for key, pair in found.items() if key not in EXCEPTIONS} == {}
    # The list contains no exception that has ceased to be one.
    assert EXCEPTIONS.keys() - found.keys() == set()


@pytest.mark.parametrize("section", OPEN_SECTIONS)
def test_the_class_of_an_open_section_has_the_defaults_of_configs(section: str, sections: dict[str, Any]):
    composed = instantiate(sections[section])
    assert composed == type(composed)()


@pytest.mark.parametrize("name", ["cispo", "grpo", "gspo", "ppo", "reinforce_pp"])
def test_an_algorithm_with_a_class_of_its_own_has_the_defaults_of_its_file(name: str):
    """The other files of configs/algorithm are settings of GRPO."""
    composed = instantiate(run_sections(compose_config([f"algorithm={name}"], KNOWN), [])["algorithm"])
    assert composed == type(composed)()


def test_a_difference_is_found_in_a_section_and_in_one_inside_it(sections: dict[str, Any]):
    learner = sections["learner"] | {"max_bad_steps": 4, "optimizer": sections["learner"]["optimizer"] | {"eps": 1.0}}
    found = differences(SECTIONS["learner"], learner)
    assert found["max_bad_steps"] == (3, 4) and found["optimizer.eps"] == (1e-8, 1.0)
    assert differences(SECTIONS["buffer"], {"skip_solved": {"success": 0.9}}) == {"skip_solved.success": (1.0, 0.9)}
    assert differences(SECTIONS["learner"], {"optimizer": {"betas": [0.9, 0.95], "learning_rate": 1.0}}) == {}
