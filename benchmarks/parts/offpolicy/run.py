"""One run of `offpolicy.py`: the real learner and the real actor's parts in one process, strictly in turn.

The trainer asks its buffer for the batch of version v; the stand-in for the buffer answers by loading version
max(0, v - staleness) into vLLM and sampling the batch there and then. So staleness is exact and a run repeats itself.
Everything else is the system's own: configuration, prompts and their order, engine, loading of weights, verifier,
trajectories, trainer, DeepSpeed, weight store.
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
"""What is kept of a run's event files, one value per version."""


@dataclass(frozen=True)
class Study:
    """What all runs share: the engine and the scale."""

    generator: Generator
    scale: Scale

    @classmethod
    def start(cls, scale: Scale) -> Study:
        """Load the engine; the base model is made where it is not in the cache."""
        _be_quiet()
        torch.set_num_threads(1)
        # The engine first: the learner's process group leaves variables that vLLM would take for its own.
        study = cls(Generator(_plan(Cell("ppo", "none", 0, 0), scale)), scale)
        init_distributed(torch.device("cpu"))
        return study

    def close(self) -> None:
        """End the engine and the verifier, and leave the process group."""
        self.generator.close()
        shut_down_distributed()

    def run(self, cell: Cell) -> dict[str, Any]:
        """One run from the base model to its last version. Returns its line of the results."""
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
        """To the last version. Returns why the learner would not go on; nothing where it did."""
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
    """(version, pass@1); a run that stopped stays where it was."""
    found = {report.policy_version: report.pass_at_1 for report in reports}
    for version in range(0, scale.updates + 1, scale.evaluate_every):
        found.setdefault(version, list(found.values())[-1])
    return sorted(found.items())


def _curves(directory: Path) -> dict[str, list[float]]:
    """By short name, one value per version from 1 on; a policy that was not stepped has fewer."""
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
