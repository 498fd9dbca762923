"""`python launch/cluster.py [key=value ...]`: start a run, watch it, end it.

Exit status: 0 after the last step, or after SIGTERM (the run can then be continued); 130 after Ctrl-C; 2 if the
overrides contain a mistake; 1 if the run failed.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# NumPy would start a thread per core of the host, which the launcher does not need.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from launch.install import missing_packages_message

# Without these packages the imports below would end with a traceback.
if message := missing_packages_message():
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

from omegaconf import OmegaConf
from rich.console import Console

from buffer.transport.messages import Status
from buffer.weights.config import MEMORY_VARIABLE
from launch.base_model import prepare_base_model
from launch.config.compose import compose_config, with_files, without_hydra
from launch.config.plan import RunPlan, claim_default_run_dir, plan_run, write_config
from launch.config.sections import KNOWN
from launch.preview import notices, print_preview
from launch.processes.guardian import Guardian
from launch.processes.shared_memory import shared_memory_shortage
from launch.processes.supervisor import RunFailedError
from launch.processes.topology import actor_join_command, relay_join_command
from launch.session import Session
from launch.terminal.display import Display
from launch.terminal.summary import print_summary, summarize_run, write_summary
from learner.checkpoints.manifest import newest_checkpoint


class Signals:
    """SIGINT and SIGTERM of this process: the first raises `Interrupted`, and one that comes later ends all at once."""

    def __init__(self) -> None:
        self._is_ending = self._comes_later = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._is_ending:
            # An exception would interrupt the shutdown; who waits in it asks `end_at_once`.
            self._comes_later = True
        else:
            self._is_ending = True
            raise Interrupted(number)

    def begin_to_end(self) -> None:
        """Raise nothing from now on, because the run is ending for another reason."""
        self._is_ending = True

    def end_at_once(self) -> bool:
        """Whether nothing is to be waited for any more."""
        return self._comes_later


class Interrupted(Exception):
    """Ctrl-C or SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def main(arguments: list[str]) -> int:
    """Start or continue the run that the overrides describe. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides",
        nargs="*",
        help="key=value; config=FILE.yaml reads them from a file; resume=RUN_DIR continues a run",
    )
    parser.add_argument("--cfg", choices=["job"], help="print the composed configuration and exit")
    parser.add_argument("--check", action="store_true", help="check everything, print what would run and exit")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.cfg:
            print(OmegaConf.to_yaml(without_hydra(compose_config(with_files(options.overrides), KNOWN))), end="")
            return 0
        plan = plan_run(options.overrides)
        if options.check:
            print_preview(plan, console)
            return 0
        plan = claim_default_run_dir(plan)
    except ValueError as error:
        Console(stderr=True).print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
        return 2
    signals = Signals()
    try:
        return _run(plan, console, signals)
    except Interrupted as interruption:
        console.print(f"stopped by {interruption}; {_how_to_go_on(plan)}", soft_wrap=True, markup=False)
        # SIGTERM asks for exactly this end, so it is a success.
        return 0 if interruption.number == signal.SIGTERM else 128 + interruption.number


def _how_to_go_on(plan: RunPlan) -> str:
    if not (plan.run_dir / "config.yaml").is_file():
        return "nothing was trained yet, start it again with the same command"
    checkpoint = newest_checkpoint(plan.run_dir / "checkpoints")
    where = f"at checkpoint {int(checkpoint.name)}" if checkpoint else "before the first checkpoint"
    command = "slipstream train" if Path(sys.argv[0]).name == "slipstream" else "python launch/cluster.py"
    return f"{where}, continue with: {command} resume={plan.run_dir}"


def _run(plan: RunPlan, console: Console, signals: Signals) -> int:
    started = time.monotonic()
    console.print(f"run directory: {plan.run_dir}", soft_wrap=True, markup=False)
    guardian = Guardian(plan.cluster.longest_grace_seconds, Path(plan.cluster.cache_dir).expanduser() / "compiled")
    # All processes started below inherit the run's mark and its temporary folder.
    os.environ.update(guardian.environment)
    try:
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        status = _train(plan, console, guardian.run_mark, signals)
        summary = summarize_run(plan.run_dir, status, time.monotonic() - started)
        write_summary(summary, plan.run_dir)
    # OSError: any write can fail because the disk is full or the run directory is gone.
    except (RunFailedError, ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
        return 1
    finally:
        signals.begin_to_end()
        guardian.close()
    print_summary(summary, plan.run_dir, newest_checkpoint(plan.run_dir / "checkpoints"), console)
    return 0


def _train(plan: RunPlan, console: Console, run_mark: str, signals: Signals) -> Status:
    """Run all processes until the learner has made its last step. Returns the final status of the buffer."""
    with Display(console, plan.sections["learner"]["total_steps"]) as display:
        for notice in notices(plan):
            console.print(notice, style="yellow", soft_wrap=True, markup=False, highlight=False)
        if plan.embedded is not None:
            prepare_base_model(plan, plan.embedded, display.pretraining)
        if shortage := shared_memory_shortage(plan):
            os.environ[MEMORY_VARIABLE] = ""
            console.print(shortage, style="yellow", soft_wrap=True, markup=False, highlight=False)
        write_config(plan)
        (plan.run_dir / "logs").mkdir(exist_ok=True)
        handler = logging.FileHandler(plan.run_dir / "logs" / "launcher.log")
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=[handler])
        # If the disk is full, logging fails silently: the run goes on, and the terminal shows no tracebacks.
        logging.raiseExceptions = False
        joining = [f"another actor joins with: {actor_join_command(plan)}"]
        if plan.cluster.reaches_other_hosts:
            joining.append(f"a relay for the actors of another host joins with: {relay_join_command(plan)}")
        for line in joining:
            console.print(line, style="dim", soft_wrap=True, markup=False, highlight=False)
            logging.getLogger(__name__).info("%s", line)
        session = Session(plan, display, run_mark)
        try:
            return session.run()
        finally:
            signals.begin_to_end()
            session.close(signals.end_at_once)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
