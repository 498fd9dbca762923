"""The networks of one rank: the policy, and the critic and the reference if the algorithm needs them.

The training loop owns the networks, which are created, saved and restored together. Every rank holds a whole copy of
the reference: the policy that the run started from, or the policy of the version at which the reference was last
refreshed.
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
    """Policy and critic train under DeepSpeed; the reference is a plain frozen module."""

    policy: TrainingEngine
    critic: TrainingEngine | None
    reference: PolicyModel | None
    refresh_every: int
    """Policy versions from one refresh of the reference to the next; 0: never refreshed."""
    lora: LoraConfig
    """The policy's adapters."""

    @classmethod
    def load(cls, config: LearnerConfig, model: ModelConfig, algorithm: Algorithm, device: torch.device) -> Networks:
        """Load the networks of a run that starts: all from the model's folder."""
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

        # The policy that the run starts from; also the full-precision base of a policy that is held in four bits.
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
        """Copy the policy to the reference if one of the last `num_versions` versions was due for it.

        Every rank must call it. Returns whether it copied.
        """
        every = self.refresh_every
        if not every or self.reference is None:
            return False
        if policy_version // every == (policy_version - num_versions) // every:
            return False
        self.policy.copy_to(self.reference)
        return True

    def save(
        self,
        directory: Path,
        policy_version: int,
        *,
        model: ModelConfig,
        state: dict[str, Any],
        keep: int,
        may_be_named: Callable[[], bool],
    ) -> None:
        """Write a checkpoint with `save_checkpoint`; every rank must call it.

        Raises:
            CheckpointWriteError: on every rank, when any rank could not write its part, or it may not be named.
        """
        save_checkpoint(
            directory,
            policy_version,
            self.policy,
            self.critic,
            # A reference that is never refreshed is loaded from the model's folder again.
            reference=self.reference if self.refresh_every else None,
            base_path=Path(model.path),
            dtype=getattr(torch, model.dtype),
            lora=self.lora,
            state=state,
            keep=keep,
            may_be_named=may_be_named,
        )

    def restore(self, checkpoint: Path) -> None:
        """Load all networks from `checkpoint` with `load_checkpoint`; every rank must call it.

        Raises:
            CheckpointError: when another number of ranks wrote sharded state.
        """
        load_checkpoint(checkpoint, self.policy, self.critic, self.reference if self.refresh_every else None)
