"""In which order prompts are dealt within an epoch, and which of them the difficulty filter passes over.

Pure functions of what the ledger holds, so that every restart finds the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from buffer.curriculum_config import Skip


def epoch_order(prompts: NDArray[np.int64], *, shuffle: bool, seed: int, stage: int, epoch: int) -> NDArray[np.int64]:
    """The prompts of one epoch in the order they are dealt, each once.

    Args:
        prompts: [num_prompts] prompt ids, ascending.
        shuffle: False keeps them so.
        seed, stage, epoch: choose the permutation; stages count from 1, epochs of each stage from 0.
    """
    return np.random.default_rng((seed, epoch, stage)).permutation(prompts) if shuffle else prompts


def is_passed_over(
    prompts: Sequence[int],
    recent: Mapping[int, Sequence[tuple[int, float]]],
    skip_solved: Skip,
    skip_unsolved: Skip,
) -> NDArray[np.bool_]:
    """Which of `prompts` have been solved, or failed, in each of their last groups.

    Args:
        prompts: prompt ids.
        recent: of each prompt its last groups as (occurrence, share of correct completions), the last dealt last.
        skip_solved, skip_unsolved: what counts as solved and as unsolved, and for how many groups in a row.
    """

    def teaches_nothing(prompt_id: int) -> bool:
        groups = recent.get(prompt_id, ())
        solved, unsolved = groups[-skip_solved.seen :], groups[-skip_unsolved.seen :]
        return (0 < skip_solved.seen == len(solved) and min(s for _, s in solved) >= skip_solved.success) or (
            0 < skip_unsolved.seen == len(unsolved) and max(s for _, s in unsolved) <= skip_unsolved.success
        )

    return np.fromiter(map(teaches_nothing, prompts), np.bool_, len(prompts))
