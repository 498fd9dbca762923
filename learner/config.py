"""The learner's settings, checked before a model is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

from learner.schedule import Schedule, learning_rate

DTYPES = ("float32", "bfloat16")
ZERO_STAGES = (0, 1, 2, 3)
DEVICES = ("auto", "cpu", "cuda")
PUBLISHED = ("adapter", "merged")
LEAST = {
    **dict.fromkeys(("total_steps", "groups_per_batch", "samples_per_group", "updates_per_batch", "num_ranks"), 1),
    **dict.fromkeys(("keep_checkpoints", "max_bad_steps", "checkpoint_every", "tokens_per_microbatch"), 1),
    **dict.fromkeys(("max_batches_without_signal", "evaluate_every", "critic_warmup_steps", "seed"), 0),
}
"""Lower bounds of the settings that are counts."""
ABOVE_ZERO = ("evaluation_timeout_seconds", "logprob_tolerance")
"""Settings that may be any number above 0."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy to start from."""

    path: str
    """A Hugging Face folder."""
    dtype: str = "float32"
    """Type of the learner's parameters: float32 | bfloat16 (with bfloat16 DeepSpeed keeps float32 master weights)."""
    gradient_checkpointing: bool = False
    max_tokens: int = 256
    """Context length: prompt and completion together, in tokens."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype={self.dtype} is unknown; use one of {', '.join(DTYPES)}")
        if self.max_tokens < 2:
            raise ValueError(f"model.max_tokens={self.max_tokens} must be at least 2: a prompt and a completion")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm when their norm over all parameters is larger; 0: never."""
    schedule: str = "constant"
    """constant | linear | cosine."""
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    """Final learning rate of the linear and cosine schedules, as a fraction of `learning_rate`."""

    def __post_init__(self) -> None:
        # Written so that nan fails too.
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must each be 0 or above and below 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay} must be 0 (none) or above")
        if not self.max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be 0 (never clip) or above")

    def rate(self, step: int, total_steps: int) -> float:
        """Return the learning rate of the optimizer step that makes version `step` + 1.

        A run shorter than the warm-up ends during the warm-up.

        Raises:
            ValueError: unknown schedule, `min_lr_ratio` outside [0, 1], or a negative `warmup_steps`.
        """
        return learning_rate(
            step,
            base=self.learning_rate,
            warmup_steps=self.warmup_steps,
            total_steps=max(total_steps, self.warmup_steps),
            schedule=cast(Schedule, self.schedule),
            min_lr_ratio=self.min_lr_ratio,
        )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a frozen policy; critic and reference have none."""

    rank: int = 0
    """Rank of the two trained matrices of a layer; 0: no adapters, every parameter trains."""
    alpha: int = 32
    """The product of the two matrices is scaled by alpha / rank, so that one learning rate suits every rank."""
    target_modules: list[str] = field(default_factory=list)
    """Ends of the names of linear layers that get adapters, such as q_proj; empty: all in the decoder's layers."""
    base_4bit: bool = False
    """Store the frozen weights in four bits (NF4); CUDA only."""
    publish: str = "adapter"
    """adapter | merged: actors receive the two matrices of every layer, or the whole weights with them merged in."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"learner.lora.rank={self.rank} is below 0; use 0 for none, or for example 16")
        if self.alpha <= 0:
            raise ValueError(f"learner.lora.alpha={self.alpha} must be above 0: without a factor nothing is learned")
        if self.publish not in PUBLISHED:
            raise ValueError(f"learner.lora.publish={self.publish} is unknown; use one of {', '.join(PUBLISHED)}")
        if self.rank == 0 and (self.target_modules or self.base_4bit):
            raise ValueError("learner.lora has settings, but learner.lora.rank=0 means no adapters; set it, e.g. to 16")
        if self.base_4bit and self.publish == "merged":
            raise ValueError(
                "learner.lora.base_4bit=true has no whole weights to send for learner.lora.publish=merged; use adapter"
            )

    @property
    def publishes_adapters(self) -> bool:
        """Whether actors receive the adapters alone."""
        return self.rank > 0 and self.publish == "adapter"

    def differences(self, other: LoraConfig) -> list[str]:
        """Return the names of the settings that differ and that adapters must share to be loaded."""
        if not self.rank and not other.rank:
            return []
        return [name for name in ("rank", "alpha", "target_modules") if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class LearnerConfig:
    """One training run as the learner sees it."""

    total_steps: int
    """Optimizer steps, which is also the last policy version."""
    optimizer: OptimizerConfig
    critic_optimizer: OptimizerConfig
    groups_per_batch: int
    samples_per_group: int
    updates_per_batch: int = 1
    """Optimizer steps made with each batch."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    num_ranks: int = 1
    zero_stage: int = 0
    cpu_offload: bool = False
    """Keep optimizer state and float32 master weights in host memory; torch makes the step there, on the CPU."""
    tokens_per_microbatch: int = 4096
    """Packed tokens of one forward and backward pass; a longer trajectory gets a pass to itself."""
    temperature: float = 1.0
    """The actors' sampling temperature; the learner divides its logits by it."""
    critic_warmup_steps: int = 0
    """Number of first optimizer steps that train only the critic."""
    publish_dtype: str = "float32"
    """Type of the published weights, which is the actors' type."""
    checkpoint_every: int = 50
    """Policy versions from one checkpoint to the next; the last version always gets one."""
    keep_checkpoints: int = 2
    max_bad_steps: int = 3
    """Consecutive batches with a skipped step (loss or gradient not finite) after which the run ends."""
    max_batches_without_signal: int = 0
    """Consecutive batches that teach nothing (zero-advantage groups only, or no completion judged) after which the run
    ends with a checkpoint; 0: the run never ends for this reason, only a warning is logged."""
    evaluate_every: int = 15
    """Policy versions from one evaluation on held-out prompts to the next; 0: none in between. The first and the last
    version are always evaluated."""
    evaluation_timeout_seconds: float = 300.0
    """How long the learner waits, at the end of the run, while no actor runs the last evaluation."""
    logprob_tolerance: float = 0.02
    """Largest allowed mean of |log pi - log mu| over tokens of the first batch that were sampled under its version."""
    device: str = "auto"
    """auto | cpu | cuda."""
    cpu_affinity: list[int] = field(default_factory=list)
    """CPU cores this process may use, shared out among the ranks; empty: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.zero_stage not in ZERO_STAGES:
            raise ValueError(f"learner.zero_stage={self.zero_stage} is unknown; use 0, 1, 2 or 3")
        if self.cpu_offload and not self.zero_stage:
            raise ValueError(
                "learner.cpu_offload=true moves nothing with learner.zero_stage=0, whose optimizer is not sharded; use"
                " learner.zero_stage=1, 2 or 3"
            )
        if self.device not in DEVICES:
            raise ValueError(f"learner.device={self.device} is unknown; use one of {', '.join(DEVICES)}")
        if self.publish_dtype not in DTYPES:
            raise ValueError(
                f"actor.dtype={self.publish_dtype}, which learner.publish_dtype follows, is unknown; use one of"
                f" {', '.join(DTYPES)}"
            )
        if self.lora.base_4bit and (self.device == "cpu" or self.zero_stage == 3):
            raise ValueError(
                f"learner.lora.base_4bit=true needs CUDA and weights that are not cut up, not learner.device="
                f"{self.device} with learner.zero_stage={self.zero_stage}; leave it out, or use cuda and stage 0 to 2"
            )
        parts = self.num_ranks * self.updates_per_batch
        if self.groups_per_batch % parts:
            raise ValueError(
                f"groups_per_batch={self.groups_per_batch} can't be divided by num_ranks={self.num_ranks} x"
                f" updates_per_batch={self.updates_per_batch}; use a multiple of {parts}"
            )
        if self.total_steps % self.updates_per_batch:
            raise ValueError(
                f"total_steps={self.total_steps} is not a multiple of updates_per_batch={self.updates_per_batch};"
                f" use {self.total_steps // self.updates_per_batch * self.updates_per_batch or self.updates_per_batch}"
            )
        for name, optimizer in (("optimizer", self.optimizer), ("critic_optimizer", self.critic_optimizer)):
            try:
                optimizer.rate(0, self.total_steps)
            except ValueError as error:
                raise ValueError(f"learner.{name}: {error}") from error

    def _check_numbers(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"learner.{name}={getattr(self, name)} must be at least {least}")
        # Written so that nan fails too.
        for name in ABOVE_ZERO:
            if not getattr(self, name) > 0:
                raise ValueError(f"learner.{name}={getattr(self, name)} must be above 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0: greedy sampling explores nothing")
