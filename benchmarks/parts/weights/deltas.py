"""Measures the size of deltas between versions after real training steps of a small model."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from buffer.weights.delta import apply, encode

WARM_UP_STEPS = 8
VERSIONS_BEHIND = (1, 2)
BATCH, LENGTH, VOCABULARY = 8, 32, 4096


def measure_deltas(quick: bool) -> list[dict[str, Any]]:
    """Returns one row per dtype, learning rate and number of versions behind.

    A row has the share of the numbers that changed, how many times fewer bytes the delta has than the whole version,
    and the speed of encoding and applying it in GB/s.
    """
    rates = (1e-6, 1e-3) if quick else (1e-6, 1e-5, 1e-3)
    rows = []
    for rate in rates:
        versions = train(rate, hidden=64 if quick else 512)
        for dtype, number_bytes in (("bfloat16", 2), ("float32", 4)):
            published = [
                torch.cat([tensor.reshape(-1) for tensor in version]).to(getattr(torch, dtype)) for version in versions
            ]
            for behind in VERSIONS_BEHIND:
                old, new = (published[index].view(torch.uint8).numpy() for index in (-1 - behind, -1))
                figures = compare(old, new, number_bytes)
                rows.append({"dtype": dtype, "learning_rate": rate, "versions_behind": behind} | figures)
    return rows


def train(rate: float, hidden: int) -> list[list[torch.Tensor]]:
    """Returns the float32 parameters after each of the last optimizer steps, with AdamW as in the learner."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    versions: list[list[torch.Tensor]] = []
    for _ in range(WARM_UP_STEPS + max(VERSIONS_BEHIND)):
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        versions = [*versions, [parameter.detach().clone() for parameter in model.parameters()]]
        versions = versions[-1 - max(VERSIONS_BEHIND) :]
    return versions


def compare(old: NDArray[np.uint8], new: NDArray[np.uint8], number_bytes: int) -> dict[str, float]:
    """Makes a delta from `old` to `new`, applies it, and returns its size and speed.

    Raises:
        RuntimeError: when the result is not `new`, bit by bit.
    """
    layout = [(0, len(old), number_bytes)]
    started = time.perf_counter()
    delta = encode(old, new, layout, 1 << 62)
    made = time.perf_counter()
    rebuilt = old.copy()
    copied = time.perf_counter()
    apply(rebuilt, delta, layout)
    applied = time.perf_counter()
    if not np.array_equal(rebuilt, new):
        raise RuntimeError("a delta gave other bytes than it was made from")
    words: Any = np.dtype(f"u{number_bytes}")
    return {
        "changed_share": float((old.view(words) != new.view(words)).mean()),
        "times_fewer_bytes": len(new) / len(delta),
        "encode_gb_per_second": len(new) / 1e9 / (made - started),
        "apply_gb_per_second": len(new) / 1e9 / (applied - copied),
    }
