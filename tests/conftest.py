"""No deadline per example, since a busy machine is no failure; and a folder with a name short enough for sockets."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    # Shorter than tmp_path: an ipc socket's path may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="sock-") as directory:
        yield Path(directory)
