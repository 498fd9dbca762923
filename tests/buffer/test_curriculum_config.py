from pathlib import Path

import numpy as np
import pytest

from buffer.curriculum_config import Skip, Stage, check_skips, check_stages, prompts_of, read_levels, write_levels

LAST = Stage()


@pytest.mark.parametrize(
    ("stage", "next_version", "successes", "ends"),
    [
        (Stage(until_step=12), 11, [1.0] * 9, False),
        (Stage(until_step=12), 12, [], True),
        (Stage(at_most_steps=2), 11, [], False),
        (Stage(at_most_steps=2), 12, [], True),
        (Stage(until_success=0.5, over_groups=4), 11, [1.0] * 3, False),
        (Stage(until_success=0.5, over_groups=4), 11, [1.0, 0.75, 0.25, 0.0], True),
        (Stage(until_success=0.5, over_groups=4), 11, [1.0, 0.74, 0.25, 0.0], False),
        (Stage(until_success=0.5, over_groups=4, at_least_steps=2), 11, [1.0] * 4, False),
        (Stage(until_success=0.5, over_groups=4, at_least_steps=2), 12, [1.0] * 4, True),
        (Stage(until_success=0.5, at_least_steps=2, at_most_steps=3), 13, [], True),
        (Stage(until_step=5), 4, [], False),
        (LAST, 10**6, [1.0] * 200, False),
    ],
)
def test_a_stage_that_began_at_policy_10_ends(stage: Stage, next_version: int, successes: list[float], ends: bool):
    assert stage.ends(next_version, 10, successes) is ends


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([Stage(), LAST], "curriculum stage 1 never ends; give it until_step"),
        ([Stage(until_step=5)], "curriculum stage 1 is the last one and goes on to the end"),
        ([Stage(until_step=5), Stage(until_step=5), LAST], "curriculum stage 2 has until_step=5, .* until step 5"),
        ([Stage(until_step=9), Stage(at_most_steps=1), Stage(until_step=3), LAST], "stage 3 has until_step=3, .* 9"),
        ([Stage(min_level=4, max_level=3)], "stage 1 has min_level=4 above max_level=3"),
        ([Stage(max_level=-1)], "stage 1 has max_level=-1; use 0"),
        ([Stage(until_success=1.5), LAST], "stage 1 has until_success=1.5; it is a share"),
        ([Stage(until_success=0.5, over_groups=0), LAST], "stage 1 has over_groups=0"),
        ([Stage(until_step=5, at_least_steps=2), LAST], "at_least_steps=2 without until_success"),
        ([Stage(until_success=0.5, at_least_steps=3, at_most_steps=2), LAST], "at_least_steps=3 above at_most_steps=2"),
    ],
)
def test_a_contradiction_is_one_sentence(stages: list[Stage], expected: str):
    with pytest.raises(ValueError, match=expected):
        check_stages(stages)


def test_a_sound_curriculum_passes():
    check_stages([])
    check_stages([LAST])
    check_stages([Stage(max_level=3, until_step=9), Stage(until_success=0.8), Stage(until_step=10), Stage(min_level=4)])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((Skip(1.5), Skip(0.0), 0), "buffer.skip_solved.success is 1.5"),
        ((Skip(1.0), Skip(0.0, -1), 0), "buffer.skip_unsolved.seen is -1"),
        ((Skip(0.5), Skip(0.5), 0), "could be both"),
        ((Skip(1.0), Skip(0.0), -1), "buffer.revisit_epochs is -1"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(settings: tuple[Skip, Skip, int], expected: str):
    with pytest.raises(ValueError, match=expected):
        check_skips(*settings)


def test_levels_choose_prompts():
    levels = np.array([3, 0, 5, 4, 3])
    chosen = [prompts_of(stage, levels).tolist() for stage in (Stage(), Stage(min_level=4), Stage(max_level=3))]
    assert chosen == [[0, 1, 2, 3, 4], [2, 3], [0, 1, 4]]
    assert prompts_of(Stage(min_level=3, max_level=3), levels).tolist() == [0, 4]


@pytest.mark.parametrize("text", ["", "[1,", "[1,2]", '{"a": 1}', "[[1],[2],[3]]", '["x",1,2]', "null", "[[1],2,3]"])
def test_levels_that_are_not_the_runs_are_refused(run_dir: Path, text: str):
    (run_dir / "levels.json").write_text(text)
    with pytest.raises(ValueError, match=r"levels.json .* resume the run"):
        read_levels(run_dir, 3)


def test_levels_are_written_and_read(run_dir: Path):
    write_levels(run_dir, [3, 0, 7])
    assert read_levels(run_dir, 3).tolist() == [3, 0, 7]
