import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import learner.distributed.ranks

ROOT = Path(__file__).parents[3]


@pytest.mark.system
def test_a_mistake_ends_several_ranks_as_it_ends_one(tmp_path: Path):
    command = [sys.executable, "-m", "learner.distributed.ranks", "2", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 2, result.stderr[-2000:]
    assert f"error: {tmp_path}/config.yaml does not exist" in result.stderr


def failure(status: int) -> ChildFailedError:
    return ChildFailedError("learner", {0: ProcessFailure(0, 1, status, "<N/A>")})


@pytest.mark.parametrize(
    ("error", "status"), [(failure(3), 3), (failure(-9), 137), (SignalException("SIGTERM", 15), 143), (None, 0)]
)
def test_the_exit_status_is_that_of_the_rank(monkeypatch: pytest.MonkeyPatch, error: Exception | None, status: int):
    def torchrun(arguments: list[str]) -> None:
        assert arguments == [
            *("--standalone", "--nproc-per-node", "2", "--shutdown-timeout", "604800"),
            *("-m", "learner", "runs/one"),
        ]
        if error is not None:
            raise error

    monkeypatch.setattr(learner.distributed.ranks, "torchrun", torchrun)
    assert learner.distributed.ranks.main(["2", "runs/one"]) == status
