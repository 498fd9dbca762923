"""What every way of `benchmarks/peers.py` is given. Imports nothing heavy.

The folder and files are made once by the launcher: a base model, and the task's training problems in the order in which
all ways take them. Learning rates come as a list, one per update, so that no two schedules can differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SETTINGS = (
    "algorithm=grpo",
    "algorithm.normalize_std=true",
    "algorithm.aggregation=sequence_mean",
    "temperature=1.0",
    "max_new_tokens=64",
    "buffer.shuffle=false",
    "learner.evaluate_every=0",
    "learner.keep_checkpoints=1000",
    "actor.evaluation_prompts=1",
)
"""Of our run. Prompts come in the order of the file; the models are evaluated afterwards, those of all ways alike."""
MODELS = {
    "small": (
        "embedded.hidden_size=128",
        "embedded.intermediate_size=340",
        "embedded.num_layers=4",
        "embedded.num_heads=4",
        "pretraining.num_traces=38400",
        "pretraining.steps=1200",
    ),
    "tiny": (),
}
"""0.8 and 0.15 million parameters; the first takes some minutes of pretraining, once."""

OURS = {"slipstream": ("Slipstream", 1), "slipstream-2": ("Slipstream, two actors", 2)}
"""By way: label, actors."""


@dataclass(frozen=True)
class Scale:
    """How much every run does."""

    model: str = "small"
    """One of `MODELS`."""
    updates: int = 50
    groups_per_batch: int = 16
    samples_per_group: int = 8
    checkpoint_every: int = 10

    @property
    def batch(self) -> int:
        """Completions of one update."""
        return self.groups_per_batch * self.samples_per_group

    def overrides(self) -> list[str]:
        """On our launcher's command line."""
        return [
            *MODELS[self.model],
            *SETTINGS,
            f"total_steps={self.updates}",
            f"groups_per_batch={self.groups_per_batch}",
            f"samples_per_group={self.samples_per_group}",
            f"learner.checkpoint_every={self.checkpoint_every}",
        ]


@dataclass(frozen=True)
class Work:
    """One run of a peer."""

    mode: str
    """generate | batching | vllm: what samples."""
    model: str
    """Hugging Face folder to start from."""
    problems: str
    """JSON lines with `prompt` and `gold`, in the order to train on."""
    output: str
    """Folder for checkpoints: checkpoint-V/ holds version V."""
    num_threads: int
    seed: int
    groups_per_batch: int
    samples_per_group: int
    max_new_tokens: int
    max_tokens: int
    temperature: float
    checkpoint_every: int
    learning_rates: Sequence[float]
    """[updates]"""
    betas: Sequence[float]
    max_grad_norm: float
    clip: float
    """Of the ratio, on both sides."""
    rows_per_microbatch: int

    @classmethod
    def read(cls, path: Path) -> Work:
        """From the file that `write` made."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def rows(self) -> list[dict[str, str]]:
        """The problems."""
        return read_rows(Path(self.problems))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
