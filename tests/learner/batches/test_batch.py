import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.trajectory import TrajectoryGroup
from learner.batches.batch import TrainingBatch, occurrence_ranges
from tests.learner.samples import CPU, make_batch, make_trajectory


def lengths_batch(lengths: list[int], group_sizes: list[int] | None = None) -> TrainingBatch:
    """Trajectories of these lengths; all but the first token are scored."""
    groups, used = [], 0
    for index, size in enumerate(group_sizes or [len(lengths)]):
        name = f"g{index}"
        members = [
            make_trajectory(i, [10 * i + t for t in range(length)], [t > 0 for t in range(length)], group=name)
            for i, length in enumerate(lengths[used : used + size], start=used)
        ]
        used += size
        groups.append(TrajectoryGroup(name, 0, tuple(members)))
    return make_batch(groups)


def two_groups() -> list[TrajectoryGroup]:
    first = make_trajectory(
        0,
        [5, 6, 7, 8, 9],
        [False, True, True, False, True],
        group="a",
        reward=1.0,
        versions=((1, 3), (4, 5)),
        logprobs=[-9, -1, -2, -9, -3],
    )
    second = make_trajectory(1, [5, 4], [False, True], group="a", reward=-0.5, versions=((0, 4),), logprobs=[-9, -4])
    third = make_trajectory(0, [8, 8, 8], [False, False, True], group="b", prompt_id=1, logprobs=[-9, -9, -5])
    return [TrajectoryGroup("a", 0, (first, second)), TrajectoryGroup("b", 1, (third,))]


def test_groups_become_flat_tensors_over_scored_tokens():
    batch = TrainingBatch.from_groups(two_groups(), [4, 7], 7, CPU)
    assert (batch.policy_version, batch.staleness, batch.num_tokens, batch.num_scored_tokens) == (7, (4, 7), 10, 5)
    assert batch.group_index.tolist() == [0, 0, 1]
    assert batch.sequence_index.tolist() == [0, 0, 0, 1, 2]
    assert batch.rewards.tolist() == [1.0, -0.5, 0.0]
    assert batch.behavior_logprobs.tolist() == [-1, -2, -3, -4, -5]
    assert batch.rewards.dtype == batch.behavior_logprobs.dtype == torch.float32


def test_every_token_knows_the_version_that_sampled_it():
    batch = TrainingBatch.from_groups(two_groups(), [4, 7], 7, CPU)
    # Spans (1, 3) and (4, 5): tokens 1 and 2 are of version 3, token 4 of version 5.
    assert batch.token_versions.tolist() == [3, 3, 5, 4, 0]


def test_a_microbatch_is_packed_with_restarting_positions():
    (micro,) = make_batch(two_groups(), 7).microbatches(range(0, 3), 100)
    assert micro.token_ids.tolist() == [5, 6, 7, 8, 9, 5, 4, 8, 8, 8]
    assert micro.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]
    assert micro.boundaries == (0, 5, 7, 10)
    assert micro.targets.tolist() == [1, 2, 4, 6, 9]
    assert micro.scored == slice(0, 5)
    # The second sequence has a prefix in common with the first one.
    assert micro.shared is not None
    # No score depends on the last token of a sequence, so that token is not computed.
    assert micro.shared.computed.tolist() == [0, 1, 2, 3, 7, 8]
    assert micro.shared.source.tolist() == [0, 1, 2, 3, 0, 0, 0, 4, 5, 0]


def test_microbatches_fill_the_budget_and_a_longer_trajectory_stands_alone():
    batch = lengths_batch([4, 3, 5, 20, 2, 6])
    micros = batch.microbatches(range(0, 6), 8)
    assert [m.boundaries for m in micros] == [(0, 4, 7), (0, 5), (0, 20), (0, 2, 8)]
    assert [m.scored for m in micros] == [slice(0, 5), slice(5, 9), slice(9, 28), slice(28, 34)]


def test_a_prompt_that_is_computed_once_takes_its_place_in_the_budget_once():
    groups = []
    for index in range(2):
        name, prompt = f"g{index}", [100 * index + t for t in range(10)]
        members = [
            make_trajectory(i, [*prompt, 90 + i, 9], [False] * 10 + [True] * 2, group=name, prompt_id=index)
            for i in range(4)
        ]
        groups.append(TrajectoryGroup(name, index, tuple(members)))
    batch = make_batch(groups)
    assert batch.shared_prefix_lengths == (0, 10, 10, 10, 0, 10, 10, 10)
    # A group has 12 + 3 x 2 computed tokens. A microbatch that begins inside a group computes the prompt again.
    assert [len(m.boundaries) - 1 for m in batch.microbatches(range(0, 8), 18)] == [4, 4]
    assert [len(m.boundaries) - 1 for m in batch.microbatches(range(0, 8), 16)] == [2, 2, 2, 2]
    assert batch.num_microbatches(range(1, 8), 16) == 3
    # On a CUDA device attention holds the prompt once per trajectory.
    on_device = TrainingBatch.from_groups(groups, [0, 0], 0, torch.device("meta"))
    assert on_device.shared_prefix_lengths == batch.shared_prefix_lengths
    assert [len(m.boundaries) - 1 for m in on_device.microbatches(range(0, 8), 24)] == [2, 2, 2, 2]


def test_a_budget_below_every_trajectory_gives_one_each():
    assert [m.boundaries for m in lengths_batch([4, 3, 5]).microbatches(range(0, 3), 1)] == [(0, 4), (0, 3), (0, 5)]


def test_minibatches_have_equally_many_groups_whatever_their_sizes():
    batch = lengths_batch([3, 3, 4, 2, 5, 6], group_sizes=[1, 2, 2, 1])
    assert batch.split(1) == [range(0, 6)]
    assert batch.split(2) == [range(0, 3), range(3, 6)]
    assert batch.split(4) == [range(0, 1), range(1, 3), range(3, 5), range(5, 6)]
    assert [batch.scored_slice(part) for part in batch.split(2)] == [slice(0, 7), slice(7, 17)]


def test_the_microbatches_of_a_minibatch_hold_only_its_trajectories():
    batch = lengths_batch([3, 3, 4, 2], group_sizes=[2, 2])
    (micro,) = batch.microbatches(batch.split(2)[1], 100)
    assert micro.token_ids.tolist() == [20, 21, 22, 23, 30, 31]
    assert micro.scored == slice(4, 8)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=8), st.integers(1, 30), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_microbatches_cover_everything_once_in_order_within_the_budget(lengths: list[int], budget: int, at_least: int):
    batch = lengths_batch(lengths)
    everything = range(len(lengths))
    micros = batch.microbatches(everything, budget, at_least)
    assert len(micros) == min(max(batch.num_microbatches(everything, budget), at_least), len(lengths))
    sizes = [np.diff(m.boundaries).tolist() for m in micros]
    assert [length for size in sizes for length in size] == lengths
    assert all(sum(size) <= budget or len(size) == 1 for size in sizes)
    assert torch.cat([m.token_ids for m in micros]).tolist() == [t for x in batch.trajectories for t in x.token_ids]
    assert [m.scored.start for m in micros] == [0, *(m.scored.stop for m in micros[:-1])]
    assert micros[-1].scored.stop == batch.num_scored_tokens


def test_trajectories_of_several_versions_are_told_apart():
    batch = make_batch(two_groups())
    assert batch.of_one_version.tolist() == [False] * 3 + [True, True]


def test_the_prompts_of_a_batch_are_named_as_ranges():
    groups = []
    for number in (7, 3, 4, 5, 12):
        name = f"{number}.1"
        groups.append(TrajectoryGroup(name, 0, (make_trajectory(0, [1, 2], [False, True], group=name),)))
    assert occurrence_ranges(groups) == "3-5,7,12"
