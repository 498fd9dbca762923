"""An impossible curriculum is refused in one sentence; a possible one is passed to the buffer."""

from pathlib import Path
from typing import Any

import pytest

from buffer.__main__ import read_buffer_config
from buffer.curriculum_config import Skip, Stage, read_levels
from buffer.ledger.ledger import Ledger
from launch.config.plan import plan_run, write_config
from launch.preview import notices

KNIGHTS = ("task=knights_knaves", "task.num_train=40", "task.num_held_out=4", "groups_per_batch=32")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("curriculum=5", "curriculum=5 is no list of stages"),
        ("curriculum=[5]", "curriculum stage 1 is 5, no settings"),
        ("curriculum=null", "curriculum has no value"),
        ("curriculum=[{until:5},{}]", "curriculum stage 1.until is not a known setting; .*until_step"),
        ("curriculum=[{until_step:5},{until_step:x},{}]", "curriculum stage 2.until_step is not valid: .*'x'"),
        ("curriculum=[{},{}]", "curriculum stage 1 never ends; give it until_step"),
        (
            "curriculum=[{until_step:80},{}]",
            "1 has until_step=80 and so lasts until step 80 .* at total_steps=80; lower",
        ),
        ("curriculum=[{at_most_steps:40},{at_most_steps:40},{}]", "2 has at_most_steps=40 and so lasts until step 80"),
        ("curriculum=[{until_success:0.5,over_groups:2529},{}]", "1 has over_groups=2529 and .* lasts until step 80"),
        ("curriculum=[{until_success:0.5,at_least_steps:80},{}]", "at_least_steps=80 and so lasts until step 80"),
        ("curriculum=[{samples_per_group:9}]", "stage 1 has samples_per_group=9, more than the run's .*=8; raise"),
        ("curriculum=[{max_new_tokens:217}]", "stage 1 has max_new_tokens=217, more than the run's .*=216; raise"),
        ("curriculum=[{max_level:2,until_step:9},{min_level:4}]", "stage 2 draws levels 4 and up, .* has 2, 3; change"),
        ("task.max_level=9 task=arithmetic", "task.min_level=0 and task.max_level=9 choose by .* arithmetic have none"),
        (
            "task=arithmetic curriculum=[{max_level:3}]",
            "stage 1 draws levels 0 to 3, but .* no levels; .*task.level_field",
        ),
        ("curriculum=[{min_level:4,max_level:5}]", "stage 1 draws levels 4 to 5, but the task has 2, 3"),
        ("buffer.skip_solved.seen=-1", "buffer.skip_solved.seen is -1"),
        ("buffer.skip_unsolved.sen=1", "buffer.skip_unsolved.sen is not a known setting"),
    ],
)
def test_a_curriculum_that_cannot_be_gone_through_is_refused(make_plan: Any, override: str, expected: str):
    with pytest.raises(ValueError, match=expected) as caught:
        make_plan(*KNIGHTS, *override.split(" "))
    assert "\n" not in str(caught.value)


def test_a_stage_that_may_begin_with_the_last_batch_is_no_contradiction(make_plan: Any):
    stages = "[{until_success:0.5,over_groups:2528,at_most_steps:200},{}]"
    assert make_plan(*KNIGHTS, f"curriculum={stages}").stages[0].over_groups == 79 * 32


def test_groups_too_small_to_compare_are_refused(make_plan: Any):
    with pytest.raises(ValueError, match="samples_per_group=1 is too few for GRPO"):
        make_plan(*KNIGHTS, "algorithm=grpo", "curriculum=[{samples_per_group:1,until_step:9},{}]")


def test_a_curriculum_is_handed_to_the_buffer(make_plan: Any, run_dir: Path, model_folder: Path):
    stages = "[{max_level:2,until_success:0.5,samples_per_group:4},{max_new_tokens:30,until_step:9},{}]"
    plan = make_plan(*KNIGHTS, f"curriculum={stages}", f"model.path={model_folder}", "buffer.skip_solved.seen=2")
    levels = [problem.level for problem in plan.task.train]
    (notice,) = notices(plan)
    assert f"a stage of the curriculum has {levels.count(2)} training prompts, fewer than groups_per_batch=32" in notice
    write_config(plan)
    config = read_buffer_config(str(run_dir))
    first, second, last = config.stages
    assert (first.max_level, first.until_success, first.samples_per_group) == (2, 0.5, 4)
    assert (second.max_new_tokens, second.until_step, last) == (30, 9, Stage())
    assert (config.skip_solved, config.skip_unsolved) == (Skip(1.0, 2), Skip(0.0, 0))
    assert read_levels(run_dir, 40).tolist() == levels
    Ledger(config, 0.0).close()
    assert plan_run([f"resume={run_dir}"]).stages == plan.stages
