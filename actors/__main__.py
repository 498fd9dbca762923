"""Run one actor: `python -m actors RUN_DIR`. Actors may join and leave a run at any time."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.config import ActorConfig
from actors.rollouts.trajectories import PromptsTooLongError, check_prompts_fit
from actors.tasks.task import Task, TaskConfig, load_task
from actors.weights.client import WeightClient
from actors.weights.device_client import DeviceClient, rank_offset
from actors.weights.interface import VersionClient
from buffer.config import load_run_config, read_section
from buffer.curriculum_config import Stage
from buffer.process import REPLACED, exit_now, pause_gc, resume_gc
from buffer.transport.connection import Connection, RequestRefused, host_id
from buffer.transport.credentials import Credentials, client_credentials
from buffer.transport.roles import ACTOR
from buffer.transport.schema import check_name
from buffer.weights.config import WeightsConfig
from verifier.base import RewardSpec
from verifier.config import VerifierConfig

if TYPE_CHECKING:
    from verifier.scoring.pool import ScoringPool

logger = logging.getLogger("actors")


def main() -> int:
    """Generate for the run in RUN_DIR until SIGTERM or SIGINT. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m actors", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of the run; its config.yaml holds all other settings")
    # Unique over hosts, because an actor takes over the leases of another one with its name.
    name = f"actor-{socket.gethostname()}-{os.getpid()}"
    parser.add_argument("--name", default=name, help="name of this actor; takes over from an actor with the same name")
    parser.add_argument(
        "--cores", default="", help="cores for vLLM's engine, as in 0,1; OMP_NUM_THREADS sets its number of threads"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    try:
        check_name(arguments.name, "--name")
        cores = read_cores(arguments.cores)
        run = load_run_config(arguments.run_dir)
        config = read_section(ActorConfig, run["actor"], "actor")
        credentials = client_credentials(arguments.run_dir, ACTOR)
        settings = read_section(WeightsConfig, run["weights"], "weights")
        offset = 0
        if settings.transport == "nccl":
            offset = rank_offset(arguments.name, config.tensor_parallel_size, settings.group_size)
        task = load_task(read_section(TaskConfig, run["task"], "task"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from actors.engine.environment import prepare_environment

    prepare_environment(config)
    try:
        asyncio.run(_run(arguments.name, arguments.run_dir, run, config, credentials, task, settings, offset, cores))
    except asyncio.CancelledError:
        logger.info("stopped")
    except ExceptionGroup as failed:
        return exit_status(failed)
    except PromptsTooLongError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def exit_status(failed: ExceptionGroup[Exception]) -> int:
    """Print why the actor's tasks failed, and return the exit status.

    2: a restart would fail in the same way; `REPLACED`: a newer process works under the actor's name.
    """
    # What the buffer refuses once, it refuses again. A request that the buffer failed to handle is no fault of this
    # actor, so a restart may help.
    refused = failed.subgroup(lambda error: isinstance(error, RequestRefused) and not error.is_server_error)
    if refused is None:
        logger.error("the actor's tasks failed", exc_info=failed)
    # The launcher shows the log's last line, so the last line names the error.
    print(f"error: {failed.exceptions[0]!r}" if refused is None else f"error: {refused.exceptions[0]}", file=sys.stderr)
    if refused is None:
        return 1
    is_replaced = refused.subgroup(lambda error: isinstance(error, RequestRefused) and error.is_replaced) is not None
    return REPLACED if is_replaced else 2


def read_cores(listed: str) -> list[int]:
    """Read the core numbers in `listed`, such as 0,1. Empty: no cores.

    Raises:
        ValueError: an entry is not a number, or this process may not use the core.
    """
    here = sorted(os.sched_getaffinity(0))
    try:
        cores = [int(core) for core in listed.split(",")] if listed else []
    except ValueError:
        raise ValueError(f"--cores={listed} is no list of numbers; name cores as in --cores=0,1") from None
    foreign = sorted(set(cores) - set(here))
    if foreign:
        raise ValueError(f"--cores={listed}: this process may not use core {foreign[0]}, only {here}")
    return cores


async def _run(
    name: str,
    run_dir: Path,
    run: dict[str, Any],
    config: ActorConfig,
    credentials: Credentials,
    task: Task,
    settings: WeightsConfig,
    offset: int,
    cores: list[int],
) -> None:
    own_task = asyncio.current_task()
    assert own_task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, own_task.cancel)
    pause_gc()
    from transformers import AutoTokenizer

    from actors.actor import Actor
    from actors.engine.engine import Engine

    tokenizer = AutoTokenizer.from_pretrained(config.model_path)
    stages = [read_section(Stage, stage, "curriculum stage") for stage in run["curriculum"]]
    check_prompts_fit(
        task, tokenizer, max_tokens=config.max_tokens, max_new_tokens=config.max_new_tokens, stages=stages
    )
    # No time limit: the buffer answers a request for leases when it can grant one.
    buffer = Connection(run["buffer"]["address"], name, credentials, timeout_seconds=math.inf)
    learner = Connection(settings.address, name, credentials.for_weights())
    weights = _version_client(name, run_dir, config, credentials, settings, offset, learner)
    # Before the scoring pool: the engine thread imports vLLM while the scoring processes start.
    engine = Engine(config, settings.transport, settings.rendezvous_seconds, cores)
    # The environment of a multi-turn task gives the rewards, so the task needs no pool.
    pool = None if task.is_multi_turn else _scoring_pool(run)
    try:
        await engine.start()
        resume_gc()
        actor = Actor(
            name,
            config,
            task,
            tokenizer,
            engine,
            pool,
            buffer,
            weights,
            spool=run_dir / "actors" / name,
            max_staleness=run["buffer"]["max_staleness"],
        )
        logger.info("%s is ready", name)
        await actor.run()
    finally:
        buffer.close()
        weights.close()
        learner.close()
        if pool is not None:
            pool.close()
        engine.close()


def _scoring_pool(run: dict[str, Any]) -> ScoringPool:
    from verifier.scoring.pool import ScoringPool

    verifier = read_section(VerifierConfig, run["verifier"], "verifier")
    return ScoringPool(
        [RewardSpec(**spec) for spec in run["reward"]],
        num_workers=verifier.num_workers,
        deadline_seconds=verifier.deadline_seconds,
        memory_bytes=verifier.memory_bytes,
        on_timeout=verifier.on_timeout,
        on_error=verifier.on_error,
        max_retries=verifier.max_retries,
    )


def _version_client(
    name: str,
    run_dir: Path,
    config: ActorConfig,
    credentials: Credentials,
    settings: WeightsConfig,
    offset: int,
    learner: Connection,
) -> VersionClient:
    """Make the client for `weights.transport`."""
    if settings.transport != "file":
        return DeviceClient(learner, host_id=host_id(), published=run_dir / "weights", rank_offset=offset)
    from actors.weights.adapters import Merger

    return WeightClient(
        learner,
        host_id=host_id() if config.share_files else "",
        published=run_dir / "weights",
        chunk_bytes=config.chunk_bytes,
        deltas=settings.deltas,
        relays=run_dir / "relays",
        connect=lambda address: Connection(address, name, credentials.for_weights()),
        whole=Merger(Path(config.model_path), config.dtype).whole,
    )


if __name__ == "__main__":
    exit_now(main())
