"""A slow reference implementation of the curriculum, for the buffer's tests."""

from collections.abc import Mapping

import numpy as np

from buffer.config import BufferConfig
from buffer.curriculum_config import Stage


class ReferenceCurriculum:
    """Draws the prompts of occurrences 0, 1, 2, ..., given a configuration and the level of every prompt."""

    def __init__(self, config: BufferConfig, levels: list[int] | None = None) -> None:
        self.config = config
        self.levels = levels or [0] * config.num_prompts
        self.stages = config.stages or [Stage()]
        self.prompts: list[int] = []
        """The drawn prompts, by occurrence."""
        self.firsts: list[int] = []
        """First occurrence of every stage that has begun."""
        self.began: list[int] = []
        """Version of the next batch when each stage began."""
        self.begin_stage(0)

    @property
    def stage(self) -> Stage:
        return self.stages[len(self.firsts) - 1]

    def stage_of(self, k: int) -> Stage:
        return self.stages[max(i for i, first in enumerate(self.firsts) if first <= k)]

    def begin_stage(self, version: int) -> None:
        self.firsts.append(len(self.prompts))
        self.began.append(version)
        self.begin_epoch(0, [])

    def begin_epoch(self, epoch: int, passed_over: list[int]) -> None:
        highest = self.stage.max_level or max(self.levels)
        prompts = [p for p, level in enumerate(self.levels) if self.stage.min_level <= level <= highest]
        kept = [p for p in prompts if p not in passed_over] or prompts
        self.epoch = epoch
        if self.config.shuffle:
            kept = np.random.default_rng((self.config.seed, epoch, len(self.firsts))).permutation(kept).tolist()
        self.left: list[int] = kept

    def draw(self, successes: Mapping[int, float] | None = None) -> int:
        """Draw the next prompt. `successes` are the success shares of all delivered groups, by occurrence."""
        if not self.left:
            self.begin_epoch(self.epoch + 1, self.passed_over(successes or {}))
        self.prompts.append(self.left.pop(0))
        return self.prompts[-1]

    def passed_over(self, successes: Mapping[int, float]) -> list[int]:
        config = self.config
        if config.revisit_epochs and (self.epoch + 1) % config.revisit_epochs == 0:
            return []
        found = []
        for prompt in set(self.prompts):
            groups = range(self.firsts[-1], len(self.prompts))
            seen = [successes[k] for k in groups if self.prompts[k] == prompt and k in successes]
            for skip, sign in ((config.skip_solved, 1), (config.skip_unsolved, -1)):
                last = seen[-skip.seen :]
                if 0 < skip.seen == len(last) and all(sign * success >= sign * skip.success for success in last):
                    found.append(prompt)
        return found

    def advance(self, next_version: int, used: list[float]) -> None:
        """Begin new stages after a cut. `used` are the success shares of the stage's used groups, oldest first."""
        while len(self.firsts) < len(self.stages):
            if not self.stage.ends(next_version, self.began[-1], used[-self.stage.over_groups :]):
                return
            self.begin_stage(next_version)
            used = []
