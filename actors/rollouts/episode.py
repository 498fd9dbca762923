"""One episode of a multi-turn task: turns of the model through the engine, answers of the environment in between.

Tokens are only ever appended: what was sampled stays as it was sampled, the token that ended a turn included, and what
the environment says follows as tokens that are not trained on. The environment alone keeps rewards and success.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from actors.rollouts.trajectories import Continuation, TextTokenizer
from actors.tasks.games.episode import Episode, Step
from actors.tasks.task import Problem, Task
from buffer.trajectory import FinishReason
from verifier.base import Score, Verdict

if TYPE_CHECKING:
    from actors.engine.engine import SampledCompletion

Sample = Callable[[Sequence[int], int], Awaitable["SampledCompletion"]]
"""Samples one turn after these token ids; the number is the turn's, from 0."""


async def play(
    task: Task,
    problem: Problem,
    prompt_ids: Sequence[int],
    tokenizer: TextTokenizer,
    sample: Sample,
    *,
    seed: int,
    max_new_tokens: int,
    max_tokens: int,
) -> tuple[Continuation, Score]:
    """An episode to its end: the environment's, `task.max_turns`, or a context without room for another turn.

    Waits for: the engine, once for each turn.

    Args:
        prompt_ids: the first observation in the task's template.
        seed: of the environment's noise.
        max_new_tokens: of one turn.
        max_tokens: of the context; a turn begins only where `max_new_tokens` still fit, the first one always.
    """
    episode = task.episode(problem, seed)
    episode.reset()
    continuation, steps = Continuation(), list[Step]()
    for turn in range(task.max_turns):
        choice = await sample([*prompt_ids, *continuation.token_ids], turn)
        continuation.append_turn(choice)
        written = tokenizer.decode(choice.token_ids.tolist(), skip_special_tokens=True)
        step = episode.step(task.template.prefill + written)
        steps.append(step)
        if step.done or turn + 1 == task.max_turns:
            break
        shown = tokenizer.encode(task.template.next_turn(step.observation), add_special_tokens=False)
        # A turn that ended itself has the token already with which the text between two turns begins.
        if shown and shown[0] == choice.token_ids[-1]:
            del shown[0]
        if len(prompt_ids) + continuation.num_tokens + len(shown) + max_new_tokens > max_tokens:
            continuation.finish_reason = FinishReason.LENGTH
            break
        continuation.append_observation(shown)
    return continuation, score_episode(episode, steps, continuation.finish_reason)


def score_episode(episode: Episode, steps: Sequence[Step], finish_reason: FinishReason) -> Score:
    """The return (the sum of all rewards), its parts, and a verdict: correct where the environment says solved."""
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
