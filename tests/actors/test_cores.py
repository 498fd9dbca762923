"""The option --cores, and one OpenMP thread by default."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from actors.__main__ import read_cores

ROOT = Path(__file__).parents[2]
THREADS = """
import re, threading
from actors.config import ActorConfig
from actors.engine.environment import prepare_environment
{before}
prepare_environment(ActorConfig(model_path="-", seed=0, samples_per_group=1, max_new_tokens=8, max_tokens=16))
import torch
def count():
    print(re.findall(r"(?:get_num_threads|get_max_threads)\\(\\) : (\\d+)", torch.__config__.parallel_info()))
thread = threading.Thread(target=count)
thread.start()
thread.join()
"""
CACHE = """
import os
from actors.config import ActorConfig
from actors.engine.environment import prepare_environment
limits = dict(samples_per_group=1, max_new_tokens=8, max_tokens=16)
prepare_environment(ActorConfig(model_path="-", kv_cache_gib={asked}, **limits))
print(os.environ["VLLM_CPU_KVCACHE_SPACE"])
"""


def run(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    without = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, *words],
        env=without | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("before", ["", "import torch; torch.ones(9) @ torch.ones(9)"])
def test_the_engine_thread_has_one_thread_unless_the_environment_says_otherwise(before: str):
    code = THREADS.format(before=before)
    # The number of threads of PyTorch, OpenMP and MKL, in a thread that started afterwards.
    assert run("-c", code).stdout == "['1', '1', '1']\n"
    wanted = str(min(2, len(os.sched_getaffinity(0))))
    assert run("-c", code, OMP_NUM_THREADS=wanted).stdout == f"{[wanted] * 3}\n"


@pytest.mark.parametrize(("asked", "gib"), [(2.0, "2"), (0.25, "1")])
def test_the_engines_cache_is_as_large_as_asked_for_whatever_memory_there_is(asked: float, gib: str):
    code = CACHE.format(asked=asked)
    assert run("-c", code).stdout == f"{gib}\n"


def test_cores_are_a_list_of_those_that_may_be_used():
    here = sorted(os.sched_getaffinity(0))
    assert read_cores("") == []
    assert read_cores(",".join(map(str, here))) == here


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("0-3", "--cores=0-3 is no list of numbers; name cores as in --cores=0,1"),
        ("4000", r"--cores=4000: this process may not use core 4000, only \[\d+"),
    ],
)
def test_a_core_that_is_not_there_is_refused_with_one_sentence(listed: str, said: str, tmp_path: Path):
    ended = run("-m", "actors", str(tmp_path), "--cores", listed)
    assert ended.returncode == 2
    assert re.match(f"error: {said}", ended.stderr), ended.stderr
    assert ended.stderr.count("\n") == 1
