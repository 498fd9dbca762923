from pathlib import Path

import pytest

from actors.tasks.templates import Template, load_template, template_names

NAMES = template_names()
CHAT = [name for name in NAMES if "<|im_start|>" in load_template(name).text]


def test_plain_is_the_question_alone() -> None:
    assert load_template("plain").render("47+85=") == "47+85="


def test_qwen_boxed_is_the_published_prompt() -> None:
    assert load_template("qwen_boxed").render("What is $1+1$?") == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is $1+1$?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_template_holds_the_question_once_and_leaves_it_as_it_is(name: str) -> None:
    question = r"Solve {x} \frac{1}{2} and {question} with %s %(a)s {0}"
    template = load_template(name)
    prompt = load_template(name).render(question)
    assert prompt.count(question) == 1
    before, after = template.text.split("{question}")
    assert prompt == before + question + after + template.prefill


@pytest.mark.parametrize("name", CHAT)
def test_chat_templates_open_the_assistants_turn_with_a_new_line_and_end_at_their_marker(name: str) -> None:
    template = load_template(name)
    assert "<|im_start|>assistant\n" in template.text
    assert template.text.count("<|im_start|>") == template.text.count("<|im_end|>") + 1 == 3
    assert template.stop == ("<|im_end|>",)
    assert not template.text.endswith((" ", "\n\n"))


def test_stops_of_the_others() -> None:
    assert load_template("countdown_r1").stop == ("</answer>",)
    assert load_template("plain").stop == ()


@pytest.mark.parametrize("name", ["countdown_r1", "countdown_chat", "knights_knaves"])
def test_a_prefill_ends_the_prompt(name: str) -> None:
    assert load_template(name).render("?").endswith("\n<think>")
    assert load_template(name).prefill == "<think>"


@pytest.mark.parametrize("name", ["turns", "qwen_turns"])
def test_templates_of_several_turns_put_the_observation_between_them(name: str) -> None:
    template = load_template(name)
    between = template.next_turn("{observation} seen")
    assert between.startswith("<|im_end|>") and between.count("{observation} seen") == 1
    # The text between two turns ends like the prompt.
    assert between.endswith(template.text.partition("{question}")[2])


def test_a_text_file_of_the_users_own_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Q: {question}\nA {with braces}: \n", encoding="utf-8")
    assert load_template(str(path)).render("why?") == "Q: why?\nA {with braces}: \n"


def test_a_yaml_file_of_the_users_own_names_the_other_fields_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("text: |\n  Q: {question}\n  A:\nprefill: '<think>'\nstop: ['\\n', END]\n", encoding="utf-8")
    assert load_template(str(path)) == Template("Q: {question}\nA:\n", prefill="<think>", stop=("\\n", "END"))
    assert load_template(str(path)).render("why?") == "Q: why?\nA:\n<think>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no placeholder", "has no text"),
        ("text: no placeholder", "0 times"),
        ("text: '{question} {question}'", "2 times"),
        ("text: '{question}'\nbetween: x", r"between holds \{observation\} 0 times"),
        ("text: '{question}'\nstops: x", "stops: 'x' does not belong"),
        ("text: '{question}'\nstop: x", "stop: 'x' does not belong"),
        ("text: '{question}'\nstop: ['']", r"stop: \[''\] does not belong"),
        ("text: '{question}'\nprefill: 3", "prefill: 3 does not belong"),
        ("text: '{question}", "is not YAML"),
        ("stop: [x]", "has no text"),
    ],
)
def test_a_yaml_file_that_is_no_template_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_template(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "times"), [("no placeholder", "0 times"), ("{question} {question}", "2 times")])
def test_a_file_without_exactly_one_placeholder_is_refused(tmp_path: Path, text: str, times: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=times) as error:
        load_template(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["qwen_boxd", "../template/plain"])
def test_an_unknown_template_names_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' is neither a template \(countdown_chat, countdown_r1, "):
        load_template(name)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.bin"
    path.write_bytes(b"\xff\xfe{question}")
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        load_template(str(path))
