"""TRL's way of `benchmarks/peers.py`: `with_trl.py WORK.json`, run by a Python with TRL.

TRL's GRPO trainer does the prompts, sampling, advantages, loss and checkpoints. This script gives it the model, the
problems in order, our grader, AdamW with our settings, and the learning rate of every update.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

# The root of the project comes before this folder, where some files have the names of packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.parts.marked_lines import say
from benchmarks.parts.peers.work import Work
from verifier.base import Completion, Verdict
from verifier.rewards.answer import boxed_exact

SAMPLERS: dict[str, dict[str, Any]] = {
    "generate": {},
    "batching": {"use_transformers_continuous_batching": True},
    "vllm": {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1},
}


def keep_weights() -> None:
    """Make vLLM's layers on a CPU keep their weights, so that TRL can update them.

    With oneDNN a layer packs its weights and drops the originals. TRL's first update then fails with "'Parameter'
    object has no attribute 'weight_loader'". Without oneDNN the layers use torch's linear layer on their own weights.
    """
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False


class Rewards:
    """TRL's reward function. It also records the number of tokens and the share of correct completions of the batch."""

    __name__ = "boxed_exact"

    def __init__(self) -> None:
        self._grader = boxed_exact()
        self.num_tokens = 0
        self.fraction_correct = 0.0

    def __call__(
        self, completions: list[str], gold: list[str], completion_ids: list[list[int]], **named: Any
    ) -> list[float]:
        """Called by the trainer, once per batch."""
        verdicts = [
            self._grader.judge(Completion(text, answer)) for text, answer in zip(completions, gold, strict=True)
        ]
        self.num_tokens = sum(map(len, completion_ids))
        self.fraction_correct = sum(verdict is Verdict.CORRECT for verdict in verdicts) / len(verdicts)
        return [self._grader.rewards[verdict] for verdict in verdicts]


class Marks(TrainerCallback):
    """Reports the end of every update."""

    def __init__(self, rewards: Rewards) -> None:
        self._rewards = rewards

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Called by the trainer."""
        rewards = self._rewards
        say(
            version=state.global_step,
            time=time.time(),
            num_tokens=rewards.num_tokens,
            correct=rewards.fraction_correct,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **named: Any) -> None:
        """Called by the trainer."""
        difference = (logs or {}).get("sampling/sampling_logp_difference/max")
        if difference is not None:
            say(logprob_difference=float(difference))


def main() -> None:
    work = Work.read(Path(sys.argv[1]))
    torch.set_num_threads(work.num_threads)
    if work.mode == "vllm":
        keep_weights()
    # Imported after `keep_weights`, because it imports vLLM.
    from trl import GRPOConfig, GRPOTrainer

    batch = work.groups_per_batch * work.samples_per_group
    arguments = GRPOConfig(
        output_dir=work.output,
        seed=work.seed,
        max_steps=len(work.learning_rates),
        per_device_train_batch_size=work.rows_per_microbatch,
        gradient_accumulation_steps=batch // work.rows_per_microbatch,
        num_generations=work.samples_per_group,
        max_completion_length=work.max_new_tokens,
        shuffle_dataset=False,
        temperature=work.temperature,
        top_k=0,
        beta=0.0,
        epsilon=work.clip,
        loss_type="grpo",
        scale_rewards="group",
        max_grad_norm=work.max_grad_norm,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=work.checkpoint_every,
        **({"vllm_max_model_length": work.max_tokens} if work.mode == "vllm" else {}),
        **SAMPLERS[work.mode],
    )
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=tuple(work.betas), weight_decay=0.0)
    rates = [*work.learning_rates, work.learning_rates[-1]]
    rewards = Rewards()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=arguments,
        train_dataset=Dataset.from_list(work.rows()),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[Marks(rewards)],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step])),
    )
    trainer.train()


if __name__ == "__main__":
    main()
