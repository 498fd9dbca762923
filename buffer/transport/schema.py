"""Types of message fields, with their limits, and readers that check received values against them.

`buffer/transport/messages.py` declares messages as dataclasses with these types. `reader` turns a type annotation into
a function, once per type, that checks and builds a received value. A reader raises `WireError` and no other exception.
A reader allocates memory only for bytes that were received, never for a length that a sender claims.

`fast_reader` does the same for a whole frame with msgspec, several times faster, for what is sent most: groups. It
leaves the patterns of texts to `check_texts`, which checks many texts at once.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import msgpack
import msgspec

MAX_HEADER_BYTES = 1 << 22
SMALL_HEADER_BYTES = 1 << 12
MAX_INTEGER = (1 << 63) - 1
"""Largest integer that SQLite stores. msgpack also accepts larger, unsigned ones."""
MAX_VERSION = 1 << 40
MAX_ITEMS = 1 << 16
"""Largest number of entries of a list or map."""

Frame = bytes | memoryview
"""A large frame is a memoryview of the memory that ZeroMQ received it in, which lives as long as the view."""
Frames = list[Frame]
Reader = Callable[[Any, Frames], Any]
"""Takes a decoded msgpack value and the frames not yet used, in reverse order."""


class WireError(ValueError):
    """An invalid message: wrong schema, kind, type, length, range or size."""


@dataclass(frozen=True, slots=True)
class Within:
    """A number from `least` to `most`, both included. NaN is refused."""

    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Text:
    """A text of at most `longest` characters that matches `pattern`; with an empty pattern, any printable text."""

    longest: int
    pattern: str = ""


Name = Annotated[str, Text(128, r"(?:[A-Za-z0-9_][A-Za-z0-9_.:@-]*)?")]
"""An identifier, or empty. Safe to show, to log, to store and to use in a file name."""
Line = Annotated[str, Text(4096)]
"""Text for a person: one line without control characters."""
Metrics = Annotated[dict[Annotated[str, Text(64)], float], Within(0, 64)]
"""At most 64 values by name."""
Role = Annotated[str, Text(16, "actor|learner")]
PathName = Annotated[str, Text(4096, r"[^\0]+")]
"""A path. The process that opens the path must check where it leads."""
Version = Annotated[int, Within(0, MAX_VERSION)]
VersionOrNone = Annotated[int, Within(-1, MAX_VERSION)]
"""-1: no version."""
VersionDistance = Annotated[int, Within(-MAX_VERSION, MAX_VERSION)]
Count = Annotated[int, Within(0, MAX_INTEGER)]
SmallCount = Annotated[int, Within(0, MAX_ITEMS)]
TokenId = Annotated[int, Within(0, (1 << 31) - 1)]
Number = Annotated[float, Within(-1e300, 1e300)]
Share = Annotated[float, Within(0, 1)]
Seconds = Annotated[float, Within(0, 1e12)]


def check_name(name: str, what: str) -> None:
    """Refuse a name that the servers of a run would refuse. `what` names it in the error.

    Raises:
        ValueError: when the name is empty, too long, or has characters that are unsafe in a log or a path.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]{0,127}", name):
        raise ValueError(f"{what} {name[:150]!r} is not made of 1 to 128 letters, digits and _.:@-; choose another")


def unpack_header(frame: bytes, max_bytes: int | None = None) -> Any:
    """Decode the msgpack value in `frame`, which may have `max_bytes` bytes; None: `MAX_HEADER_BYTES`.

    Raises:
        WireError: when the frame is too large or is not exactly one msgpack value.
    """
    max_bytes = MAX_HEADER_BYTES if max_bytes is None else max_bytes
    if len(frame) > max_bytes:
        raise WireError(f"a header of {len(frame)} bytes; at most {max_bytes} are allowed")
    try:
        # A first pass skips through the value without building it, so that no false length reaches the second pass. For
        # a small frame the second pass is bounded by itself: it refuses lengths above the frame's.
        if len(frame) > SMALL_HEADER_BYTES:
            walker = msgpack.Unpacker(read_size=len(frame), max_buffer_size=max_bytes)
            walker.feed(frame)
            walker.skip()
        return msgpack.unpackb(frame, raw=False, strict_map_key=True)
    # msgpack raises ValueError subclasses, UnicodeDecodeError and, on deep nesting, RecursionError or StackError.
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"the header is not msgpack: {type(error).__name__}") from error


def reader(wanted: Any, special: dict[Any, Reader]) -> Reader:
    """Return a function that checks and builds a value of type `wanted`.

    `special` has the readers of types that are sent as frames.
    """
    if wanted in special:
        return special[wanted]
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Annotated:
        if typing.get_origin(arguments[0]) is dict:
            key, item = typing.get_args(arguments[0])
            limit = typing.get_args(key)[1]
            longest = limit.longest if item is float and not limit.pattern else 0
            return _mapping(reader(key, special), reader(item, special), int(arguments[1].most), longest)
        return _text(arguments[1]) if arguments[0] is str else _number(arguments[0], arguments[1])
    if wanted is float:
        return _float
    if wanted is bool:
        return _bool
    if origin is tuple and arguments[-1] is Ellipsis:
        return _texts(typing.get_args(Name)[1]) if arguments[0] == Name else _sequence(reader(arguments[0], special))
    if origin is tuple:
        return _record(tuple, "a tuple", [reader(kind, special) for kind in arguments])
    if origin is dict:
        return _mapping(reader(arguments[0], special), reader(arguments[1], special))
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return record(wanted, special)
    raise TypeError(
        f"a message field of type {wanted} has no limits; use one of the types in buffer/transport/schema.py"
    )


def record(cls: type[Any], special: dict[Any, Reader]) -> Reader:
    """Return a function that checks and builds the dataclass `cls` from a list of its field values."""
    kinds = field_types(cls).values()
    return _record(lambda values: cls(*values), cls.__name__, [reader(kind, special) for kind in kinds])


def fast_reader(cls: type[Any]) -> Callable[[bytes], Any]:
    """Return a function that decodes a frame into the dataclass `cls`, which has no frames. It checks all but patterns.

    Memory is allocated for a length that a sender claims only up to `MAX_ITEMS` per list.
    """
    fields = [(name, _for_msgspec(kind)) for name, kind in field_types(cls).items()]
    struct = msgspec.defstruct(cls.__name__, fields, array_like=True, forbid_unknown_fields=True)
    decode = msgspec.msgpack.Decoder(struct).decode
    explain = record(cls, {})

    def read(frame: bytes) -> Any:
        if len(frame) > MAX_HEADER_BYTES:
            raise WireError(f"a header of {len(frame)} bytes; at most {MAX_HEADER_BYTES} are allowed")
        try:
            return cls(*msgspec.structs.astuple(decode(frame)))
        # A UnicodeDecodeError is a ValueError, as are msgspec's errors.
        except (ValueError, RecursionError) as error:
            explain(unpack_header(frame), [])
            raise WireError(f"the header of {cls.__name__} is invalid: {error}") from error

    return read


def _for_msgspec(wanted: Any) -> Any:
    """Return `wanted` with its limits, but not the patterns of texts, as msgspec declares them."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    few = msgspec.Meta(max_length=MAX_ITEMS)
    if origin is Annotated and isinstance(arguments[1], Text):
        return Annotated[str, msgspec.Meta(max_length=arguments[1].longest)]
    if origin is Annotated:
        return Annotated[arguments[0], msgspec.Meta(ge=arguments[1].least, le=arguments[1].most)]
    if origin is tuple and arguments[-1] is Ellipsis:
        return Annotated[types.GenericAlias(tuple, (_for_msgspec(arguments[0]), ...)), few]
    if origin is tuple:
        return types.GenericAlias(tuple, tuple(map(_for_msgspec, arguments)))
    if origin is dict:
        return Annotated[types.GenericAlias(dict, tuple(map(_for_msgspec, arguments))), few]
    raise TypeError(f"msgspec has no limits for {wanted}")


def check_texts(wanted: Any, texts: Iterable[str]) -> None:
    """Check each of the `texts` against the pattern of the type `wanted`, such as `Name`.

    Raises:
        WireError: when one has characters that are not allowed.
    """
    limit, texts = typing.get_args(wanted)[1], list(texts)
    if not _all_match(limit, texts):
        wrong = next(text for text in texts if not _matcher(limit)(text))
        raise WireError(f"the text {wrong[:60]!r} has characters that are not allowed there")


def field_types(cls: type[Any]) -> dict[str, Any]:
    """Return the resolved annotation of every field, by name and in order."""
    return typing.get_type_hints(cls, include_extras=True)


def _record(build: Callable[[Any], Any], name: str, readers: list[Reader]) -> Reader:
    def read(value: Any, rest: Frames) -> Any:
        if type(value) is not list or len(value) != len(readers):
            raise WireError(f"{name} has {len(readers)} fields")
        return build([read_one(item, rest) for read_one, item in zip(readers, value, strict=True)])

    return read


def _sequence(read_one: Reader) -> Reader:
    def read(value: Any, rest: Frames) -> Any:
        if type(value) is not list or len(value) > MAX_ITEMS:
            raise WireError(f"expected at most {MAX_ITEMS} values, got {_describe(value)}")
        return tuple([read_one(item, rest) for item in value])

    return read


def _mapping(read_key: Reader, read_value: Reader, most: int = MAX_ITEMS, longest: int = 0) -> Reader:
    """Return a reader of maps. `longest` is the most characters of a key if keys are any text and values any floats."""

    def read(value: Any, rest: Frames) -> Any:
        if type(value) is not dict or len(value) > most:
            raise WireError(f"expected a map of at most {most} entries, got {_describe(value)}")
        # Metrics, which every process sends every second, are checked together.
        if longest and set(map(type, value)) == {str} and set(map(type, value.values())) == {float}:
            names = "".join(value)
            if names.isprintable() and max(map(len, value)) <= longest:
                return value
        return {read_key(key, rest): read_value(item, rest) for key, item in value.items()}

    return read


def _texts(limit: Text) -> Reader:
    """Return a reader of lists of texts, such as the ids that an actor holds, which checks all of them together."""
    read_one = _text(limit)

    def read(value: Any, rest: Frames) -> Any:
        if type(value) is not list or len(value) > MAX_ITEMS:
            raise WireError(f"expected at most {MAX_ITEMS} values, got {_describe(value)}")
        are_texts = set(map(type, value)) <= {str} and max(map(len, value), default=0) <= limit.longest
        if are_texts and _all_match(limit, value):
            return tuple(value)
        return tuple([read_one(item, rest) for item in value])

    return read


def _all_match(limit: Text, texts: list[str]) -> bool:
    """Return whether each of the texts has only characters that are allowed."""
    if not limit.pattern:
        return "".join(texts).isprintable()
    # One search in all of them is several times faster than one in each. No name contains the separator.
    joined = "\n".join(texts)
    return bool(_matcher_of_lines(limit)(joined)) and joined.count("\n") == max(len(texts) - 1, 0)


@functools.cache
def _matcher_of_lines(limit: Text) -> Callable[[str], Any]:
    return re.compile(f"(?:{limit.pattern})(?:\n(?:{limit.pattern}))*").fullmatch


@functools.cache
def _matcher(limit: Text) -> Callable[[str], Any]:
    return re.compile(limit.pattern, re.DOTALL).fullmatch if limit.pattern else str.isprintable


def _text(limit: Text) -> Reader:
    matches = _matcher(limit)

    def read(value: Any, rest: Frames) -> Any:
        if type(value) is not str:
            raise WireError(f"expected str, got {type(value).__name__}")
        if len(value) > limit.longest:
            raise WireError(f"a text of {len(value)} characters; at most {limit.longest} are allowed")
        if not matches(value):
            raise WireError(f"the text {value[:60]!r} has characters that are not allowed there")
        return value

    return read


def _number(wanted: type[Any], limit: Within) -> Reader:
    kinds = (int,) if wanted is int else (int, float)

    def read(value: Any, rest: Frames) -> Any:
        if type(value) not in kinds:
            raise WireError(f"expected {wanted.__name__}, got {type(value).__name__}")
        if not limit.least <= value <= limit.most:
            raise WireError(f"the number {value} is not between {limit.least} and {limit.most}")
        return wanted(value)

    return read


def _float(value: Any, rest: Frames) -> float:
    """Accept any float, also NaN and infinity: measurements may be either."""
    if type(value) not in (int, float):
        raise WireError(f"expected float, got {type(value).__name__}")
    return float(value)


def _bool(value: Any, rest: Frames) -> bool:
    if type(value) is not bool:
        raise WireError(f"expected bool, got {type(value).__name__}")
    return value


def _describe(value: Any) -> str:
    return f"{len(value)}" if isinstance(value, list | dict) else type(value).__name__
