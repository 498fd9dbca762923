"""Problems from data sets: sources, fields, and the messages for broken ones."""

import json
import re
from pathlib import Path

import pytest

from actors.tasks.task import Problem, Task, TaskConfig, load_task
from buffer.config import read_section
from launch.config.compose import compose_config, run_sections

SHARED = Path(__file__).parents[5] / "shared" / "data"


def write_jsonl(path: Path, records: list[object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def records(count: int, start: int = 0) -> list[object]:
    return [{"problem": f"What is {i}+1?", "answer": str(i + 1)} for i in range(start, start + count)]


def described(path: str, **settings) -> TaskConfig:
    return TaskConfig(name="data", data_path=path, **settings)


def golds(path: str, **settings) -> list[str]:
    return [problem.gold for problem in load_task(described(path, **settings)).train]


def test_the_last_records_are_held_out(tmp_path) -> None:
    task = load_task(described(write_jsonl(tmp_path / "d.jsonl", records(10)), num_held_out=3))
    assert task.train[0] == Problem(0, "What is 0+1?", "1")
    assert [problem.gold for problem in task.train] == ["1", "2", "3", "4", "5", "6", "7"]
    assert [(problem.prompt_id, problem.gold) for problem in task.held_out] == [(7, "8"), (8, "9"), (9, "10")]


def test_num_train_takes_the_first_records(tmp_path) -> None:
    task = load_task(described(write_jsonl(tmp_path / "d.jsonl", records(10)), num_held_out=3, num_train=2))
    assert [problem.gold for problem in task.train] == ["1", "2"]
    assert [problem.gold for problem in task.held_out] == ["8", "9", "10"]


def test_an_evaluation_file_is_held_out_of_training(tmp_path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", records(6))
    evaluation = write_jsonl(tmp_path / "e.jsonl", records(4, start=4))
    task = load_task(described(data, eval_path=evaluation))
    assert [problem.gold for problem in task.train] == ["1", "2", "3", "4"]
    assert [(problem.prompt_id, problem.gold) for problem in task.held_out] == [(4, "5"), (5, "6"), (6, "7"), (7, "8")]
    assert len(load_task(described(data, eval_path=evaluation, num_held_out=1)).held_out) == 1


def test_a_question_repeated_at_the_end_leaves_training(tmp_path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [*records(5), *records(1)])
    task = load_task(described(data, num_held_out=1))
    assert [problem.question for problem in task.train] == [f"What is {i}+1?" for i in range(1, 5)]


def test_answers_may_be_numbers_and_patterns_pick_the_last_match(tmp_path) -> None:
    rows = [{"q": "a", "a": 27.0}, {"q": "b", "a": 3}, {"q": "c", "a": 0.5}, {"q": "d", "a": " x\u2028y "}]
    task = load_task(described(write_jsonl(tmp_path / "d.jsonl", rows), question_field="q", answer_field="a"))
    assert [problem.gold for problem in task.train] == ["27", "3", "0.5", "x\u2028y"]
    rows = [{"q": "a", "a": "#### 1\nso\n#### 1,234 "}]
    config = described(
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
        ('{"problem": ["a"], "answer": "b"}\n', r"line 1: field 'problem' is \[\"a\"\]; it must be text or a number"),
        ('{"problem": " ", "answer": "b"}\n', r"line 1: field 'problem' is empty"),
    ],
)
def test_broken_data_is_named(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_task(described(str(path)))
    assert "\n" not in str(error.value)


def test_records_without_an_answer_are_passed_over_and_counted(tmp_path, caplog) -> None:
    data = write_jsonl(
        tmp_path / "d.jsonl", [*records(2), {"problem": "Prove it.", "answer": " "}, *records(2, start=2)]
    )
    task = load_task(described(data, num_held_out=1))
    assert [(problem.prompt_id, problem.gold) for problem in task.train] == [(0, "1"), (1, "2"), (2, "3")]
    assert "skipped 1 records with an empty answer" in caplog.text
    unanswered = write_jsonl(tmp_path / "u.jsonl", [{"problem": "Prove it.", "answer": ""}])
    with pytest.raises(ValueError, match=r"u\.jsonl has only empty answers in field 'answer'"):
        load_task(described(unanswered))


def test_missing_and_unreadable_files(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"task\.data_path is empty"):
        load_task(described(""))
    with pytest.raises(ValueError, match=r"data file .*none\.jsonl does not exist"):
        load_task(described(str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match=r"data file .*none\.jsonl does not exist"):
        load_task(described(write_jsonl(tmp_path / "d.jsonl", records(3)), eval_path=str(tmp_path / "none.jsonl")))
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "\xe9"}')
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        load_task(described(str(tmp_path / "latin.jsonl")))


def test_too_few_records(tmp_path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", records(3))
    with pytest.raises(
        ValueError,
        match=r"task\.num_held_out is 3, but .* has only 2 problems for it; lower .*, or give data.eval_path",
    ):
        load_task(described(data, num_held_out=3))
    with pytest.raises(
        ValueError, match=r"task\.num_train is 4, but .* has only 3 problems for it; .*, or set it to 0 for all of them"
    ):
        load_task(described(data, num_train=4))
    with pytest.raises(ValueError, match="has no training problem that is not held out too"):
        load_task(described(data, eval_path=data))


def test_bad_patterns(tmp_path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", records(3))
    with pytest.raises(ValueError, match="is not a regular expression"):
        load_task(described(data, answer_pattern="("))
    with pytest.raises(ValueError, match="has 0 groups; put one around the answer"):
        load_task(described(data, answer_pattern="#### .+"))
    with pytest.raises(ValueError, match=r"line 1: field 'answer' has no match of task\.answer_pattern"):
        load_task(described(data, answer_pattern="#### (.+)"))


# --- where data lies -------------------------------------------------------------------------------------------------


def test_a_json_file_is_a_list_or_lines(tmp_path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(records(3), indent=2), encoding="utf-8")
    assert golds(str(path)) == ["1", "2", "3"]
    path.write_text(json.dumps([*records(1), "x"]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"d\.json record 2 is a JSON str; each record must be an object"):
        load_task(described(str(path)))
    path.write_text("[{]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"d\.json is not JSON \("):
        load_task(described(str(path)))
    assert golds(write_jsonl(path, records(2))) == ["1", "2"]


def test_parquet(tmp_path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "d.parquet"
    rows = [{"q": f"{i}?", "reward_model": {"ground_truth": [str(i)]}, "level": f"Level {i}"} for i in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    fields = {"question_field": "q", "answer_field": "reward_model.ground_truth", "level_field": "level"}
    task = load_task(described(str(path), **fields, min_level=2))
    assert [(problem.gold, problem.level) for problem in task.train] == [("2", 2), ("3", 3)]
    with pytest.raises(ValueError, match=r"d\.parquet record 1 has no field 'problem'; it has q, reward_model, level"):
        load_task(described(str(path)))
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"data file .*d\.parquet cannot be read as parquet: "):
        load_task(described(str(path)))


def test_data_sets_saved_to_a_folder(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    one, several = datasets.Dataset.from_list(records(3)), datasets.Dataset.from_list(records(2, start=3))
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "dev": several}).save_to_disk(tmp_path / "several")
    assert golds(f"{tmp_path}/one") == ["1", "2", "3"]
    task = load_task(described(f"{tmp_path}/several", eval_path=f"{tmp_path}/several", eval_split="dev"))
    assert [problem.gold for problem in task.train + task.held_out] == ["1", "2", "3", "4", "5"]
    with pytest.raises(ValueError, match=r"several has no split 'test'; it has train, dev: set task\.split or"):
        load_task(described(f"{tmp_path}/several", split="test"))


def test_a_folder_of_files(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", records(3))
    write_jsonl(folder / "test.jsonl", records(2, start=3))
    task = load_task(described(str(folder), eval_path=str(folder)))
    assert [problem.gold for problem in task.train + task.held_out] == ["1", "2", "3", "4", "5"]
    with pytest.raises(ValueError, match=r"data set .*set \(task\.subset not set, split dev\) cannot be loaded: "):
        load_task(described(str(folder), split="dev"))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_jsonl(mixed / "one.jsonl", records(2))
    write_jsonl(mixed / "two.jsonl", [{"other": [1]}])
    # The library's own message is not specific.
    with pytest.raises(ValueError, match=r"mixed .* cannot be loaded: An error occurred .* \(.*cast"):
        load_task(described(str(mixed)))


def test_the_hub_is_asked_only_where_hf_says_so(tmp_path, monkeypatch) -> None:
    import datasets

    asked = []

    def load(name: str, subset: str | None, split: str) -> list[object]:
        asked.append((name, subset, split))
        if name == "nobody/nothing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist on the Hub.\nSee there.")
        return records(3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert golds("hf:somebody/sums", subset="main", split="train[:3]") == ["1", "2", "3"]
    assert golds("hf:somebody/sums") == ["1", "2", "3"]
    assert asked == [("somebody/sums", "main", "train[:3]"), ("somebody/sums", None, "train")]
    with pytest.raises(ValueError, match=r"hf:nobody/nothing .* cannot be loaded: Dataset doesn't exist on the Hub\.$"):
        load_task(described("hf:nobody/nothing"))
    with pytest.raises(ValueError, match=r"somebody/sums does not exist; .* write hf:OWNER/NAME"):
        load_task(described("somebody/sums"))
    assert len(asked) == 3


def test_a_file_has_no_subsets(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"task\.subset is main, but .* is one file"):
        load_task(described(write_jsonl(tmp_path / "d.jsonl", records(2)), subset="main"))


# --- what fields hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "field", "gold"),
    [
        ({"value": "5"}, "a.value", "5"),
        (["7", "8"], "a.1", "8"),
        ({"x": [{"y": 2.0}]}, "a.x.0.y", "2"),
        (["1/2", "0.5"], "a", '["1/2", "0.5"]'),
        (["$\\pi$"], "a", "\\pi"),
        (["3", "3", ""], "a", "3"),
        ([1, 2.0], "a", '["1", "2"]'),
        ([True, False], "a", "[true, false]"),
        (True, "a", "True"),
        ({"numbers": [1, 2], "target": 3}, "a", '{"numbers": [1, 2], "target": 3}'),
        ("$x=5$ and $y=6$", "a", "x=5 and y=6"),
        ("$5", "a", "$5"),
        (r"\$5 or \$6", "a", r"\$5 or \$6"),
    ],
)
def test_answers_become_golds(tmp_path, value: object, field: str, gold: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": "?", "a": value}])
    assert golds(path, answer_field=field) == [gold]


def test_a_field_with_dots_in_its_name_and_a_path_that_leads_nowhere(tmp_path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": "?", "a.b": "1", "c": ["2"]}])
    assert golds(path, answer_field="a.b") == ["1"]
    for nowhere in ("a.c", "c.1", "c.x", "c.0.y"):
        with pytest.raises(
            ValueError, match=rf"line 1 has no field '{nowhere}'; it has problem, a\.b, c: set task\.ans"
        ):
            golds(path, answer_field=nowhere)


def test_the_last_box_of_a_solution_is_the_gold(tmp_path) -> None:
    solutions = ["so \\boxed{1}, no: $\\boxed{\\frac{1}{2}}$.", "\\boxed{4} is it", "no box"]
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": f"{i}?", "answer": s} for i, s in enumerate(solutions)])
    assert golds(path, answer_pattern="boxed") == ["\\frac{1}{2}", "4"]


def test_levels_filter_training_and_leave_evaluation(tmp_path, caplog) -> None:
    levels = ["Level 1", 2, 3.0, "Level ?", "4"]
    rows = [{**record, "level": level} for record, level in zip(records(5), levels, strict=True)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    held_out = write_jsonl(tmp_path / "e.jsonl", records(2, start=7))
    task = load_task(described(path, eval_path=held_out, level_field="level", min_level=2, max_level=3))
    assert [(problem.prompt_id, problem.gold, problem.level) for problem in task.train] == [(0, "2", 2), (1, "3", 3)]
    assert [problem.level for problem in task.held_out] == [0, 0]
    leveled = load_task(described(path, level_field="level"))
    assert [problem.level for problem in leveled.train] == [1, 2, 3, 0, 4]
    assert leveled.fingerprint != load_task(described(path)).fingerprint
    assert "1 records have no level, which counts as 0" in caplog.text
    with pytest.raises(ValueError, match=r"leave none of the 5 training problems of .*, whose levels go from 0 to 4"):
        load_task(described(path, level_field="level", min_level=9))
    with pytest.raises(ValueError, match=r"need task\.level_field"):
        load_task(described(path, min_level=2))
    with pytest.raises(ValueError, match=r"no record of .* holds a number in field 'lvl'; set task.level_field"):
        load_task(described(path, level_field="lvl"))


def test_a_level_is_never_below_zero_nor_beyond_belief(tmp_path) -> None:
    def loaded(*levels: object) -> list[int]:
        rows = [{**record, "level": level} for record, level in zip(records(9), levels, strict=False)]
        return [
            p.level for p in load_task(described(write_jsonl(tmp_path / "d.jsonl", rows), level_field="level")).train
        ]

    assert loaded("level-3", -1, "algebra-12", 1_000_000) == [3, 1, 12, 1_000_000], "a hyphen hides no problem"
    for too_high in (1_000_001, "9" * 40):
        with pytest.raises(
            ValueError, match=r"line 2: the number in field 'level' is .*above the highest level 1000000"
        ):
            loaded(1, too_high)


def test_a_question_that_is_held_out_in_other_spelling_leaves_training(tmp_path) -> None:
    rows = [{"problem": text, "answer": "1"} for text in ("Is $x=1$?", "Is  X = 1?\n", "is x=2?", "Is x=1 ?")]
    task = load_task(described(write_jsonl(tmp_path / "d.jsonl", rows), num_held_out=1))
    assert [problem.question for problem in task.train] == ["is x=2?"]


def test_countdown_of_a_file(tmp_path) -> None:
    rows = [
        {"numbers": [44, 19, 35], "target": 98},
        {"numbers": [3, 4, 5, 6], "target": 18},
        {"numbers": [1, 2], "target": 3},
    ]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    config = {"name": "countdown", "data_path": path, "num_held_out": 1}
    task = load_task(TaskConfig(**config, options={"words": 1}))
    assert task.train[0].question == "Using the numbers [44, 19, 35], create an equation that equals 98."
    assert json.loads(task.train[0].gold) == rows[0]
    assert [problem.level for problem in task.train] == [3, 4]
    assert load_task(TaskConfig(**config, min_level=4)).train[0].question == "3,4,5,6=18:"
    write_jsonl(tmp_path / "d.jsonl", [*rows, {"numbers": [1, "2"], "target": 3}])
    with pytest.raises(
        ValueError, match=r"line 4: countdown reads numbers, a list of whole numbers, and target, .* \[1, '2'\]"
    ):
        load_task(TaskConfig(**config))


# --- the data beside the repository ----------------------------------------------------------------------------------


COUNTDOWN = ["task=countdown", "task.num_train=0", "task.template=countdown_r1", "task.options.words=1"]
PUZZLES = ["task=knights_knaves", "task.num_train=0", "task.template=knights_knaves"]
SETS = {
    "train/math_lvl3to5_8k": (8521, "118", ["task=math", "task.level_field=level"]),
    "train/gsm8k": (7473, "72", ["task=gsm8k"]),
    "train/knights_knaves": (4500, None, PUZZLES),
    "train/countdown": (10240, None, COUNTDOWN),
    "eval/knights_knaves": (500, None, PUZZLES),
    "eval/countdown": (1024, None, COUNTDOWN),
    "eval/gsm8k": (1319, "18", ["task=gsm8k"]),
    "eval/math500": (500, r"\left( 3, \frac{\pi}{2} \right)", ["task=math", "task.level_field=level"]),
    "eval/aime24": (30, "204", ["task=math"]),
    "eval/amc23": (40, "27", ["task=math"]),
    "eval/minerva_math": (272, "1.6", ["task=math", "task.answer_field=solution", "task.answer_pattern=boxed"]),
    "eval/olympiadbench": (675, "2", ["task=math", "task.question_field=question", "task.answer_field=final_answer.0"]),
    "eval/gaokao2023en": (385, r"\{x|-2\leq x < 1\}", ["task=math", "task.question_field=question"]),
    "eval/college_math": (2818, "10-4 n", ["task=math", "task.question_field=question"]),
}
"""What docs/tasks.md says of each: rows, the first gold, and the settings beside data.path."""


def loaded(name: str, *settings: str) -> Task:
    if not (SHARED / f"{name}.jsonl").is_file():
        pytest.skip(f"the data set {name} is not here")
    overrides = [*SETS[name][2], f"data.path={SHARED / name}.jsonl", *settings]
    sections = run_sections(compose_config(overrides, ("task", "data")), overrides)
    return load_task(read_section(TaskConfig, sections["task"], "task"))


@pytest.mark.parametrize("name", SETS)
def test_every_set_loads_by_one_line(name: str) -> None:
    task = loaded(name, "task.num_held_out=1")
    num_rows, first_gold, _ = SETS[name]
    problems = [*task.train, *task.held_out]
    assert num_rows - 3 <= len(problems) <= num_rows
    assert first_gold is None or problems[0].gold == first_gold
    assert not any(re.fullmatch(r"\$[^$]*\$", problem.gold) for problem in problems)


def test_every_file_beside_the_repository_is_in_the_table() -> None:
    if not SHARED.is_dir():
        pytest.skip("the data folder is not beside the repository")
    assert {path.relative_to(SHARED).with_suffix("").as_posix() for path in SHARED.rglob("*.jsonl")} == set(SETS)


def test_training_and_evaluation_files_together() -> None:
    task = loaded("train/math_lvl3to5_8k", f"data.eval_path={SHARED}/eval/math500.jsonl", "task.num_held_out=0")
    assert (len(task.train), len(task.held_out)) == (8521, 500)
    assert {problem.level for problem in task.train} == {3, 4, 5}
    hard = loaded("train/math_lvl3to5_8k", "task.min_level=5")
    assert {problem.level for problem in hard.train} == {5} and len(hard.held_out) == 200
    task = loaded("train/gsm8k", f"data.eval_path={SHARED}/eval/gsm8k.jsonl", "task.num_held_out=0")
    assert (len(task.train), len(task.held_out)) == (7473, 1319)
