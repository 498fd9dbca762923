"""Rewards for the form of a completion, independent of its answer. docs/rewards.md has a table of them.

Every check searches for fixed text, in time linear in the length of the completion. Text that the template puts at the
beginning of the completion, such as "<think>", belongs to it.
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
    """Whether `text` has the opening and the closing tag of every element exactly once, and all of them in order."""
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    places = [text.find(mark) for mark in marks]
    return min(places) >= 0 and places == sorted(places) and all(text.count(mark) == 1 for mark in marks)


@register("tag_format")
def tag_format(met: float = 1.0, missed: float = -1.0, tags: Sequence[str] = LOGIC_TAGS) -> RewardFunction:
    """Logic-RL: <think>, </think>, <answer> and </answer> stand exactly once each, in this order."""
    _check_tags(tags)
    return lambda completion: met if has_tags_in_order(completion.text, tags) else missed


@register("xml_format_strict")
def xml_format_strict(met: float = 0.5, missed: float = 0.0, tags: Sequence[str] = DEMO_TAGS) -> RewardFunction:
    """grpo_demo, strict: only the elements, each tag on its own line. Line ends after the last tag are allowed."""
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
    """grpo_demo, soft: the text begins with the elements, separated by white space only. Any text may follow."""
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
    r"""mini-deepseek-r1: the completion is <think>...</think>\n<answer>...</answer> and nothing else."""

    def reward(completion: Completion) -> float:
        text = completion.text
        is_framed = text.startswith("<think>") and text.endswith("</answer>") and "</think>\n<answer>" in text
        return met if is_framed and has_tags_in_order(text, LOGIC_TAGS) else missed

    return reward


@register("tag_count")
def tag_count(value: float = 0.125, tags: Sequence[str] = DEMO_TAGS, penalty: float = 0.001) -> RewardFunction:
    """grpo_demo: `value` per tag that stands exactly once, on its own line, minus `penalty` per character after them.

    open-r1 uses {value: 0.25, tags: [think, answer], penalty: 0.0}.
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
    """grpo_demo: the text in <answer> is a whole number, with or without a minus sign."""

    def reward(completion: Completion) -> float:
        digits = (last_tagged(completion.text) or "").removeprefix("-")
        return met if digits.isascii() and digits.isdecimal() else missed

    return reward


def _check_tags(tags: Sequence[str]) -> None:
    if isinstance(tags, str) or not tags or not all(isinstance(tag, str) and tag.isidentifier() for tag in tags):
        raise ValueError(f"tags is {tags!r}; give the names of the elements in order, for example [think, answer]")
