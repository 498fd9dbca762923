"""Which processes a run consists of: command lines, environment and cores. Starts nothing."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from buffer.machine import THREADS_VARIABLE
from launch.config.devices import VISIBLE, own_devices
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
    learner = _spec("learner", "learner", ranks, num_threads=plan.cores.learner_threads, devices=devices[0])
    specs.append(replace(learner, environment=learner.environment | heap_environment()))
    cores, num_threads = plan.cores.actors, plan.cores.actor_threads
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
