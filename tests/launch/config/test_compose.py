"""`config=FILE.yaml` reads settings as in configs/; the command line overrides them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from launch.config.compose import given_settings, with_files
from launch.config.plan import plan_run

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8)
PLAIN = st.none() | st.booleans() | st.integers(-9, 9**9) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
NAMES = st.text("abcdefgh_", min_size=1, max_size=5).map(lambda name: f"x{name}")
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)


@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=3))
def test_every_value_of_a_file_arrives_as_it_is(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]):
    path = tmp_path_factory.mktemp("file") / "mine.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    found: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(with_files([f"config={path}"])):
        *parents, name = override.key_or_group.split(".")
        section = found
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = plain(override.value())
    assert found == content


def plain(value: Any) -> Any:
    """The value with plain strings in place of Hydra's class of quoted strings."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.text if hasattr(value, "text") else value


def test_a_file_of_the_users_is_read_before_the_command_line(make_plan: Any, tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "algorithm: grpo\ntotal_steps: 40\nlearner:\n  optimizer:\n    learning_rate: 1.0e-5\n    betas: [0.9, 0.99]\n"
        "curriculum:\n  - {until_step: 10, max_new_tokens: 32}\n  - {}\nbuffer:\n  sampler: freshest\n"
    )
    plan = make_plan("total_steps=50", f"config={mine}", "algorithm=rloo")
    assert plan.sections["choices"]["algorithm"] == "rloo"
    assert plan.sections["learner"]["total_steps"] == 50
    assert plan.sections["learner"]["optimizer"]["learning_rate"] == 1e-5
    assert list(plan.sections["learner"]["optimizer"]["betas"]) == [0.9, 0.99]
    assert [stage.until_step for stage in plan.stages] == [10, 0]
    assert plan.sections["buffer"]["sampler"] == "freshest"
    assert make_plan(f"config={mine}").sections["choices"]["algorithm"] == "grpo"


def test_a_later_file_wins(make_plan: Any, tmp_path: Path):
    for number in (1, 2):
        (tmp_path / f"{number}.yaml").write_text(f"total_steps: {number}0\n")
    given = [f"config={tmp_path}/{number}.yaml" for number in (1, 2)]
    assert make_plan(*given).sections["total_steps"] == 20


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ("a: [1", "cannot be read"),
        ("- 1", "holds no settings"),
        ("", "holds no settings"),
        ("choices: {task: arithmetic}", "is what a run wrote"),
        ("learner: {zero_stag: 1}", "learner.zero_stag is not a known setting; did you mean learner.zero_stage?"),
        ("totl_steps: 3", "did you mean total_steps?"),
        ("algorithm: ppoo", "algorithm=ppoo does not exist"),
        ("learner: 5", "learner"),
    ],
)
def test_a_file_that_makes_no_sense_is_one_sentence(tmp_path: Path, content: str | None, expected: str):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError) as caught:
        plan_run([f"config={path}"])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_choices_of_a_group_are_no_settings():
    assert given_settings(["algorithm=grpo", "algorithm.lam=1", "++seed=3"]) == ["algorithm.lam", "seed"]
