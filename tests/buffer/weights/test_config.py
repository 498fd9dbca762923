import pytest

from buffer.weights.config import WeightsConfig


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"keep_versions": 0}, r"weights\.keep_versions=0 must be at least 1"),
        ({"bytes_per_second": -1.0}, r"weights\.bytes_per_second=-1\.0 must be 0 \(no limit\) or above"),
        ({"relay_fanout": -1}, r"weights\.relay_fanout=-1 must be 0 \(no tree\) or above"),
        ({"rendezvous_seconds": 0.0}, r"weights\.rendezvous_seconds=0\.0 must be above 0"),
        ({"transport": "rdma"}, r"weights\.transport=rdma is unknown; use one of file, ipc, nccl"),
        ({"transport": "ipc"}, r"leave weights\.relay_fanout, weights\.deltas and weights\.bytes_per_second out"),
        ({"transport": "nccl", "deltas": False, "relay_fanout": 2}, r"weights\.transport=nccl sends no bytes through"),
    ],
)
def test_a_value_out_of_range_is_named(settings: dict[str, float | str], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        WeightsConfig(**settings)  # type: ignore[arg-type]
