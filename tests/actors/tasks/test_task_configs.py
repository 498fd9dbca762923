"""Every configured task and recipe: an answer in the format that the template asks for gets the full reward."""

import json
import random
from typing import Any

import pytest

from actors.rollouts.trajectories import completions_to_score
from actors.tasks.task import GENERATED, Task, TaskConfig, load_task
from buffer.config import read_section
from launch.config.compose import compose_config, run_sections
from tests.actors.stand_ins import Characters, sampled
from verifier.base import RewardSpec, Score, Verdict
from verifier.scoring.scorer import Scorer, build_scorer

SECTIONS = ("task", "data", "reward")


def configured(*overrides: str) -> tuple[Task, Scorer]:
    """The task with a few problems, and the scorer for its rewards."""
    few = ("task.num_train=20", "task.num_held_out=4")
    sections: dict[str, Any] = run_sections(compose_config([*overrides, *few], SECTIONS), overrides)
    task = load_task(read_section(TaskConfig, sections["task"], "task"))
    return task, build_scorer([read_section(RewardSpec, reward, "reward") for reward in sections["reward"]])


def score(task: Task, scorer: Scorer, completion: str) -> Score:
    """The score of this completion of the task's first problem."""
    [seen] = completions_to_score(task.train[0], [sampled(completion)], Characters(), task.template.prefill)
    return scorer(seen)


@pytest.mark.parametrize(
    ("name", "best"), [("arithmetic", 1), ("countdown", 1), ("knights_knaves", 3), ("multiply", 1)]
)
def test_the_teacher_earns_the_most_and_the_others_less(name: str, best: float) -> None:
    task, scorer = configured(f"task={name}")
    trace = GENERATED[name].teacher_trace(task.train[0], random.Random(0), 0.0)
    earned = score(task, scorer, trace)
    assert (earned.reward, earned.verdict) == (best, Verdict.CORRECT)
    wrong = [GENERATED[name].teacher_trace(task.train[0], random.Random(seed), 0.9) for seed in range(40)]
    verdicts = {score(task, scorer, trace).verdict for trace in wrong}
    assert Verdict.WRONG in verdicts and verdicts <= {Verdict.WRONG, Verdict.CORRECT}
    assert score(task, scorer, "I do not know").verdict is Verdict.NO_ANSWER


def test_logic_rl_pays_for_tags_and_for_everyones_role() -> None:
    task, scorer = configured("experiment=logic_rl", "model.path=x")
    gold = json.loads(task.train[0].gold)

    def answer(is_knight: list[bool]) -> str:
        roles = ("knight" if this_one else "knave" for this_one in is_knight)
        told = enumerate(zip(gold["names"], roles, strict=True), start=1)
        return "\n".join(f"({number}) {name} is a {role}" for number, (name, role) in told)

    right, wrong = answer(gold["is_knight"]), answer([not gold["is_knight"][0], *gold["is_knight"][1:]])
    # The template has opened <think> already.
    assert score(task, scorer, f"so</think>\n<answer>{right}</answer>").reward == 3
    assert score(task, scorer, f"so</think>\n<answer>{wrong}</answer>").reward == -0.5
    assert score(task, scorer, f"<think>so</think>\n<answer>{right}</answer>").reward == -3
    assert score(task, scorer, right).reward == -3


def test_mini_deepseek_r1_pays_for_form_and_equation() -> None:
    task, scorer = configured("experiment=mini_deepseek_r1", "model.path=x")
    gold = json.loads(task.train[0].gold)
    trace = GENERATED["countdown"].teacher_trace(task.train[0], random.Random(0), 0.0)
    expression = trace.partition("<answer>")[2].removesuffix("</answer>")
    assert score(task, scorer, f"so</think>\n<answer>{expression}</answer>").reward == 2
    assert score(task, scorer, f"so</think>\n<answer>{gold['target']}</answer>").reward == 1
    assert score(task, scorer, f"<answer>{expression}</answer>").reward == 1
    assert task.prompt(task.train[0]).endswith("step by step.\n<think>")


@pytest.fixture
def data_file(tmp_path) -> str:
    rows = [
        {"question": f"What is {i}+1?", "problem": f"What is {i}+1?", "answer": f"So.\n#### {i + 1}"} for i in range(30)
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_gsm8k_pays_as_the_grpo_demo(data_file: str) -> None:
    task, scorer = configured("task=gsm8k", f"data.path={data_file}")
    assert task.train[0].gold == "1"
    assert score(task, scorer, "<reasoning>\n0+1\n</reasoning>\n<answer>\n1\n</answer>\n").reward == 4
    assert score(task, scorer, "<reasoning>\n0+1\n</reasoning>\n<answer>\n7\n</answer>\n").reward == 2
    assert score(task, scorer, "It is 1.").reward == 0


def test_math_pays_as_the_seed_recipe(data_file: str) -> None:
    task, scorer = configured("task=math", f"data.path={data_file}", 'task.answer_pattern="#### (.+)"')
    assert [score(task, scorer, text).reward for text in ("\\boxed{1}", "\\boxed{2}", "1")] == [1, -0.5, -1]


def test_dr_grpo_pays_nothing_for_what_was_cut_off(data_file: str) -> None:
    task, scorer = configured(
        "experiment=dr_grpo", "model.path=x", f"data.path={data_file}", 'task.answer_pattern="#### (.+)"'
    )
    assert [score(task, scorer, text).reward for text in ("\\boxed{1}", "\\boxed{2}", "1")] == [1, 0, 0]
