import pytest

from buffer.weights_config import WeightsConfig


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"keep_versions": 0}, r"weights\.keep_versions=0 must be at least 1"),
        ({"bytes_per_second": -1.0}, r"weights\.bytes_per_second=-1\.0 must be 0 \(no limit\) or above"),
        ({"relay_fanout": -1}, r"weights\.relay_fanout=-1 must be 0 \(no tree\) or above"),
    ],
)
def test_a_value_out_of_range_is_named(settings: dict[str, float], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        WeightsConfig(**settings)  # type: ignore[arg-type]
