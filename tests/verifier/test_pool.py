"""The scoring pool: real processes, with graders that hang, crash, eat memory and raise."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from verifier.base import Completion, RewardSpec, Score, Verdict
from verifier.pool import ScoringPool

OBEDIENT = [RewardSpec("misbehaving_rewards:obedient")]
DEADLINE_SECONDS = 0.5


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


def start(spec: list[RewardSpec] = OBEDIENT, **changes: Any) -> ScoringPool:
    bounds = {"num_workers": 1, "deadline_seconds": DEADLINE_SECONDS, "memory_bytes": 1 << 30} | changes
    return ScoringPool(spec, **bounds)


@pytest.fixture(scope="module")
def pool(_importable: None) -> Iterator[ScoringPool]:
    pool = start()
    yield pool
    pool.close()


def score(pool: ScoringPool, *texts: str, gold: str = "good") -> list[Score]:
    return asyncio.run(pool.score_group([Completion(text, gold) for text in texts]))


def verdicts(scores: list[Score]) -> list[Verdict]:
    return [score.verdict for score in scores]


def test_order_is_kept(pool: ScoringPool) -> None:
    scores = score(pool, "good", "bad", "", "good")
    assert verdicts(scores) == [Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.CORRECT]
    assert [score.reward for score in scores] == [1.0, -0.5, -1.0, 1.0]
    assert score(pool) == []


def test_many_groups_at_once_keep_their_order() -> None:
    pool = start(num_workers=2)

    async def all_groups() -> list[list[Score]]:
        groups = [[Completion(str(i + j), str(i)) for j in range(i % 4 + 1)] for i in range(100)]
        return await asyncio.gather(*(pool.score_group(group) for group in groups))

    try:
        for index, scores in enumerate(asyncio.run(all_groups())):
            assert verdicts(scores) == [Verdict.CORRECT] + [Verdict.WRONG] * (index % 4)
    finally:
        pool.close()


@pytest.mark.parametrize("text", ["hang", "spin"])
def test_only_the_hanging_completion_times_out(pool: ScoringPool, text: str) -> None:
    num_timeouts, start_time = pool.num_timeouts, time.monotonic()
    scores = score(pool, "good", text, "bad")
    assert verdicts(scores) == [Verdict.CORRECT, Verdict.TIMEOUT, Verdict.WRONG]
    assert scores[1].reward == -0.5
    assert pool.num_timeouts == num_timeouts + 1
    assert time.monotonic() - start_time < 10
    assert verdicts(score(pool, "good")) == [Verdict.CORRECT]


def test_a_slow_group_of_quick_completions_gets_real_scores(pool: ScoringPool) -> None:
    num_timeouts = pool.num_timeouts
    assert verdicts(score(pool, *["sleep 0.2"] * 4)) == [Verdict.WRONG] * 4
    assert pool.num_timeouts == num_timeouts


@pytest.mark.parametrize("text", ["crash", "exit", "eat", "raise"])
def test_only_the_crashing_completion_is_an_error(pool: ScoringPool, text: str) -> None:
    num_errors = pool.num_errors
    scores = score(pool, "good", text, "bad")
    assert verdicts(scores) == [Verdict.CORRECT, Verdict.ERROR, Verdict.WRONG]
    assert scores[1].reward == -0.5
    assert pool.num_errors == num_errors + 1


def test_a_worker_killed_between_groups_is_replaced(pool: ScoringPool) -> None:
    workers = [
        p
        for p in psutil.Process().children(recursive=True)
        if "forkserver" in " ".join(p.cmdline()) and not p.children()
    ]
    assert workers
    for worker in workers:
        worker.kill()
    assert verdicts(score(pool, "good", "bad")) == [Verdict.CORRECT, Verdict.WRONG]


def test_workers_are_other_processes_without_torch(pool: ScoringPool) -> None:
    assert verdicts(score(pool, "pid", "torch", gold=str(os.getpid()))) == [Verdict.CORRECT] * 2


def test_on_timeout_chooses_the_reward() -> None:
    pool = start(on_timeout="no_answer")
    try:
        assert score(pool, "hang")[0].reward == -1.0
    finally:
        pool.close()
    with pytest.raises(ValueError, match="on_timeout is 'zero'"):
        start(on_timeout="zero")


def test_close_ends_the_workers_and_the_waiting() -> None:
    pool = start(deadline_seconds=60.0)

    async def close_while_waiting() -> None:
        waiting = asyncio.create_task(pool.score_group([Completion("hang", "")]))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(pool.close)
        with pytest.raises(asyncio.CancelledError):
            await waiting

    start_time = time.monotonic()
    asyncio.run(close_while_waiting())
    assert time.monotonic() - start_time < 5
    with pytest.raises(RuntimeError, match="closed"):
        score(pool, "good")
    pool.close()


def test_a_pool_whose_workers_cannot_start_says_so() -> None:
    with pytest.raises(RuntimeError, match="no scoring process started"):
        start([RewardSpec("misbehaving_rewards:broken_in_workers", options={"parent": os.getpid()})])


SCRIPT = """
import asyncio, psutil, sys
sys.path[:0] = {paths!r}
from verifier.base import Completion, RewardSpec
from verifier.pool import ScoringPool

async def hang(pool):
    children = [process.pid for process in psutil.Process().children(True)]
    asyncio.get_running_loop().call_later(0.5, lambda: print(*children, flush=True))
    await pool.score_group([Completion("spin", "")])

if __name__ == "__main__":
    spec = [RewardSpec("misbehaving_rewards:obedient")]
    asyncio.run(hang(ScoringPool(spec, num_workers=1, deadline_seconds=60.0, memory_bytes=1 << 30)))
"""


def is_running(pid: int) -> bool:
    """A zombie, which only waits for a parent to read its status, has ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_spinning_worker_dies_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    here = Path(__file__).parent
    script.write_text(SCRIPT.format(paths=[str(here), str(here.parents[1])]))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 3  # resource tracker, fork server, worker
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.05)


def test_mathematics_is_scored_in_workers() -> None:
    pool = start([RewardSpec("boxed_math")], memory_bytes=2 << 30, deadline_seconds=5.0)
    completions = [
        Completion(r"\boxed{0.5}", r"\frac{1}{2}"),
        Completion(r"\boxed{10^{10^{10}}}", "5"),
        Completion("and", "5", truncated=True),
        Completion(r"\boxed{\sum_{j=1}^{n} j}", r"\sum_{k=1}^{n} k"),
    ]
    try:
        scores = asyncio.run(pool.score_group(completions))
    finally:
        pool.close()
    assert verdicts(scores) == [Verdict.CORRECT, Verdict.WRONG, Verdict.TRUNCATED, Verdict.CORRECT]
