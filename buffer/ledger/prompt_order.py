"""In which order prompts are drawn within an epoch, and which of them the difficulty filter passes over.

Both follow from what the ledger holds alone, so that every restart finds the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from buffer.curriculum_config import Skip


def epoch_order(prompts: NDArray[np.int64], *, shuffle: bool, seed: int, stage: int, epoch: int) -> NDArray[np.int64]:
    """The prompts of one epoch in the order they are drawn, each once.

    Args:
        prompts: [num_prompts] prompt ids, ascending.
        shuffle: False keeps them so.
        seed, stage, epoch: choose the permutation; stages count from 1, epochs of each stage from 0.
    """
    return np.random.default_rng((seed, epoch, stage)).permutation(prompts) if shuffle else prompts


class RecentGroups:
    """Of every prompt the groups drawn last, and how many of their completions were correct; 16 bytes a group.

    Args:
        num_prompts: of the run.
        num_groups: kept of each prompt.
        rows: (occurrence, prompt_id, share of correct completions) of the groups so far, in the order they were drawn.
    """

    def __init__(self, num_prompts: int, num_groups: int, rows: Sequence[tuple[int, int, float]] = ()) -> None:
        self._occurrences = np.full((num_prompts, num_groups), -1, np.int64)
        self._success = np.full((num_prompts, num_groups), np.nan)
        """[num_prompts, num_groups] share of correct completions, the group drawn last on the right; NaN: none yet."""
        columns = np.array(rows, np.float64).reshape(-1, 3)
        by_prompt = columns[np.argsort(columns[:, 1], kind="stable")]
        prompts = by_prompt[:, 1].astype(np.int64)
        # How many groups of the same prompt were drawn after this one.
        newer = np.searchsorted(prompts, prompts, side="right") - 1 - np.arange(len(prompts))
        kept = newer < num_groups
        places = prompts[kept], num_groups - 1 - newer[kept]
        self._occurrences[places], self._success[places] = by_prompt[kept, 0], by_prompt[kept, 2]

    def add(self, occurrence: int, prompt_id: int, success: float) -> None:
        """A group came in; they may come in another order than they were drawn."""
        place = int(np.searchsorted(self._occurrences[prompt_id], occurrence))
        for kept, new in ((self._occurrences[prompt_id], occurrence), (self._success[prompt_id], success)):
            if place:
                kept[: place - 1] = kept[1:place]
                kept[place - 1] = new

    def teach_nothing(self, prompts: NDArray[np.int64], skip_solved: Skip, skip_unsolved: Skip) -> NDArray[np.bool_]:
        """Which of `prompts` have been solved, or failed, in each of their last groups.

        Args:
            prompts: prompt ids.
            skip_solved, skip_unsolved: what counts as solved and as unsolved, and for how many groups in a row.
        """
        passed_over = np.zeros(len(prompts), np.bool_)
        if skip_solved.seen:
            passed_over |= (self._success[prompts, -skip_solved.seen :] >= skip_solved.success).all(axis=1)
        if skip_unsolved.seen:
            passed_over |= (self._success[prompts, -skip_unsolved.seen :] <= skip_unsolved.success).all(axis=1)
        return passed_over
