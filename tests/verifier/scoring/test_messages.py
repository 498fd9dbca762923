"""The messages to and from a scoring process: decoding restores them, and damaged bytes raise a ValueError."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.base import Completion, Score, Verdict
from verifier.scoring.messages import Failure, pack_completion, pack_result, unpack_completion, unpack_result

RESULTS = [
    Score(-0.25, {"accuracy": 1.0, "длина": -1e-300}, Verdict.CORRECT),
    Score(1e300, {}, Verdict.TRUNCATED, skipped=True),
    Failure(Verdict.ERROR, "ValueError: \N{PILE OF POO}"),
    Failure(Verdict.CRASH, "", from_outside=True),
]


@pytest.mark.parametrize("result", RESULTS)
def test_a_result_comes_back_whole(result: Score | Failure) -> None:
    assert unpack_result(pack_result(result)) == result


@pytest.mark.parametrize("text", ["", "x" * 100_000, "half of a pair: \ud800", "\0"])
@pytest.mark.parametrize("num_tokens", [None, 0, 1 << 40])
def test_a_completion_comes_back_whole(text: str, num_tokens: int | None) -> None:
    completion = Completion(text, "gold", truncated=True, num_tokens=num_tokens)
    assert unpack_completion(pack_completion(completion)) == completion


@given(st.binary(max_size=64))
def test_nonsense_is_a_value_error(packed: bytes) -> None:
    try:
        result = unpack_result(packed)
    except ValueError:
        return
    assert isinstance(result, Score | Failure)


@given(st.data())
def test_a_flipped_byte_is_a_value_error_or_another_result(data: st.DataObject) -> None:
    packed = bytearray(pack_result(RESULTS[0]))
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        result = unpack_result(bytes(packed))
    except ValueError:
        return
    assert isinstance(result, Score)
    assert isinstance(result.reward, float)


@pytest.mark.parametrize("breakdown", [{"accuracy": "1.0"}, {"accuracy": None}, {"accuracy": 1}])
def test_a_part_that_is_no_number_is_a_value_error(breakdown: dict[str, float]) -> None:
    packed = pack_result(Score(1.0, breakdown, Verdict.CORRECT))
    with pytest.raises(ValueError, match="is no score"):
        unpack_result(packed)
