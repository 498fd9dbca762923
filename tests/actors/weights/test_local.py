"""Mappings of the learner's files: kept while the file exists, and no longer."""

from pathlib import Path

import numpy as np

from actors.weights.local import Mappings
from buffer.weights.shared_memory import SegmentPool, hold, let_go


def deleted_mappings() -> int:
    """Mappings of this process whose file was deleted."""
    return sum(".weights (deleted)" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_version_that_was_deleted_does_not_stay_mapped(tmp_path: Path):
    pool, mappings = SegmentPool(tmp_path), Mappings()
    before = deleted_mappings()
    for version in range(6):
        segment = pool.take(1 << 16)
        segment.array[:] = version
        path = segment.publish(f"v{version}.weights")
        file = hold(path)
        assert mappings.of(file).max() == version
        let_go(file)
        segment.remove()
        segment.array = np.empty(0, np.uint8)
        # Its own is gone at the next fetch, and those before it are gone.
        assert deleted_mappings() - before <= 1


def test_a_file_that_is_used_again_is_not_mapped_again(tmp_path: Path):
    pool, mappings = SegmentPool(tmp_path), Mappings()
    arrays = []
    for version in range(3):
        segment = pool.take(1 << 16)
        segment.array[:] = version
        path = segment.publish(f"v{version}.weights")
        file = hold(path)
        arrays.append(mappings.of(file))
        assert arrays[-1].max() == version
        let_go(file)
        pool.retire(segment)
    assert arrays[0] is arrays[1] is arrays[2]
