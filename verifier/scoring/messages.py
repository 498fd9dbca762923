"""The messages between the pool and a scoring process, as msgpack: a completion, and its score or failure.

A scoring process runs rewards on text that a model wrote. So the pool never unpickles its answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgpack

from verifier.base import Completion, Score, Verdict

# Decoded tokens may contain one half of a surrogate pair.
_PACKED = {"unicode_errors": "surrogatepass"}


@dataclass(frozen=True, slots=True)
class Failure:
    """The result for a completion that could not be scored."""

    verdict: Verdict
    """timeout, crash or error."""
    reason: str
    from_outside: bool = False
    """True: something other than the limits killed the process, so the completion is not the cause."""


def pack_completion(completion: Completion) -> bytes:
    """Encodes a completion for the scoring process, without `verdict`, which is decided there."""
    fields = (completion.text, completion.gold, completion.truncated, completion.num_tokens)
    packed: bytes = msgpack.packb(fields, **_PACKED)
    return packed


def unpack_completion(packed: bytes) -> Completion:
    """Decodes the bytes of `pack_completion`."""
    text, gold, truncated, num_tokens = msgpack.unpackb(packed, **_PACKED)
    return Completion(text=text, gold=gold, truncated=truncated, num_tokens=num_tokens)


def pack_result(result: Score | Failure) -> bytes:
    """Encodes a result for the pool."""
    if isinstance(result, Failure):
        fields: tuple[object, ...] = (result.verdict, result.reason, result.from_outside)
    else:
        fields = (result.verdict, result.reward, result.breakdown, result.skipped)
    packed: bytes = msgpack.packb(fields, **_PACKED)
    return packed


def unpack_result(packed: bytes) -> Score | Failure:
    """Decodes the bytes of `pack_result`.

    Raises:
        ValueError: when the bytes are not a result.
    """
    fields = msgpack.unpackb(packed, **_PACKED)
    match fields:
        case [str(verdict), float(reward), dict(breakdown), bool(skipped)] if _names_numbers(breakdown):
            return Score(reward, breakdown, Verdict(verdict), skipped)
        case [str(verdict), str(reason), bool(from_outside)]:
            return Failure(Verdict(verdict), reason, from_outside)
    raise ValueError(f"{fields!r:.80} is no score")


def _names_numbers(breakdown: dict[object, object]) -> bool:
    return all(isinstance(name, str) and isinstance(value, float) for name, value in breakdown.items())
