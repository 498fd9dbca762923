"""Extraction: which part of a completion is its answer."""

import time

import pytest

from verifier.mathematics.extract import extract_answer, last_boxed, last_tagged


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
        (r"\boxed{3} or \boxed{4}", "3, 4"),
        (r"\boxed{3} or 4.", "3, 4"),
        (r"\boxed{3} (or 4)", "3, 4"),
        (r"\boxed{3}, but it might also be \boxed{4}", "3, 4"),
        (r"\boxed{3} or more of them", "3"),
        (r"\boxed{3}$, or maybe $\boxed{4}", "3, 4"),
        (r"$x = \boxed{1}$ and $x = \boxed{2}$", "1, 2"),
        (r"\boxed{3} = \boxed{3}", "3"),
        (r"\boxed{3}. Wait, that is wrong: it is \boxed{4}", "4"),
        (r"\boxed{1 + \boxed{2}}", r"1 + \boxed{2}"),
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
        ("<answer>1</answer> no, wait <answer>\n2\n</answer>", "2"),
        ("<answer>1</answer> <answer>\n2\n</answer>", "1, 2"),
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


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48 / 2 = 24\n#### 1,024\n", "1,024"),
        ("Thus, the answer is $2.5$. Done.", "$2.5$"),
        ("Final Answer: 42", "42"),
        ("Final Answer: The final answer is $42$. I hope it is correct.", "$42$"),
        ("**Answer:** 42", "42"),
        ("**Answer: 42**", "42"),
        ("### Final Answer\n\n42", "42"),
        ("The answer is\n\n\\[\n42\n\\]", "42"),
        ("答案是 42。", "42"),
        ("The answer is 3:30 p.m. on Monday", "3:30 p.m. on Monday"),
        ("The answer is 5, not 6.", "5"),
        ("The answer is 5 because 2 + 3 = 5.", "5"),
        ("The answer is A. Or maybe the answer is B.", "A, B"),
        ("The answer is 5. Actually, the answer is 6.", "6"),
        (r"\boxed{255} is one part. The final answer is 10455.", "10455"),
        (r"\boxed{255}. The answer is reasonable.", "255"),
        ("Some steps.\nTherefore, x = 5.", "x = 5"),
        ("Some steps.\nThus the area is $12\\pi$.", r"$12\pi$"),
        ("We get the result.\nTherefore 7 is the answer.", "7"),
        (r"\frac12", r"\frac12"),
        ("x = 5", "x = 5"),
        ("I counted 42 of them in all", None),
        ("Some steps.\n42", None),
        ("", None),
    ],
)
def test_any(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text", ["Thus, the answer is 5.", "5", "#### 5", "Therefore, x = 5."])
def test_strict_formats_want_their_mark(text: str) -> None:
    assert extract_answer(text, format="boxed") is None
    assert extract_answer(text, format="tags") is None


def test_thinking_does_not_count_when_an_answer_follows() -> None:
    assert extract_answer(r"<think>\boxed{1}</think> \boxed{2}") == "2"
    assert extract_answer(r"<think>\boxed{1}</think> <answer>2</answer>") == "2"
    assert extract_answer(r"<think>\boxed{1}</think> so it is", format="boxed") == "1"
    assert extract_answer(r"\boxed{1} was an idea</think> \boxed{2} <think> \boxed{3}") == "2"
    assert extract_answer(r"<think>\boxed{1}</think> \boxed{2} <think>\boxed{3}</think>") == "2"


@pytest.mark.parametrize(
    "text", ["\\boxed{", "{", "<answer>", "\\boxed ", "<think>", "answer: ", "\n", "####", "answer is \n", "so "]
)
def test_a_megabyte_of_one_mark_is_quick(text: str) -> None:
    start = time.process_time()
    extract_answer(text * (10**6 // len(text)))
    assert time.process_time() - start < 3
