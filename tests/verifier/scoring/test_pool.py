"""The scoring pool with real processes, and with graders that hang, crash, use too much memory and raise."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from verifier.base import Completion, RewardSpec, Score, Verdict
from verifier.scoring.messages import Failure
from verifier.scoring.pool import ScoringPool
from verifier.scoring.worker import Worker

OBEDIENT = [RewardSpec("misbehaving_rewards:obedient"), RewardSpec("misbehaving_rewards:not_a_number", weight=0.0)]
DEADLINE_SECONDS = 0.5
SLACK_SECONDS = 5.0
"""Allowance for a slow machine."""


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


def workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [p for p in children if "forkserver" in " ".join(p.cmdline()) and not p.children()]


def test_a_reward_that_imports_numpy_gets_one_thread(pool: ScoringPool) -> None:
    assert verdicts(score(pool, "ask-for-one-thread")) == [Verdict.CORRECT]


def test_order_is_kept(pool: ScoringPool) -> None:
    scores = score(pool, "good", "bad", "", "x" * 3_000_000, "good")
    assert verdicts(scores) == [Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.WRONG, Verdict.CORRECT]
    assert [score.reward for score in scores] == [1.0, -0.5, -1.0, -0.5, 1.0]
    assert score(pool) == []


def test_many_groups_at_once_keep_their_order() -> None:
    pool = start(num_workers=2)

    async def all_groups() -> list[list[Score]]:
        groups = [[Completion(str(i + j), str(i)) for j in range(i % 4 + 1)] for i in range(100)]
        return await asyncio.gather(*(pool.score_group(group) for group in groups))

    with contextlib.closing(pool):
        for index, scores in enumerate(asyncio.run(all_groups())):
            assert verdicts(scores) == [Verdict.CORRECT] + [Verdict.WRONG] * (index % 4)


def test_the_others_of_a_group_do_not_pay_for_those_that_hang() -> None:
    texts = ["hang" if index in (3, 120) else "sleep 0.005" for index in range(200)]

    def seconds(pool: ScoringPool, texts: list[str]) -> float:
        start_time = time.monotonic()
        found = verdicts(score(pool, *texts))
        assert [found[index] is Verdict.TIMEOUT for index in range(len(texts))] == [text == "hang" for text in texts]
        return time.monotonic() - start_time

    with contextlib.closing(start(num_workers=2, deadline_seconds=4.0)) as pool:
        without = seconds(pool, [text for text in texts if text != "hang"])
        # Two deadlines pass in two workers at once, plus time to replace them. One after the other would take 8 s more.
        assert seconds(pool, texts) < without + 4.0 + 3.5


def test_where_completions_hang_the_next_process_stands_ready_and_may_die_too() -> None:
    others = {process.pid for process in workers()}
    with contextlib.closing(start(deadline_seconds=0.3)) as pool:
        assert verdicts(score(pool, "hang", "good")) == [Verdict.TIMEOUT, Verdict.CORRECT]
        until(lambda: len([p for p in workers() if p.pid not in others]) == 2)
        ours = [process for process in workers() if process.pid not in others]
        assert len(ours) == 2
        for process in ours:
            process.kill()
        assert verdicts(score(pool, "good", "hang", "good")) == [Verdict.CORRECT, Verdict.TIMEOUT, Verdict.CORRECT]
    assert not [process for process in workers() if process.pid not in others]


def test_a_process_that_is_killed_while_it_starts_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the kernel, when memory is short; one that is killed every time is an error."""
    launch, num_kills = Worker._launch, [2]

    def launch_and_kill(self: Worker) -> Any:
        process = launch(self)
        if num_kills[0]:
            num_kills[0] -= 1
            process.process.kill()
        return process

    others = {process.pid for process in workers()}

    def kill_ours() -> None:
        """The death of its process makes the pool start another one."""
        for process in workers():
            if process.pid not in others:
                process.kill()
                process.wait()

    with contextlib.closing(start()) as pool:
        monkeypatch.setattr(Worker, "_launch", launch_and_kill)
        kill_ours()
        assert verdicts(score(pool, "good")) == [Verdict.CORRECT]
        assert num_kills == [0]
        num_kills[0] = 1000
        kill_ours()
        with pytest.raises(RuntimeError, match="the scoring pool broke: the scoring process was ended by a signal"):
            score(pool, "good")


@pytest.mark.parametrize("text", ["hang", "spin-in-c"])
def test_only_the_hanging_completion_times_out(pool: ScoringPool, text: str) -> None:
    before, start_time = pool.counts(), time.monotonic()
    scores = score(pool, "good", text, "bad")
    assert verdicts(scores) == [Verdict.CORRECT, Verdict.TIMEOUT, Verdict.WRONG]
    assert (scores[1].reward, scores[1].skipped) == (-0.5, False)
    assert pool.counts() == before | {"timeouts": before["timeouts"] + 1}
    assert time.monotonic() - start_time < DEADLINE_SECONDS + SLACK_SECONDS


def test_the_deadline_is_each_completions_own(pool: ScoringPool) -> None:
    assert verdicts(score(pool, *["sleep 0.2"] * 4)) == [Verdict.WRONG] * 4


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("crash", Verdict.CRASH),
        ("exit", Verdict.CRASH),
        ("eat", Verdict.CRASH),
        ("fork", Verdict.CRASH),
        ("sys.exit", Verdict.ERROR),
        ("raise", Verdict.ERROR),
        ("recurse", Verdict.ERROR),
        ("nan", Verdict.ERROR),
        ("print", Verdict.WRONG),
    ],
)
def test_only_the_completion_to_blame_fails(pool: ScoringPool, text: str, verdict: Verdict) -> None:
    before = pool.counts()
    scores = score(pool, "good", text, "bad")
    assert verdicts(scores) == [Verdict.CORRECT, verdict, Verdict.WRONG]
    assert scores[1].reward == -0.5
    kind = {Verdict.CRASH: "crashes", Verdict.ERROR: "errors"}.get(verdict)
    assert pool.counts() == before | ({kind: before[kind] + 1} if kind else {})


def test_a_process_that_a_reward_leaves_behind_is_killed(pool: ScoringPool, tmp_path: Path) -> None:
    assert verdicts(score(pool, "fork-and-stay", gold=str(tmp_path / "pid"))) == [Verdict.CRASH]
    assert verdicts(score(pool, "good")) == [Verdict.CORRECT]
    # The process may have been killed before it wrote its process id.
    text = (tmp_path / "pid").read_text() if (tmp_path / "pid").exists() else ""
    until(lambda: not (text and is_running(int(text))))


def test_a_worker_killed_between_groups_is_replaced(pool: ScoringPool) -> None:
    assert workers()
    for worker in workers():
        worker.kill()
    assert verdicts(score(pool, "good", "bad")) == [Verdict.CORRECT, Verdict.WRONG]


def test_a_completion_is_not_to_blame_when_somebody_else_kills_its_worker(pool: ScoringPool) -> None:
    before = pool.counts()

    async def kill_while_scoring() -> list[Score]:
        waiting = asyncio.create_task(pool.score_group([Completion("sleep 0.3", "good")]))
        await asyncio.sleep(0.1)
        for worker in workers():
            worker.kill()
        return await waiting

    assert verdicts(asyncio.run(kill_while_scoring())) == [Verdict.WRONG]
    assert pool.counts() == before


def test_the_processor_is_limited_where_nobody_keeps_the_deadline() -> None:
    worker = Worker(OBEDIENT, deadline_seconds=0.3, memory_bytes=1 << 30)
    worker._deadline_seconds = 60.0  # The pool does not enforce the deadline in time.
    try:
        found = worker.score(Completion("spin-in-c", ""))
    finally:
        worker.close()
    assert isinstance(found, Failure)
    assert (found.verdict, found.reason) == (Verdict.TIMEOUT, "it used more of the processor than the deadline allows")


def test_workers_are_other_processes_without_torch(pool: ScoringPool) -> None:
    assert verdicts(score(pool, "pid", "torch", gold=str(os.getpid()))) == [Verdict.CORRECT] * 2


def test_retry_scores_again_in_a_fresh_process_and_then_counts_as_wrong(tmp_path: Path) -> None:
    with contextlib.closing(start(on_timeout="retry", on_error="retry", max_retries=2, deadline_seconds=0.3)) as pool:
        [found] = score(pool, "hang-once", gold=str(tmp_path / "mark"))
        assert (found.verdict, found.reward, pool.counts()["retries"]) == (Verdict.CORRECT, 1.0, 1)
        [found] = score(pool, "raise")
        assert (found.verdict, found.reward, found.skipped) == (Verdict.ERROR, -0.5, False)
        assert pool.counts() == {"timeouts": 0, "crashes": 0, "errors": 1, "retries": 3, "skipped": 0}


def test_what_becomes_of_a_failure_is_configured_by_its_kind() -> None:
    with contextlib.closing(start(on_timeout="no_answer", on_error="skip", deadline_seconds=0.3)) as pool:
        late, good, crashed = score(pool, "hang", "good", "crash")
        assert (late.verdict, late.reward, late.skipped) == (Verdict.TIMEOUT, -1.0, False)
        assert (good.reward, good.skipped) == (1.0, False)
        assert (crashed.verdict, crashed.reward, crashed.skipped) == (Verdict.CRASH, -0.5, True)
        assert pool.counts() == {"timeouts": 1, "crashes": 1, "errors": 0, "retries": 0, "skipped": 1}
    with pytest.raises(ValueError, match="on_timeout is 'zero'"):
        start(on_timeout="zero")


def test_close_ends_the_workers_and_the_waiting() -> None:
    pool = start(deadline_seconds=60.0)

    async def close_while_waiting() -> None:
        waiting = asyncio.create_task(pool.score_group([Completion("hang", ""), Completion("good", "")]))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(pool.close)
        with pytest.raises(asyncio.CancelledError):
            await waiting

    start_time = time.monotonic()
    asyncio.run(close_while_waiting())
    assert time.monotonic() - start_time < SLACK_SECONDS
    with pytest.raises(RuntimeError, match="closed"):
        score(pool, "good")
    pool.close()


def test_what_nobody_waits_for_any_more_is_not_scored(pool: ScoringPool) -> None:
    before = pool.counts()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.score_group([Completion("hang", "")] * 50), 0.1)

    asyncio.run(give_up())
    assert verdicts(score(pool, "good")) == [Verdict.CORRECT]
    assert pool.counts()["timeouts"] <= before["timeouts"] + 1


def test_a_pool_whose_workers_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"no scoring process started .*not here"):
        start([RewardSpec("misbehaving_rewards:broken_in_workers", options={"parent": os.getpid()})])


def test_whoever_waits_hears_that_workers_start_no_more(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with contextlib.closing(
        start([RewardSpec("misbehaving_rewards:broken_from_now_on", options={"mark": str(mark)})])
    ) as pool:
        mark.touch()
        with pytest.raises(RuntimeError, match=r"the scoring pool broke: .*: not any more"):
            score(pool, "crash", "good", "good")


def test_a_fork_server_that_is_killed_is_replaced() -> None:
    with contextlib.closing(start()) as pool:
        [server] = {worker.ppid() for worker in workers()}
        psutil.Process(server).kill()
        assert verdicts(score(pool, "good", "bad")) == [Verdict.CORRECT, Verdict.WRONG]


SCRIPT = """
import asyncio, psutil, sys
sys.path[:0] = {paths!r}
from verifier.base import Completion, RewardSpec
from verifier.scoring.pool import ScoringPool

async def hang(pool):
    children = [process.pid for process in psutil.Process().children(True)]
    asyncio.get_running_loop().call_later(0.5, lambda: print(*children, flush=True))
    await pool.score_group([Completion("spin", "")])

if __name__ == "__main__":
    spec = [RewardSpec("misbehaving_rewards:obedient")]
    asyncio.run(hang(ScoringPool(spec, num_workers=1, deadline_seconds=60.0, memory_bytes=1 << 30)))
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie has ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_spinning_worker_dies_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    here = Path(__file__).parent
    script.write_text(SCRIPT.format(paths=[str(here), str(here.parents[2])]))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 3  # resource tracker, fork server, worker
    until(lambda: not any(is_running(pid) for pid in children))


def test_mathematics_is_scored_in_workers() -> None:
    pool = start([RewardSpec("boxed_format")], memory_bytes=2 << 30, deadline_seconds=5.0)
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
