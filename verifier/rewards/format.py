"""Rewards of the form of a completion, whatever its answer. docs/rewards.md has their table.

Every check is a search for fixed text, linear in the length of the completion. What the template began the completion
with, as "<think>", is part of its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from verifier.base import Completion, RewardFunction
from verifier.mathematics.extract import last_tagged
from verifier.rewards.registry import register

LOGIC_TAGS = ("think", "answer")
DEMO_TAGS = ("reasoning", "answer")


def has_tags_in_order(text: str, tags: Sequence[str]) -> bool:
    """Whether the opening and the closing tag of each of `tags` stand in `text` exactly once, all in order."""
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    places = [text.find(mark) for mark in marks]
    return min(places) >= 0 and places == sorted(places) and all(text.count(mark) == 1 for mark in marks)


@register("tag_format")
def tag_format(met: float = 1.0, missed: float = -1.0, tags: Sequence[str] = LOGIC_TAGS) -> RewardFunction:
    """Logic-RL's: each of <think> </think> <answer> </answer> exactly once, in order."""
    _check_tags(tags)
    return lambda completion: met if has_tags_in_order(completion.text, tags) else missed


@register("xml_format_strict")
def xml_format_strict(met: float = 0.5, missed: float = 0.0, tags: Sequence[str] = DEMO_TAGS) -> RewardFunction:
    """The demo's strict one: the elements and nothing else, every tag on a line of its own; a last line end is free."""
    _check_tags(tags)

    def reward(completion: Completion) -> float:
        text = completion.text
        is_framed = text.startswith(f"<{tags[0]}>\n") and text.rstrip("\n").endswith(f"\n</{tags[-1]}>")
        on_lines = all(f"<{tag}>\n" in text and f"\n</{tag}>" in text for tag in tags)
        joined = all(f"\n</{first}>\n<{second}>\n" in text for first, second in pairwise(tags))
        return met if is_framed and on_lines and joined and has_tags_in_order(text, tags) else missed

    return reward


@register("xml_format_soft")
def xml_format_soft(met: float = 0.5, missed: float = 0.0, tags: Sequence[str] = DEMO_TAGS) -> RewardFunction:
    """The demo's soft one: begins with the elements, with white space at most between them; what follows is free."""
    _check_tags(tags)

    def reward(completion: Completion) -> float:
        rest = completion.text
        for tag in tags:
            rest = rest.lstrip()
            _, closing, after = rest.partition(f"</{tag}>")
            if not rest.startswith(f"<{tag}>") or not closing:
                return missed
            rest = after
        return met

    return reward


@register("countdown_format")
def countdown_format(met: float = 1.0, missed: float = 0.0) -> RewardFunction:
    r"""mini-deepseek-r1's: <think>...</think>\n<answer>...</answer> and nothing else."""

    def reward(completion: Completion) -> float:
        text = completion.text
        is_framed = text.startswith("<think>") and text.endswith("</answer>") and "</think>\n<answer>" in text
        return met if is_framed and has_tags_in_order(text, LOGIC_TAGS) else missed

    return reward


@register("tag_count")
def tag_count(value: float = 0.125, tags: Sequence[str] = DEMO_TAGS, penalty: float = 0.001) -> RewardFunction:
    """The demo's: `value` for every tag that stands once, on a line of its own, less `penalty` per character after all.

    The variant of open-r1: {value: 0.25, tags: [think, answer], penalty: 0.0}.
    """
    _check_tags(tags)

    def reward(completion: Completion) -> float:
        text = completion.text
        marks = [mark for tag in tags for mark in (f"<{tag}>\n", f"\n</{tag}>")]
        _, closing, after = text.partition(f"\n</{tags[-1]}>")
        trailing = len(after.removeprefix("\n")) if closing else 0
        return value * sum(text.count(mark) == 1 for mark in marks) - penalty * trailing

    return reward


@register("integer")
def integer(met: float = 0.5, missed: float = 0.0) -> RewardFunction:
    """The demo's: the text in <answer> is a whole number, with a sign or without."""

    def reward(completion: Completion) -> float:
        digits = (last_tagged(completion.text) or "").removeprefix("-")
        return met if digits.isascii() and digits.isdecimal() else missed

    return reward


def _check_tags(tags: Sequence[str]) -> None:
    if isinstance(tags, str) or not tags or not all(isinstance(tag, str) and tag.isidentifier() for tag in tags):
        raise ValueError(f"tags is {tags!r}; give the names of the elements in order, for example [think, answer]")
