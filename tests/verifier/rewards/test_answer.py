"""The graders: the reward and the verdict of each for various answers."""

import json
from typing import Any

import pytest

from verifier.base import Completion, RewardSpec, Verdict
from verifier.scoring.scorer import build_scorer

COUNTDOWN = json.dumps({"numbers": [44, 19, 35], "target": 98})
TWO = json.dumps({"names": ["Zoey", "Anna Lee"], "is_knight": [True, False]})
BOTH_TAGS = "<think>hm</think>\n<answer>{}</answer>"


@pytest.mark.parametrize(
    ("name", "text", "gold", "reward", "verdict"),
    [
        ("boxed_format", r"\boxed{0.5}", r"\frac{1}{2}", 1.0, Verdict.CORRECT),
        ("boxed_format", r"\boxed{0.6}", r"\frac{1}{2}", -0.5, Verdict.WRONG),
        ("boxed_format", "0.5", r"\frac{1}{2}", -1.0, Verdict.NO_ANSWER),
        ("boxed_format", "<answer>0.5</answer>", r"\frac{1}{2}", -1.0, Verdict.NO_ANSWER),
        ("accuracy", "The answer is 0.5.", r"\frac{1}{2}", 1.0, Verdict.CORRECT),
        ("accuracy", r"\boxed{0.6}", r"\frac{1}{2}", 0.0, Verdict.WRONG),
        ("accuracy", "Hm, let me see, what is asked for here?", r"\frac{1}{2}", 0.0, Verdict.NO_ANSWER),
        ("multiply", r"<answer>4,2</answer>", "42", 0.1, Verdict.WRONG),
        ("boxed_exact", r"\boxed{ 042 }", "42", 1.0, Verdict.CORRECT),
        ("boxed_exact", r"\boxed{4 2}", "42", 1.0, Verdict.CORRECT),
        ("boxed_exact", r"\boxed{x+1}", "x + 1", 1.0, Verdict.CORRECT),
        ("boxed_exact", r"\boxed{1,234}", "1234", 1.0, Verdict.CORRECT),
        ("boxed_exact", r"\boxed{-1,234,567}", "-1234567", 1.0, Verdict.CORRECT),
        ("boxed_exact", r"\boxed{4,2}", "42", -0.5, Verdict.WRONG),
        ("boxed_exact", r"\boxed{1,2,3}", "123", -0.5, Verdict.WRONG),
        ("boxed_exact", r"\boxed{,,42,}", "42", -0.5, Verdict.WRONG),
        ("boxed_exact", r"\boxed{12,34}", "1234", -0.5, Verdict.WRONG),
        ("boxed_exact", r"\boxed{1234,567}", "1234567", -0.5, Verdict.WRONG),
        ("boxed_exact", r"\boxed{42.}", "42", 1.0, Verdict.CORRECT),
        ("boxed_exact", r"\boxed{\,42\ }", "42", 1.0, Verdict.CORRECT),
        ("boxed_exact", r"\boxed{4.2}", "42", -0.5, Verdict.WRONG),
        ("boxed_exact", r"\boxed{43}", "42", -0.5, Verdict.WRONG),
        ("boxed_exact", r"\boxed{84/2}", "42", -0.5, Verdict.WRONG),
        ("boxed_exact", "42", "42", -1.0, Verdict.NO_ANSWER),
        ("countdown", "<answer>44 + 19 + 35</answer>", COUNTDOWN, 1.0, Verdict.CORRECT),
        ("countdown", "<answer>44 + 19</answer>", COUNTDOWN, 0.1, Verdict.WRONG),
        ("countdown", "44 + 19 + 35", COUNTDOWN, 0.0, Verdict.NO_ANSWER),
        ("countdown_equation", "<answer>44 + 19 + 35</answer>", COUNTDOWN, 1.0, Verdict.CORRECT),
        ("countdown_equation", "<answer>44 + 19</answer>", COUNTDOWN, 0.0, Verdict.WRONG),
        ("multiply", "<answer>56,088</answer>", "56088", 1.0, Verdict.CORRECT),
        ("multiply", "<answer>56089</answer>", "56088", 0.1, Verdict.WRONG),
        ("multiply", "56088", "56088", 0.0, Verdict.NO_ANSWER),
    ],
)
def test_graders_of_the_recipes(name: str, text: str, gold: str, reward: float, verdict: Verdict) -> None:
    score = build_scorer([RewardSpec(name)])(Completion(text, gold))
    assert (score.reward, score.verdict, score.breakdown) == (reward, verdict, {name: reward})


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("(1) Zoey is a knight\n(2) Anna Lee is a knave", 2.0),
        ("1. zoey is a KNIGHT.\n2. Anna Lee is a knave.", 2.0),
        ("Anna Lee is a knave, and Zoey is a knight", 2.0),
        ("**Zoey is a knight**; **Anna Lee is a knave**", 2.0),
        ("(1) Zoey is a knave\n(2) Anna Lee is a knave", -1.5),
        ("(1) Zoey is a knight", -2.0),
        ("Zoey is a knight\nAnna Lee is a knave\nZoey is a knight", -2.0),
        ("Zoey is a knight\nAnna Lee is a knave\nBob is a knave", -2.0),
        ("Zoey is not a knave\nAnna Lee is a knave", -2.0),
        ("Zoey is a knight or Anna Lee is a knave", -2.0),
        ("Zoey: knight, Anna Lee: knave", -2.0),
        ("If Zoey is a knight, Anna Lee is a knave", -2.0),
        ("Zoey is a knight\nAnna Lee is a knave\n" + " " * 3000, 2.0),
        ("Zoey is a knight\nAnna Lee is a knave" + "\n.;" * 3000, -2.0),
        ("", -2.0),
    ],
)
def test_knights_and_knaves_reads_plain_statements_only(answer: str, reward: float) -> None:
    score = build_scorer([RewardSpec("knights_knaves")])(Completion(BOTH_TAGS.format(answer), TWO))
    assert score.reward == reward


def test_knights_and_knaves_asks_for_the_tags_unless_told_not_to() -> None:
    text = "<answer>Zoey is a knight, Anna Lee is a knave</answer>"
    assert build_scorer([RewardSpec("knights_knaves")])(Completion(text, TWO)).reward == -2.0
    loose = RewardSpec("knights_knaves", options={"strict_tags": False, "correct": 1.0})
    assert build_scorer([loose])(Completion(text, TWO)).reward == 1.0


@pytest.mark.parametrize(
    ("options", "completion", "verdict"),
    [
        ({"after_thinking": True}, Completion(r"<think>a \boxed{5}", "5"), Verdict.NO_ANSWER),
        ({"after_thinking": True}, Completion(r"<think>a</think> \boxed{5}", "5"), Verdict.CORRECT),
        ({"allow_truncated": False}, Completion(r"\boxed{5} and", "5", truncated=True), Verdict.TRUNCATED),
        ({"allow_truncated": False}, Completion(r"\boxed{5} and", "5"), Verdict.CORRECT),
        ({"format": "tags"}, Completion(r"\boxed{5}", "5"), Verdict.NO_ANSWER),
    ],
)
def test_what_accuracy_counts_as_an_answer(options: dict[str, Any], completion: Completion, verdict: Verdict) -> None:
    assert build_scorer([RewardSpec("accuracy", options=options)])(completion).verdict is verdict


def test_options_change_the_values() -> None:
    scorer = build_scorer([RewardSpec("boxed_format", options={"correct": 2, "wrong": 0, "no_answer": -3})])
    assert [scorer(Completion(text, "5")).reward for text in (r"\boxed{5}", r"\boxed{6}", "5")] == [2, 0, -3]
