"""`torchrun --nproc-per-node 2 tests/learner/stuck_ranks.py BUFFER FOLDER`: one of the ranks never enters a collective.

The ranks do a few works together, each with a collective, and say so in their heartbeats. In the first life rank 1
sleeps before the last collective; later lives end well. FOLDER remembers the lives.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch.distributed as dist

from buffer.transport.connection import Connection
from learner.distributed.collectives import any_rank, barrier, rank_and_world_size
from learner.monitoring import pace
from learner.monitoring.heartbeat import Heartbeats
from tests.learner.samples import CPU
from tests.learner.scripted_run import CREDENTIALS

LIMIT_SECONDS = 5.0


def main(address: str, folder: Path) -> None:
    """Live one life."""
    pace.LEAST_SECONDS = LIMIT_SECONDS
    dist.init_process_group("gloo")
    rank, _ = rank_and_world_size()
    buffer = Connection(address, f"learner-{rank}", CREDENTIALS)
    heartbeats = Heartbeats(buffer, rank)
    heartbeats.say(-1, activity="loads the model")
    is_first = not (folder / "life").exists()
    barrier()
    (folder / "life").touch()
    for version in range(3):
        heartbeats.say(-1, activity=f"trains on the batch for policy {version}")
        if is_first and version == 2 and rank == 1:
            threading.Event().wait()
        any_rank(False, CPU)
        heartbeats.say(-1, activity=f"publishes policy {version + 1}")
    heartbeats.close()
    buffer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
