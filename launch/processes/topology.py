"""Which processes a run consists of: command lines, environment and cores. Starts nothing."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from buffer.machine import THREADS_VARIABLE, num_usable_cores
from launch.config.devices import VISIBLE, has_cuda, own_devices
from launch.config.plan import RunPlan
from learner.models.cpu_heap import heap_environment

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ProcessSpec:
    """One process of a run."""

    role: str
    """buffer | actor | learner | relay | tensorboard."""
    name: str
    command: tuple[str, ...]
    environment: dict[str, str]

    @property
    def command_line(self) -> str:
        """What a person would type, in any folder, to start it alone."""
        return shlex.join(["env", *(f"{name}={value}" for name, value in self.environment.items()), *self.command])


def assign_cores(plan: RunPlan) -> None:
    """Give the learner its cores; those of the actors are in their command lines."""
    plan.sections["learner"]["cpu_affinity"] = own_cores(plan)[1]


def own_cores(plan: RunPlan) -> tuple[list[int], list[int]]:
    """Cores of the actors and of the learner on this host; on a CPU with at least two, each has some of their own.

    A second thread on a busy core makes both processes many times slower, so each gets as many threads as cores. Where
    all have one thread and there are too few cores for that, nobody keeps to any: what one leaves idle others take.
    A CPU quota grants time and no particular cores. Under one smaller than the mask nobody keeps to any either: every
    container of the host would choose the same few.
    """
    cores, learner_cores = sorted(os.sched_getaffinity(0)), _learner_cores(plan)
    too_few = plan.cluster.learner_cores == 1 and plan.cluster.num_actors > len(cores) - learner_cores
    has_quota = num_usable_cores() < len(cores)
    if not plan.cluster.pin_cores or has_cuda() or has_quota or len(cores) <= learner_cores or too_few:
        return [], []
    return cores[:-learner_cores], cores[-learner_cores:]


def actor_threads(plan: RunPlan) -> int:
    """Threads of each worker of an actor: an equal share of the cores that the learner leaves, pinned or not.

    Beside a GPU it is one: the work is on the device.
    """
    if has_cuda():
        return 1
    num_workers: int = plan.cluster.num_actors * plan.sections["actor"]["tensor_parallel_size"]
    return max(1, (num_usable_cores() - _learner_cores(plan)) // num_workers)


def learner_threads(plan: RunPlan) -> int:
    """Threads of each of the learner's ranks: what was asked for, as far as there are cores."""
    num_ranks: int = plan.sections["learner"]["num_ranks"]
    return min(plan.cluster.learner_cores, max(1, num_usable_cores() // num_ranks))


def _learner_cores(plan: RunPlan) -> int:
    num_ranks: int = plan.sections["learner"]["num_ranks"]
    return plan.cluster.learner_cores * num_ranks


def processes(plan: RunPlan) -> list[ProcessSpec]:
    """The run's processes in starting order."""
    run_dir, num_actors = str(plan.run_dir), plan.cluster.num_actors
    specs = [_spec("buffer", "buffer", ("-m", "buffer", "serve", run_dir))]
    num_ranks = plan.sections["learner"]["num_ranks"]
    devices = [""] * (1 + num_actors)
    if plan.cluster.separate_devices:
        devices = own_devices(num_ranks, num_actors, plan.sections["actor"]["tensor_parallel_size"])
    # torchrun by itself would hide a rank's exit status.
    ranks = (
        ("-m", "learner.distributed.ranks", str(num_ranks), run_dir) if num_ranks > 1 else ("-m", "learner", run_dir)
    )
    learner = _spec("learner", "learner", ranks, num_threads=learner_threads(plan), devices=devices[0])
    specs.append(replace(learner, environment=learner.environment | heap_environment()))
    # The actors share their cores.
    cores, num_threads = own_cores(plan)[0], actor_threads(plan)
    keeping = ("--cores", ",".join(map(str, cores))) if cores else ()
    for index in range(num_actors):
        name = f"actor-{index}"
        actor = ("-m", "actors", run_dir, *keeping, "--name", name)
        specs.append(_spec("actor", name, actor, num_threads=num_threads, devices=devices[1 + index]))
    for index, runner in enumerate(plan.cluster.relays):
        name = f"relay-{index}"
        # What stands before it runs it in a shell elsewhere, where nothing of this environment is known.
        there = _relay(plan, "--name", name).command_line
        specs.append(ProcessSpec("relay", name, (*shlex.split(runner), there), {}))
    if plan.cluster.tensorboard:
        port = str(plan.cluster.tensorboard_port)
        command = ("-m", "tensorboard.main", "--logdir", f"{run_dir}/tensorboard", "--port", port)
        specs.append(_spec("tensorboard", "tensorboard", command))
    return specs


def another_actor(plan: RunPlan) -> str:
    """What a person types to add an actor to the run; it names itself."""
    return _spec("actor", "", ("-m", "actors", str(plan.run_dir))).command_line


def another_relay(plan: RunPlan) -> str:
    """What a person types on another host to start a relay there, beside its actors."""
    return _relay(plan).command_line


def _relay(plan: RunPlan, *arguments: str) -> ProcessSpec:
    return _spec("relay", "", ("-m", "actors.relay", str(plan.run_dir), *arguments))


def _spec(role: str, name: str, arguments: Sequence[str], num_threads: int = 1, devices: str = "") -> ProcessSpec:
    """A Python process.

    Args:
        role: as in `ProcessSpec`, like `name`.
        name: of the process.
        arguments: for Python.
        num_threads: of its numerical libraries, which otherwise start one per core of the host when they are imported.
        devices: the CUDA devices it sees; empty: as the launcher does.
    """
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        THREADS_VARIABLE: str(num_threads),
    }
    if devices:
        environment[VISIBLE] = devices
    return ProcessSpec(role, name, (sys.executable, *arguments), environment)
