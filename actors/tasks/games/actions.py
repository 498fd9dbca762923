"""Parses the actions of a turn, as in `<answer>Up || Left</answer>`.

Only this parser reads the model's text, and it reads only the tagged answer. Forged observations and claimed rewards in
the text therefore have no effect.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

OPEN, CLOSE, SEPARATOR = "<answer>", "</answer>", "||"
ALPHABET = OPEN + CLOSE + SEPARATOR
INVALID_REWARD = -1.0
"""Reward of a turn without a readable action, which leaves the state unchanged."""
MAX_CHARACTERS = 200
"""Longest answer that is read as a list of actions."""


def read_actions(text: str, names: Mapping[str, str], at_most: int) -> list[str] | None:
    """Read the actions of a turn, in order. None unless it has exactly one tagged list of 1 to `at_most` known actions.

    The text before the last `</think>` is ignored. A turn with an open `<think>` has no answer.

    Args:
        text: the model's turn.
        names: maps an action as the model writes it, in lower case, to the action.
        at_most: largest number of actions in one turn.
    """
    after_thinking = text.rpartition("</think>")[2]
    if "<think>" in after_thinking or after_thinking.count(OPEN) != 1 or after_thinking.count(CLOSE) != 1:
        return None
    inside = after_thinking.partition(OPEN)[2].partition(CLOSE)
    if not inside[1] or len(inside[0]) > MAX_CHARACTERS:
        return None
    written = [part.strip().lower() for part in inside[0].split(SEPARATOR)]
    if len(written) > at_most or any(part not in names for part in written):
        return None
    return [names[part] for part in written]


def write_actions(actions: Sequence[str]) -> str:
    """Write a turn with these actions."""
    return f"{OPEN}{SEPARATOR.join(actions)}{CLOSE}"


def noisy(action: str, actions: Sequence[str], rng: random.Random, error_rate: float) -> str:
    """Return `action`, or with probability `error_rate` a uniformly random one of `actions`."""
    return rng.choice(actions) if rng.random() < error_rate else action
