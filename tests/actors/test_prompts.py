import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from actors.prompts import GENERATED, Problem, TaskConfig, load_task, write_traces

DATA = Path(__file__).parents[3] / "shared" / "data"


def write_jsonl(path: Path, records: list[object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def records(count: int, start: int = 0) -> list[object]:
    return [{"problem": f"What is {i}+1?", "answer": str(i + 1)} for i in range(start, start + count)]


def jsonl(path: str, **settings) -> TaskConfig:
    return TaskConfig(name="jsonl", data_path=path, **settings)


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
    with pytest.raises(ValueError, match="'sudoku' is unknown; choose one of arithmetic, countdown, multiply, jsonl"):
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
    one = jsonl(write_jsonl(tmp_path / "one.jsonl", base), num_held_out=2)
    two = jsonl(write_jsonl(tmp_path / "two.jsonl", changed), num_held_out=2)
    moved = jsonl(one.data_path, num_held_out=3)
    assert len({load_task(config).fingerprint for config in (one, two, moved)}) == 3


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
    with pytest.raises(ValueError, match="jsonl has no teacher"):
        write_traces(jsonl("x"), tmp_path / "t", num_traces=1, error_rate=0.0, seed=0)
    assert not list(tmp_path.iterdir())


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_last_records_are_held_out(tmp_path) -> None:
    task = load_task(jsonl(write_jsonl(tmp_path / "d.jsonl", records(10)), num_held_out=3))
    assert task.train[0] == Problem(0, "What is 0+1?", "1")
    assert [problem.gold for problem in task.train] == ["1", "2", "3", "4", "5", "6", "7"]
    assert [(problem.prompt_id, problem.gold) for problem in task.held_out] == [(7, "8"), (8, "9"), (9, "10")]


def test_num_train_takes_the_first_records(tmp_path) -> None:
    task = load_task(jsonl(write_jsonl(tmp_path / "d.jsonl", records(10)), num_held_out=3, num_train=2))
    assert [problem.gold for problem in task.train] == ["1", "2"]
    assert [problem.gold for problem in task.held_out] == ["8", "9", "10"]


def test_an_evaluation_file_is_held_out_of_training(tmp_path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", records(6))
    evaluation = write_jsonl(tmp_path / "e.jsonl", records(4, start=4))
    task = load_task(jsonl(data, eval_path=evaluation))
    assert [problem.gold for problem in task.train] == ["1", "2", "3", "4"]
    assert [(problem.prompt_id, problem.gold) for problem in task.held_out] == [(4, "5"), (5, "6"), (6, "7"), (7, "8")]
    assert len(load_task(jsonl(data, eval_path=evaluation, num_held_out=1)).held_out) == 1


def test_a_question_repeated_at_the_end_leaves_training(tmp_path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [*records(5), *records(1)])
    task = load_task(jsonl(data, num_held_out=1))
    assert [problem.question for problem in task.train] == [f"What is {i}+1?" for i in range(1, 5)]


def test_answers_may_be_numbers_and_patterns_pick_the_last_match(tmp_path) -> None:
    rows = [{"q": "a", "a": 27.0}, {"q": "b", "a": 3}, {"q": "c", "a": 0.5}, {"q": "d", "a": " x\u2028y "}]
    task = load_task(jsonl(write_jsonl(tmp_path / "d.jsonl", rows), question_field="q", answer_field="a"))
    assert [problem.gold for problem in task.train] == ["27", "3", "0.5", "x\u2028y"]
    rows = [{"q": "a", "a": "#### 1\nso\n#### 1,234 "}]
    config = jsonl(
        write_jsonl(tmp_path / "g.jsonl", rows), question_field="q", answer_field="a", answer_pattern="#### (.+)"
    )
    assert load_task(config).train[0].gold == "1,234"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"data file .*d\.jsonl is empty; it must hold one JSON object per line"),
        ("\n  \n", r"data file .*d\.jsonl is empty"),
        ('{"problem": "a", "answer": "b"}\n\nnot json\n', r"d\.jsonl line 3 is not JSON \(Expecting value\)"),
        ('["a"]\n', r"d\.jsonl line 1 is a JSON list"),
        (
            '{"question": "a", "answer": "b"}\n',
            r"line 1 has no field 'problem'; it has question, answer: set task\.quest",
        ),
        (
            '{"problem": "a", "gold": "b"}\n',
            r"line 1 has no field 'answer'; it has problem, gold: set task\.answer_field",
        ),
        ("{}\n", r"line 1 has no field 'problem'; it has none"),
        ('{"problem": "a", "answer": ["b"]}\n', r"line 1: field 'answer' is \[\"b\"\]; it must be text or a number"),
        ('{"problem": "a", "answer": true}\n', r"line 1: field 'answer' is true; it must be text or a number"),
        ('{"problem": " ", "answer": "b"}\n', r"line 1: field 'problem' is empty"),
    ],
)
def test_broken_data_is_named(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_task(jsonl(str(path)))
    assert "\n" not in str(error.value)


def test_records_without_an_answer_are_passed_over_and_counted(tmp_path, caplog) -> None:
    data = write_jsonl(
        tmp_path / "d.jsonl", [*records(2), {"problem": "Prove it.", "answer": " "}, *records(2, start=2)]
    )
    task = load_task(jsonl(data, num_held_out=1))
    assert [(problem.prompt_id, problem.gold) for problem in task.train] == [(0, "1"), (1, "2"), (2, "3")]
    assert "passed over 1 records with an empty answer" in caplog.text
    unanswered = write_jsonl(tmp_path / "u.jsonl", [{"problem": "Prove it.", "answer": ""}])
    with pytest.raises(ValueError, match=r"u\.jsonl has only empty answers in field 'answer'"):
        load_task(jsonl(unanswered))


def test_missing_and_unreadable_files(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"task\.data_path is empty"):
        load_task(jsonl(""))
    with pytest.raises(ValueError, match=r"data file .*none\.jsonl does not exist"):
        load_task(jsonl(str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match=r"data file .*none\.jsonl does not exist"):
        load_task(jsonl(write_jsonl(tmp_path / "d.jsonl", records(3)), eval_path=str(tmp_path / "none.jsonl")))
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "\xe9"}')
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        load_task(jsonl(str(tmp_path / "latin.jsonl")))


def test_too_few_records(tmp_path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", records(3))
    with pytest.raises(ValueError, match=r"task\.num_held_out is 3, but .* has only 2 problems for it"):
        load_task(jsonl(data, num_held_out=3))
    with pytest.raises(ValueError, match=r"task\.num_train is 4, but .* has only 3 problems for it"):
        load_task(jsonl(data, num_train=4))
    with pytest.raises(ValueError, match="has no training problem that is not held out too"):
        load_task(jsonl(data, eval_path=data))


def test_bad_patterns(tmp_path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", records(3))
    with pytest.raises(ValueError, match="is not a regular expression"):
        load_task(jsonl(data, answer_pattern="("))
    with pytest.raises(ValueError, match="has 0 groups; put one around the answer"):
        load_task(jsonl(data, answer_pattern="#### .+"))
    with pytest.raises(ValueError, match=r"line 1: field 'answer' has no match of task\.answer_pattern"):
        load_task(jsonl(data, answer_pattern="#### (.+)"))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data folder beside the repository")
def test_the_real_sets_load() -> None:
    config = jsonl(
        str(DATA / "train" / "math_lvl3to5_8k.jsonl"),
        eval_path=str(DATA / "eval" / "math500.jsonl"),
        template="qwen_boxed",
    )
    task = load_task(config)
    assert (len(task.train), len(task.held_out)) == (8521, 500)
    assert task.train[0].gold == "118"
    grade_school = jsonl(
        str(DATA / "train" / "gsm8k.jsonl"),
        eval_path=str(DATA / "eval" / "gsm8k.jsonl"),
        question_field="question",
        answer_pattern=r"####\s*(.+)",
    )
    task = load_task(grade_school)
    assert (len(task.train), len(task.held_out)) == (7473, 1319)
    assert task.train[0].gold == "72"
