"""Rewards for the length of a completion and for signs of reasoning in it. docs/rewards.md has a table of them.

A length in tokens is `Completion.num_tokens`. Where only the text is known (None), a reward that needs it abstains.
"""

from __future__ import annotations

import math
import re

from verifier.base import Completion, RewardFunction, Verdict
from verifier.rewards.registry import register

REFLECTION = (
    "recheck",
    "rethink",
    "reassess",
    "reevaluate",
    "re-evaluate",
    "re-examine",
    "reexamine",
    "reconsider",
    "reanalyze",
    "double-check",
    "check again",
    "think again",
    "verify again",
    "go over the steps",
)
"""Words and phrases that the reward `reflection` counts."""

_STEP = re.compile(r"Step \d+:|^\d+\.|^[-*]|First,|Second,|Next,|Finally,", re.MULTILINE)
_REFLECTION = re.compile("|".join(REFLECTION), re.IGNORECASE)


@register("cosine")
def cosine(
    max_characters: int = 1000,
    correct_short: float = 1.0,
    correct_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
) -> RewardFunction:
    """open-r1: the reward follows half a cosine from the `_short` value at length 0 to the `_long` value.

    The reward reaches the `_long` value at `max_characters` and stays there; a full cosine would turn back. By default
    a short completion is best when correct, and worst when wrong.
    """
    _check_positive("max_characters", max_characters)

    def reward(completion: Completion) -> float:
        is_correct = completion.verdict is Verdict.CORRECT
        short, long = (correct_short, correct_long) if is_correct else (wrong_short, wrong_long)
        progress = min(len(completion.text) / max_characters, 1.0)
        return long + 0.5 * (short - long) * (1.0 + math.cos(math.pi * progress))

    return reward


@register("repetition")
def repetition(ngram_size: int = 3, max_penalty: float = -1.0, unit: str = "words") -> RewardFunction:
    """open-r1: `max_penalty` times the share of n-grams that repeat an earlier one; 0 for a text without n-grams.

    Args:
        ngram_size: n.
        max_penalty: reward of a text in which every n-gram repeats; 0 or below.
        unit: what n-grams are made of: `words`, or `characters` for languages without spaces between words.
    """
    _check_positive("ngram_size", ngram_size)
    if max_penalty > 0:
        raise ValueError(f"max_penalty is {max_penalty}; a penalty is 0 or below")
    if unit not in ("words", "characters"):
        raise ValueError(f"unit is {unit!r}; choose words or characters")

    def reward(completion: Completion) -> float:
        text = completion.text.lower()
        units = text.split() if unit == "words" else [character for character in text if not character.isspace()]
        num_ngrams = len(units) - ngram_size + 1
        if num_ngrams < 1:
            return 0.0
        distinct = {tuple(units[start : start + ngram_size]) for start in range(num_ngrams)}
        return max_penalty * (1.0 - len(distinct) / num_ngrams)

    return reward


@register("soft_overlong")
def soft_overlong(max_tokens: int, cache_tokens: int) -> RewardFunction:
    """DAPO: 0 up to max_tokens - cache_tokens, then linearly down to -1 at max_tokens, and -1 beyond."""
    _check_positive("cache_tokens", cache_tokens)
    if cache_tokens > max_tokens:
        raise ValueError(f"cache_tokens is {cache_tokens}, more than max_tokens {max_tokens}; lower it")

    def reward(completion: Completion) -> float | None:
        if completion.num_tokens is None:
            return None
        over = completion.num_tokens - (max_tokens - cache_tokens)
        return 0.0 - min(max(over / cache_tokens, 0.0), 1.0)

    return reward


@register("reasoning_steps")
def reasoning_steps(num_steps: int = 3) -> RewardFunction:
    """open-r1: number of step marks over `num_steps`, at most 1.

    A step mark is "Step 1:", "First,", "Second,", "Next,", "Finally,", or a number or bullet at the start of a line.
    """
    _check_positive("num_steps", num_steps)
    return lambda completion: min(1.0, len(_STEP.findall(completion.text)) / num_steps)


@register("reflection")
def reflection() -> RewardFunction:
    """Number of words of self-reflection (recheck, rethink, ...). Use weight: 0.0 to plot it without training on it."""
    return lambda completion: float(len(_REFLECTION.findall(completion.text)))


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; give 1 or more")
