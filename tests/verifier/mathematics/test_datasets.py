"""Golds of the public data sets: found in their solutions, equal to rewritten forms, unequal to mutated ones."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from verifier.mathematics.answer import equivalent, is_correct
from verifier.mathematics.extract import last_boxed

DATA = Path(__file__).parents[3] / ".." / "shared" / "data"


def rows(name: str) -> list[dict[str, Any]]:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"the data set {name} is not here")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def boxed(answer: object) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


def cases(name: str) -> list[tuple[str, str]]:
    """Returns the (completion, gold) pairs of a data set. The completion is the published solution if there is one."""
    match name:
        case "eval/gsm8k" | "train/gsm8k":
            return [(row["answer"], row["answer"].rpartition("#### ")[2]) for row in rows(name)]
        case "eval/aime24":
            return [(boxed(int(row["answer"])), row["answer"]) for row in rows(name)]
        case "eval/amc23":
            return [(boxed(f"{row['answer']:g}"), str(row["answer"])) for row in rows(name)]
        case "eval/minerva_math":
            return [(row["solution"], last_boxed(row["solution"]) or "") for row in rows(name)]
        case "eval/olympiadbench":
            return [(boxed(row["final_answer"][0]), row["final_answer"][0].replace("$", "")) for row in rows(name)]
        case "eval/gaokao2023en" | "eval/college_math":
            return [(boxed(row["answer"]), re.sub(r"(?<!\\)\$", "", row["answer"])) for row in rows(name)]
    return [(row["solution"], row["answer"]) for row in rows(name)]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("train/math_lvl3to5_8k", 0.997),
        ("train/gsm8k", 1.0),
        ("eval/math500", 1.0),
        ("eval/gsm8k", 1.0),
        ("eval/aime24", 1.0),
        ("eval/amc23", 1.0),
        ("eval/minerva_math", 0.99),
        ("eval/olympiadbench", 0.99),
        ("eval/gaokao2023en", 0.99),
        ("eval/college_math", 0.99),
    ],
)
def test_the_gold_is_found_in_its_solution(name: str, share: float) -> None:
    found = cases(name)
    wrong = [(completion[-80:], gold) for completion, gold in found if not is_correct(completion, gold)]
    assert len(wrong) <= (1 - share) * len(found) + 1e-9, wrong[:10]


def rewritten(gold: str) -> str:
    """The same answer in another spelling."""
    text = gold.replace("\\frac", "\\dfrac").replace("\\left", "").replace("\\right", "").replace("\\!", "")
    if re.fullmatch(r"-?\d+", text):
        return f"{int(text):,}.0"
    return re.sub(
        r"\\dfrac\{(\d+)\}\{(\d+)\}", lambda m: f"\\frac{{{2 * int(m[1])}}}{{{2 * int(m[2])}}}", f"$ {text} $."
    )


def test_rewritten_golds_are_right_and_mutated_ones_wrong() -> None:
    golds = sorted({row["answer"] for row in rows("train/math_lvl3to5_8k")} - {"", "None", "$\\boxed{}$"})[::3]
    generator = random.Random(0)
    missed, mistaken = [], []
    for gold in golds:
        if not equivalent(rewritten(gold), gold):
            missed.append(gold)
        digits = [match.start() for match in re.finditer(r"\d", gold)]
        if digits:
            position = generator.choice(digits)
            digit = (int(gold[position]) + generator.randint(1, 8)) % 10
            mutated = f"{gold[:position]}{digit}{gold[position + 1 :]}"
            if equivalent(mutated, gold):
                mistaken.append((mutated, gold))
    assert len(missed) <= 0.005 * len(golds), missed[:20]
    assert not mistaken
