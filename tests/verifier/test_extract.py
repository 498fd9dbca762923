"""Extraction: which part of a completion is its answer."""

import time

import pytest

from verifier.extract import extract_answer, last_boxed, last_tagged


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed 9 is it", "9"),
        (r"a { stray brace, \boxed{5}", "5"),
        (r"a } stray brace, \boxed{5}", "5"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{x = {5}", None),
        (r"\boxed{5", None),
        (r"\boxed{}", None),
        ("no box, 5", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1 + 2</answer>", "1 + 2"),
        ("<answer>1</answer> <answer>\n2\n</answer>", "2"),
        ("<answer>1</answer><answer>2", "1"),
        ("<answer>1", None),
        ("1</answer>", None),
        ("<answer> </answer>", None),
    ],
)
def test_last_tagged(text: str, answer: str | None) -> None:
    assert last_tagged(text) == answer


def test_format_decides_what_counts() -> None:
    text = r"\boxed{1} <answer>2</answer>"
    assert extract_answer(text, format="boxed") == "1"
    assert extract_answer(text, format="tags") == "2"
    assert extract_answer(text, format="any") == "2"
    assert extract_answer(r"<answer>It is \boxed{3}.</answer>") == "3"


def test_any_understands_hashes_and_phrases() -> None:
    assert extract_answer("48 / 2 = 24\n#### 1,024\n") == "1,024"
    assert extract_answer("Thus, the answer is $2.5$. Done.") == "$2.5$"
    assert extract_answer("Final Answer: 42") == "42"
    assert extract_answer("I counted 42 of them") is None
    assert extract_answer("Thus, the answer is 5.", format="boxed") is None


def test_thinking_does_not_count_when_an_answer_follows() -> None:
    assert extract_answer(r"<think>\boxed{1}</think> \boxed{2}") == "2"
    assert extract_answer(r"<think>\boxed{1}</think> <answer>2</answer>") == "2"
    assert extract_answer(r"<think>\boxed{1}</think> so it is", format="boxed") == "1"


@pytest.mark.parametrize("text", ["\\boxed{" * 140_000, "{" * 10**6, "<answer>" * 125_000, "\\boxed " * 140_000])
def test_a_megabyte_of_openings_is_quick(text: str) -> None:
    start = time.process_time()
    extract_answer(text)
    assert time.process_time() - start < 3
