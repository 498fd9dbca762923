"""The actor against the real buffer and the real scoring pool; only engine and weight store are stand-ins."""

import asyncio
import errno
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from actors.__main__ import exit_status
from actors.actor import Actor
from actors.config import ActorConfig
from actors.metrics import Meter
from actors.rollouts.trajectories import build_group, single_turn
from actors.tasks.games.sokoban import SokobanEpisode
from actors.tasks.task import Task
from buffer.config import BufferConfig
from buffer.curriculum_config import Stage
from buffer.ledger.audit import audit
from buffer.process import REPLACED
from buffer.service.peers import LONGEST_HEARTBEAT_SECONDS
from buffer.service.server import Server
from buffer.transport import messages
from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.credentials import Credentials
from buffer.transport.packed_group import pack_group, unpack_group
from tests.actors.stand_ins import CORRIDOR, TURNS, Characters, FakeEngine, FakeWeights, sampled, sums
from verifier.base import RewardSpec, Score, Verdict
from verifier.scoring.pool import ScoringPool

SECONDS = 20.0


@pytest.fixture(scope="module")
def pool() -> Iterator[ScoringPool]:
    options = {"num_workers": 1, "deadline_seconds": 5.0, "memory_bytes": 2 << 30}
    started = ScoringPool([RewardSpec("boxed_exact")], **options)  # type: ignore[arg-type]
    yield started
    started.close()


@dataclass
class Loop:
    """A running actor, and the learner's connection to the buffer."""

    actor: Actor
    engine: FakeEngine
    weights: FakeWeights
    learner: Connection
    work: asyncio.Task[None]
    run_dir: Path

    async def ask(self, message: messages.Message) -> Any:
        return await asyncio.wait_for(asyncio.wrap_future(self.learner.request(message)), SECONDS)

    async def batch(self, version: int) -> messages.Shard:
        shard = await self.ask(messages.BatchRequest(version, 0, 1))
        assert isinstance(shard, messages.Shard)
        return shard

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(SECONDS):
            while not condition():
                if self.work.done():
                    self.work.result()
                await asyncio.sleep(0.01)

    def counts(self) -> dict[str, int]:
        found = audit(self.run_dir)
        assert found.holds
        return found.counts | {f"dropped:{reason}": count for reason, count in found.dropped.items()}


Looper = Callable[..., AbstractAsyncContextManager[Loop]]


@pytest.fixture
def loop(tmp_path: Path, pool: ScoringPool) -> Looper:
    @asynccontextmanager
    async def run(
        task: Task | None = None,
        max_staleness: int = 1,
        lease_seconds: float = 60.0,
        scoring: ScoringPool = pool,
        engine: FakeEngine | None = None,
        stages: Sequence[Stage] = (),
        **changes: Any,
    ) -> AsyncIterator[Loop]:
        task = task or sums()
        settings = {"samples_per_group": 2, "max_new_tokens": 16, "max_tokens": 32, "heartbeat_seconds": 0.1}
        config = ActorConfig("model", **(settings | changes))  # type: ignore[arg-type]
        limits = {"groups_per_batch": 2, "max_staleness": max_staleness, "durability": "memory", "shuffle": False}
        limits |= {"lease_seconds": lease_seconds, "stages": list(stages)}
        server = Server(
            BufferConfig(str(tmp_path), "tcp://127.0.0.1:*", len(task.train), task.fingerprint, **limits),  # type: ignore[arg-type]
            Credentials.plain("test"),
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        learner, buffer = (
            Connection(server.address, name, Credentials.plain("test"), timeout_seconds=SECONDS)
            for name in ("learner", "actor-0")
        )
        engine, weights = engine or FakeEngine(), FakeWeights()
        try:
            parts = engine, scoring, buffer, weights, tmp_path
            actor = Actor("actor-0", config, task, Characters(), *parts, max_staleness)  # type: ignore[arg-type]
            work = asyncio.create_task(actor.run())
            running = Loop(actor, engine, weights, learner, work, tmp_path)
            learner.epoch = (await running.ask(messages.LearnerHello(0))).epoch
            yield running
            work.cancel()
            await asyncio.wait([work], timeout=SECONDS)
        finally:
            buffer.close()
            learner.close()
            server.stop()
            thread.join()

    return run


def test_prompts_come_back_as_scored_groups(loop: Looper):
    async def check() -> None:
        async with loop() as running:
            running.weights.publish(0)
            shard = await running.batch(0)
            assert len(shard.groups) == 2
            for packed in shard.groups:
                group = unpack_group(packed)
                right, wrong = group.trajectories
                assert (right.verdict, wrong.verdict) == ("correct", "wrong")
                assert right.reward > wrong.reward
                prompt = "".join(map(chr, right.token_ids[~right.loss_mask]))
                assert prompt == f"{group.prompt_id}+4="
                assert right.oldest_version == right.newest_version == 0
                assert right.actor_id == "actor-0"
            await running.until(lambda: running.counts()["ready"] == 2)
            assert running.counts() == {"pending": 0, "leased": 0, "ready": 2, "used": 2, "done": 0}

    asyncio.run(check())


def test_nothing_is_sampled_before_the_first_weights(loop: Looper):
    async def check() -> None:
        async with loop() as running:
            await asyncio.sleep(0.2)
            assert running.engine.requests == []
            running.weights.publish(0)
            await running.until(lambda: running.engine.requests)
            assert running.weights.fetched == [0]

    asyncio.run(check())


def test_an_actor_with_old_weights_waits_and_newer_weights_unblock_it(loop: Looper):
    async def check() -> None:
        async with loop(max_staleness=1) as running:
            running.weights.publish(0)
            assert (await running.batch(0)).staleness == (0, 0)
            assert (await running.batch(1)).staleness == (1, 1)
            # Version 0 is too old for the batch of version 2, so the buffer does not answer the lease request.
            sampled_so_far = len(running.engine.requests)
            waiting = asyncio.ensure_future(running.batch(2))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            assert len(running.engine.requests) == sampled_so_far == 4
            running.weights.publish(2)
            assert (await waiting).staleness == (0, 0)
            await running.until(lambda: running.actor.policy_version == 2)
            assert running.weights.fetched == [0, 2]

    asyncio.run(check())


def test_weights_that_arrive_while_sampling_show_in_the_group(loop: Looper):
    async def check() -> None:
        async with loop() as running:
            running.engine.open.clear()
            running.weights.publish(0)
            await running.until(lambda: running.engine.requests)
            running.weights.publish(1)
            await running.until(lambda: running.engine.version == 1)
            running.engine.open.set()
            group = unpack_group((await running.batch(0)).groups[0])
            spans = group.trajectories[0].policy_versions
            assert [(span.start, span.version) for span in spans] == [(4, 0), (6, 1)]

    asyncio.run(check())


def test_a_prompt_that_leaves_no_room_is_dropped_and_the_others_go_on(loop: Looper):
    async def check() -> None:
        async with loop(sums(long_prompt=0)) as running:
            running.weights.publish(0)
            assert all(packed.header.prompt_id != 0 for packed in (await running.batch(0)).groups)
            assert running.counts()["dropped:prompt_too_long"] == 1

    asyncio.run(check())


def test_a_stage_of_the_curriculum_says_how_many_completions_and_how_long(loop: Looper):
    """The long prompt leaves room for the first stage's shorter completions, but not for the run's."""
    stages = [Stage(samples_per_group=3, max_new_tokens=16, until_step=4), Stage()]
    limits = {"samples_per_group": 2, "max_new_tokens": 40, "max_tokens": 80}

    async def check() -> None:
        async with loop(sums(long_prompt=0), max_staleness=0, stages=stages, **limits) as running:
            sizes = []
            for version in range(7):
                running.weights.publish(version)
                shard = await running.batch(version)
                sizes += [len(packed.header.rewards) for packed in shard.groups]
                if version == 3:
                    assert running.counts().get("dropped:prompt_too_long", 0) == 0
            assert sizes == [3] * 8 + [2] * 6
            assert running.counts()["dropped:prompt_too_long"] == 1

    asyncio.run(check())


def test_an_evaluation_is_reported_once_with_the_version_it_measured(loop: Looper):
    async def check() -> None:
        async with loop(evaluation_prompts=2) as running:
            running.weights.publish(0)
            await running.ask(messages.EvaluationRequest(0))
            reports: tuple[messages.EvaluationReport, ...] = ()
            while not reports:
                reports = (await running.ask(messages.EvaluationQuery(0))).reports
                await asyncio.sleep(0.01)
            [report] = reports
            assert (report.requested_version, report.policy_version, report.num_prompts) == (0, 0, 2)
            # The engine's only completion is correct, and its length is that of the text and the end token.
            assert (report.pass_at_1, report.completion_tokens_mean) == (1.0, len(r"\boxed{12}") + 1)
            asked = [(name, seed) for name, seed in running.engine.requests if name.startswith("evaluation")]
            assert [name for name, _ in asked] == ["evaluation-0-8", "evaluation-0-9"]
            assert len({seed for _, seed in asked}) == 2
            assert audit(running.run_dir).evaluations == {"reported": 1}

    asyncio.run(check())


def test_heartbeats_name_the_evaluation_under_way_until_its_report_has_arrived(
    loop: Looper, monkeypatch: pytest.MonkeyPatch
):
    async def check() -> None:
        async with loop() as running:
            said: list[tuple[int, ...]] = []
            request = running.actor.buffer.request

            def listen(message: Any) -> Any:
                if isinstance(message, messages.Heartbeat):
                    said.append(message.evaluating)
                return request(message)

            monkeypatch.setattr(running.actor.buffer, "request", listen)
            running.engine.open.clear()
            running.weights.publish(0)
            await running.ask(messages.EvaluationRequest(0))
            await running.until(lambda: (0,) in said)
            running.engine.open.set()
            await running.until(lambda: audit(running.run_dir).evaluations == {"reported": 1})
            await running.until(lambda: said[-1] == ())

    asyncio.run(check())


def test_newer_weights_wait_until_an_evaluation_is_through(loop: Looper):
    async def check() -> None:
        async with loop(max_staleness=3) as running:
            running.weights.publish(0)
            await running.until(lambda: running.actor.policy_version == 0)
            running.engine.open.clear()
            await running.ask(messages.EvaluationRequest(0))
            await running.until(lambda: any(name.startswith("evaluation") for name, _ in running.engine.requests))
            running.weights.publish(1)
            await asyncio.sleep(0.2)
            assert running.engine.version == 0
            running.engine.open.set()
            await running.until(lambda: running.engine.version == 1)
            await running.until(lambda: audit(running.run_dir).evaluations == {"reported": 1})
            [report] = (await running.ask(messages.EvaluationQuery(0))).reports
            assert report.policy_version == 0

    asyncio.run(check())


def test_a_probe_is_answered_under_the_newest_weights_and_not_during_an_evaluation(loop: Looper):
    probe = messages.Probe(7, 1, (50, 51, 52), 2)

    async def check() -> None:
        async with loop(max_staleness=3) as running:

            async def reports() -> tuple[messages.ProbeReport, ...]:
                return tuple((await running.ask(messages.ProbeRequest(probe))).reports)

            def evaluating() -> bool:
                return any(name.startswith("evaluation") for name, _ in running.engine.requests)

            running.weights.publish(0)
            await running.until(lambda: running.actor.policy_version == 0)
            # Version 0 is too old for the probe.
            while (await running.ask(messages.ProbeRequest(probe))).num_unanswered == 0:
                await asyncio.sleep(0.01)
            running.weights.publish(1)
            while not (found := await reports()):
                await asyncio.sleep(0.01)
            assert [(r.actor_id, r.policy_version, r.logprobs) for r in found] == [("actor-0", 1, (-51.0, -52.0))]
            probes = [name for name, _ in running.engine.requests if name.startswith("probe")]
            assert probes == ["probe-7"]
            await running.batch(0)
            running.engine.open.clear()
            await running.ask(messages.EvaluationRequest(1))
            await running.until(evaluating)
            probe_2 = replace(probe, probe_id=8)
            await running.ask(messages.ProbeRequest(probe_2))
            # Two heartbeats pass, each with the probe in its answer.
            await asyncio.sleep(0.3)
            assert not any(name == "probe-8" for name, _ in running.engine.requests)
            running.engine.open.set()
            await running.until(lambda: any(name == "probe-8" for name, _ in running.engine.requests))

    asyncio.run(check())


def test_a_held_out_prompt_that_cannot_be_read_counts_as_not_answered(loop: Looper):
    async def check() -> None:
        async with loop(sums(long_prompt=9)) as running:
            running.weights.publish(0)
            await running.ask(messages.EvaluationRequest(0))
            await running.until(lambda: audit(running.run_dir).evaluations == {"reported": 1})
            [report] = (await running.ask(messages.EvaluationQuery(0))).reports
            assert (report.num_prompts, report.pass_at_1) == (3, pytest.approx(2 / 3))

    asyncio.run(check())


def test_weights_that_are_too_late_when_they_come_are_what_an_actor_says_it_waits_for(loop: Looper):
    async def check() -> None:
        async with loop(max_staleness=1) as running:

            async def waits_for(text: str) -> str:
                while True:
                    peers = (await running.ask(messages.StatusRequest())).peers
                    found = [peer.waiting_for for peer in peers if text in peer.waiting_for]
                    if found:
                        return found[0]
                    await asyncio.sleep(0.02)

            running.weights.publish(0)
            await running.until(lambda: running.actor.policy_version == 0)
            running.weights.link.clear()
            running.weights.publish(1)
            await running.until(lambda: running.weights.under_way == 1)
            for version in (0, 1):
                await running.batch(version)
            await running.ask(messages.Heartbeat("learner", "learner", 2, "", {}))
            await running.until(lambda: running.actor._loader._learner_version == 2)
            running.weights.link.set()
            said = await waits_for("weights in time: policy 1 ")
            assert "the learner made 2 versions, more than max_staleness=1" in said
            running.weights.publish(2)
            await waits_for("prompts from the buffer")

    asyncio.run(check())


def test_a_version_that_is_gone_before_it_was_fetched_is_passed_over(loop: Looper):
    async def check() -> None:
        async with loop() as running:
            running.weights.gone = {0, 2}
            running.weights.publish(0)
            await running.until(lambda: running.actor.policy_version == 1)
            running.weights.publish(2)
            await running.until(lambda: running.actor.policy_version == 3)
            assert running.weights.fetched == [1, 3]
            await running.until(lambda: running.weights.released == [1, 3])

    asyncio.run(check())


def test_the_buffer_hears_which_weights_an_actor_has_and_what_it_waits_for(loop: Looper):
    async def check() -> None:
        async with loop(max_staleness=0) as running:
            running.weights.publish(0)
            await running.batch(0)
            peer = None
            async with asyncio.timeout(SECONDS):
                while (
                    peer is None or not peer.waiting_for or peer.metrics["samples"] < 4 or peer.metrics["groups_leased"]
                ):
                    status = await running.ask(messages.StatusRequest())
                    peer = next((peer for peer in status.peers if peer.role == "actor"), None)
                    await asyncio.sleep(0.02)
            assert (peer.name, peer.policy_version, peer.waiting_for) == ("actor-0", 0, "prompts from the buffer")
            assert peer.metrics["samples"] == 4
            assert peer.metrics["weight_loads"] == 1
            assert peer.metrics["groups_leased"] == 0
            assert 0 <= peer.metrics["idle_fraction"] <= 1

    asyncio.run(check())


def test_a_closing_run_gets_no_more_groups_but_its_last_evaluation(loop: Looper):
    async def check() -> None:
        async with loop() as running:
            running.weights.publish(0)
            await running.batch(0)
            await running.until(lambda: running.counts()["ready"] == 2)
            await running.ask(messages.Close())
            await running.ask(messages.EvaluationRequest(0))
            await running.until(lambda: audit(running.run_dir).evaluations == {"reported": 1})
            assert running.counts()["leased"] == 0

    asyncio.run(check())


def test_seeds_are_those_of_the_prompts_occurrence_and_not_of_the_attempt(loop: Looper):
    async def check() -> None:
        async with loop(seeded_sampling=True, seed=3) as running:
            running.weights.publish(0)
            await running.batch(0)
            seeds = dict(running.engine.requests)
            assert len(set(seeds.values())) == len(seeds)
            assert all(seed == running.actor._completer._seed(name.replace(".0", ".7")) for name, seed in seeds.items())

    asyncio.run(check())


def test_sampling_is_not_seeded_unless_asked_for(loop: Looper):
    async def check() -> None:
        async with loop() as running:
            running.weights.publish(0)
            await running.batch(0)
            assert {seed for _, seed in running.engine.requests} == {None}

    asyncio.run(check())


def test_weights_that_did_not_load_right_end_the_actor(loop: Looper):
    async def check() -> None:
        async with loop() as running:
            running.engine.wrong = {"head": "3"}
            running.weights.publish(0)
            with pytest.raises(ExceptionGroup) as ended:
                await asyncio.wait_for(asyncio.shield(running.work), SECONDS)
            message = r"policy 0: 1 of 2 parameters differ .* the first is head"
            assert ended.group_contains(RuntimeError, match=message)

    asyncio.run(check())


@pytest.mark.parametrize(("version", "digested"), [(0, [-1, 0]), (3, [])])
def test_the_folders_weights_are_digested_only_if_version_0_comes_first(
    loop: Looper, version: int, digested: list[int]
):
    """A version that stays on the learner's device, as the stand-in's do, is not compared unless it is version 0."""

    async def check() -> None:
        async with loop() as running:
            running.weights.publish(version)
            await running.until(lambda: running.weights.released == [version])
            running.weights.publish(version + 1)
            await running.until(lambda: running.weights.released == [version, version + 1])
            assert running.engine.digested == digested

    asyncio.run(check())


def test_an_actor_gives_up_when_neither_store_nor_buffer_hears_the_learner(loop: Looper):
    async def check() -> None:
        async with loop(weights_timeout_seconds=0.3, heartbeat_seconds=0.05) as running:
            running.weights.unreachable = True
            with pytest.raises(ExceptionGroup) as ended:
                await asyncio.wait_for(asyncio.shield(running.work), SECONDS)
            assert ended.group_contains(TimeoutError, match="no weights came, and there was no sign of the learner")

    asyncio.run(check())


def test_an_actor_waits_for_a_learner_that_lives_and_shows_it(loop: Looper):
    async def check() -> None:
        async with loop(weights_timeout_seconds=2.0, heartbeat_seconds=0.05) as running:
            running.weights.unreachable = True
            for _ in range(60):
                await running.ask(messages.Heartbeat("learner", "learner-0", -1, "its model", {}))
                await asyncio.sleep(0.1)
            assert not running.work.done()
            status = await running.ask(messages.StatusRequest())
            [actor] = [peer for peer in status.peers if peer.role == "actor"]
            assert (actor.policy_version, actor.waiting_for) == (-1, "the learner's first weights")
            running.weights.unreachable = False
            running.weights.publish(0)
            assert len((await running.batch(0)).groups) == 2

    asyncio.run(check())


def test_an_engine_that_never_ends_a_request_ends_the_actor(loop: Looper):
    async def check() -> None:
        async with loop(sample_timeout_seconds=0.2) as running:
            running.engine.open.clear()
            running.engine.hung = True
            running.weights.publish(0)
            with pytest.raises(ExceptionGroup) as ended:
                await asyncio.wait_for(asyncio.shield(running.work), SECONDS)
            message = r"the engine did not finish group \d+\.\d+, and has made no step for"
            assert ended.group_contains(RuntimeError, match=message)

    asyncio.run(check())


def test_an_actor_that_was_cut_off_goes_on_and_its_late_copies_are_not_trained_on(loop: Looper):
    async def check() -> None:
        silent = {"heartbeat_seconds": 1000.0, "max_groups_in_flight": 2}
        async with loop(max_staleness=0, lease_seconds=0.5, **silent) as running:
            running.engine.open.clear()
            running.weights.publish(0)
            await running.until(lambda: len(running.engine.requests) == 2)
            await running.until(lambda: running.counts()["pending"] == 2)
            running.engine.open.set()
            shard = await running.batch(0)
            assert [packed.header.group_id for packed in shard.groups] == ["0.1", "1.1"]
            assert audit(running.run_dir).counters["late"] == 2
            assert [name for name, _ in running.engine.requests[:4]] == ["0.0", "1.0", "0.1", "1.1"]

    asyncio.run(check())


def test_rollouts_whose_leases_have_ended_are_stopped(loop: Looper):
    async def check() -> None:
        async with loop(max_staleness=0, max_groups_in_flight=2) as running:
            running.engine.open.clear()
            running.weights.publish(0)
            await running.until(lambda: len(running.engine.requests) == 2)
            # The actor's own connection returns them, behind the back of its rollouts.
            returned = running.actor.buffer.request(messages.LeaseReturn("actor-0", ("0.0", "1.0"), ""))
            await asyncio.wait_for(asyncio.wrap_future(returned), SECONDS)
            # Without room in the actor nobody would sample the prompts again.
            await running.until(lambda: len(running.engine.requests) == 4)
            running.engine.open.set()
            shard = await running.batch(0)
            assert [packed.header.group_id for packed in shard.groups] == ["0.1", "1.1"]
            assert "late" not in audit(running.run_dir).counters

    asyncio.run(check())


def test_an_actor_whose_name_another_process_took_over_ends_with_a_sentence(
    loop: Looper, capsys: pytest.CaptureFixture[str]
):
    async def check() -> ExceptionGroup[Exception]:
        async with loop() as running:
            running.weights.publish(0)
            await running.batch(0)
            await running.until(lambda: running.counts()["ready"] == 2)
            await running.ask(messages.Heartbeat("actor", "actor-0", 0, "", {}))
            with pytest.raises(ExceptionGroup) as ended:
                await asyncio.wait_for(asyncio.shield(running.work), SECONDS)
            return ended.value

    failed = asyncio.run(check())
    assert exit_status(failed) == REPLACED, "the supervisor does not start it again while the other process works"
    assert capsys.readouterr().err == (
        "error: another process took the name actor-0 over; give this one another --name\n"
    )
    assert exit_status(ExceptionGroup("", [RequestRefused("other data")])) == 2
    assert exit_status(ExceptionGroup("", [OSError("no space")])) == 1
    assert exit_status(ExceptionGroup("", [RequestRefused("the buffer failed", is_server_error=True)])) == 1


def test_a_full_disk_is_waited_for(loop: Looper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("actors.loading.DISK_RETRY_SECONDS", 0.01)

    async def check() -> None:
        async with loop() as running:
            fetch, failures = running.weights.fetch, iter([errno.ENOSPC, errno.EDQUOT])

            async def fail_twice(manifest: messages.Manifest) -> object:
                for number in failures:
                    raise OSError(number, "no space left")
                return await fetch(manifest)

            running.weights.fetch = fail_twice  # type: ignore[assignment,method-assign]
            running.weights.publish(0)
            assert len((await running.batch(0)).groups) == 2
            assert running.weights.fetched == [0]

    asyncio.run(check())


def test_a_verifier_that_always_hangs_is_counted_and_the_run_goes_on(loop: Looper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "verifier" / "scoring"))
    options = {"num_workers": 1, "deadline_seconds": 0.2, "memory_bytes": 2 << 30}
    hanging = ScoringPool([RewardSpec("misbehaving_rewards:obedient")], **options)  # type: ignore[arg-type]

    async def check() -> None:
        async with loop(scoring=hanging) as running:

            async def hang(*_: object, num_samples: int, **__: object) -> list[Any]:
                return [sampled("hang", (0, 0)) for _ in range(num_samples)]

            running.engine.sample = hang  # type: ignore[assignment,method-assign]
            running.weights.publish(0)
            for packed in (await running.batch(0)).groups:
                found = unpack_group(packed).trajectories
                # By default, verifier.on_timeout gives them the reward of a wrong answer.
                assert [(t.verdict, t.reward) for t in found] == [("timeout", -0.5)] * 2
            async with asyncio.timeout(SECONDS):
                timeouts = 0.0
                while timeouts < 4:
                    status = await running.ask(messages.StatusRequest())
                    actors = [peer for peer in status.peers if peer.role == "actor"]
                    timeouts = actors[0].metrics["verifier_timeouts"] if actors else 0.0

    try:
        asyncio.run(check())
    finally:
        hanging.close()


@pytest.fixture
def skipping(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScoringPool]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "verifier" / "scoring"))
    options = {"num_workers": 1, "deadline_seconds": 5.0, "memory_bytes": 2 << 30, "on_error": "skip"}
    started = ScoringPool([RewardSpec("misbehaving_rewards:obedient")], **options)  # type: ignore[arg-type]
    yield started
    started.close()


def test_what_cannot_be_scored_is_left_out_of_its_group_and_an_empty_group_is_given_back(
    loop: Looper, skipping: ScoringPool
):
    async def check() -> None:
        async with loop(scoring=skipping) as running:
            texts = iter([["crash", "bad"], ["raise", "raise"], ["raise", "raise"]])

            async def misbehave(*_: object, **__: object) -> list[Any]:
                return [sampled(text, (0, 0)) for text in next(texts, ["bad", "bad"])]

            running.engine.sample = misbehave  # type: ignore[assignment,method-assign]
            running.weights.publish(0)
            groups = [unpack_group(packed) for packed in (await running.batch(0)).groups]
            assert sorted(len(group.trajectories) for group in groups) == [1, 2]
            assert {(t.verdict, t.reward) for group in groups for t in group.trajectories} == {("wrong", -0.5)}
            assert running.counts()["dropped:unscored"] == 2
            assert skipping.counts()["skipped"] == 5

    asyncio.run(check())


def test_an_actor_that_can_score_nothing_ends_with_a_sentence(
    loop: Looper, skipping: ScoringPool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("actors.actor.MAX_UNSCORED_GROUPS", 3)

    async def check() -> None:
        async with loop(scoring=skipping) as running:

            async def fail(*_: object, **__: object) -> list[Any]:
                return [sampled("raise", (0, 0))]

            running.engine.sample = fail  # type: ignore[assignment,method-assign]
            running.weights.publish(0)
            with pytest.raises(ExceptionGroup) as ended:
                await asyncio.wait_for(asyncio.shield(running.work), SECONDS)
            assert ended.group_contains(RuntimeError, match="not one completion of 3 groups in a row could be scored")

    asyncio.run(check())


def test_an_error_of_the_engine_ends_the_actor(loop: Looper):
    async def check() -> None:
        async with loop() as running:

            async def fail(*_: object, **__: object) -> None:
                raise RuntimeError("the engine died")

            running.engine.sample = fail  # type: ignore[assignment,method-assign]
            running.weights.publish(0)
            with pytest.raises(ExceptionGroup) as ended:
                await asyncio.wait_for(asyncio.shield(running.work), SECONDS)
            assert ended.group_contains(RuntimeError, match="the engine died")

    asyncio.run(check())


def test_cancelling_ends_all_tasks_in_the_middle_of_the_work(loop: Looper):
    async def check() -> None:
        async with loop() as running:
            running.engine.open.clear()
            running.weights.publish(0)
            await running.until(lambda: len(running.engine.requests) == 4)
            running.work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(running.work, 2.0)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert running.actor.meter.num_in_flight == 0

    asyncio.run(check())


def test_an_actor_that_ends_gives_back_its_leases_and_its_evaluation_first(loop: Looper):
    """All leases would otherwise end after `lease_seconds`, 60 s, and the learner would wait for them."""

    async def check() -> None:
        async with loop(max_staleness=0, lease_seconds=60.0) as running:
            running.engine.open.clear()
            running.weights.publish(0)
            await running.until(lambda: len(running.engine.requests) == 2)
            await running.ask(messages.EvaluationRequest(0))
            await running.until(lambda: audit(running.run_dir).evaluations == {"running": 1})
            assert running.counts()["leased"] == 2
            waiting = asyncio.ensure_future(running.batch(0))
            other = Connection(running.actor.buffer.address, "actor-1", Credentials.plain("test"))
            try:
                parked = other.request(messages.LeaseRequest("actor-1", 0, 2, running.actor.task.fingerprint))
                running.work.cancel()
                await asyncio.wait([running.work], timeout=SECONDS)
                assert running.work.cancelled()
                reply = await asyncio.wait_for(asyncio.wrap_future(parked), SECONDS)
                assert isinstance(reply, messages.LeaseReply)
                assert [lease.group_id for lease in reply.leases] == ["0.1", "1.1"]
                assert reply.evaluate_version == 0
                for lease in reply.leases:
                    problem, group = running.actor.task.train[lease.prompt_id], lease.group_id
                    samples = await FakeEngine(version=0).sample(
                        [ord(character) for character in problem.question],
                        num_samples=2,
                        temperature=1.0,
                        max_new_tokens=16,
                        request_id=group,
                    )
                    scores = [Score(1.0, {}, Verdict.CORRECT), Score(0.0, {}, Verdict.WRONG)]
                    made = build_group(group, problem, [1], [single_turn(s) for s in samples], scores, "actor-1")  # type: ignore[arg-type]
                    await asyncio.wrap_future(other.request(messages.GroupDelivery("actor-1", pack_group(made))))
                assert len((await waiting).groups) == 2
            finally:
                other.close()

    asyncio.run(check())


def test_an_actor_ends_within_its_patience_when_the_buffer_does_not_answer(
    loop: Looper, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("actors.actor.GOODBYE_SECONDS", 0.2)

    async def check() -> None:
        async with loop() as running:
            running.weights.publish(0)
            await running.until(lambda: running.engine.requests)
            with Connection("tcp://127.0.0.1:9", "nobody", Credentials.plain("test"), timeout_seconds=1e9) as nobody:
                running.actor.buffer = nobody
                running.work.cancel()
                await asyncio.wait([running.work], timeout=SECONDS)
                assert running.work.cancelled()

    asyncio.run(check())


def test_leases_in_an_answer_that_nobody_waits_for_are_given_back_unless_the_actor_works_on_them(loop: Looper):
    async def check() -> None:
        # Neither a heartbeat nor a lease request tells the buffer what the actor holds.
        async with loop(max_groups_in_flight=2, heartbeat_seconds=1000.0) as running:
            running.engine.open.clear()
            running.weights.publish(0)
            await running.until(lambda: len(running.engine.requests) == 2)
            # Stands for a second answer to the actor's request, which granted other leases than the first.
            held_ids = ("0.0", "1.0")
            request = messages.LeaseRequest("actor-0", 0, 1, running.actor.task.fingerprint, held_ids)
            leaked = await asyncio.wait_for(asyncio.wrap_future(running.actor.buffer.request(request)), SECONDS)
            assert isinstance(leaked, messages.LeaseReply)
            assert [lease.group_id for lease in leaked.leases] == ["2.0"]
            held = tuple(messages.Lease(group_id, 0) for group_id in held_ids)
            unclaimed = running.actor.buffer.unclaimed
            assert unclaimed is not None
            await asyncio.to_thread(unclaimed, replace(leaked, leases=held + leaked.leases))
            await running.until(lambda: running.counts()["pending"] == 1)
            assert running.counts()["leased"] == 2
            running.engine.open.set()
            assert [group.header.group_id for group in (await running.batch(0)).groups] == ["0.0", "1.0"]

    asyncio.run(check())


def test_an_actor_sends_no_more_heartbeats_than_the_buffer_asks_for(loop: Looper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("buffer.service.peers.HEARTBEATS_PER_SECOND", 1e-3)

    async def check() -> None:
        async with loop(heartbeat_seconds=0.01) as running:
            await running.until(lambda: running.actor._least_heartbeat_seconds == LONGEST_HEARTBEAT_SECONDS)
            sent: list[messages.Message] = []
            request = running.actor.buffer.request
            monkeypatch.setattr(
                running.actor.buffer, "request", lambda message: (sent.append(message), request(message))[1]
            )
            await asyncio.sleep(0.5)
            assert len(sent) <= 1

    asyncio.run(check())


def test_an_answer_that_comes_when_the_actor_ends_starts_nothing(loop: Looper):
    errors: list[dict[str, Any]] = []

    async def check() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        async with loop() as running:
            running.weights.publish(0)
            await running.until(lambda: running.actor.buffer.unclaimed)
            unclaimed = running.actor.buffer.unclaimed
            assert unclaimed is not None
            running.work.cancel()
            await asyncio.wait([running.work], timeout=SECONDS)
            unclaimed(messages.LeaseReply((messages.Lease("9.0", 0),), -1, False))
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(check())
    assert not errors


def test_a_group_that_is_leased_again_under_the_same_id_replaces_the_earlier_rollout(loop: Looper):
    """As after a power cut of the buffer's machine, whose ledger forgot the first lease."""
    errors: list[dict[str, Any]] = []

    async def check() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        async with loop(max_groups_in_flight=2) as running:
            running.engine.open.clear()
            running.weights.publish(0)
            await running.until(lambda: len(running.engine.requests) == 2)
            earlier = running.actor._rollouts["0.0"]
            async with asyncio.TaskGroup() as tasks:
                running.actor._start_rollout(messages.Lease("0.0", 0), tasks)
                await running.until(lambda: len(running.engine.requests) == 3)
                assert earlier.cancelled()
                assert set(running.actor._rollouts) == {"0.0", "1.0"}, "it still holds both"
                running.engine.open.set()
            assert [group.header.group_id for group in (await running.batch(0)).groups] == ["0.0", "1.0"]
        assert not errors

    asyncio.run(check())


def test_one_stuck_completion_costs_its_group_and_in_the_end_its_prompt(
    loop: Looper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("actors.rollouts.deadlines.LEAST_SECONDS", 1.0)
    monkeypatch.setattr("actors.rollouts.deadlines.NUM_PACES_NEEDED", 1)
    monkeypatch.setattr("actors.rollouts.deadlines.FACTOR", 0.0)

    async def check() -> None:
        async with loop(engine=FakeEngine(stuck={"1"}), heartbeat_seconds=0.05) as running:
            running.weights.publish(0)
            shard = await running.batch(0)
            assert [group.header.group_id for group in shard.groups] == ["0.0", "2.0"]
            await running.until(lambda: running.counts().get("dropped:overdue"))
            assert running.engine.aborted == ["1.0", "1.1", "1.2"]
            peer = None
            async with asyncio.timeout(SECONDS):
                while peer is None or peer.metrics["groups_overdue"] < 3:
                    status = await running.ask(messages.StatusRequest())
                    peer = next((peer for peer in status.peers if peer.role == "actor"), None)
            assert not running.work.done()

    asyncio.run(check())
    assert "group 1.0 (prompt 1) took" in caplog.text and "to be sampled again" in caplog.text


def test_a_stuck_completion_of_an_evaluation_counts_as_wrong(loop: Looper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("actors.rollouts.deadlines.LEAST_SECONDS", 1.0)
    monkeypatch.setattr("actors.rollouts.deadlines.NUM_PACES_NEEDED", 1)
    monkeypatch.setattr("actors.rollouts.deadlines.FACTOR", 0.0)

    async def check() -> None:
        engine = FakeEngine(stuck={"evaluation-0-9"})
        async with loop(engine=engine, heartbeat_seconds=0.05) as running:
            running.weights.publish(0)
            await running.ask(messages.EvaluationRequest(0))
            await running.until(lambda: audit(running.run_dir).evaluations == {"reported": 1})
            [report] = (await running.ask(messages.EvaluationQuery(0))).reports
            assert (report.num_prompts, report.pass_at_1) == (3, pytest.approx(2 / 3))

    asyncio.run(check())


def test_an_engine_that_finishes_nothing_ends_the_actor(loop: Looper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("actors.actor.MAX_OVERDUE_GROUPS", 5)

    async def check() -> None:
        async with loop(sample_timeout_seconds=0.1, heartbeat_seconds=0.05) as running:
            running.engine.open.clear()
            running.weights.publish(0)
            with pytest.raises(ExceptionGroup) as ended:
                await asyncio.wait_for(asyncio.shield(running.work), SECONDS)
            assert ended.group_contains(RuntimeError, match="5 groups in a row were not finished in time")

    asyncio.run(check())


def test_scoring_that_hangs_costs_its_group(loop: Looper, pool: ScoringPool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("actors.rollouts.deadlines.LEAST_SECONDS", 1.0)
    monkeypatch.setattr("actors.rollouts.deadlines.NUM_PACES_NEEDED", 1)
    monkeypatch.setattr("actors.rollouts.deadlines.FACTOR", 0.0)
    score, calls = pool.score_group, iter(range(1000))

    async def hang_once(completions: Any) -> Any:
        if next(calls) == 0:
            await asyncio.Event().wait()
        return await score(completions)

    monkeypatch.setattr(pool, "score_group", hang_once)

    async def check() -> None:
        async with loop(heartbeat_seconds=0.05) as running:
            running.weights.publish(0)
            await running.until(lambda: running.counts()["ready"] == 4)
            assert running.actor.meter.metrics()["groups_overdue"] == 1
            assert audit(running.run_dir).counters["reissued"] == 1

    asyncio.run(check())


def test_an_environment_that_hangs_costs_its_group(loop: Looper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("actors.rollouts.deadlines.LEAST_SECONDS", 1.0)
    monkeypatch.setattr("actors.rollouts.deadlines.NUM_PACES_NEEDED", 1)
    monkeypatch.setattr("actors.rollouts.deadlines.FACTOR", 0.0)
    step, released = SokobanEpisode.step, threading.Event()
    first: list[object] = []

    def hang_once(self: Any, text: str) -> Any:
        if "R" in text and not first:
            first.append(self)
            released.wait(60)
        return step(self, text)

    monkeypatch.setattr(SokobanEpisode, "step", hang_once)

    async def check() -> None:
        settings = {"max_new_tokens": 30, "max_tokens": 200, "heartbeat_seconds": 0.05}
        async with loop(corridors(), engine=Puzzler(), **settings) as running:
            running.weights.publish(0)
            await running.until(lambda: running.counts()["ready"] == 4)
            assert running.actor.meter.metrics()["groups_overdue"] == 1
            assert audit(running.run_dir).counters["reissued"] == 1

    try:
        asyncio.run(check())
    finally:
        released.set()


def test_the_meter_counts_the_time_without_requests(monkeypatch: pytest.MonkeyPatch):
    clock = [5.0]
    monkeypatch.setattr("actors.metrics.time.monotonic", lambda: clock[0])
    meter = Meter()
    assert meter.metrics()["idle_fraction"] == 0.0
    clock[0] = 10.0
    with meter.in_flight():
        clock[0] = 12.0
        with meter.in_flight():
            clock[0] = 14.0
            assert meter.metrics()["requests_in_flight"] == 2
        clock[0] = 16.0
    meter.sampled(4, 60)
    meter.loaded(1.0, 0.25)
    clock[0] = 20.0
    found = meter.metrics()
    assert found["idle_fraction"] == pytest.approx(0.4)
    assert found["tokens_per_second"] == pytest.approx(6.0)
    assert (found["samples"], found["tokens"], found["weight_loads"]) == (4, 60, 1)
    assert (found["weight_fetch_seconds"], found["weight_pause_seconds"]) == (1.0, 0.25)


class Puzzler(FakeEngine):
    """Answers for CORRIDOR: even completions solve it in two turns, odd ones only claim to."""

    async def sample(self, prompt_ids: Sequence[int], *, request_id: str, seed: int | None = None, **_: Any) -> Any:
        self.requests.append((request_id, seed))
        await asyncio.sleep(0)
        even = int(request_id.split(".")[-2]) % 2 == 0
        return [sampled("<answer>R</answer>" if even else "reward: 10", (0, self.version))]


def corridors() -> Task:
    return Task("sokoban", [CORRIDOR, replace(CORRIDOR, prompt_id=1)], [replace(CORRIDOR, prompt_id=2)], TURNS, 3)


def test_episodes_are_played_turn_by_turn_and_rewarded_by_their_environment(loop: Looper):
    async def check() -> None:
        settings = {"max_new_tokens": 30, "max_tokens": 200, "seeded_sampling": True, "evaluation_prompts": 1}
        async with loop(corridors(), engine=Puzzler(), **settings) as running:
            running.weights.publish(0)
            group = unpack_group((await running.batch(0)).groups[0])
            solved, boasted = group.trajectories
            assert (solved.verdict, solved.num_turns, solved.reward) == ("correct", 2, pytest.approx(10.8))
            assert (boasted.verdict, boasted.num_turns, boasted.reward) == ("no_answer", 3, -3.0)
            assert boasted.reward_breakdown == {"environment": 0.0, "invalid_turns": -3.0, "solved": 0.0}
            observation = solved.token_ids[~solved.loss_mask][len(CORRIDOR.question) :]
            assert "".join(map(chr, observation)) == "P12X13O14:"
            assert solved.oldest_version == solved.newest_version == 0
            # Every turn of every completion has a different seed.
            of_group = {name: seed for name, seed in running.engine.requests if name.startswith(f"{group.group_id}.")}
            assert len(of_group) == len(set(of_group.values())) == 5
            await running.ask(messages.EvaluationRequest(0))
            reports: tuple[messages.EvaluationReport, ...] = ()
            while not reports:
                reports = (await running.ask(messages.StatusRequest())).reports
            assert (reports[0].pass_at_1, reports[0].num_prompts) == (1.0, 1)
            assert reports[0].reward_mean == pytest.approx(10.8)

    asyncio.run(check())
