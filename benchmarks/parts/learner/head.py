"""Measures the language-model head: `head.py ours|naive NUM_TOKENS VOCABULARY HIDDEN_SIZE`.

Prints {"peak_mb", "cpu_seconds"} of one forward and backward pass as JSON. The peak leaves out the head's inputs, its
weights and their gradients, which every way needs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

# The root of the project comes before this folder, where some files have the names of packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor, nn

from benchmarks.parts.learner.work import memory
from learner.models.head import ScoringHead


def naive(layer: nn.Linear, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by their definitions, from the whole logit matrix in float32."""
    logs = layer(hidden).float().log_softmax(-1)
    return logs.gather(-1, tokens[:, None]).squeeze(-1), -(logs.exp() * logs).sum(-1)


def main() -> None:
    way, (num_tokens, vocabulary, hidden_size) = sys.argv[1], map(int, sys.argv[2:])
    torch.set_num_threads(1)
    layer = nn.Linear(hidden_size, vocabulary, bias=False)
    layer.weight.grad = torch.zeros_like(layer.weight)
    hidden, tokens = torch.randn(num_tokens, hidden_size, requires_grad=True), torch.arange(num_tokens) % vocabulary
    Path("/proc/self/clear_refs").write_text("5")
    before, began = memory("VmRSS"), time.process_time()
    logprobs, _ = ScoringHead.of(layer)(hidden, tokens, 1.0) if way == "ours" else naive(layer, hidden, tokens)
    logprobs.sum().backward()
    cpu_seconds = time.process_time() - began
    gradients_mb = sum(4 * tensor.numel() for tensor in (layer.weight, hidden)) / 1e6
    print(json.dumps({"peak_mb": memory("VmHWM") - before - gradients_mb, "cpu_seconds": cpu_seconds}))


if __name__ == "__main__":
    main()
