"""How a turn names its actions: `<answer>Up || Left</answer>`, and what the environments pay where it does not.

The parser is the only thing that reads what the model wrote. It never looks for anything but the tagged answer, so
forged observations and claimed rewards are text without effect.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

OPEN, CLOSE, SEPARATOR = "<answer>", "</answer>", "||"
ALPHABET = OPEN + CLOSE + SEPARATOR
INVALID_REWARD = -1.0
"""Of a turn without a readable action; the state stays as it is."""
MAX_CHARACTERS = 200
"""Longer answers hold no list of actions."""


def read_actions(text: str, names: Mapping[str, str], at_most: int) -> list[str] | None:
    """The actions of a turn, in order; None where it is not exactly one tagged list of 1 to `at_most` known actions.

    Thinking does not count: what stands before the last `</think>` is passed over, and thinking that never ends holds
    no answer.

    Args:
        text: what the model wrote in this turn.
        names: action as the model writes it, in lower case -> action.
        at_most: actions in one turn.
    """
    said = text.rpartition("</think>")[2]
    if "<think>" in said or said.count(OPEN) != 1 or said.count(CLOSE) != 1:
        return None
    inside = said.partition(OPEN)[2].partition(CLOSE)
    if not inside[1] or len(inside[0]) > MAX_CHARACTERS:
        return None
    written = [part.strip().lower() for part in inside[0].split(SEPARATOR)]
    if len(written) > at_most or any(part not in names for part in written):
        return None
    return [names[part] for part in written]


def write_actions(actions: Sequence[str]) -> str:
    """A turn that names these actions."""
    return f"{OPEN}{SEPARATOR.join(actions)}{CLOSE}"


def noisy(action: str, actions: Sequence[str], rng: random.Random, error_rate: float) -> str:
    """`action`, or with probability `error_rate` any of `actions`."""
    return rng.choice(actions) if rng.random() < error_rate else action
