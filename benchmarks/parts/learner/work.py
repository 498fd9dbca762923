"""The work of `benchmarks/learner.py`: the model and batch that all ways share, and the protocol of a way's process.

A way is a process of its own. It prints a marked line of JSON when it is ready. Then it makes one optimizer step for
every line on its standard input and prints {"seconds", "cpu_seconds", "peak_mb"} after it. `peak_mb` is the peak memory
of its steps so far, less the memory before the first step. The first step saves its gradient to a file, so that the
benchmark can check that all ways compute the same one.
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
    """One model and one batch."""

    folder: str
    """Folder of the Hugging Face model; gradients are saved there too."""
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
    """Largest number of tokens in a microbatch, for the ways that pack."""
    rows_per_microbatch: int
    """Sequences in a microbatch, for the ways that pad."""

    @property
    def num_groups(self) -> int:
        """Number of groups; each has one prompt."""
        return self.num_sequences // GROUP_SIZE

    @classmethod
    def read(cls, path: Path) -> Work:
        """Reads the JSON file that the benchmark wrote."""
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Sequences:
    """The batch as arrays; the sequences 8 i to 8 i + 7 are a group and share a prompt."""

    token_ids: list[np.ndarray]
    prompt_lengths: list[int]
    rewards: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Number of tokens, prompts included."""
        return sum(map(len, self.token_ids))

    @property
    def advantages(self) -> np.ndarray:
        """[num_sequences] reward minus the mean of its group, divided by the group's standard deviation."""
        groups = self.rewards.reshape(-1, GROUP_SIZE)
        centered = groups - groups.mean(1, keepdims=True)
        return (centered / (groups.std(1, ddof=1, keepdims=True) + 1e-6)).reshape(-1)


def sequences(work: Work) -> Sequences:
    """The batch: random tokens and rewards, the same in every process."""
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
    """Save a model with random weights in `work.folder`."""
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
    """Floating-point operations of a forward pass over the batch without padding: (linear layers, attention)."""
    layer = 4 * work.hidden_size**2 + 3 * work.hidden_size * work.intermediate_size
    scored = sum(len(ids) - prompt for ids, prompt in zip(data.token_ids, data.prompt_lengths, strict=True))
    linear = 2 * data.num_tokens * work.num_layers * layer + 2 * scored * work.hidden_size * work.vocabulary
    # Products of queries with keys, and of weights with values; with the causal mask half of each.
    pairs = sum(len(ids) * (len(ids) + 1) / 2 for ids in data.token_ids)
    return linear, 4 * work.num_layers * work.hidden_size * pairs


def save_gradient(work: Work, name: str, gradients: list[tuple[str, Any]]) -> None:
    """Save the gradient of the first step as {parameter name: tensor}."""
    import torch

    torch.save({key: value.detach().clone() for key, value in gradients}, Path(work.folder, f"gradient-{name}.pt"))


class Turns:
    """The way's side of the protocol. Keyword arguments go into the line that says it is ready."""

    def __init__(self, **about: Any) -> None:
        self._memory_before = 0.0
        self._began = self._cpu_began = 0.0
        self.number = 0
        say(**about)

    def wait(self) -> bool:
        """Waits for: the benchmark to ask for a step. Returns False when there are no more steps."""
        if not sys.stdin.readline():
            return False
        if not self.number:
            # Reset the peak, because loading the model may have taken more memory than a step does.
            Path("/proc/self/clear_refs").write_text("5")
            self._memory_before = memory("VmRSS")
        self.number += 1
        self._began, self._cpu_began = time.perf_counter(), time.process_time()
        return True

    def done(self) -> None:
        """Report the step that was asked for last."""
        seconds, cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._cpu_began
        say(seconds=seconds, cpu_seconds=cpu_seconds, peak_mb=memory("VmHWM") - self._memory_before)


def memory(field: str) -> float:
    """A memory figure of this process from /proc/self/status, such as VmRSS or VmHWM, in megabytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6
