"""The order in which an epoch draws its prompts, and the prompts that the difficulty filter passes over.

Both depend only on the configuration and the ledger, so a restart finds the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from buffer.curriculum_config import Skip


def epoch_order(prompts: NDArray[np.int64], *, shuffle: bool, seed: int, stage: int, epoch: int) -> NDArray[np.int64]:
    """Return the prompts of one epoch in the order in which they are drawn, each once.

    Args:
        prompts: [num_prompts] prompt ids, ascending.
        shuffle: whether to permute `prompts`; otherwise they are returned unchanged.
        seed, stage, epoch: seed of the permutation. Stages count from 1, epochs of each stage from 0.
    """
    return np.random.default_rng((seed, epoch, stage)).permutation(prompts) if shuffle else prompts


class RecentGroups:
    """The latest groups of every prompt and their shares of correct completions. Takes 16 bytes per group.

    Args:
        num_prompts: number of prompts in the run.
        num_groups: number of groups kept per prompt.
        rows: (occurrence, prompt_id, share of correct completions) of all groups so far, by occurrence.
    """

    def __init__(self, num_prompts: int, num_groups: int, rows: Sequence[tuple[int, int, float]] = ()) -> None:
        self._occurrences = np.full((num_prompts, num_groups), -1, np.int64)
        self._success = np.full((num_prompts, num_groups), np.nan)
        """[num_prompts, num_groups] share of correct completions, the latest group on the right; NaN: no group yet."""
        columns = np.array(rows, np.float64).reshape(-1, 3)
        by_prompt = columns[np.argsort(columns[:, 1], kind="stable")]
        prompts = by_prompt[:, 1].astype(np.int64)
        # Number of groups of the same prompt with a later occurrence.
        newer = np.searchsorted(prompts, prompts, side="right") - 1 - np.arange(len(prompts))
        kept = newer < num_groups
        places = prompts[kept], num_groups - 1 - newer[kept]
        self._occurrences[places], self._success[places] = by_prompt[kept, 0], by_prompt[kept, 2]

    def add(self, occurrence: int, prompt_id: int, success: float) -> None:
        """Add a delivered group. Groups may be delivered in another order than their prompts were drawn."""
        place = int(np.searchsorted(self._occurrences[prompt_id], occurrence))
        for kept, new in ((self._occurrences[prompt_id], occurrence), (self._success[prompt_id], success)):
            if place:
                kept[: place - 1] = kept[1:place]
                kept[place - 1] = new

    def replace(self, prompt_id: int, rows: Sequence[tuple[int, int, float]]) -> None:
        """Replace all groups of a prompt. `rows` as in the constructor, at most `num_groups`."""
        self._occurrences[prompt_id], self._success[prompt_id] = -1, np.nan
        for place, (occurrence, _, success) in enumerate(reversed(rows), start=1):
            self._occurrences[prompt_id, -place], self._success[prompt_id, -place] = occurrence, success

    def teach_nothing(self, prompts: NDArray[np.int64], skip_solved: Skip, skip_unsolved: Skip) -> NDArray[np.bool_]:
        """Return True for prompts that were solved, or failed, in each of their latest groups, [len(prompts)] bool.

        Args:
            prompts: prompt ids.
            skip_solved, skip_unsolved: the success that counts as solved or unsolved, and the number of groups.
        """
        passed_over = np.zeros(len(prompts), np.bool_)
        if skip_solved.seen:
            passed_over |= (self._success[prompts, -skip_solved.seen :] >= skip_solved.success).all(axis=1)
        if skip_unsolved.seen:
            passed_over |= (self._success[prompts, -skip_unsolved.seen :] <= skip_unsolved.success).all(axis=1)
        return passed_over
