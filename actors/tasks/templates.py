r"""Prompt templates: they turn a question into the text that the model continues.

A named template is a file in `configs/template/`. Any other name is the path of a file: YAML with the fields of
`Template`, or a text file that is the template's `text`, character by character. Only the placeholders are interpreted,
so LaTeX braces are safe.
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
    """The text around a question, and the strings that end a completion."""

    text: str
    """Contains {question} exactly once."""
    prefill: str = ""
    """The beginning of every turn of the model. It ends the prompt and the text between two turns; rewards and
    environments read it as part of the model's text."""
    between: str = ""
    """The text between two turns, from the end of a turn to the start of the next. Contains {observation} exactly once.
    Empty: single-turn only."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, in addition to the end-of-sequence token. They are part of the completion."""

    def __post_init__(self) -> None:
        for name, text, placeholder in (("text", self.text, QUESTION), ("between", self.between, OBSERVATION)):
            if text.count(placeholder) != 1 and (text or name == "text"):
                raise ValueError(
                    f"{name} holds {placeholder} {text.count(placeholder)} times; write it exactly once, where it goes"
                )

    def render(self, question: str) -> str:
        """Return the prompt for this question."""
        before, _, after = self.text.partition(QUESTION)
        return f"{before}{question}{after}{self.prefill}"

    def next_turn(self, observation: str) -> str:
        """Return the text between a turn of the model and its next turn."""
        before, _, after = self.between.partition(OBSERVATION)
        return f"{before}{observation}{after}{self.prefill}"


def template_names() -> list[str]:
    """List the named templates, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_template(name: str) -> Template:
    """Load the template with this name, or in the file with this path.

    Raises:
        ValueError: there is no such template and no such file, or the file is not a template.
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
