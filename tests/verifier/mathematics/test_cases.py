"""The judge against `cases.jsonl`: completions of every kind that are labeled by hand, about half of them near misses.

A line has the fields kind, completion, gold (a text, or a list of alternatives), correct, note, and sometimes format.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from verifier.base import Verdict
from verifier.mathematics.answer import judge

CASES = Path(__file__).with_name("cases.jsonl")
_KINDS = """
integers fractions mixed_numbers decimals repeating_decimals percent thousands_separators scientific_notation currency
units degrees radicals complex_numbers constants polynomials rational_functions trigonometric logarithmic equations
assignment inequalities intervals sets tuples_points matrices_vectors plus_minus bases binomials_factorials huge_numbers
multiple_choice text_answers ordinals yes_no time_date several_golds unicode_spelling extraction traps
"""


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]


def table(cases: list[dict[str, Any]], wrong: list[dict[str, Any]]) -> str:
    """The text of a failure: each kind with disagreements, its agreement, and the disagreements."""
    totals, lines = Counter(case["kind"] for case in cases), defaultdict(list)
    for case in wrong:
        side = "refused" if case["correct"] else "accepted"
        lines[case["kind"]].append(f"  {side}: {case['completion'][-80:]!r} for {case['gold']!r} ({case['note']})")
    shares = {kind: f"{kind}: {1 - len(found) / totals[kind]:.0%} of {totals[kind]}" for kind, found in lines.items()}
    return "\n".join(line for kind in shares for line in [shares[kind], *lines[kind]])


def test_the_judge_agrees_with_a_careful_human(cases: list[dict[str, Any]]):
    wrong = []
    for case in cases:
        verdict = judge(case["completion"], case["gold"], format=case.get("format", "any")).verdict
        if (verdict is Verdict.CORRECT) != case["correct"]:
            wrong.append(case)
    assert not wrong, table(cases, wrong)


def test_the_cases_cover_every_kind_from_both_sides(cases: list[dict[str, Any]]):
    sides = Counter((case["kind"], case["correct"]) for case in cases)
    assert len(cases) >= 600
    assert all(sides[kind, label] >= 5 for kind in _KINDS.split() for label in (True, False))
    texts = [(case["completion"], json.dumps(case["gold"]), case.get("format")) for case in cases]
    assert len(set(texts)) == len(texts)
