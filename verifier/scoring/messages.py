"""What crosses the pipe to a scoring process and back, as msgpack: a completion, and its score or why it has none.

The process runs rewards on text that a model wrote; nothing it answers is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgpack

from verifier.base import Completion, Score, Verdict

# A tokenizer may decode to half of a surrogate pair.
_PACKED = {"unicode_errors": "surrogatepass"}


@dataclass(frozen=True, slots=True)
class Failure:
    """A completion that could not be scored: timeout, crash or error, and why."""

    verdict: Verdict
    reason: str
    from_outside: bool = False
    """The process was killed, and not by its limits: the completion is not to blame."""


def pack_completion(completion: Completion) -> bytes:
    """For the scoring process; a verdict is only made there."""
    fields = (completion.text, completion.gold, completion.truncated, completion.num_tokens)
    packed: bytes = msgpack.packb(fields, **_PACKED)
    return packed


def unpack_completion(packed: bytes) -> Completion:
    """Of `pack_completion`."""
    return Completion(*msgpack.unpackb(packed, **_PACKED))


def pack_result(result: Score | Failure) -> bytes:
    """For the pool."""
    if isinstance(result, Failure):
        fields: tuple[object, ...] = (result.verdict, result.reason, result.from_outside)
    else:
        fields = (result.verdict, result.reward, result.breakdown, result.skipped)
    packed: bytes = msgpack.packb(fields, **_PACKED)
    return packed


def unpack_result(packed: bytes) -> Score | Failure:
    """Of `pack_result`.

    Raises:
        ValueError: it is none.
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
