"""The processes of a run: command line, environment and cores of each. Starts nothing."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from buffer.machine import THREADS_VARIABLE
from launch.config.devices import VISIBLE, assign_devices
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
        """The shell command that starts this process alone, from any folder."""
        return shlex.join(["env", *(f"{name}={value}" for name, value in self.environment.items()), *self.command])


def processes(plan: RunPlan) -> list[ProcessSpec]:
    """The run's processes in starting order."""
    run_dir, num_actors = str(plan.run_dir), plan.cluster.num_actors
    specs = [_spec("buffer", "buffer", ("-m", "buffer", "serve", run_dir))]
    num_ranks = plan.sections["learner"]["num_ranks"]
    devices = [""] * (1 + num_actors)
    if plan.cluster.separate_devices:
        devices = assign_devices(num_ranks, num_actors, plan.sections["actor"]["tensor_parallel_size"])
    # `learner.distributed.ranks` runs torchrun and keeps a rank's exit status, which torchrun alone would hide.
    ranks = (
        ("-m", "learner.distributed.ranks", str(num_ranks), run_dir) if num_ranks > 1 else ("-m", "learner", run_dir)
    )
    learner = _spec("learner", "learner", ranks, num_threads=plan.cores.learner_threads, devices=devices[0])
    specs.append(replace(learner, environment=learner.environment | heap_environment()))
    cores, num_threads = plan.cores.actors, plan.cores.actor_threads
    pinning = ("--cores", ",".join(map(str, cores))) if cores else ()
    for index in range(num_actors):
        name = f"actor-{index}"
        actor = ("-m", "actors", run_dir, *pinning, "--name", name)
        specs.append(_spec("actor", name, actor, num_threads=num_threads, devices=devices[1 + index]))
    for index, runner in enumerate(plan.cluster.relays):
        name = f"relay-{index}"
        # The runner, such as ssh, executes the relay's command in a shell that does not have this environment.
        relay_command = _relay(plan, "--name", name).command_line
        specs.append(ProcessSpec("relay", name, (*shlex.split(runner), relay_command), {}))
    if plan.cluster.tensorboard:
        port = str(plan.cluster.tensorboard_port)
        command = ("-m", "tensorboard.main", "--logdir", f"{run_dir}/tensorboard", "--port", port)
        specs.append(_spec("tensorboard", "tensorboard", command))
    return specs


def actor_join_command(plan: RunPlan) -> str:
    """The command that adds an actor to the run. The actor chooses its name itself."""
    return _spec("actor", "", ("-m", "actors", str(plan.run_dir))).command_line


def relay_join_command(plan: RunPlan) -> str:
    """The command that starts a relay on another host, for the actors of that host."""
    return _relay(plan).command_line


def _relay(plan: RunPlan, *arguments: str) -> ProcessSpec:
    return _spec("relay", "", ("-m", "actors.relay", str(plan.run_dir), *arguments))


def _spec(role: str, name: str, arguments: Sequence[str], num_threads: int = 1, devices: str = "") -> ProcessSpec:
    """A Python process.

    Args:
        role: as in `ProcessSpec`.
        name: of the process.
        arguments: for Python.
        num_threads: threads of the numerical libraries, whose default is one per core of the host.
        devices: visible CUDA devices; empty: those that the launcher sees.
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
