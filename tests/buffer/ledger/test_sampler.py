from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from buffer.ledger.admission import Limits
from buffer.ledger.sampler import SAMPLERS, Candidate, balance, fifo, next_batch, prioritized
from tests.buffer.ledger.slow_batch import Group, expected_batch


def test_fifo_takes_the_groups_due_first_and_returns_issue_order():
    ready = [Candidate(9, 4), Candidate(3, 5), Candidate(1, 5), Candidate(7, 4)]
    assert next_batch(fifo, ready, {}, {4: 2, 5: 2}, 5, Limits(4, 3)) == [1, 7, 9]


def test_fifo_waits_for_enough_groups_and_for_leases_that_are_due():
    limits = Limits(1, 2)
    assert next_batch(fifo, [Candidate(0, 5)], {}, {5: 1}, 5, limits) == []
    ready = [Candidate(0, 5), Candidate(1, 5)]
    assert next_batch(fifo, ready, {4: 1}, {5: 2}, 5, limits) == []
    assert next_batch(fifo, ready, {5: 1}, {5: 2}, 5, limits) == [0, 1]


@pytest.mark.parametrize("sampler", SAMPLERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), next_version=st.integers(4, 9), waits=st.booleans())
def test_every_sampler_chooses_as_its_slow_writing(
    make_config: Any, sampler: str, data: st.DataObject, next_version: int, waits: bool
):
    config = make_config(
        groups_per_batch=3, max_staleness=3, sampler=sampler, max_uses=2, seed=5, on_stale="wait" if waits else "drop"
    )
    versions = st.integers(next_version - 3, next_version)
    described = data.draw(st.lists(st.tuples(versions, st.booleans(), st.sampled_from([0.0, 0.25, 0.5])), max_size=9))
    leased = data.draw(st.lists(st.integers(next_version - 4, next_version), max_size=4))
    groups = [Group(k, *values) for k, values in enumerate(described)]
    candidates = [Candidate(g.occurrence, g.version, int(g.was_used), g.spread) for g in groups]
    in_time = [v for v in leased if waits or v + 3 >= next_version + 1]
    ready = Counter(g.version for g in groups if not g.was_used)
    ways = {"seed": 5, "waits": waits}
    chosen = next_batch(SAMPLERS[sampler], candidates, Counter(in_time), ready, next_version, config.limits, **ways)
    if chosen:
        assert chosen == expected_batch(config, groups, leased, next_version)
        again = next_batch(
            SAMPLERS[sampler], candidates[::-1], Counter(in_time), ready, next_version, config.limits, **ways
        )
        assert again == chosen, "the order in which the file gives them is of no matter"
    else:
        assert len(groups) < 3 or (waits and leased)


def test_priority_is_the_spread_of_rewards():
    candidates = [Candidate(k, 0, 0, spread) for k, spread in enumerate((0.1, 0.0, 0.3, 0.6))]
    firsts = Counter(prioritized(candidates, np.random.default_rng(seed))[0].occurrence for seed in range(2000))
    assert [firsts[k] / 2000 for k in range(4)] == pytest.approx([0.1, 0, 0.3, 0.6], abs=0.03)
    assert prioritized(candidates, np.random.default_rng(0))[-1].occurrence == 1, "no spread comes last"


@given(st.integers(1, 4).flatmap(lambda r: st.tuples(st.just(r), st.integers(1, 6))), st.data())
def test_shards_are_equal_complete_and_balanced_in_every_part(shape: tuple[int, int], data: st.DataObject):
    world_size, places = shape
    num_parts = data.draw(st.integers(1, 3))
    size = world_size * places
    costs = data.draw(st.lists(st.integers(1, 10_000), min_size=size * num_parts, max_size=size * num_parts))
    shards = balance(costs, world_size, num_parts)
    assert sorted(index for shard in shards for index in shard) == list(range(len(costs)))
    assert all(shard == sorted(shard) for shard in shards)
    for part in range(num_parts):
        # The learner gives every optimizer step the same number of groups of its shard, in order.
        mine = [shard[part * places : (part + 1) * places] for shard in shards]
        assert sorted(index for own in mine for index in own) == list(range(part * size, (part + 1) * size))
        ordered = sorted((costs[index] for own in mine for index in own), reverse=True)
        widest = max(ordered[i] - ordered[i + world_size - 1] for i in range(0, size, world_size))
        loads = [sum(costs[index] for index in own) for own in mine]
        assert max(loads) - min(loads) <= widest
        assert max(loads) <= sum(loads) / world_size + widest
    assert shards == balance(costs, world_size, num_parts)


def test_on_ragged_batches_the_heaviest_rank_is_within_three_hundredths_of_the_mean():
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(64, 4096, size=(64, 8))
        costs = (lengths * (1 + lengths / 2000)).sum(axis=1).tolist()
        loads = [sum(costs[index] for index in shard) for shard in balance(costs, 8)]
        assert max(loads) < 1.03 * sum(costs) / 8


def test_balance_separates_the_long_groups():
    assert balance([100, 100, 1, 1], 2) == [[0, 2], [1, 3]]
    assert balance([100, 100, 1, 1], 2, 2) == [[0, 2], [1, 3]]
    assert balance([100, 1, 1, 100], 2, 2) == [[0, 3], [1, 2]]


@pytest.mark.parametrize(("size", "world_size"), [(3, 2), (1, 4), (2, 0)])
def test_balance_refuses_unequal_shards(size: int, world_size: int):
    with pytest.raises(ValueError, match=f"{size} groups cannot be cut into {world_size} equal shards"):
        balance([1] * size, world_size)
