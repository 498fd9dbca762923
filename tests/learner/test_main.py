"""`python -m learner` started by hand: its PyTorch threads, and a wrong number of ranks."""

import os
import sys

import pytest

from learner.__main__ import check_num_ranks
from tests.containers import limited, run

CODE = """
import sys
from contextlib import suppress
from pathlib import Path
from learner.__main__ import _train
# `_train` fails at its first import after PyTorch: all the others together take three times as long.
sys.modules["hydra.utils"] = None
with suppress(ModuleNotFoundError):
    _train(Path(), {"learner": {"device": "cpu"}}, None, None)
import torch
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(("given", "threads"), [([], "1"), (["OMP_NUM_THREADS=2"], "2")])
def test_a_learner_started_by_hand_has_as_many_threads_as_its_quota_has_cores(given: list[str], threads: str) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core is one thread anyhow")
    with limited(cpu=1.0) as inside:
        assert run(["env", "-u", "OMP_NUM_THREADS", *given, *inside, sys.executable, "-c", CODE]) == f"{threads}\n"


def test_another_number_of_ranks_than_configured_is_refused() -> None:
    check_num_ranks({"learner": {}}, {})
    check_num_ranks({"learner": {"num_ranks": 4}}, {"WORLD_SIZE": "4"})
    with pytest.raises(ValueError, match=r"4 learner ranks were started, but learner\.num_ranks=1; start that many"):
        check_num_ranks({"learner": {"num_ranks": 1}}, {"WORLD_SIZE": "4"})
    with pytest.raises(ValueError, match=r"1 learner ranks were started, but learner\.num_ranks=2"):
        check_num_ranks({"learner": {"num_ranks": 2}}, {})
