"""`python -m learner RUN_DIR`: one learner rank; several with `torchrun --nproc-per-node R -m learner RUN_DIR`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from buffer.client import Connection
from buffer.config import load_run_config, read_section


def main() -> int:
    """Train the run in RUN_DIR from its newest checkpoint on. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m learner", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's folder; its config.yaml says the rest")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    try:
        config = load_run_config(arguments.run_dir)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _train(arguments.run_dir, config)


def _train(run_dir: Path, run: dict[str, Any]) -> int:
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    os.environ["SLIPSTREAM_DEVICE"] = device_name(run["learner"].get("device", "auto"))
    import torch
    from hydra.utils import instantiate

    from learner.config import LearnerConfig, ModelConfig
    from learner.engine import init_distributed, shut_down_distributed
    from learner.publisher import WeightStore
    from learner.train import LogprobMismatchError, Trainer

    config = read_section(LearnerConfig, run["learner"], "learner")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if config.cpu_affinity:
        # Every rank of this host its own cores, as many threads as cores.
        cores = config.cpu_affinity[local_rank :: config.num_ranks] or config.cpu_affinity
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
    device = torch.device(os.environ["SLIPSTREAM_DEVICE"], local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(config.seed)
    init_distributed(device)
    rank = int(os.environ["RANK"])
    store = WeightStore(run_dir / "weights", run["weights"]["address"]) if rank == 0 else None
    buffer = Connection(run["buffer"]["address"], f"learner-{rank}")
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
        trainer.run()
    except LogprobMismatchError as error:
        logging.getLogger("learner").error("%s", error)
        return 3
    finally:
        buffer.close()
        if store is not None:
            store.close()
        shut_down_distributed()
    return 0


def device_name(wanted: str) -> str:
    """Cpu or cuda; `auto` takes CUDA where torch sees a device."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
