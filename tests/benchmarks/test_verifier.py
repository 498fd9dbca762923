"""`benchmarks/verifier.py`: the labels of rewritings, the counts of hangs and deaths, and a small complete run."""

import json
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks.parts.verifier import asking
from benchmarks.parts.verifier.asking import DIED, HANG, NOT_ASKED, Item, Unavailable, ask
from benchmarks.parts.verifier.data import boxed, own_solutions, rewritten
from benchmarks.parts.verifier.rewritings import CHANGES, REWRITINGS
from benchmarks.parts.verifier.trust import PAYLOADS

ROOT = Path(__file__).parents[2]
CASES = [
    {"kind": "fractions", "completion": r"\boxed{\frac12}", "gold": "0.5", "correct": True},
    {"kind": "fractions", "completion": r"\boxed{\frac13}", "gold": "0.5", "correct": False},
    {"kind": "sets", "completion": r"\boxed{3}", "gold": ["2", "3"], "correct": True},
    {"kind": "tags", "completion": "The answer is 3", "gold": "3", "correct": False, "format": "tags"},
]
ODD_GRADER = """
import sys, time
print("ready 1.0", flush=True)
for line in open(sys.argv[2]).read().splitlines()[int(sys.argv[3]):]:
    if "hang" in line:
        time.sleep(600)
    if "die" in line:
        sys.exit(3)
    print("[true, 0.1, 0.1, \\"\\"]", flush=True)
"""


def value(text: str) -> Fraction | None:
    """Reads the numbers that the rules write, by code of its own; None for other texts."""
    text = (
        text.strip("$.").removeprefix("n = ").replace(",\\!", "").replace("{,}", "").replace(",", "").replace("−", "-")
    )
    text = text.replace("\\dfrac", "\\frac").replace("\\left", "").replace("\\right", "").strip("()")
    sign, text = (-1, text[1:]) if text.startswith("-") else (1, text)
    whole, bar, rest = text.partition("\\frac{")
    try:
        if not bar:
            return sign * Fraction(text)
        numerator, denominator = rest.removesuffix("}").split("}{")
        return sign * (Fraction(whole or 0) + Fraction(int(numerator), int(denominator)))
    except ValueError:
        return None


@pytest.mark.parametrize(
    "gold", ["1234567", "-12", r"\frac{22}{7}", r"-\frac{5}{8}", r"\dfrac{1}{3}", "0.375", "-2.50"]
)
def test_rewritings_keep_a_number_and_changes_do_not(gold: str):
    read = 0
    for rules, kept in ((REWRITINGS, True), (CHANGES, False)):
        for name, rule in rules.items():
            text = rule(gold, random.Random(0))
            number = value(text) if text else None
            if number is not None:
                assert (number == value(gold)) is kept, (name, text)
                read += 1
    assert read >= 6


def test_every_gold_is_asked_against_itself_and_the_same_in_every_run():
    items = rewritten(["7", "[0,1)", r"\text{no}"], most=3)
    assert items == rewritten(["7", "[0,1)", r"\text{no}"], most=3)
    assert [item.completion for item in items if item.kind == "itself"] == [
        boxed(g) for g in ("7", "[0,1)", r"\text{no}")
    ]
    assert {item.kind for item in items if not item.expected} >= {"another digit", "another bracket"}


def test_data_sets_that_are_not_here_are_left_out(tmp_path: Path):
    (tmp_path / "eval").mkdir()
    row = {"answer": "2 + 2 is 4 #### 4"}
    (tmp_path / "eval" / "gsm8k.jsonl").write_text(json.dumps(row))
    assert own_solutions(tmp_path) == {"eval/gsm8k": [Item("eval/gsm8k", row["answer"], ("4",), True)]}


def test_hangs_and_deaths_are_counted_and_the_others_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "odd.py"
    script.write_text(ODD_GRADER)
    monkeypatch.setattr(asking, "SCRIPT", script)
    items = [Item("", text, ("1",), True) for text in ("fine", "hang", "die", "fine", "die", "fine")]
    asked = ask("odd", sys.executable, items, 0.5)
    assert asked.release == "1.0"
    assert [outcome.problem for outcome in asked.outcomes] == ["", HANG, DIED, "", DIED, ""]
    monkeypatch.setattr(asking, "MAX_RESTARTS", 1)
    problems = [outcome.problem for outcome in ask("odd", sys.executable, items, 0.5).outcomes]
    assert problems == ["", HANG, DIED, NOT_ASKED, NOT_ASKED, NOT_ASKED]


def test_a_grader_that_is_not_installed_says_so(tmp_path: Path):
    with pytest.raises(Unavailable, match=r"ModuleNotFoundError.*mathruler"):
        ask("mathruler", sys.executable, [Item("", "1", ("1",), True)], 5.0)


def test_the_whole_benchmark_without_peers_and_data(tmp_path: Path):
    cases, found, drawn = tmp_path / "cases.jsonl", tmp_path / "figures.json", tmp_path / "kinds.svg"
    cases.write_text("".join(json.dumps(case) + "\n" for case in CASES))
    options = ["--quick", "--graders", "--data", str(tmp_path), "--cases", str(cases), "--pool-answers", "100"]
    command = [sys.executable, "benchmarks/verifier.py", *options, "--json", str(found), "--plot", str(drawn)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    figures = json.loads(found.read_text())
    ours = figures["graders"]["ours"]
    assert ours["parts"]["cases"]["agreement"] == 1.0
    assert ours["answers_per_cpu_second"] > 0
    assert (ours["hangs"], ours["exceptions"], ours["executions"]) == (0, 0, 0)
    differing = figures["same_verdict"]["differing"]
    assert [count for count in differing.values() if isinstance(count, int)] == [0] * 5
    assert differing["with gmpy2"].startswith("not tried")
    assert (figures["pool"]["hangs"], figures["pool"]["timeouts"]) == (1, 1)
    assert "no data set in" in figures["skipped"]["data"]
    assert "labelled cases" in printed
    assert drawn.stat().st_size > 0


def test_a_payload_that_is_executed_leaves_its_file(tmp_path: Path):
    payload = PAYLOADS[1] % "canary1"
    subprocess.run([sys.executable, "-c", payload], cwd=tmp_path, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["canary1"]
