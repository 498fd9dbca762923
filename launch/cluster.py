"""`python launch/cluster.py [key=value ...]`: start a run, watch it, end it.

Exit status: 0 when the run reached its last step, 130 after Ctrl-C, 143 after SIGTERM, 2 for a mistake in what was
asked for, 1 when a process failed for good.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import OmegaConf
from rich.console import Console

from buffer.client import Connection
from buffer.wire import Status, StatusRequest
from launch.base_model import prepare_base_model
from launch.compose import compose_config, without_hydra
from launch.config import KNOWN, RunPlan, plan_run, write_config
from launch.display import Display
from launch.summary import print_summary, summarize_run, write_summary
from launch.supervisor import RunFailedError, Supervisor
from launch.topology import assign_cores, processes

POLL_SECONDS = 0.25


class Interrupted(Exception):
    """Ctrl-C or SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def main(arguments: list[str]) -> int:
    """Run what the overrides describe. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value; resume=RUN_DIR continues a run")
    parser.add_argument("--cfg", choices=["job"], help="print the composed configuration and end")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.cfg:
            print(OmegaConf.to_yaml(without_hydra(compose_config(options.overrides, KNOWN))), end="")
            return 0
        plan = plan_run(options.overrides)
    except ValueError as error:
        Console(stderr=True).print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        return _run(plan, console)
    except Interrupted as interruption:
        console.print(
            f"stopped by {interruption}; continue with: python launch/cluster.py resume={plan.run_dir}",
            soft_wrap=True,
            markup=False,
        )
        return 128 + interruption.number


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A second signal while everything is being ended must not break that off.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted(number)


def _run(plan: RunPlan, console: Console) -> int:
    started = time.monotonic()
    total_steps = plan.sections["learner"]["total_steps"]
    console.print(f"run directory: {plan.run_dir}", soft_wrap=True, markup=False)
    with Display(console, total_steps) as display:
        try:
            if plan.embedded is not None:
                base = prepare_base_model(plan, plan.embedded, display.pretraining)
                plan.sections["model"]["path"] = plan.sections["actor"]["model_path"] = str(base)
            assign_cores(plan)
            write_config(plan)
            (plan.run_dir / "logs").mkdir(exist_ok=True)
            handler = logging.FileHandler(plan.run_dir / "logs" / "launcher.log")
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=[handler])
            status = _supervise(plan, display)
        except (RunFailedError, ValueError) as error:
            Console(stderr=True).print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
            return 1
    summary = summarize_run(plan.run_dir, status, time.monotonic() - started)
    write_summary(summary, plan.run_dir)
    checkpoints = sorted(path for path in (plan.run_dir / "checkpoints").glob("*") if path.name.isdigit())
    print_summary(summary, plan.run_dir, checkpoints[-1] if checkpoints else None, console)
    return 0


def _supervise(plan: RunPlan, display: Display) -> Status:
    """Until the learner ends well. Returns the buffer's last words."""
    started = time.monotonic()
    supervisor = Supervisor(processes(plan), plan.run_dir / "logs", plan.cluster.max_restarts)
    observer = Connection(plan.sections["buffer"]["address"], "launcher")
    try:
        supervisor.start()
        pending = observer.request(StatusRequest())
        while not supervisor.poll():
            if pending.done():
                status = pending.result()
                if isinstance(status, Status) and status.peers:
                    display.status(status)
                else:
                    display.starting(time.monotonic() - started)
                pending = observer.request(StatusRequest())
            time.sleep(POLL_SECONDS)
        status = observer.call(StatusRequest(), timeout_seconds=30.0)
        assert isinstance(status, Status)
        return status
    finally:
        observer.close()
        supervisor.stop(plan.cluster.grace_seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
