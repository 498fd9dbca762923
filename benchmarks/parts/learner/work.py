"""The work of `benchmarks/learner.py`: one model and one batch, the same for every way, and how a way takes its turns.

A way is a process of its own. It prints a marked line of JSON when ready, then makes one optimizer step for every line
on its standard input and prints {"seconds", "cpu_seconds", "peak_mb"} for it; `peak_mb` is what its steps so far took
beyond what the process held before the first. The first gradient goes to a file: all ways must compute the same.
"""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.parts.marked_lines import say

LEARNING_RATE = 1e-6
GROUP_SIZE = 8


@dataclass(frozen=True)
class Work:
    """One batch and one model."""

    folder: str
    """Of the Hugging Face model; gradients go there too."""
    vocabulary: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    shortest: int
    longest: int
    """Tokens of a sequence, prompt included; lengths are uniform between the two."""
    num_sequences: int
    num_threads: int
    tokens_per_microbatch: int
    """Of the ways that pack; the others take as many sequences as `rows_per_microbatch` says."""
    rows_per_microbatch: int

    @property
    def num_groups(self) -> int:
        """Prompts."""
        return self.num_sequences // GROUP_SIZE

    @classmethod
    def read(cls, path: Path) -> Work:
        """What the benchmark wrote."""
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Sequences:
    """The batch as arrays; the sequences 8 i to 8 i + 7 share a prompt."""

    token_ids: list[np.ndarray]
    prompt_lengths: list[int]
    rewards: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Prompts included."""
        return sum(map(len, self.token_ids))

    @property
    def advantages(self) -> np.ndarray:
        """[num_sequences]: reward less the group's mean, over its standard deviation."""
        groups = self.rewards.reshape(-1, GROUP_SIZE)
        centered = groups - groups.mean(1, keepdims=True)
        return (centered / (groups.std(1, ddof=1, keepdims=True) + 1e-6)).reshape(-1)


def sequences(work: Work) -> Sequences:
    rng = np.random.default_rng(0)
    tokens, prompts = [], []
    for _ in range(work.num_groups):
        prompt = rng.integers(3, work.vocabulary, int(rng.integers(work.shortest // 4, work.shortest // 2 + 1)))
        for _ in range(GROUP_SIZE):
            length = int(rng.integers(work.shortest, work.longest + 1))
            tokens.append(np.concatenate([prompt, rng.integers(3, work.vocabulary, length - len(prompt))]))
            prompts.append(len(prompt))
    rewards = rng.normal(size=work.num_sequences)
    return Sequences(tokens, prompts, rewards)


def save_model(work: Work) -> None:
    """Random weights in `work.folder`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden_size,
        intermediate_size=work.intermediate_size,
        num_hidden_layers=work.num_layers,
        num_attention_heads=work.num_heads,
        num_key_value_heads=work.num_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(work.folder)


def forward_flops(work: Work, data: Sequences) -> tuple[float, float]:
    """Operations of one forward pass over the batch without padding: (of the linear layers, of attention)."""
    layer = 4 * work.hidden_size**2 + 3 * work.hidden_size * work.intermediate_size
    scored = sum(len(ids) - prompt for ids, prompt in zip(data.token_ids, data.prompt_lengths, strict=True))
    linear = 2 * data.num_tokens * work.num_layers * layer + 2 * scored * work.hidden_size * work.vocabulary
    # Scores and their product with the values, the causal half of both.
    pairs = sum(len(ids) * (len(ids) + 1) / 2 for ids in data.token_ids)
    return linear, 4 * work.num_layers * work.hidden_size * pairs


def save_gradient(work: Work, name: str, gradients: list[tuple[str, Any]]) -> None:
    """The gradient of the first step: {name: tensor}."""
    import torch

    torch.save({key: value.detach().clone() for key, value in gradients}, Path(work.folder, f"gradient-{name}.pt"))


class Turns:
    """The way's side of the protocol."""

    def __init__(self, **about: Any) -> None:
        self._held = 0.0
        self._began = self._worked = 0.0
        self.number = 0
        say(**about)

    def wait(self) -> bool:
        """Until it is this way's turn; False when there is none any more."""
        if not sys.stdin.readline():
            return False
        if not self.number:
            # The peak so far is forgotten: loading a model may have taken more than a step.
            Path("/proc/self/clear_refs").write_text("5")
            self._held = memory("VmRSS")
        self.number += 1
        self._began, self._worked = time.perf_counter(), time.process_time()
        return True

    def done(self) -> None:
        """The step of this turn is made."""
        seconds, worked = time.perf_counter() - self._began, time.process_time() - self._worked
        say(seconds=seconds, cpu_seconds=worked, peak_mb=memory("VmHWM") - self._held)


def memory(field: str) -> float:
    """Megabytes of this process, by Linux's name of them."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6
