r"""Prompt templates: how a question becomes the text that the model continues.

A template is a text that holds `{question}` exactly once; nothing else in it is interpreted, so LaTeX braces are safe.
Named templates stand here; any other name is read as the path of a text file of the user's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PLACEHOLDER = "{question}"


@dataclass(frozen=True, slots=True)
class Template:
    """The text around a question, and the strings that end a completion besides the end-of-sequence token."""

    text: str
    stop: tuple[str, ...] = ()

    def render(self, question: str) -> str:
        """The prompt for this question."""
        before, _, after = self.text.partition(PLACEHOLDER)
        return f"{before}{question}{after}"


TEMPLATES = {
    # The question and nothing else: for the small embedded models, whose questions end in "=" or ":".
    "plain": Template(PLACEHOLDER),
    # SimpleRL-Zero, with the newline after `assistant` in training as in evaluation.
    "qwen_boxed": Template(
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        stop=("<|im_end|>",),
    ),
    # After TinyZero, for base models that read English; the task option `words` makes its questions sentences.
    "countdown_r1": Template(
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The"
        " assistant first thinks about the reasoning process and then gives the answer.\n"
        "User: {question} Use the operations +, -, * and /, and each number exactly once. Show your work in"
        " <think> </think> tags, and give the final answer in <answer> </answer> tags, for example"
        " <answer> (1 + 2) / 3 </answer>.\n"
        "Assistant: Let me solve this step by step.\n<think>",
        stop=("</answer>",),
    ),
}


def load_template(name: str) -> Template:
    """The named template, or the one in the text file of that path.

    Raises:
        ValueError: neither a name nor a readable file, or a file that does not hold {question} exactly once.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"task.template {name!r} is neither a template ({', '.join(sorted(TEMPLATES))}) nor an existing text file"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template file {path} cannot be read as UTF-8 text: {error}") from error
    if text.count(PLACEHOLDER) != 1:
        raise ValueError(
            f"template file {path} holds {PLACEHOLDER} {text.count(PLACEHOLDER)} times; write it exactly once, where"
            " the question goes"
        )
    return Template(text)


def render(name: str, question: str) -> str:
    """The prompt for one question through the named template.

    Raises:
        ValueError: see `load_template`.
    """
    return load_template(name).render(question)
