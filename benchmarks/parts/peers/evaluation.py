"""Evaluates model folders: `evaluation.py HELD_OUT.jsonl MAX_NEW_TOKENS FOLDER...` prints pass@1 of each as JSON.

`benchmarks/peers.py` evaluates the checkpoints of all ways like this after the runs. transformers samples one
completion per held-out problem at temperature 1, with the same seed for every model, and our grader judges it. All
models use the tokenizer of the first folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# The root of the project comes before this folder, where some files have the names of packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from benchmarks.parts.marked_lines import say
from benchmarks.parts.peers.work import read_rows
from verifier.base import Completion, Verdict
from verifier.rewards.answer import boxed_exact

SEED = 20


def pass_at_1(
    folder: Path, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, str]], max_new_tokens: int
) -> float:
    """Share of the problems whose sampled completion is correct."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = tokenizer(
        [row["prompt"] for row in rows],
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_token_type_ids=False,
    )
    torch.manual_seed(SEED)
    sampled = model.generate(
        **prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens
    )
    completions = tokenizer.batch_decode(sampled[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    judge = boxed_exact().judge
    correct = [
        judge(Completion(text, row["gold"])) is Verdict.CORRECT for text, row in zip(completions, rows, strict=True)
    ]
    return sum(correct) / len(correct)


def main() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    rows, max_new_tokens, folders = (
        read_rows(Path(sys.argv[1])),
        int(sys.argv[2]),
        [Path(name) for name in sys.argv[3:]],
    )
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    for folder in folders:
        say(folder=str(folder), pass_at_1=pass_at_1(folder, tokenizer, rows, max_new_tokens))


if __name__ == "__main__":
    main()
