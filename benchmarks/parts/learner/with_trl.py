"""TRL's way of `benchmarks/learner.py`: `with_trl.py trl WORK.json`, run by a Python with TRL.

TRL's GRPO trainer does the whole step, from its data loader to its optimizer. Only generation is replaced: it returns
the batch of the benchmark, which the trainer splits like one of its own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

# The root of the project comes before this folder, where some files have the names of packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.parts.learner.work import GROUP_SIZE, LEARNING_RATE, Sequences, Turns, Work, save_gradient, sequences


def batch_of(data: Sequences) -> dict[str, Any]:
    """The batch in the form of the trainer's own generation: prompts padded on the left, completions on the right."""
    prompts = [ids[:n] for ids, n in zip(data.token_ids, data.prompt_lengths, strict=True)]
    completions = [ids[n:] for ids, n in zip(data.token_ids, data.prompt_lengths, strict=True)]
    prompt_ids, prompt_mask = _pad(prompts, left=True)
    completion_ids, completion_mask = _pad(completions, left=False)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.from_numpy(data.advantages).float(),
        "num_items_in_batch": completion_mask.sum(),
    }


def _pad(rows: list[np.ndarray], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), dtype=np.int64), np.zeros((len(rows), width), dtype=np.int64)
    for row, tokens in enumerate(rows):
        inside = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, inside], mask[row, inside] = tokens, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


class Marks(TrainerCallback):
    """Reports every optimizer step, and ends the training when the benchmark asks for no further step."""

    def __init__(self, work: Work, turns: Turns) -> None:
        self.work, self.turns, self.over = work, turns, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Called by the trainer."""
        if self.turns.number == 1:
            parameters = named["model"].named_parameters()
            save_gradient(self.work, "trl", [(key, parameter.grad) for key, parameter in parameters])

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Called by the trainer."""
        if self.over:
            control.should_training_stop = True
        else:
            self.turns.done()


class Prepared(GRPOTrainer):
    """The trainer with `prepared` in place of its generation."""

    prepared: dict[str, Any]
    marks: Marks

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.marks.over = not self.marks.turns.wait()
        return dict(self.prepared)


def main() -> None:
    work = Work.read(Path(sys.argv[2]))
    torch.set_num_threads(work.num_threads)
    turns_after = work.num_sequences // work.rows_per_microbatch
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=work.rows_per_microbatch,
            gradient_accumulation_steps=turns_after,
            num_generations=GROUP_SIZE,
            max_steps=100_000,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            max_grad_norm=1.0,
            beta=0.0,
            loss_type="dapo",
            temperature=1.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            optim="adamw_torch",
            report_to=[],
            save_strategy="no",
            logging_strategy="steps",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = Prepared(
            model=AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float32),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=_prompts(work.num_groups),
            processing_class=_tokenizer(),
        )
        trainer.prepared = batch_of(sequences(work))
        trainer.marks = Marks(work, Turns())
        trainer.add_callback(trainer.marks)
        trainer.train()


def _prompts(number: int) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": ["a"] * number})


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "a": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")


if __name__ == "__main__":
    main()
