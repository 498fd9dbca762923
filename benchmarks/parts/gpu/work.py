"""Tools of `benchmarks/gpu.py`: shapes of models, random networks, the limit of matrix products, time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.parts.learner.work import GROUP_SIZE, Sequences, Work, forward_flops, memory
from benchmarks.parts.model_sizes import MODELS

SHEET_TFLOPS = {
    **{"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250},
    **{"A100": 312, "A10G": 70, "L40S": 362, "L4": 121, "RTX 4090": 165},
}
"""Dense bfloat16 TFLOP/s of the data sheet, by a part of the device's name; the first part that matches counts."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2 with random weights, and of the batch on which its step is measured."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    key_value: int
    """Width of the keys, and of the values: all their heads together."""
    head_dim: int
    tied: bool = True
    checkpointing: bool = False
    longest: int = 2048
    """Tokens of the longest sequence; the shortest has a sixteenth of them."""
    tokens_per_microbatch: int = 16384

    def work(self, quick: bool) -> Work:
        """The model and batch in the form of `benchmarks/learner.py`, without a model folder."""
        return Work(
            folder="",
            vocabulary=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_layers=self.layers,
            num_heads=self.hidden // self.head_dim,
            shortest=self.longest // 16,
            longest=self.longest,
            num_sequences=GROUP_SIZE * (2 if quick else 8),
            num_threads=1,
            tokens_per_microbatch=self.tokens_per_microbatch,
            rows_per_microbatch=1,
        )

    def step_flops(self, work: Work, data: Sequences) -> float:
        """Operations of the forward and the backward pass, without the recomputation of gradient checkpointing."""
        linear, attention = forward_flops(work, data)
        # `forward_flops` counts keys and values as wide as the hidden states; here they are narrower.
        narrower = 2 * data.num_tokens * self.layers * 2 * self.hidden * (self.hidden - self.key_value)
        return 3 * (linear - narrower + attention)


SHAPES = {
    "tiny": Shape(512, 64, 128, 2, 32, 32, longest=64, tokens_per_microbatch=256),
    "0.5B": Shape(**MODELS["0.5B"], head_dim=64),
    "1.5B": Shape(**MODELS["1.5B"], head_dim=128, checkpointing=True),
    "7B": Shape(152_064, 3584, 18944, 28, 512, head_dim=128, tied=False, checkpointing=True),
}


def dtype_on(device: torch.device) -> torch.dtype:
    """Bfloat16, or float32 on a CPU, where bfloat16 is slow."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def random_model(shape: Shape, device: torch.device) -> Any:
    """A causal language model with random weights, configured as the learner configures the models that it loads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from learner.models.attention import register_packed_attention

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // shape.head_dim,
        num_key_value_heads=shape.key_value // shape.head_dim,
        max_position_embeddings=shape.longest,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    with device:
        model = Qwen2ForCausalLM._from_config(
            config, dtype=dtype_on(device), attn_implementation=register_packed_attention()
        )
    if shape.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


class Meter:
    """Measures time and peak memory of work on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        """Waits for: all kernels that were launched on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], repeats: int, warm_up: int = 1) -> list[float]:
        """Seconds of each of `repeats` calls of `work`, after `warm_up` calls that are not measured."""
        found = []
        for number in range(warm_up + repeats):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            if number >= warm_up:
                found.append(time.perf_counter() - began)
        return found

    def reset_peak(self) -> None:
        """Begin a new measurement of the peak memory."""
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def current_mb(self) -> float:
        """Memory in use now: allocated on the CUDA device, or resident in this process."""
        return torch.cuda.memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else memory("VmRSS")

    def peak_mb(self) -> float:
        """Peak of the memory in use since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else memory("VmHWM")


def matmul(meter: Meter, size: int, repeats: int) -> dict[str, Any]:
    """Measures TFLOP/s of large matrix products in the models' dtype: the limit of this device."""
    left, right = (torch.randn(size, size, device=meter.device, dtype=dtype_on(meter.device)) for _ in range(2))
    out = torch.empty_like(left)
    taken = meter.seconds(lambda: torch.mm(left, right, out=out), repeats, warm_up=3)
    flops = 2 * size**3
    name = torch.cuda.get_device_name(meter.device) if meter.device.type == "cuda" else "CPU"
    return {
        "device": name,
        "size": size,
        "dtype": str(dtype_on(meter.device)).removeprefix("torch."),
        "tflops": flops / statistics.median(taken) / 1e12,
        "spread": [flops / max(taken) / 1e12, flops / min(taken) / 1e12],
        "sheet_tflops": next((rate for part, rate in SHEET_TFLOPS.items() if part in name), None),
    }


def num_parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
