"""The parts `learner` and `head` of `benchmarks/gpu.py`: an optimizer step, and the language-model head alone."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.parts.gpu.work import Meter, Shape, dtype_on, num_parameters, random_model
from benchmarks.parts.learner.groups import completion_lengths, trajectory_groups
from benchmarks.parts.learner.head import naive
from benchmarks.parts.learner.work import LEARNING_RATE, Sequences, sequences
from learner.models import head as heads
from learner.models.fused_head import fits
from learner.models.head import ScoringHead
from learner.models.policy import PolicyModel

PLAIN = "plain torch AdamW, parameters without master weights: DeepSpeed is not installed"


def learner(meter: Meter, shape: Shape, quick: bool) -> dict[str, Any]:
    """Measures a whole optimizer step, from received groups to metrics: tokens/s, TFLOP/s and peak memory."""
    work = shape.work(quick)
    data = sequences(work)
    policy = PolicyModel(random_model(shape, meter.device), temperature=1.0)
    parameters = num_parameters(policy)
    with_deepspeed = find_spec("deepspeed") is not None
    make = deepspeed_step if with_deepspeed else plain_step
    step = make(policy, data, work.tokens_per_microbatch, meter.device)
    meter.reset_peak()
    taken = meter.seconds(step, 2 if quick else 5, warm_up=1 if quick else 2)
    rates = [data.num_tokens / seconds for seconds in taken]
    return {
        "how": "DeepSpeed" if with_deepspeed else PLAIN,
        "parameters": parameters,
        "num_tokens": data.num_tokens,
        "checkpointing": shape.checkpointing,
        "tokens_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "tflops": shape.step_flops(work, data) / statistics.median(taken) / 1e12,
        "peak_mb": meter.peak_mb(),
        "fused_head": fits(
            torch.empty(1, shape.hidden, device=meter.device, dtype=dtype_on(meter.device)),
            policy.causal_lm.get_output_embeddings().weight,
            None,
        ),
    }


def deepspeed_step(policy: PolicyModel, data: Sequences, budget: int, device: torch.device) -> Callable[[], None]:
    """A step by the learner's own functions, with DeepSpeed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    from benchmarks.parts.learner.step import OurStep

    step = OurStep(policy, data, budget, device, bfloat16=dtype_on(device) == torch.bfloat16)

    def work() -> None:
        step.accumulate()
        step.finish()

    return work


def plain_step(policy: PolicyModel, data: Sequences, budget: int, device: torch.device) -> Callable[[], None]:
    """A step with the same batch, microbatches and loss, with torch's AdamW instead of DeepSpeed."""
    from learner.algorithms.base import AdvantageInputs, LossInputs
    from learner.algorithms.corrections import DecoupledTIS
    from learner.algorithms.grpo import GRPO
    from learner.batches.batch import TrainingBatch

    algorithm = GRPO(correction=DecoupledTIS(), aggregation="token_mean")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    groups = trajectory_groups(data, [np.full(length, -1.0, np.float32) for length in completion_lengths(data)])

    def work() -> None:
        batch = TrainingBatch.from_groups(groups, [0] * len(groups), 0, device)
        inputs = AdvantageInputs(
            rewards=batch.rewards,
            group_index=batch.group_index,
            sequence_index=batch.sequence_index,
            behavior_logprobs=batch.behavior_logprobs,
        )
        advantages = algorithm.advantages(inputs).advantages
        everything, mask = range(len(batch.trajectories)), torch.ones_like(batch.sequence_index, dtype=torch.bool)
        counts = {"num_tokens": batch.num_scored_tokens, "num_sequences": len(batch.trajectories)}
        weights = algorithm.token_weights(mask, batch.sequence_index, **counts).float()
        for micro in batch.microbatches(
            everything, budget, attention_crossover_tokens=policy.attention_crossover_tokens
        ):
            logprobs, entropy = policy(*micro.inputs)
            loss = algorithm.loss(
                LossInputs(
                    logprobs=logprobs,
                    entropy=entropy,
                    behavior_logprobs=batch.behavior_logprobs[micro.scored],
                    advantages=advantages[micro.scored],
                    token_weights=weights[micro.scored],
                    sequence_index=batch.sequence_index[micro.scored],
                )
            ).loss
            loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return work


def head(meter: Meter, shape: Shape, quick: bool) -> dict[str, Any]:
    """Measures memory, time and error of the head: the whole logit matrix, chunks of it, and the fused kernel."""
    torch.manual_seed(0)
    num_tokens = shape.longest if quick else 16384
    options = {"device": meter.device, "dtype": dtype_on(meter.device)}
    layer = nn.Linear(shape.hidden, shape.vocab, bias=False, **options)
    hidden = torch.randn(num_tokens, shape.hidden, **options).requires_grad_()
    tokens = torch.arange(num_tokens, device=meter.device) % shape.vocab
    scoring = ScoringHead.of(layer)
    fused = fits(hidden, layer.weight, None)
    exact = _exact(layer, hidden, tokens)
    ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "naive": lambda: naive(layer, hidden, tokens),
        "chunked": lambda: scoring(hidden, tokens, 1.0),
    }
    found: dict[str, Any] = {"num_tokens": num_tokens, "vocabulary": shape.vocab, "ways": {}}
    for name, way in (ways | ({"fused": ways["chunked"]} if fused else {})).items():
        with patch.object(heads, "fits", fits if name == "fused" else lambda *_: False):
            try:
                found["ways"][name] = _measure_head(meter, layer, hidden, way, exact, 1 if quick else 5)
            except torch.OutOfMemoryError:
                found["ways"][name] = {"skipped": "out of memory"}
    if not fused:
        found["ways"]["fused"] = {"skipped": "needs bfloat16, a Hopper device and liger-kernel"}
    return found


def _exact(layer: nn.Linear, hidden: Tensor, tokens: Tensor) -> list[Tensor]:
    """Returns log-probabilities, the gradient of the hidden states and that of the weight, computed in float32."""
    wide = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    wide.weight = nn.Parameter(layer.weight.detach().float())
    states = hidden.detach().float().requires_grad_()
    logprobs, _ = ScoringHead.of(wide)(states, tokens, 1.0)
    return [logprobs.detach(), *torch.autograd.grad(logprobs.sum(), (states, wide.weight))]


def _measure_head(
    meter: Meter,
    layer: nn.Linear,
    hidden: Tensor,
    way: Callable[[], tuple[Tensor, Tensor]],
    exact: list[Tensor],
    repeats: int,
) -> dict[str, float]:
    layer.weight.grad, hidden.grad = torch.zeros_like(layer.weight), torch.zeros_like(hidden)
    meter.reset_peak()
    before = meter.current_mb()
    logprobs, _ = way()
    logprobs.sum().backward()
    peak = meter.peak_mb() - before
    found = [logprobs.detach(), hidden.grad, layer.weight.grad]
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    taken = meter.seconds(lambda: way()[0].sum().backward(), repeats, warm_up=0 if repeats == 1 else 1)
    names = ("logprob_error", "hidden_gradient_error", "weight_gradient_error")
    return {"peak_mb": peak, "seconds": statistics.median(taken)} | dict(zip(names, errors, strict=True))
