r"""Prompt templates: how a question becomes the text that the model continues.

A named template is a file of `configs/template/`. Any other name is the path of a file of the user's own: YAML with the
fields of `Template`, or a text file, whose every character is the template's. Nothing but the placeholders is
interpreted, so LaTeX braces are safe.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "template"
QUESTION = "{question}"
OBSERVATION = "{observation}"


@dataclass(frozen=True, slots=True)
class Template:
    """The text around a question, and what ends a completion besides the end-of-sequence token."""

    text: str
    """Holds {question} exactly once."""
    prefill: str = ""
    """How every answer begins: the end of the prompt and of what stands between two turns; rewards and environments
    read it in front of what the model writes."""
    between: str = ""
    """Between two turns: what ends a turn, then {observation} once, up to where the model goes on; empty: one turn."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; they belong to it."""

    def __post_init__(self) -> None:
        for name, text, placeholder in (("text", self.text, QUESTION), ("between", self.between, OBSERVATION)):
            if text.count(placeholder) != 1 and (text or name == "text"):
                raise ValueError(
                    f"{name} holds {placeholder} {text.count(placeholder)} times; write it exactly once, where it goes"
                )

    def render(self, question: str) -> str:
        """The prompt for this question."""
        before, _, after = self.text.partition(QUESTION)
        return f"{before}{question}{after}{self.prefill}"

    def next_turn(self, observation: str) -> str:
        """What follows a turn of the model, up to its next one."""
        before, _, after = self.between.partition(OBSERVATION)
        return f"{before}{observation}{after}{self.prefill}"


def template_names() -> list[str]:
    """The named templates, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_template(name: str) -> Template:
    """The named template, or the one in the file of that path.

    Raises:
        ValueError: neither a name nor a readable file, or a file that does not hold what a template needs.
    """
    path = FOLDER / f"{name}.yaml" if name in template_names() else Path(name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"task.template {name!r} is neither a template ({', '.join(template_names())}) nor an existing text file"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template file {path} cannot be read as UTF-8 text: {error}") from error
    try:
        return _from_yaml(text) if path.suffix in (".yaml", ".yml") else Template(text)
    except ValueError as error:
        raise ValueError(f"template file {path}: {error}") from error


def _from_yaml(text: str) -> Template:
    try:
        given: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error
    known = [field.name for field in fields(Template)]
    if not isinstance(given, dict) or "text" not in given:
        raise ValueError(f"has no text; a template in YAML has the fields {', '.join(known)}")
    for field, value in given.items():
        is_sound = isinstance(value, list) if field == "stop" else isinstance(value, str)
        if field not in known or not is_sound or not all(isinstance(part, str) and part for part in value):
            raise ValueError(
                f"{field}: {value!r:.80} does not belong there; text, prefill and between are texts, stop"
                " is a list of them"
            )
    return Template(**{**given, "stop": tuple(given.get("stop", ()))})
