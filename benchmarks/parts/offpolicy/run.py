"""One run of `benchmarks/offpolicy.py`: the real learner and the real parts of an actor take turns in one process.

The trainer asks for the batch of version v. A stand-in for the buffer answers: it loads version max(0, v - staleness)
into vLLM and samples the batch at once. So staleness is exact and runs are reproducible. Everything else belongs to the
system: configuration, prompts and their order, engine, loading of weights, verifier, trajectories, trainer, DeepSpeed,
weight store.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from transformers.utils.logging import disable_progress_bar

from benchmarks.parts.offpolicy.actor import Generator
from benchmarks.parts.offpolicy.cells import Cell, Scale
from benchmarks.parts.offpolicy.turn import History, InTurn
from buffer.config import read_section
from buffer.transport.connection import Connection
from buffer.transport.messages import EvaluationReport
from launch.base_model import prepare_base_model
from launch.config.plan import RunPlan, plan_run
from learner.config import LearnerConfig, ModelConfig
from learner.distributed.deepspeed_engine import init_distributed, shut_down_distributed
from learner.monitoring.stop_conditions import RunStoppedError
from learner.train import Trainer

CURVES = {
    "ess": "importance/effective_sample_size",
    "kl_k1": "importance/behavior_kl_k1",
    "kl_k3": "importance/behavior_kl_k3",
    "weight_std": "importance/weight_std",
    "fraction_masked": "importance/fraction_masked",
    "fraction_capped": "importance/fraction_capped",
    "clipped_low": "policy/fraction_clipped_low",
    "clipped_high": "policy/fraction_clipped_high",
    "gradient_norm": "policy/gradient_norm",
    "entropy": "policy/entropy",
    "correct": "reward/fraction_correct",
}
"""The metrics that are kept from a run's event files, by the short name in the results; one value per version."""


@dataclass(frozen=True)
class Study:
    """The engine and the size that all runs share."""

    generator: Generator
    scale: Scale

    @classmethod
    def start(cls, scale: Scale) -> Study:
        """Load the engine. The base model is trained first if it is not in the cache."""
        _be_quiet()
        torch.set_num_threads(1)
        # The engine comes first: the learner's process group sets environment variables that vLLM would use.
        study = cls(Generator(_plan(Cell("ppo", "none", 0, 0), scale)), scale)
        init_distributed(torch.device("cpu"))
        return study

    def close(self) -> None:
        """End the engine and the verifier, and leave the process group."""
        self.generator.close()
        shut_down_distributed()

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train from the base model to the last version. Returns the line of the results."""
        started = time.monotonic()
        plan = _plan(cell, self.scale)
        with tempfile.TemporaryDirectory(prefix="offpolicy-") as name:
            directory = Path(name)
            store = History(directory / "weights", f"ipc://{name}/socket", self.scale.updates)
            buffer = InTurn(self.generator, store.manifest, cell.staleness, int(plan.sections["groups_per_batch"]))
            store.on_publication = buffer.go_on
            self.generator.begin(cell.seed)
            try:
                stopped = self._train(plan, directory, buffer, store)
            finally:
                store.close()
            curves = _curves(directory / "tensorboard")
        return {
            **cell.line(),
            **self.scale.line(),
            "stopped": stopped,
            "seconds": round(time.monotonic() - started, 1),
            "pass_at_1": _evaluations(buffer.reports, self.scale),
            "curves": curves,
        }

    def _train(self, plan: RunPlan, directory: Path, buffer: InTurn, store: History) -> str:
        """Train to the last version. Returns the reason if a stop condition ended the run, or else an empty text."""
        config = read_section(LearnerConfig, plan.sections["learner"], "learner")
        torch.manual_seed(config.seed)
        trainer = Trainer(
            config,
            read_section(ModelConfig, plan.sections["model"], "model"),
            instantiate(dict(plan.sections["algorithm"])),
            run_dir=directory,
            buffer=cast(Connection, buffer),
            store=store,
            device=torch.device("cpu"),
            stopping=threading.Event(),
        )
        try:
            trainer.run()
        except RunStoppedError as error:
            return str(error)
        return ""


def _plan(cell: Cell, scale: Scale) -> RunPlan:
    overrides = [*cell.overrides(), *scale.overrides(), f"run_dir={tempfile.gettempdir()}/offpolicy"]
    default = plan_run(overrides).sections["learner"]
    for name in ("optimizer", "critic_optimizer"):
        overrides.append(f"learner.{name}.learning_rate={scale.rate * default[name]['learning_rate']}")
    plan = plan_run(overrides)
    assert plan.embedded is not None
    prepare_base_model(plan, plan.embedded, lambda *_: None)
    return plan


def _evaluations(reports: Sequence[EvaluationReport], scale: Scale) -> list[tuple[int, float]]:
    """Returns (version, pass@1) pairs; a run that stopped early keeps its last value for the versions it lacks."""
    found = {report.policy_version: report.pass_at_1 for report in reports}
    for version in range(0, scale.updates + 1, scale.evaluate_every):
        found.setdefault(version, list(found.values())[-1])
    return sorted(found.items())


def _curves(directory: Path) -> dict[str, list[float]]:
    """Reads CURVES from the event files: by short name one value per version from 1 on, or fewer in a stopped run."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    written = set(events.Tags()["scalars"])
    return {
        name: [float(f"{event.value:.5g}") for event in events.Scalars(tag)]
        for name, tag in CURVES.items()
        if tag in written
    }


def _be_quiet() -> None:
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("DeepSpeed", "deepspeed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
