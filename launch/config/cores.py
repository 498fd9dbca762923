"""Which cores and how many threads the processes of a run have on this host."""

from __future__ import annotations

import os
from dataclasses import dataclass

from buffer.machine import num_usable_cores
from launch.config.devices import has_cuda
from launch.config.settings import ClusterConfig


@dataclass(frozen=True)
class Cores:
    """Cores to keep to, empty for any; and threads of each process."""

    actors: tuple[int, ...]
    """Shared by all actors."""
    learner: tuple[int, ...]
    """Shared by the learner's ranks."""
    actor_threads: int
    """Of each worker of an actor's engine."""
    learner_threads: int
    """Of each of the learner's ranks."""


def assign_cores(cluster: ClusterConfig, *, num_ranks: int, workers_per_actor: int) -> Cores:
    """Give actors and learner cores of their own where there are enough.

    A second thread on a busy core makes both processes many times slower, so a process has as many threads as cores.
    On a GPU's host nobody is pinned, and an actor has one thread: the work is on the device.

    Args:
        cluster: how many actors, and what the learner wants.
        num_ranks: of the learner.
        workers_per_actor: processes of each engine.
    """
    usable = num_usable_cores()
    wanted = cluster.learner_cores * num_ranks
    actors, learner = _pinned(cluster, wanted, usable)
    share = (usable - wanted) // (cluster.num_actors * workers_per_actor)
    return Cores(
        actors=actors,
        learner=learner,
        actor_threads=1 if has_cuda() else max(1, share),
        learner_threads=min(cluster.learner_cores, max(1, usable // num_ranks)),
    )


def _pinned(cluster: ClusterConfig, wanted: int, usable: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cores of the actors and of the learner; two empty tuples where the scheduler shares them."""
    cores = sorted(os.sched_getaffinity(0))
    # With one thread each and fewer cores than processes, a process that waits leaves its core to the others.
    too_few = cluster.learner_cores == 1 and cluster.num_actors > len(cores) - wanted
    # A CPU quota grants time and no particular cores: every container of the host would choose the same few.
    has_quota = usable < len(cores)
    if not cluster.pin_cores or has_cuda() or has_quota or len(cores) <= wanted or too_few:
        return (), ()
    return tuple(cores[:-wanted]), tuple(cores[-wanted:])
