"""The option --cores, and one OpenMP thread by default."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from actors.__main__ import read_cores

ROOT = Path(__file__).parents[2]
LIMITS = "samples_per_group=1, max_new_tokens=8, max_tokens=16"
THREADS = f"""
import os, re, threading
from actors.config import ActorConfig
from actors.engine.environment import prepare_environment
import torch
def count():
    found = re.findall(r"(?:get_num_threads|get_max_threads)\\(\\) : (\\d+)", torch.__config__.parallel_info())
    print(found, flush=True)
# First a child in which PyTorch has not worked yet, and then this process, in which it has.
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    torch.ones(9) @ torch.ones(9)
prepare_environment(ActorConfig(model_path="-", seed=0, {LIMITS}))
thread = threading.Thread(target=count)
thread.start()
thread.join()
"""
CACHE = f"""
import os, sys
from actors.config import ActorConfig
from actors.engine.environment import prepare_environment
for gib in (2.0, 0.25):
    prepare_environment(ActorConfig(model_path="-", kv_cache_gib=gib, {LIMITS}))
    print(os.environ.pop("VLLM_CPU_KVCACHE_SPACE"))
# vLLM reads the variables when it is imported.
assert "vllm" not in sys.modules
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


def test_the_engine_thread_has_one_thread_unless_the_environment_says_otherwise():
    # The number of threads of PyTorch, OpenMP and MKL, in a thread that started afterwards.
    assert run("-c", THREADS).stdout == "['1', '1', '1']\n" * 2
    wanted = str(min(2, len(os.sched_getaffinity(0))))
    assert run("-c", THREADS, OMP_NUM_THREADS=wanted).stdout == f"{[wanted] * 3}\n" * 2


def test_the_engines_cache_is_as_large_as_asked_for_whatever_memory_there_is():
    ended = run("-c", CACHE)
    assert (ended.stdout, ended.stderr) == ("2\n1\n", "")


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
