"""`python -m verifier check`: verdicts, rules, kinds, disagreements with labels and between graders, user mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from verifier.__main__ import main

LINES = [
    {"completion": r"So $\boxed{\frac{1}{2}}$.", "gold": "0.5", "expected": True, "kind": "fractions"},
    {"completion": "\x1b[2J\ud800 So [/x] $\\boxed{3}$.", "gold": "4", "expected": "correct", "kind": "integers"},
    {"completion": "", "gold": "4", "expected": 0, "kind": "integers"},
    {"completion": "The answer is 7.", "gold": ["6", "7"], "expected": False, "kind": "integers"},
]


@pytest.fixture
def write(tmp_path: Path):
    def write(lines: list[Any], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return str(path)

    return write


def test_labels_are_compared_and_disagreements_listed(write, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = tmp_path / "found.json"
    status = main(["check", "--reward", "accuracy", "--data", write(LINES), "--json", str(found)])
    figures, printed = json.loads(found.read_text()), capsys.readouterr().out
    assert status == 1
    assert figures["verdicts"] == {"correct": 2, "wrong": 1, "no_answer": 1}
    assert figures["mean_reward"] == 0.5
    assert (figures["compared"], figures["false_positives"], figures["false_negatives"]) == (4, 1, 1)
    assert [one["line"] for one in figures["disagreements"]] == [2, 4]
    assert figures["kinds"]["integers"] == {"completions": 3, "correct": 1, "disagreements": 2}
    assert sum(sum(counts.values()) for counts in figures["rules"].values()) == 4
    assert "extraction" in figures["rules"]
    assert "\x1b" not in printed
    assert "[/x]" in printed
    assert "2 of 4 (50.0%); 1 correct only here, 1 correct only there" in " ".join(printed.split())


def test_two_graders_are_compared(write, tmp_path: Path):
    found = tmp_path / "found.json"
    boxed = "{name: accuracy, options: {format: boxed}}"
    common = ["check", "--reward", "accuracy", "--data", write(LINES), "--json", str(found)]
    assert main([*common, "--against", boxed]) == 1
    (only,) = json.loads(found.read_text())["disagreements"]
    assert (only["line"], only["verdict"], only["other"]) == (4, "correct", "no_answer")
    assert main([*common, "--against", "accuracy"]) == 0


def test_a_task_and_names_of_fields(write, tmp_path: Path):
    renamed = [
        {"text": line["completion"], "answer": line["gold"], "is_right": line["kind"] == "integers"} for line in LINES
    ]
    found = tmp_path / "found.json"
    fields = ["--completion-field", "text", "--gold-field", "answer", "--expected-field", "is_right"]
    assert main(["check", "--task", "math", "--data", write(renamed), "--json", str(found), *fields]) == 1
    figures = json.loads(found.read_text())
    assert figures["verdicts"] == {"no_answer": 2, "correct": 1, "wrong": 1}
    assert figures["kinds"] == {}


def test_a_hanging_grader_is_a_verdict(write, tmp_path: Path):
    grader = tmp_path / "endless.py"
    grader.write_text(
        "from verifier.base import Grader, Verdict\n"
        "def judge(completion):\n"
        "    while completion.text == 'hang':\n"
        "        pass\n"
        "    return Verdict.CORRECT\n"
        "def endless():\n"
        "    return Grader(judge, {Verdict.CORRECT: 1.0, Verdict.WRONG: 0.0, Verdict.NO_ANSWER: 0.0})\n"
    )
    data, found = write([{"completion": text, "gold": "1"} for text in ("hang", "fine")]), tmp_path / "found.json"
    options = ["--deadline-seconds", "0.5", "--json", str(found)]
    assert main(["check", "--reward", f"{grader}:endless", "--data", data, *options]) == 0
    assert json.loads(found.read_text())["verdicts"] == {"timeout": 1, "correct": 1}


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        (LINES, ["--task", "nonsense"], "unknown task 'nonsense'; choose one of"),
        (LINES, ["--reward", "nonsense"], "unknown reward 'nonsense'"),
        (LINES, ["--reward", "{weight: 1}"], "neither a name nor"),
        (LINES, ["--reward", "{name: ["], "neither a name nor"),
        (LINES, ["--reward", "{name: accuracy, weight: much}"], "has weight 'much'"),
        (LINES, ["--reward", "{name: accuracy, options: [boxed]}"], "options ['boxed']; give a number, and options as"),
        (LINES, ["--reward", "accuracy", "--workers", "0"], "--workers is 0"),
        (LINES, ["--reward", "accuracy", "--deadline-seconds", "inf"], "--deadline-seconds inf"),
        (LINES, ["--reward", "accuracy", "--gold-field", "answer"], "no field 'answer', only completion, gold"),
        (LINES, ["--reward", "accuracy", "--expected-field", "label"], "no field 'label'"),
        ([], ["--reward", "accuracy"], "holds no completions"),
        (["{"], ["--reward", "accuracy"], "line 1 is not JSON"),
        (["", "7"], ["--reward", "accuracy"], "line 2 is no JSON object"),
        ([{"completion": 7, "gold": "7"}], ["--reward", "accuracy"], "it must be a text"),
        ([{"completion": "7", "gold": None}], ["--reward", "accuracy"], "it must be an answer"),
        ([{"completion": "7", "gold": "7", "label": "yes"}], ["--reward", "accuracy"], "label is 'yes'"),
    ],
)
def test_a_mistake_gets_one_sentence(write, capsys: pytest.CaptureFixture[str], lines: Any, options: Any, said: str):
    assert main(["check", "--data", write(lines), *options]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.startswith("verifier: ") and printed.count("\n") == 1


def test_a_file_that_is_none_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "missing", binary):
        assert main(["check", "--reward", "accuracy", "--data", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
