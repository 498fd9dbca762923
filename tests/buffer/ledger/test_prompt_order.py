import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.curriculum_config import Skip
from buffer.ledger.prompt_order import RecentGroups, epoch_order

PROMPTS = np.arange(3, 53)


def order(stage: int = 1, epoch: int = 0, seed: int = 3, shuffle: bool = True) -> list[int]:
    return epoch_order(PROMPTS, shuffle=shuffle, seed=seed, stage=stage, epoch=epoch).tolist()


def test_an_epoch_deals_every_prompt_once_in_an_order_of_its_own():
    others = [order(), order(epoch=1), order(stage=2), order(seed=4), order(shuffle=False)]
    assert [sorted(one) for one in others] == [PROMPTS.tolist()] * 5
    assert len({tuple(one) for one in others}) == 5
    assert order() == order(), "the same after every restart"
    assert order(shuffle=False) == PROMPTS.tolist()


@given(
    history=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.25, 0.5, 1.0])), max_size=20),
    solved=st.builds(Skip, st.sampled_from([0.5, 1.0]), st.integers(0, 3)),
    unsolved=st.builds(Skip, st.sampled_from([0.0, 0.25]), st.integers(0, 3)),
    data=st.data(),
)
@settings(deadline=None)
def test_a_prompt_is_passed_over_after_enough_groups_in_a_row(
    history: list[tuple[int, float]], solved: Skip, unsolved: Skip, data: st.DataObject
):
    known = data.draw(st.integers(0, len(history)), label="groups in the ledger")
    rows = [(occurrence, *history[occurrence]) for occurrence in range(known)]
    recent = RecentGroups(5, max(solved.seen, unsolved.seen), rows)
    for occurrence in data.draw(st.permutations(range(known, len(history))), label="order of arrival"):
        recent.add(occurrence, *history[occurrence])
    expected = []
    for prompt in range(5):
        own = [success for seen, success in history if seen == prompt]
        good = bad = 0
        for success in own:
            good, bad = (good + 1) * (success >= solved.success), (bad + 1) * (success <= unsolved.success)
        expected.append((good >= solved.seen > 0) or (bad >= unsolved.seen > 0))
    assert recent.teach_nothing(np.arange(5), solved, unsolved).tolist() == expected
    assert recent.teach_nothing(np.array([3, 1]), solved, unsolved).tolist() == [expected[3], expected[1]]
