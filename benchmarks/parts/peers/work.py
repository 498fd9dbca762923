"""The settings of every way of `benchmarks/peers.py`. Imports nothing heavy.

`benchmarks/peers.py` makes the base model and the file of training problems once; all ways take the problems in the
order of the file. Learning rates are a list with one value per update, so that the schedules cannot differ.
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
"""Settings of our run: prompts in the order of the file, no evaluation during the run, all checkpoints kept."""
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
"""Settings by model: small has 0.8 and tiny 0.15 million parameters. Small is pretrained once, for some minutes."""

OURS = {"slipstream": ("Slipstream", 1), "slipstream-2": ("Slipstream, two actors", 2)}
"""(label, number of actors) by way."""


@dataclass(frozen=True)
class Scale:
    """The size of every run."""

    model: str = "small"
    """One of `MODELS`."""
    updates: int = 50
    groups_per_batch: int = 16
    samples_per_group: int = 8
    checkpoint_every: int = 10

    @property
    def batch(self) -> int:
        """Completions per update."""
        return self.groups_per_batch * self.samples_per_group

    def overrides(self) -> list[str]:
        """Overrides for our launcher's command line."""
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
    """The settings of one run of TRL."""

    mode: str
    """How TRL samples: generate (transformers), batching (transformers' continuous batching) or vllm."""
    model: str
    """Folder of the Hugging Face base model."""
    problems: str
    """File of JSON lines with `prompt` and `gold`, in the order of training."""
    output: str
    """Folder for checkpoints; checkpoint-V/ holds version V."""
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
    """Bound of the ratio on both sides: 1 - clip to 1 + clip."""
    rows_per_microbatch: int

    @classmethod
    def read(cls, path: Path) -> Work:
        """Reads the file that `write` made."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Writes the settings as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def rows(self) -> list[dict[str, str]]:
        """The problems."""
        return read_rows(Path(self.problems))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
