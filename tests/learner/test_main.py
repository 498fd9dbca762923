"""The number of PyTorch threads of `python -m learner` that no launcher started."""

import os
import sys

import pytest

from tests.containers import limited, run

CODE = """
from contextlib import suppress
from pathlib import Path
from learner.__main__ import _train
# `_train` fails when it reads the configuration; PyTorch is imported by then.
with suppress(Exception):
    _train(Path(), {"learner": {"device": "cpu"}}, None)
import torch
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(("given", "threads"), [([], "1"), (["OMP_NUM_THREADS=2"], "2")])
def test_a_learner_started_by_hand_has_as_many_threads_as_its_quota_has_cores(given: list[str], threads: str) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core is one thread anyhow")
    with limited(cpu=1.0) as inside:
        assert run(["env", "-u", "OMP_NUM_THREADS", *given, *inside, sys.executable, "-c", CODE]) == f"{threads}\n"
