"""Fixtures of the system tests. Base models are pretrained for some seconds, once per session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.system.runs import ROOT, SMALL_RUN, Launch


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of base models, shared by all tests of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def launch(cache_dir: Path) -> Launch:
    """Returns a function that starts `launch/cluster.py` with small settings and further overrides."""

    def start(run_dir: Path, *overrides: str, small: bool = True, inside: Sequence[str] = ()) -> subprocess.Popen[str]:
        command = [*inside, sys.executable, "launch/cluster.py", *(SMALL_RUN if small else ()), *overrides]
        if small:
            command.append(f"run_dir={run_dir}")
        environment = os.environ | {"SLIPSTREAM_CACHE": str(cache_dir)}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return start
