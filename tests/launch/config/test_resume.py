"""A resumed run has its own configuration; only some settings may change."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.config.compose import compose_config, run_sections
from launch.config.consistency import setting
from launch.config.plan import plan_run, write_config
from launch.config.resume import CHANGEABLE
from launch.config.sections import KNOWN

STARTED = ("total_steps=30", "seed=7", "algorithm=grpo")


@pytest.fixture
def run(make_plan: Any, run_dir: Path, model_folder: Path) -> Path:
    """A run that was started and has done 20 steps."""
    write_config(make_plan(*STARTED, f"model.path={model_folder}"))
    (run_dir / "checkpoints" / "00000020").mkdir(parents=True)
    return run_dir


def refusal(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        plan_run(overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_more_steps_reach_every_process(run: Path):
    sections = plan_run([f"resume={run}", "total_steps=50"]).sections
    assert (sections["total_steps"], sections["learner"]["total_steps"], sections["buffer"]["num_batches"]) == (50,) * 3
    assert sections["seed"] == 7
    assert sections["choices"]["algorithm"] == "grpo"


def test_the_change_lasts(run: Path):
    write_config(plan_run([f"resume={run}", "total_steps=50", "cluster.num_actors=2"]))
    again = plan_run([f"resume={run}"])
    assert again.sections["learner"]["total_steps"] == 50
    assert again.cluster.num_actors == 2
    assert "resume" not in yaml.safe_load((run / "config.yaml").read_text())


def test_steps_that_are_done_cannot_be_undone(run: Path):
    assert f"total_steps=10 is below 20, the steps that {run} has done" in refusal(f"resume={run}", "total_steps=10")


@pytest.mark.parametrize(
    ("override", "was", "wanted"),
    [
        ("seed=8", "7", "8"),
        ("algorithm=ppo", "grpo", "ppo"),
        ("algorithm.clip_high=0.5", "0.2", "0.5"),
        ("groups_per_batch=8", "16", "8"),
        ("learner.optimizer.learning_rate=1e-5", "1e-06", "1e-05"),
        ("task=countdown", "arithmetic", "countdown"),
        ("mode=sync", "async", "sync"),
        ("cluster.encryption=none", "curve", "none"),
    ],
)
def test_what_a_run_computes_cannot_change(run: Path, override: str, was: str, wanted: str):
    said = refusal(f"resume={run}", "total_steps=50", override)
    assert f"cannot change {override.partition('=')[0]}, which is {was} there and {wanted} here" in said


def test_an_old_key_is_read_by_its_present_name(run: Path):
    said = refusal(f"resume={run}", "learner.optimizer.clip_norm=0.3")
    assert "cannot change learner.optimizer.max_grad_norm, which is 1.0 there and 0.3 here" in said


def test_a_setting_that_does_not_exist_is_named_as_at_a_start(run: Path):
    assert "learner.zero_stag is not a known setting" in refusal(f"resume={run}", "learner.zero_stag=1")


def test_asking_for_what_the_run_has_changes_nothing(run: Path):
    assert plan_run([f"resume={run}", "seed=7", "algorithm=grpo", "groups_per_batch=16"]).sections["seed"] == 7


def test_auto_starts_a_run_and_then_continues_it_with_the_same_command(run_dir: Path, model_folder: Path):
    """A scheduler repeats the command when it requeues a job; `mode=sync` changes settings that were typed."""
    command = [
        "resume=auto",
        f"run_dir={run_dir}",
        *STARTED,
        f"model.path={model_folder}",
        "mode=sync",
        "max_staleness=0",
    ]
    started = plan_run(command)
    assert not started.resumed
    write_config(started)
    continued = plan_run(command)
    assert continued.resumed
    assert continued.sections["learner"] == started.sections["learner"]
    more = plan_run([*command, "total_steps=60"])
    assert more.sections["learner"]["total_steps"] == 60
    assert "cannot change seed" in refusal(*command, "seed=9")


def test_auto_needs_a_directory_and_resume_has_one(run: Path):
    assert "resume=auto has no run to look for" in refusal("resume=auto")
    assert f"resume={run} and run_dir=other name two directories" in refusal(f"resume={run}", "run_dir=other")


def test_the_run_directory_may_have_moved(run: Path, tmp_path: Path):
    run.rename(tmp_path / "moved")
    assert plan_run([f"resume={tmp_path}/moved"]).run_dir == tmp_path / "moved"


def test_every_setting_that_may_change_exists():
    sections = run_sections(compose_config([], KNOWN), [])
    from launch.config.sections import SECTIONS

    for name in CHANGEABLE:
        section, _, key = name.partition(".")
        assert setting(sections, name) is not None or key in SECTIONS[section].__dataclass_fields__, name


def test_a_base_model_that_was_removed_from_the_cache_is_made_again(make_plan: Any, run_dir: Path):
    write_config(make_plan("total_steps=30"))
    resumed = plan_run([f"resume={run_dir}"])
    assert resumed.embedded is not None
    config = run_dir / "config.yaml"
    sections = yaml.safe_load(config.read_text())
    sections["pretraining"]["steps"] += 1
    config.write_text(yaml.safe_dump(sections))
    assert "is gone, and what is made now would be another" in refusal(f"resume={run_dir}")


def test_a_plan_is_changed_by_nobody(make_plan: Any):
    sections = make_plan().sections
    with pytest.raises(TypeError):
        sections["learner"]["total_steps"] = 3
    with pytest.raises(TypeError):
        sections["seed"] = 3


def test_the_page_lists_what_may_change():
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text().partition("## Continue a run")[2]
    rows = [line.split("|")[1:3] for line in page.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    listed = {
        f"{section.strip(' `')}.{name}"
        for section, names in rows
        for name in re.findall(r"`(\w+)`", names)
        if "resume" not in section
    }
    assert listed == {name for name in CHANGEABLE if "." in name}
