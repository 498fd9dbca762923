"""`python -m learner RUN_DIR` runs one learner rank; `python -m learner.distributed.ranks R RUN_DIR` runs R of them."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buffer.config import load_run_config, read_section
from buffer.machine import THREADS_VARIABLE, num_usable_cores
from buffer.process import exit_now, pause_gc, resume_gc
from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.credentials import WEIGHTS, Credentials, client_credentials, server_credentials
from buffer.transport.roles import LEARNER
from buffer.weights.config import MEMORY_VARIABLE, WeightsConfig

if TYPE_CHECKING:
    import torch

    from learner.weights.store import WeightStore


def main() -> int:
    """Train the run in RUN_DIR, starting from its newest checkpoint if it has one. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m learner", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's folder; its config.yaml holds all settings")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    try:
        config = load_run_config(arguments.run_dir)
        check_num_ranks(config, os.environ)
        # First, because a run without a launcher has no keys before.
        serving = server_credentials(arguments.run_dir, WEIGHTS)
        credentials = client_credentials(arguments.run_dir, LEARNER)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _train(arguments.run_dir, config, credentials, serving)


def check_num_ranks(run: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Check that as many ranks were started as the run is configured for.

    Args:
        run: the run's configuration.
        environment: torchrun sets WORLD_SIZE in it; without, this is the only rank.

    Raises:
        ValueError: the numbers differ.
    """
    started, wanted = int(environment.get("WORLD_SIZE", "1")), run["learner"].get("num_ranks", 1)
    if started != wanted:
        raise ValueError(
            f"{started} learner ranks were started, but learner.num_ranks={wanted}; start that many, with python -m"
            f" learner.distributed.ranks {wanted} RUN_DIR"
        )


def _train(run_dir: Path, run: dict[str, Any], credentials: Credentials, serving: Credentials) -> int:
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    pause_gc()
    # PyTorch reads the variable when PyTorch is imported. Without the variable PyTorch would start one thread per core
    # of the host.
    os.environ.setdefault(THREADS_VARIABLE, str(num_usable_cores()))
    os.environ["SLIPSTREAM_DEVICE"] = device_name(run["learner"].get("device", "auto"))
    import torch
    from hydra.utils import instantiate

    from learner.checkpoints.checkpoint import CheckpointError
    from learner.config import LearnerConfig, ModelConfig
    from learner.distributed.deepspeed_engine import init_distributed, shut_down_distributed
    from learner.monitoring.stop_conditions import RunStoppedError
    from learner.train import Trainer

    config = read_section(LearnerConfig, run["learner"], "learner")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if config.cpu_affinity:
        # Each rank on this host gets its share of the cores, and one thread per core.
        cores = config.cpu_affinity[local_rank :: config.num_ranks] or config.cpu_affinity
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
    device = torch.device(os.environ["SLIPSTREAM_DEVICE"], local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(config.seed)
    init_distributed(device)
    rank = int(os.environ["RANK"])
    settings = read_section(WeightsConfig, run["weights"], "weights")
    store = _open_store(run_dir, settings, serving, device) if not rank else None
    buffer = Connection(run["buffer"]["address"], f"learner-{rank}", credentials)
    try:
        trainer = Trainer(
            config,
            read_section(ModelConfig, run["model"], "model"),
            instantiate(run["algorithm"]),
            run_dir=run_dir,
            buffer=buffer,
            store=store,
            device=device,
            stopping=stopping,
        )
        resume_gc()
        trainer.run()
    except RunStoppedError as error:
        return _log_failure(error, 3)
    except CheckpointError as error:
        return _log_failure(error, 2)
    except (OSError, RequestRefused) as error:
        # A full disk, a missing folder, a buffer that lost its last moments: the supervisor restarts the learner.
        return _log_failure(error, 1)
    finally:
        buffer.close()
        if store is not None:
            store.close()
        shut_down_distributed()
    return 0


def _open_store(run_dir: Path, settings: WeightsConfig, credentials: Credentials, device: torch.device) -> WeightStore:
    from learner.weights.device_store import open_store

    memory = os.environ.get(MEMORY_VARIABLE) if settings.shared_memory else None
    # Without a launcher no process would remove the shared memory after kill -9, so versions are written to the run
    # directory.
    folder = Path(memory) / "weights" if memory else None
    return open_store(run_dir / "weights", settings, credentials, folder, device)


def _log_failure(error: Exception, status: int) -> int:
    logging.getLogger("learner").error("%s: %s", type(error).__name__, error)
    return status


def device_name(wanted: str) -> str:
    """Return the name of the device: `cpu` or `cuda`. `auto` means CUDA if torch finds a device."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    exit_now(main())
