import pytest

from actors.templates import TEMPLATES, load_template, render


def test_plain_is_the_question_alone() -> None:
    assert render("plain", "47+85=") == "47+85="


def test_qwen_boxed_is_the_published_prompt() -> None:
    assert render("qwen_boxed", "What is $1+1$?") == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is $1+1$?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_template_holds_the_question_once_and_leaves_it_as_it_is(name: str) -> None:
    question = r"Solve {x} \frac{1}{2} and {question} with %s %(a)s {0}"
    assert TEMPLATES[name].text.count("{question}") == 1
    prompt = render(name, question)
    assert prompt.count(question) == 1
    before, after = TEMPLATES[name].text.split("{question}")
    assert prompt == before + question + after


def test_completions_of_chat_templates_end_at_their_markers() -> None:
    assert load_template("qwen_boxed").stop == ("<|im_end|>",)
    assert load_template("countdown_r1").stop == ("</answer>",)
    assert load_template("plain").stop == ()


def test_a_file_of_the_users_own(tmp_path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Q: {question}\nA {with braces}: ", encoding="utf-8")
    assert render(str(path), "why?") == "Q: why?\nA {with braces}: "


@pytest.mark.parametrize(("text", "times"), [("no placeholder", "0 times"), ("{question} {question}", "2 times")])
def test_a_file_without_exactly_one_placeholder_is_refused(tmp_path, text: str, times: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=times) as error:
        load_template(str(path))
    assert str(path) in str(error.value)


def test_an_unknown_template_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'qwen_boxd' is neither a template \(countdown_r1, plain, qwen_boxed\)"):
        load_template("qwen_boxd")


def test_a_binary_file_is_refused(tmp_path) -> None:
    path = tmp_path / "mine.bin"
    path.write_bytes(b"\xff\xfe{question}")
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        load_template(str(path))
