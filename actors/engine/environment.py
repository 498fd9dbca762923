"""Environment variables that vLLM reads when it is imported. This module does not import vLLM."""

from __future__ import annotations

import os

import torch

from actors.config import ActorConfig
from actors.lifeline import name_actor


def prepare_environment(config: ActorConfig) -> None:
    """Set vLLM's environment variables. Call in the actor before anything imports vLLM."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.kv_cache_gib))))
    # The supervisor assigns the cores, so vLLM must not bind its threads.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # A second OpenMP thread on a busy core spins while it waits, which slows every process on that core many times.
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    # vLLM's processes set their title. setproctitle would write the title over the environment block, by which the
    # launcher recognizes its processes.
    os.environ["SPT_NOENV"] = "1"
    name_actor()
