"""`python tests/learner/stuck_ranks.py BUFFER FOLDER`: a learner of two ranks, one of which never enters a collective.

The ranks do a few works together, each with a collective, and say so in their heartbeats. In the first life rank 1
sleeps before the last collective; later lives end well. FOLDER remembers the lives. The ranks are forks of one process,
which imports torch once.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from buffer.transport.connection import Connection
from buffer.transport.credentials import Credentials
from learner.distributed.collectives import any_rank, barrier
from learner.monitoring import pace
from learner.monitoring.heartbeat import Heartbeats

LIMIT_SECONDS = 5.0


def live(address: str, folder: Path, rank: int, life: int) -> None:
    """One life of one rank."""
    pace.LEAST_SECONDS = LIMIT_SECONDS
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{life}", rank=rank, world_size=2)
    buffer = Connection(address, f"learner-{rank}", Credentials.plain("scripted"))
    heartbeats = Heartbeats(buffer, rank)
    heartbeats.say(-1, activity="loads the model")
    barrier()
    for version in range(3):
        heartbeats.say(-1, activity=f"trains on the batch for policy {version}")
        if life == 0 and version == 2 and rank == 1:
            threading.Event().wait()
        any_rank(False, torch.device("cpu"))
        heartbeats.say(-1, activity=f"publishes policy {version + 1}")
    heartbeats.close()
    buffer.close()
    dist.destroy_process_group()


def main(address: str, folder: Path) -> None:
    """Live one life as rank 0, and as rank 1 in a fork."""
    life = len(list(folder.glob("life-*")))
    (folder / f"life-{life}").touch()
    other = os.fork()
    live(address, folder, 0 if other else 1, life)
    if other:
        os.waitpid(other, 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
