import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from actors.tasks.task import GENERATED, TaskConfig, load_task, write_traces


def write_jsonl(path: Path, records: list[object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def records(count: int, start: int = 0) -> list[object]:
    return [{"problem": f"What is {i}+1?", "answer": str(i + 1)} for i in range(start, start + count)]


def data(path: str, **settings) -> TaskConfig:
    return TaskConfig(name="data", data_path=path, **settings)


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_the_config_passes_through_omegaconf() -> None:
    schema = OmegaConf.structured(TaskConfig)
    given = {"name": "countdown", "num_train": 10, "options": {"max_number": 9}}
    config = OmegaConf.to_object(OmegaConf.merge(schema, given))
    assert config == TaskConfig(name="countdown", num_train=10, options={"max_number": 9})
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(schema, {"nmae": "countdown"})


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task\.num_train is -1"):
        TaskConfig(num_train=-1)


def test_a_task_renders_through_its_template() -> None:
    task = load_task(TaskConfig(num_train=5, num_held_out=2, template="qwen_boxed"))
    assert task.prompt(task.train[3]).startswith("<|im_start|>system\n")
    assert f"user\n{task.train[3].question}<|im_end|>" in task.prompt(task.train[3])
    assert task.stop == ("<|im_end|>",)
    assert [problem.prompt_id for problem in task.train] == [0, 1, 2, 3, 4]
    assert [problem.prompt_id for problem in task.held_out] == [5, 6]


def test_unknown_task_and_template() -> None:
    with pytest.raises(ValueError, match=r"'sudoku' is unknown; choose one of arithmetic, .*countdown, .*multiply"):
        load_task(TaskConfig(name="sudoku", num_train=5))
    with pytest.raises(ValueError, match="'nowhere' is neither a template"):
        load_task(TaskConfig(template="nowhere", num_train=5))


def test_the_fingerprint_follows_every_prompt_and_gold() -> None:
    config = {"num_train": 20, "num_held_out": 5}
    fingerprint = load_task(TaskConfig(**config)).fingerprint
    assert len(fingerprint) == 16 and set(fingerprint) <= set("0123456789abcdef")
    assert load_task(TaskConfig(**config)).fingerprint == fingerprint
    others = [{"seed": 1}, {"num_train": 21}, {"num_held_out": 6}, {"template": "qwen_boxed"}, {"name": "multiply"}]
    assert len({fingerprint, *(load_task(TaskConfig(**{**config, **o})).fingerprint for o in others)}) == 6


def test_the_fingerprint_sees_a_changed_gold_and_a_moved_split(tmp_path) -> None:
    base = records(6)
    changed = [*base[:2], {"problem": "What is 2+1?", "answer": "4"}, *base[3:]]
    one = data(write_jsonl(tmp_path / "one.jsonl", base), num_held_out=2)
    two = data(write_jsonl(tmp_path / "two.jsonl", changed), num_held_out=2)
    moved = data(one.data_path, num_held_out=3)
    assert len({load_task(config).fingerprint for config in (one, two, moved)}) == 3


def test_the_fingerprint_sees_other_rules_of_a_turn(tmp_path) -> None:
    config = {"name": "bandit", "num_train": 5, "num_held_out": 1, "max_turns": 6}
    seen = {load_task(TaskConfig(**config, template="turns")).fingerprint}
    for number, rules in enumerate(("between: '<e>{observation}'", "between: '<|im_end|>{observation}'\nstop: [x]")):
        template = tmp_path / f"{number}.yaml"
        template.write_text(f"text: '{{question}}'\n{rules}\n")
        seen.add(load_task(TaskConfig(**config, template=str(template))).fingerprint)
    seen.add(load_task(TaskConfig(**{**config, "max_turns": 7}, template="turns")).fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize("name", GENERATED)
def test_traces_are_of_training_prompts_and_within_the_alphabet(tmp_path, name: str) -> None:
    config = TaskConfig(name=name, num_train=50, num_held_out=20)
    path = tmp_path / "traces.jsonl"
    write_traces(config, path, num_traces=200, error_rate=0.3, seed=4)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    task = load_task(config)
    assert len(rows) == 200 and all(set(row) == {"prompt", "completion"} for row in rows)
    assert {row["prompt"] for row in rows} <= {task.prompt(problem) for problem in task.train}
    assert {c for row in rows for c in row["prompt"] + row["completion"]} <= set(task.alphabet)
    assert list(task.alphabet) == sorted(set(task.alphabet))
    again = tmp_path / "again.jsonl"
    write_traces(config, again, num_traces=200, error_rate=0.3, seed=4)
    assert again.read_bytes() == path.read_bytes()
    write_traces(config, again, num_traces=200, error_rate=0.3, seed=5)
    assert again.read_bytes() != path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.jsonl", "traces.jsonl"]


def test_the_first_traces_are_clean(tmp_path) -> None:
    path = tmp_path / "traces.jsonl"
    config = TaskConfig(num_train=50)
    write_traces(config, path, num_traces=200, error_rate=1.0, seed=0, clean_share=0.25)
    golds = {problem.question: problem.gold for problem in load_task(config).train}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    right = [row["completion"].endswith(f"\\boxed{{{golds[row['prompt']]}}}") for row in rows]
    assert all(right[:50])
    assert sum(right[50:]) < 15


def test_traces_refuse_what_cannot_be_taught(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"error_rate is 1\.5"):
        write_traces(TaskConfig(num_train=5), tmp_path / "t", num_traces=1, error_rate=1.5, seed=0)
    with pytest.raises(ValueError, match=r"clean_share is -0\.1"):
        write_traces(TaskConfig(num_train=5), tmp_path / "t", num_traces=1, error_rate=0.0, seed=0, clean_share=-0.1)
    with pytest.raises(ValueError, match="data has no teacher"):
        write_traces(data("x"), tmp_path / "t", num_traces=1, error_rate=0.0, seed=0)
    assert not list(tmp_path.iterdir())
