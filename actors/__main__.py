"""`python -m actors RUN_DIR --name actor-0`: one actor of a run. May be started and stopped at any time."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.config import ActorConfig
from actors.rollouts.trajectories import PromptsTooLongError, check_prompts_fit
from actors.tasks.task import Task, TaskConfig, load_task
from actors.weights.client import WeightClient
from actors.weights.device_client import DeviceClient, rank_offset
from actors.weights.interface import VersionClient
from buffer import starting
from buffer.config import load_run_config, read_section
from buffer.curriculum_config import Stage
from buffer.leaving import leave
from buffer.transport.connection import Connection, host_id
from buffer.transport.credentials import Credentials, client_credentials
from buffer.transport.schema import check_name
from buffer.weights.config import WeightsConfig
from verifier.base import RewardSpec
from verifier.config import VerifierConfig

logger = logging.getLogger("actors")


def main() -> int:
    """Generate for the run in RUN_DIR until told to stop. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m actors", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's folder; its config.yaml says the rest")
    # A name in use would take the other's leases away; this one is unique over hosts.
    name = f"actor-{socket.gethostname()}-{os.getpid()}"
    parser.add_argument("--name", default=name, help="unique among the run's actors; a name in use is taken over")
    parser.add_argument("--cores", default="", help="the engine keeps to them, as in 0,1; its threads: OMP_NUM_THREADS")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    try:
        check_name(arguments.name, "--name")
        cores = read_cores(arguments.cores)
        run = load_run_config(arguments.run_dir)
        config = read_section(ActorConfig, run["actor"], "actor")
        credentials = client_credentials(arguments.run_dir)
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
        logger.exception("the actor's tasks failed")
        # The log's last line is what the launcher shows; of a group's traceback it would be an ornament.
        print(f"error: {failed.exceptions[0]!r}", file=sys.stderr)
        return 1
    except PromptsTooLongError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_cores(listed: str) -> list[int]:
    """The cores that `listed` names, as in 0,1.

    Raises:
        ValueError: what is not a number, or a core that this process may not use.
    """
    here = sorted(os.sched_getaffinity(0))
    try:
        cores = [int(core) for core in listed.split(",")] if listed else []
    except ValueError:
        raise ValueError(f"--cores={listed} is no list of numbers; name cores as in --cores=0,1") from None
    foreign = sorted(set(cores) - set(here))
    if foreign:
        raise ValueError(f"--cores={listed}: core {foreign[0]} is not there; those that may be used are {here}")
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
    starting.begin()
    from transformers import AutoTokenizer

    from actors.actor import Actor
    from actors.engine.engine import Engine
    from actors.weights.adapters import Merger
    from verifier.scoring.pool import ScoringPool

    verifier = read_section(VerifierConfig, run["verifier"], "verifier")
    tokenizer = AutoTokenizer.from_pretrained(config.model_path)
    limits = {"max_tokens": config.max_tokens, "max_new_tokens": config.max_new_tokens}
    stages = [read_section(Stage, stage, "curriculum stage") for stage in run["curriculum"]]
    check_prompts_fit(task, tokenizer, **limits, stages=stages)
    # First, so that it imports vLLM while the scoring processes start.
    engine = Engine(config, settings.transport, settings.meeting_seconds, cores)
    # The environment of a multi-turn task keeps its rewards itself.
    pool = (
        None if task.is_multi_turn else ScoringPool([RewardSpec(**spec) for spec in run["reward"]], **asdict(verifier))
    )
    # The connection resends until it is answered; a lease may be long in coming.
    buffer = Connection(run["buffer"]["address"], name, credentials, timeout_seconds=math.inf)
    learner = Connection(settings.address, name, credentials)
    weights: VersionClient
    if settings.transport == "file":
        weights = WeightClient(
            learner,
            host_id=host_id() if config.share_files else "",
            published=run_dir / "weights",
            chunk_bytes=config.chunk_bytes,
            deltas=settings.deltas,
            relays=run_dir / "relays",
            connect=lambda address: Connection(address, name, credentials),
            whole=Merger(Path(config.model_path), config.dtype).whole,
        )
    else:
        weights = DeviceClient(learner, host_id=host_id(), published=run_dir / "weights", rank_offset=offset)
    spool = run_dir / "actors" / name
    try:
        checksums = await engine.start()
        starting.done()
        actor = Actor(
            name,
            config,
            task,
            tokenizer,
            engine,
            pool,
            buffer,
            weights,
            spool,
            max_staleness=run["buffer"]["max_staleness"],
        )
        logger.info("%s is ready", name)
        await actor.run(checksums)
    finally:
        buffer.close()
        weights.close()
        learner.close()
        if pool is not None:
            pool.close()
        engine.close()


if __name__ == "__main__":
    leave(main())
