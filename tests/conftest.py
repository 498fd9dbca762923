"""Fixtures of all tests: a folder for sockets, and a process group of one rank.

Hypothesis gets no deadline per example, because a slow machine is not a failure. DeepSpeed remembers its first process
group, so all tests of a process share one.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The statuses with which threads of this test wanted to end the process; a test that expects one clears it."""
    statuses: list[int] = []
    monkeypatch.setattr("buffer.process.exit_now", statuses.append)
    yield statuses
    assert not statuses, "a thread failed; the log has its traceback"


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    # tmp_path is too long: the path of an ipc socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="sock-") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def _process_group() -> Iterator[None]:
    import torch

    from learner.distributed.deepspeed_engine import init_distributed, shut_down_distributed

    init_distributed(torch.device("cpu"))
    yield
    shut_down_distributed()


@pytest.fixture(scope="module")
def one_rank(_process_group: None) -> Iterator[None]:
    """Makes this process rank 0 of 1. The variables are removed after the module, so that no child inherits them."""
    os.environ.update(zip(RANK_VARIABLES, ("0", "1", "0", "127.0.0.1", "0"), strict=True))
    yield
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
