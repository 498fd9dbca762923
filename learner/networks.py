"""The networks of one rank: the policy, the critic and the reference, as far as the algorithm asks for them.

Made, moved and restored together; the training loop owns the object. The reference is a module of each rank's own,
equal on all of them: the policy the run started from, or that of the last version at which it was refreshed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from learner.algorithms.base import Algorithm
from learner.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from learner.config import LearnerConfig, LoraConfig, ModelConfig, OptimizerConfig
from learner.distributed.deepspeed_engine import TrainingEngine
from learner.models.policy import PolicyModel, ValueModel


@dataclass(frozen=True, slots=True)
class Networks:
    """Under DeepSpeed those that learn, plain the one that does not."""

    policy: TrainingEngine
    critic: TrainingEngine | None
    reference: PolicyModel | None
    refresh_every: int
    """Versions after which the policy becomes the reference; 0: never."""
    lora: LoraConfig
    """Of the policy."""

    @classmethod
    def load(cls, config: LearnerConfig, model: ModelConfig, algorithm: Algorithm, device: torch.device) -> Networks:
        """All of them as the run starts."""
        dtype, checkpointing = getattr(torch, model.dtype), model.gradient_checkpointing

        def engine(
            network: PolicyModel | ValueModel,
            optimizer: OptimizerConfig,
            full_base: Callable[[], PolicyModel] | None = None,
        ) -> TrainingEngine:
            return TrainingEngine(
                network,
                optimizer,
                zero_stage=config.zero_stage,
                bfloat16=model.dtype == "bfloat16",
                cpu_offload=config.cpu_offload,
                device=device,
                full_base=full_base,
            )

        # The policy that a run starts from; also the frozen weights of a base that learns in four bits.
        frozen = partial(PolicyModel.load, model.path, dtype=dtype, temperature=config.temperature, checkpointing=False)
        policy = engine(
            PolicyModel.load(
                model.path,
                dtype=dtype,
                temperature=config.temperature,
                checkpointing=checkpointing,
                lora=config.lora,
            ),
            config.optimizer,
            frozen if config.lora.base_4bit else None,
        )
        critic = reference = None
        if algorithm.needs_critic:
            critic = engine(
                ValueModel.load(model.path, dtype=dtype, checkpointing=checkpointing), config.critic_optimizer
            )
        if algorithm.needs_reference:
            reference = frozen().to(device).eval().requires_grad_(False)
        return cls(policy, critic, reference, algorithm.reference_refresh_every, config.lora)

    def refresh_reference(self, policy_version: int, num_versions: int) -> bool:
        """Make the policy the reference when one of the last `num_versions` versions was due. Every rank must call it.

        Returns whether it was.
        """
        every = self.refresh_every
        if not every or self.reference is None:
            return False
        if policy_version // every == (policy_version - num_versions) // every:
            return False
        self.policy.copy_to(self.reference)
        return True

    def save(
        self, directory: Path, policy_version: int, *, model: ModelConfig, state: dict[str, Any], keep: int
    ) -> None:
        """Write a checkpoint; every rank must call it.

        Raises:
            CheckpointWriteError: as `save_checkpoint` does.
        """
        save_checkpoint(
            directory,
            policy_version,
            self.policy,
            self.critic,
            # One that is never refreshed is the policy the run started from.
            reference=self.reference if self.refresh_every else None,
            base_path=Path(model.path),
            dtype=getattr(torch, model.dtype),
            lora=self.lora,
            state=state,
            keep=keep,
        )

    def restore(self, checkpoint: Path) -> None:
        """Everything as it was when `checkpoint` was written; every rank must call it.

        Raises:
            CheckpointError: as `load_checkpoint` does.
        """
        load_checkpoint(checkpoint, self.policy, self.critic, self.reference if self.refresh_every else None)
