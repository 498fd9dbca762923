"""Runs one episode of a multi-turn task: the model writes a turn, the environment answers, until the episode ends.

Tokens are only appended. Sampled tokens stay exactly as they were sampled, with the token that ended the turn. Tokens
of the environment are not trained on. Rewards and success come from the environment alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from actors.rollouts.trajectories import Completion, TextTokenizer
from actors.tasks.games.episode import Episode, Step
from actors.tasks.task import Problem, Task
from buffer.trajectory import FinishReason
from verifier.base import Score, Verdict

if TYPE_CHECKING:
    from actors.engine.engine import SampledCompletion

NUM_THREADS = 8
_threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="environment")
"""Environments run here, so that one that hangs does not stop the actor's event loop."""

Sample = Callable[[Sequence[int], int], Awaitable["SampledCompletion"]]
"""A function that samples one turn: from (token ids so far, index of the turn from 0) to the turn's tokens."""


async def run_episode(
    task: Task,
    problem: Problem,
    prompt_ids: Sequence[int],
    tokenizer: TextTokenizer,
    sample: Sample,
    *,
    seed: int,
    max_new_tokens: int,
    max_tokens: int,
) -> tuple[Completion, Score]:
    """Run an episode until the environment ends it, after `task.max_turns`, or when no further turn fits the context.

    Waits for: the engine and the environment, once per turn.

    Args:
        task: a multi-turn task.
        problem: the start of the episode.
        prompt_ids: token ids of the first observation in the task's template.
        tokenizer: the model's.
        sample: samples one turn.
        seed: seed of the environment's randomness.
        max_new_tokens: largest number of tokens of one turn.
        max_tokens: context length. Every turn after the first needs room for `max_new_tokens`.
    """
    loop = asyncio.get_running_loop()

    def begin() -> Episode:
        begun = task.episode(problem, seed)
        begun.reset()
        return begun

    episode = await loop.run_in_executor(_threads, begin)
    completion, steps = Completion(), list[Step]()
    for turn in range(task.max_turns):
        choice = await sample([*prompt_ids, *completion.token_ids], turn)
        completion.append_turn(choice)
        written = tokenizer.decode(choice.token_ids.tolist(), skip_special_tokens=True)
        step = await loop.run_in_executor(_threads, episode.step, task.template.prefill + written)
        steps.append(step)
        if step.done or turn + 1 == task.max_turns:
            break
        shown = tokenizer.encode(task.template.next_turn(step.observation), add_special_tokens=False)
        # The template's text between two turns begins with the token that ends a turn. The model may have sampled it.
        if shown and shown[0] == choice.token_ids[-1]:
            del shown[0]
        if len(prompt_ids) + completion.num_tokens + len(shown) + max_new_tokens > max_tokens:
            completion.finish_reason = FinishReason.LENGTH
            break
        completion.append_observation(shown)
    return completion, score_episode(episode, steps, completion.finish_reason)


def score_episode(episode: Episode, steps: Sequence[Step], finish_reason: FinishReason) -> Score:
    """Return the score of an episode.

    The reward is the return (sum of all rewards), with its parts. The verdict is correct when the environment says
    solved.
    """
    invalid = sum(not step.valid for step in steps)
    parts = {
        "environment": sum(step.reward for step in steps if step.valid),
        "invalid_turns": sum(step.reward for step in steps if not step.valid),
        "solved": float(episode.solved),
    }
    if episode.solved:
        verdict = Verdict.CORRECT
    elif finish_reason is FinishReason.LENGTH:
        verdict = Verdict.TRUNCATED
    else:
        verdict = Verdict.NO_ANSWER if invalid == len(steps) else Verdict.WRONG
    return Score(parts["environment"] + parts["invalid_turns"], parts, verdict)
