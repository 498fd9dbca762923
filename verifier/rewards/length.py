"""Rewards of how long a completion is and how it reasons. docs/rewards.md has their table.

Lengths in tokens are those that were sampled; where only the text is known (`num_tokens` is None) a reward of tokens
abstains.
"""

from __future__ import annotations

import math
import re

from verifier.base import Completion, RewardFunction, Verdict
from verifier.rewards.registry import register

REFLECTION = (
    *("recheck", "rethink", "reassess", "reevaluate", "re-evaluate", "re-examine", "reexamine", "reconsider"),
    *("reanalyze", "double-check", "check again", "think again", "verify again", "go over the steps"),
)

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
    """open-r1's: from the short to the long value along half a cosine of the length; short is best where right.

    The length counts up to `max_characters`; past it the cosine would rise again.
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
    """open-r1's: `max_penalty` times the share of n-grams that occurred before; 0 for a text without any.

    Args:
        ngram_size: n.
        max_penalty: 0 or below.
        unit: `words`, or `characters` for text without spaces.
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
    """DAPO's: 0 up to max_tokens - cache_tokens, then down in a line to -1 at `max_tokens`, and -1 past it."""
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
    """open-r1's: marks of steps (Step 1:, 1. or - at a line's start, First, Next, ...) over `num_steps`, at most 1."""
    _check_positive("num_steps", num_steps)
    return lambda completion: min(1.0, len(_STEP.findall(completion.text)) / num_steps)


@register("reflection")
def reflection() -> RewardFunction:
    """How many words of self-reflection there are (recheck, rethink, ...); meant as a curve, with weight: 0.0."""
    return lambda completion: float(len(_REFLECTION.findall(completion.text)))


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; give 1 or more")
