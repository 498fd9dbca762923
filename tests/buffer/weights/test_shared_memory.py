import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from buffer.weights.shared_memory import SPARE_SEGMENTS, SegmentPool, hold, link_folder


def killed(work: Callable[[], object]) -> None:
    """Run `work` in a child process that is killed by SIGKILL right afterwards."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_what_a_killed_writer_left_half_written_is_never_seen_and_goes_with_the_next_one(tmp_path: Path):
    def write_half() -> None:
        pool = SegmentPool(tmp_path)
        pool.take(100).publish("v1.weights")
        segment = pool.take(100)
        segment.array[:50] = 7

    killed(write_half)
    [half] = tmp_path.glob("*.part")
    assert half.read_bytes() == bytes([7] * 50 + [0] * 50)
    # The kernel dropped the lock; only the name shows that the contents are incomplete.
    assert [path.name for path in tmp_path.glob("*.weights")] == ["v1.weights"]
    SegmentPool(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_was_killed_holds_nothing(tmp_path: Path):
    pool = SegmentPool(tmp_path)
    first = pool.take(64)
    path = first.publish("v1.weights")
    killed(lambda: hold(path).readlines())
    reading = hold(path)
    pool.retire(first)
    assert pool.take(64) is not first
    reading.close()
    assert pool.take(64) is first


def test_a_segment_that_is_being_written_again_cannot_be_read_under_any_name(tmp_path: Path):
    pool = SegmentPool(tmp_path)
    segment = pool.take(64)
    path = segment.publish("v1.weights")
    pool.retire(segment)
    assert pool.take(64) is segment
    for name in (path, segment.path):
        with pytest.raises(FileNotFoundError):
            hold(name)
    with pytest.raises(FileNotFoundError):
        hold(tmp_path / "absent")


def test_a_name_that_another_version_took_while_it_was_opened_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pool = SegmentPool(tmp_path)
    segment = pool.take(64)
    path = segment.publish("v1.weights")
    opened = Path.open

    def reused_meanwhile(self: Path, mode: str) -> object:
        file = opened(self, mode)
        assert segment.reclaim()
        segment.publish("v2.weights")
        return file

    monkeypatch.setattr(Path, "open", reused_meanwhile)
    with pytest.raises(FileNotFoundError):
        hold(path)


def test_only_segments_of_the_size_asked_for_are_reused_and_few_are_kept(tmp_path: Path):
    pool = SegmentPool(tmp_path)
    segments = [pool.take(64) for _ in range(SPARE_SEGMENTS + 2)]
    for index, segment in enumerate(segments):
        segment.publish(f"v{index}.weights")
        pool.retire(segment)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v2.weights", "v3.weights"]
    assert pool.take(65) not in segments
    assert pool.take(64) is segments[2]
    pool.close()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".part", ".part"]


def test_a_folder_leads_to_memory_or_nowhere_whatever_it_was_before(tmp_path: Path):
    folder, memory = tmp_path / "run" / "weights", tmp_path / "memory"
    assert link_folder(folder, None) == folder and not folder.exists()
    SegmentPool(folder).take(8)
    for _ in range(2):
        assert link_folder(folder, memory).resolve() == memory
        SegmentPool(folder).take(8)
        assert [path.suffix for path in memory.iterdir()] == [".part"]
    assert not link_folder(folder, None).is_symlink()


def test_a_retired_segment_whose_file_was_removed_is_replaced_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    pool = SegmentPool(tmp_path)
    first = pool.take(64)
    path = first.publish("v1.weights")
    pool.retire(first)
    path.unlink()
    # Another file of that name is not the segment's.
    path.write_bytes(bytes(64))
    fresh = pool.take(64)
    assert fresh is not first
    assert "v1.weights was removed by somebody else; a new file takes its place" in caplog.text
    fresh.array[:] = 3
    assert fresh.publish("v2.weights").read_bytes() == bytes([3] * 64)


def test_a_segment_whose_file_is_removed_while_it_is_written_is_published_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    segment = SegmentPool(tmp_path).take(64)
    segment.array[:] = 5
    segment.path.unlink()
    path = segment.publish("v1.weights")
    assert path.read_bytes() == bytes([5] * 64)
    assert "was removed by somebody else; its contents are written to a new file" in caplog.text
    segment.array[:] = 6
    assert path.read_bytes() == bytes([6] * 64)
    # Readers are let in, and the segment can be used again.
    hold(path).close()
    assert segment.reclaim()
