"""Sampled tokens become completions for the verifier and groups for the buffer."""

from dataclasses import replace

import numpy as np
import pytest

import verifier.base
from actors.rollouts.trajectories import (
    Completion,
    PromptsTooLongError,
    build_group,
    check_prompts_fit,
    completions_to_score,
    single_turn,
    split_stops,
    task_prompt_ids,
)
from actors.tasks.base import Problem
from buffer.curriculum_config import Stage
from buffer.trajectory import FinishReason, VersionSpan
from buffer.transport.packed_group import pack_group, unpack_group
from tests.actors.stand_ins import Characters, sampled, sums
from verifier.base import Score, Verdict

PROBLEM = Problem(7, "3+4=", "7")
SCORES = [Score(1.0, {"grade": 1.0}, Verdict.CORRECT), Score(-0.5, {"grade": -0.5}, Verdict.WRONG)]


def test_the_verifier_sees_text_without_special_tokens_and_whether_it_was_cut_off():
    choices = [sampled("7", (0, 0)), sampled("8 or", (0, 0), finish_reason=FinishReason.LENGTH)]
    assert completions_to_score(PROBLEM, choices, Characters()) == [
        verifier.base.Completion("7", "7", truncated=False, num_tokens=2),
        verifier.base.Completion("8 or", "7", truncated=True, num_tokens=5),
    ]


def test_a_group_masks_its_prompt_and_counts_versions_from_the_start_of_the_trajectory():
    prompt_ids = [51, 43, 52, 61]
    choices = [sampled("7", (0, 3)), sampled("88", (0, 3), (1, 5), finish_reason=FinishReason.LENGTH)]
    group = build_group("12.0", PROBLEM, prompt_ids, [single_turn(c) for c in choices], SCORES, "actor-1")
    assert (group.group_id, group.prompt_id, group.oldest_version) == ("12.0", 7, 3)
    first, second = group.trajectories
    assert first.token_ids.tolist() == [51, 43, 52, 61, 55, 0]
    assert first.loss_mask.tolist() == [False] * 4 + [True] * 2
    assert first.behavior_logprobs.tolist() == [0, 0, 0, 0, -1, -2]
    assert first.policy_versions == (VersionSpan(4, 3),)
    assert second.policy_versions == (VersionSpan(4, 3), VersionSpan(5, 5))
    assert second.behavior_logprobs.tolist() == [0, 0, 0, 0, -1, -2, -3]
    assert [t.trajectory_id for t in group.trajectories] == ["12.0.0", "12.0.1"]
    assert [(t.reward, t.verdict, t.reward_breakdown) for t in group.trajectories] == [
        (1.0, "correct", {"grade": 1.0}),
        (-0.5, "wrong", {"grade": -0.5}),
    ]
    assert [t.finish_reason for t in group.trajectories] == [FinishReason.STOP, FinishReason.LENGTH]
    assert {t.actor_id for t in group.trajectories} == {"actor-1"}


def test_a_group_arrives_as_it_was_built():
    choices = [sampled("7", (0, 3)), sampled("88", (0, 3), (1, 5))]
    group = build_group("12.0", PROBLEM, [51, 43], [single_turn(c) for c in choices], SCORES, "actor-1")
    arrived = unpack_group(pack_group(group))
    for sent, received in zip(group.trajectories, arrived.trajectories, strict=True):
        for name in ("token_ids", "loss_mask", "behavior_logprobs"):
            np.testing.assert_array_equal(getattr(received, name), getattr(sent, name))
        assert received.policy_versions == sent.policy_versions


def test_after_a_rollback_no_token_seems_newer_than_those_after_it():
    choice = sampled("7777", (0, 3), (1, 6), (2, 4))
    group = build_group("12.0", PROBLEM, [51, 43], [single_turn(choice)], SCORES[:1], "actor-1")
    assert group.trajectories[0].policy_versions == (VersionSpan(2, 3), VersionSpan(3, 4), VersionSpan(4, 4))


def test_turns_and_observations_are_joined_as_they_came() -> None:
    completion = Completion()
    completion.append_turn(sampled("ab", (0, 3), finish_reason=FinishReason.LENGTH))
    completion.append_observation([7, 8])
    completion.append_turn(sampled("c", (0, 3), (1, 4)))
    assert (completion.num_turns, completion.num_tokens, completion.num_sampled) == (2, 7, 5)
    assert completion.finish_reason is FinishReason.STOP
    [trajectory] = build_group("12.0", PROBLEM, [51, 43], [completion], SCORES[:1], "actor-1").trajectories
    assert trajectory.token_ids.tolist() == [51, 43, 97, 98, 0, 7, 8, 99, 0]
    assert trajectory.loss_mask.tolist() == [False] * 2 + [True] * 3 + [False] * 2 + [True] * 2
    assert trajectory.behavior_logprobs.tolist() == [0, 0, -1, -2, -3, 0, 0, -1, -2]
    # Neighboring runs of the same version are merged across turns.
    assert trajectory.policy_versions == (VersionSpan(2, 3), VersionSpan(8, 4))
    assert trajectory.num_turns == 2


def test_a_score_too_few_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        build_group("12.0", PROBLEM, [51], [single_turn(sampled("7", (0, 0)))] * 2, SCORES[:1], "actor-1")


def test_a_broken_log_probability_dies_in_the_actor():
    choice = sampled("7", (0, 0))
    choice.logprobs[0] = np.nan
    with pytest.raises(ValueError, match="behavior_logprobs must be finite"):
        build_group("12.0", PROBLEM, [51], [single_turn(choice)], SCORES[:1], "actor-1")


def test_a_prompt_becomes_tokens_through_the_tasks_template():
    task = sums()
    assert task_prompt_ids(task, task.train[3], Characters()) == [ord(c) for c in "3+4="]


def test_special_tokens_end_a_completion_by_their_ids_since_they_never_show_in_the_text():
    assert split_stops(("<end>", "</answer>"), Characters()) == (("</answer>",), (0,))


def test_data_of_which_no_prompt_leaves_room_is_refused_with_the_numbers():
    task = sums(num_train=3)
    check_prompts_fit(task, Characters(), max_tokens=10, max_new_tokens=6)
    with pytest.raises(PromptsTooLongError) as refused:
        check_prompts_fit(task, Characters(), max_tokens=10, max_new_tokens=7)
    assert str(refused.value) == (
        "none of the 3 training prompts leaves room for max_new_tokens=7 in model.max_tokens=10: the shortest has 4"
        " tokens; raise model.max_tokens or lower max_new_tokens"
    )


def test_every_stage_of_a_curriculum_needs_a_prompt_that_fits():
    task = sums(num_train=3, long_prompt=0)
    leveled = replace(task, train=[replace(problem, level=1 + problem.prompt_id) for problem in task.train])
    stages = [Stage(min_level=2, until_step=9), Stage(max_new_tokens=2)]
    check_prompts_fit(leveled, Characters(), max_tokens=10, max_new_tokens=6, stages=stages)
    with pytest.raises(PromptsTooLongError, match=r"none of the 1 training prompts of curriculum stage 2 .*=2 in"):
        hard = [stages[0], Stage(max_level=1, max_new_tokens=2)]
        check_prompts_fit(leveled, Characters(), max_tokens=10, max_new_tokens=6, stages=hard)


def test_one_prompt_that_fits_is_enough():
    check_prompts_fit(sums(num_train=2, long_prompt=0), Characters(), max_tokens=10, max_new_tokens=6)
