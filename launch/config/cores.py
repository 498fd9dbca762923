"""Assigns cores and threads of this host to the processes of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass

from buffer.machine import num_usable_cores
from launch.config.devices import has_cuda
from launch.config.settings import ClusterConfig


@dataclass(frozen=True)
class Cores:
    """Cores that processes are pinned to (empty: not pinned), and their numbers of threads."""

    actors: tuple[int, ...]
    """Cores that all actors share."""
    learner: tuple[int, ...]
    """Cores that the learner's ranks share."""
    actor_threads: int
    """Threads of each worker of an actor's engine."""
    learner_threads: int
    """Threads of each rank of the learner."""


def assign_cores(cluster: ClusterConfig, *, num_ranks: int, workers_per_actor: int) -> Cores:
    """Pin actors and learner to separate cores if there are enough.

    A second thread on a busy core makes both processes many times slower, so a process gets as many threads as cores.
    With CUDA no process is pinned and an actor has one thread, because the work is on the device.

    Args:
        cluster: the number of actors and the learner's cores.
        num_ranks: ranks of the learner.
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
    """Cores of the actors and of the learner; both empty if processes are not pinned."""
    cores = sorted(os.sched_getaffinity(0))
    # With one thread each and more processes than cores, do not pin: a waiting process then leaves its core to others.
    too_few = cluster.learner_cores == 1 and cluster.num_actors > len(cores) - wanted
    # A CPU quota limits time, not cores. All containers of the host would pin to the same few cores.
    has_quota = usable < len(cores)
    if not cluster.pin_cores or has_cuda() or has_quota or len(cores) <= wanted or too_few:
        return (), ()
    return tuple(cores[:-wanted]), tuple(cores[-wanted:])
