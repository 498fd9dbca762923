"""In which order prompts are dealt: a seeded permutation per epoch, the same after every restart.

Owned by the ledger. No prompt comes twice within an epoch; memory is one epoch's permutation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class PromptOrder:
    """Maps occurrence k = 0, 1, 2, ... to a prompt id in [0, num_prompts)."""

    def __init__(self, num_prompts: int, *, shuffle: bool, seed: int) -> None:
        self._num_prompts = num_prompts
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.arange(num_prompts)

    def prompt_id(self, occurrence: int) -> int:
        """The prompt of this occurrence."""
        epoch, position = divmod(occurrence, self._num_prompts)
        if self._shuffle and epoch != self._epoch:
            self._permutation = np.random.default_rng((self._seed, epoch)).permutation(self._num_prompts)
            self._epoch = epoch
        return int(self._permutation[position])
