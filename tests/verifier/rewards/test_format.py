"""Rewards for form, length and reasoning: each compared with its definition, also at its edges."""

import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier.base import Completion, RewardSpec, Verdict
from verifier.scoring.scorer import build_scorer

FORMS = ["tag_format", "xml_format_strict", "xml_format_soft", "countdown_format", "tag_count", "integer", "cosine"]
OTHERS = [RewardSpec(name) for name in [*FORMS, "repetition", "reasoning_steps", "reflection"]]
OVERLONG = RewardSpec("soft_overlong", options={"max_tokens": 100, "cache_tokens": 20})
GOLDS = {
    "countdown": '{"numbers": [5, 5], "target": 10}',
    "knights_knaves": '{"names": ["Zoey"], "is_knight": [true]}',
    "multiply": "5",
    "boxed_exact": "5",
}
SCORERS = [(build_scorer([RewardSpec(name), *OTHERS, OVERLONG]), gold) for name, gold in GOLDS.items()]
DEMO = "<reasoning>\na\nb\n</reasoning>\n<answer>\n5\n</answer>"


def value(name: str, text: str, *, num_tokens: int | None = None, **options: Any) -> float | None:
    """The value of the reward `name`; None where it abstains."""
    specs = [RewardSpec("boxed_exact", weight=0.0), RewardSpec(name, options=options)]
    score = build_scorer(specs)(Completion(text, "5", num_tokens=num_tokens))
    return score.breakdown.get(name)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tag_format", "x<think>a</think> so <answer>5</answer> y", 1.0),
        ("tag_format", "<answer>5</answer><think>a</think>", -1.0),
        ("tag_format", "<think>a</think><answer>5", -1.0),
        ("tag_format", "<think>a</think><think>b</think><answer>5</answer>", -1.0),
        ("tag_format", "", -1.0),
        ("xml_format_strict", DEMO, 0.5),
        ("xml_format_strict", DEMO + "\n", 0.5),
        ("xml_format_strict", DEMO.replace("5\n", "5"), 0.0),
        ("xml_format_strict", DEMO.replace("</reasoning>\n", "</reasoning> "), 0.0),
        ("xml_format_strict", "So: " + DEMO, 0.0),
        ("xml_format_strict", DEMO + "\nand", 0.0),
        ("xml_format_strict", DEMO.replace("a\n", "\n</reasoning>\n"), 0.0),
        ("xml_format_soft", "<reasoning>a\nb</reasoning>  \n<answer>5</answer> and", 0.5),
        ("xml_format_soft", "\n" + DEMO, 0.5),
        ("xml_format_soft", "So: " + DEMO, 0.0),
        ("xml_format_soft", "<reasoning>a</reasoning> so <answer>5</answer>", 0.0),
        ("xml_format_soft", "<reasoning>a</reasoning><answer>5", 0.0),
        ("countdown_format", "<think>a</think>\n<answer>5</answer>", 1.0),
        ("countdown_format", "<think>a</think>\n<answer>5</answer>\n", 0.0),
        ("countdown_format", "<think>a</think> <answer>5</answer>", 0.0),
        ("countdown_format", "<think><think>a</think>\n<answer>5</answer>", 0.0),
        ("tag_count", DEMO, 0.5),
        ("tag_count", DEMO + "\n", 0.5),
        ("tag_count", DEMO + "\nabcd", 0.496),
        ("tag_count", "<reasoning>\na", 0.125),
        ("tag_count", "<reasoning>\n<reasoning>\n", 0.0),
        ("integer", "<answer> 42 </answer>", 0.5),
        ("integer", "<answer>-42</answer>", 0.5),
        ("integer", "<answer>4.2</answer>", 0.0),
        ("integer", "<answer>²</answer>", 0.0),
        ("integer", "42", 0.0),
        ("reasoning_steps", "1. a\n2. b", pytest.approx(2 / 3)),
        ("reasoning_steps", "Step 1: a\nStep 2: b\n- c\nFinally, d", 1.0),
        ("reasoning_steps", "it is 5", 0.0),
        ("reflection", "Let me re-evaluate. Double-check, then Check again.", 3.0),
        ("repetition", "", 0.0),
        ("repetition", "a b", 0.0),
        ("repetition", "a b c d", 0.0),
        ("repetition", "A b c a B c", -0.25),
        ("repetition", "a " * 102, -0.99),
    ],
)
def test_rewards_of_form(name: str, text: str, expected: float) -> None:
    assert value(name, text) == pytest.approx(expected, abs=1e-12)


def test_the_variants_of_other_recipes() -> None:
    think = "<think>\na\n</think>\n<answer>\n5\n</answer>"
    assert value("tag_count", think + " and", value=0.25, tags=["think", "answer"], penalty=0.0) == 1.0
    assert value("xml_format_strict", think, tags=["think", "answer"], met=1.0) == 1.0
    assert value("repetition", "好好好好好", unit="characters") == pytest.approx(-2 / 3)


def test_soft_overlong_falls_in_a_line_and_abstains_where_tokens_are_unknown() -> None:
    lengths = [1, 80, 90, 100, 101]
    found = [value("soft_overlong", "a", num_tokens=n, max_tokens=100, cache_tokens=20) for n in lengths]
    assert found == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert value("soft_overlong", "a", max_tokens=100, cache_tokens=20) is None


def test_cosine_goes_from_short_to_long_by_correctness() -> None:
    def cosine(text: str) -> float:
        found = value("cosine", text, max_characters=100)
        assert found is not None
        return found

    right = r"\boxed{5}"
    assert cosine(right) == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi * len(right) / 100)))
    assert cosine(right.rjust(50)) == pytest.approx(0.75)
    assert cosine(right.rjust(100)) == pytest.approx(0.5)
    # The published formula rises again past its maximal length.
    assert cosine(right.rjust(150)) == pytest.approx(0.5)
    assert cosine("") == pytest.approx(-1.0)
    assert cosine(" " * 100) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tag_format", {"tags": "think"}, "tags is 'think'; give the names"),
        ("tag_count", {"tags": []}, r"tags is \[\]"),
        ("cosine", {"max_characters": 0}, "max_characters is 0; give 1 or more"),
        ("repetition", {"max_penalty": 1.0}, "max_penalty is 1.0; a penalty is 0 or below"),
        ("repetition", {"unit": "letters"}, "unit is 'letters'; choose words or characters"),
        ("soft_overlong", {"max_tokens": 10, "cache_tokens": 20}, "cache_tokens is 20, more than max_tokens 10"),
        ("soft_overlong", {}, "does not take the options"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        build_scorer([RewardSpec("accuracy"), RewardSpec(name, options=options)])


def test_long_and_hostile_text_is_read_in_linear_time() -> None:
    text = "<reasoning>\n</reasoning>\n<answer>\n<think></think>" * 20_000
    started = time.monotonic()
    for name in ("tag_format", "xml_format_strict", "xml_format_soft", "countdown_format", "tag_count", "integer"):
        value(name, text)
    for name in ("reasoning_steps", "reflection", "repetition", "cosine"):
        value(name, text)
    assert time.monotonic() - started < 5.0


PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<reasoning>",
    "</reasoning>",
    "\n",
    "Zoey is a knight",
    "5",
    " ",
    "(",
]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join)), st.integers(0, 10_000))
@settings(deadline=None, max_examples=100)
def test_every_reward_answers_a_number_to_any_text(text: str, num_tokens: int) -> None:
    for scorer, gold in SCORERS:
        assert math.isfinite(scorer(Completion(text, gold, num_tokens=num_tokens)).reward)


def test_rewards_after_the_grader_know_its_verdict() -> None:
    scorer = build_scorer([RewardSpec("cosine"), RewardSpec("boxed_exact", weight=0.0)])
    right, wrong = (scorer(Completion(text, "5")) for text in (r"\boxed{5}", r"\boxed{6}"))
    assert right.breakdown["cosine"] > 0 > wrong.breakdown["cosine"]
    assert (right.verdict, wrong.verdict) == (Verdict.CORRECT, Verdict.WRONG)
