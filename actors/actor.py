"""One actor: leases prompts, samples and scores groups, delivers them, and loads new weights.

These tasks run concurrently on one event loop:

- leases: ask the buffer for prompts while fewer than `max_groups_in_flight` groups are in flight;
- one rollout per lease: sample, score and deliver a group;
- weights: fetch the next version while generation goes on, then pause generation and load it;
- heartbeats: report version and metrics to the buffer;
- one evaluation at a time, when the buffer asks for it;
- weight probes, one at a time, when the buffer asks for one.

An error in any of them ends the process, and the supervisor decides whether to restart it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import verifier.base
from actors.config import ActorConfig
from actors.metrics import Meter
from actors.rollouts.completer import Completer
from actors.rollouts.deadlines import GroupDeadlines, OverdueError
from actors.rollouts.probe import Prober
from actors.rollouts.trajectories import TextTokenizer, build_group, task_prompt_ids
from actors.tasks.task import Problem, Task
from actors.weights.interface import FetchedVersion, VersionClient
from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.messages import (
    ActorGoodbye,
    EvaluationReport,
    GroupDelivery,
    GroupReceipt,
    Heartbeat,
    HeartbeatReply,
    Lease,
    LeaseReply,
    LeaseRequest,
    LeaseReturn,
    Message,
)
from buffer.transport.packed_group import pack_group
from verifier.base import Verdict
from verifier.scoring.pool import ScoringPool

if TYPE_CHECKING:
    from actors.engine.engine import Engine

logger = logging.getLogger(__name__)

DISK_RETRY_SECONDS = 5.0
GOODBYE_SECONDS = 1.0
UNCLAIMED_SECONDS = 0.1
"""Time after which leases in an answer that no request waits for are given back."""
MANIFEST_SECONDS = 10.0
"""Longest wait for one answer of the weight store about its newest version."""
ENGINE_SECONDS = 60.0
"""Longest engine step. An engine that takes longer while a group is overdue is hung."""
MAX_ATTEMPTS = 3
"""Leases of one prompt occurrence after which a group that is overdue is dropped."""
MAX_OVERDUE_GROUPS = 50
"""Consecutive overdue groups after which something else than the groups is assumed broken."""
MAX_UNSCORED_GROUPS = 50
"""Consecutive groups without a single scored completion after which the verifier is assumed broken."""


class Actor:
    """Generates for one buffer.

    Args:
        actor_id: unique in the run.
        config: sampling and evaluation.
        task: prompts and gold answers; leases name a prompt by its number.
        tokenizer: the model's.
        engine: a started engine.
        pool: scores completions; None for a multi-turn task, whose environment gives the rewards.
        buffer: connection to the buffer.
        weights: fetches versions from the learner.
        spool: folder for this actor's files.
        max_staleness: the run's bound, in versions. The buffer grants no leases to an actor with older weights.
    """

    def __init__(
        self,
        actor_id: str,
        config: ActorConfig,
        task: Task,
        tokenizer: TextTokenizer,
        engine: Engine,
        pool: ScoringPool | None,
        buffer: Connection,
        weights: VersionClient,
        spool: Path,
        max_staleness: int,
    ) -> None:
        self.actor_id, self.config, self.task, self.tokenizer = actor_id, config, task, tokenizer
        self.engine, self.pool, self.buffer, self.weights, self.spool = engine, pool, buffer, weights, spool
        self.policy_version = -1
        self.publication = ""
        self.meter = Meter()
        self._completer = Completer(config, task, tokenizer, engine, pool, self.meter)
        self._prober = Prober(actor_id, config.temperature, engine)
        self._deadlines = GroupDeadlines(config.sample_timeout_seconds)
        self._evaluation_deadlines: GroupDeadlines | None = None
        """Of the evaluation under way."""
        self._max_staleness = max_staleness
        self._learner_version = -1
        """The learner's version in the last answer to a heartbeat."""
        self._learner_alive = 0.0
        """Time of the last sign of life of the learner."""
        self._lateness = ""
        """What the actor waits for when the last version was fetched too slowly; empty: it was in time."""
        self._closing = False
        self._least_heartbeat_seconds = 0.0
        """Time between two heartbeats that the buffer asks for: longer with thousands of actors."""
        self._num_unscored = self._num_overdue = 0
        self._rollouts: dict[str, asyncio.Task[None]] = {}
        """One per lease, from its grant to the receipt of its group, by group id."""
        self._evaluating: list[int] = []
        """Requested versions of the evaluations that are not reported yet."""
        self._room_changed = asyncio.Event()
        self._loading = asyncio.Lock()

    async def run(self, engine_checksums: dict[str, str]) -> None:
        """Generate until cancelled. Whatever ends it, the actor first gives back what it holds.

        Waits for: the learner's first weights. Gives up after: `weights_timeout_seconds` without a sign of life of the
        learner.

        Args:
            engine_checksums: checksums of the weights that the engine loaded from its folder, by parameter.

        Raises:
            ExceptionGroup: with the error of the task that failed.
        """
        self._learner_alive = time.monotonic()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._watch_unclaimed(tasks)
                # Heartbeats must not stop once they have begun: a silent peer counts as hung.
                tasks.create_task(self._send_heartbeats())
                loaded = await self._load_next()
                while loaded is None:
                    loaded = await self._load_next()
                await self._verify_first_load(loaded, engine_checksums)
                loaded.release()
                tasks.create_task(self._keep_weights_fresh())
                tasks.create_task(self._watch_deadlines())
                tasks.create_task(self._prober.run(self._call))
                tasks.create_task(self._keep_leasing(tasks))
        finally:
            await self._say_goodbye()

    async def _say_goodbye(self) -> None:
        """Tell the buffer that the leases and the evaluation of this process are pending again.

        Waits for: the buffer. Gives up after: `GOODBYE_SECONDS`.
        """
        self.buffer.unclaimed = None
        try:
            async with asyncio.timeout(GOODBYE_SECONDS):
                await self._call(ActorGoodbye(self.actor_id))
        # The buffer may have ended too. Then its leases end with the time of this actor's silence.
        except (TimeoutError, ConnectionError, RequestRefused) as error:
            logger.info("the buffer does not know that this actor ends: %s", error)

    # --- leases ------------------------------------------------------------------------------------------------------

    async def _keep_leasing(self, tasks: asyncio.TaskGroup) -> None:
        """Lease as many groups as may be in flight, and start a rollout for each.

        Waits for: the buffer's admission. Unblocked by: a batch that the learner takes, or newer weights in this actor,
        which the actor reports by heartbeat.
        """
        while True:
            while len(self._rollouts) >= self.config.max_groups_in_flight and not self._closing:
                self._room_changed.clear()
                await self._room_changed.wait()
            reply = await self._ask_for_leases(max(self.config.max_groups_in_flight - len(self._rollouts), 0))
            self._closing = reply.closing
            for lease in reply.leases:
                self._start_rollout(lease, tasks)
            if reply.evaluate_version >= 0:
                self._evaluating.append(reply.evaluate_version)
                tasks.create_task(self._evaluate(reply.evaluate_version))
            elif self._closing and not reply.leases:
                await asyncio.sleep(0.5)

    def _start_rollout(self, lease: Lease, tasks: asyncio.TaskGroup) -> None:
        """Start the rollout. When it has ended, for whatever reason, the actor no longer holds the lease."""

        def ended(rollout: asyncio.Task[None]) -> None:
            if self._rollouts.get(lease.group_id) is rollout:
                del self._rollouts[lease.group_id]
            self._room_changed.set()

        earlier = self._rollouts.get(lease.group_id)
        if earlier is not None:
            # A ledger that lost its last moments in a power cut leases its groups again under the same ids.
            earlier.cancel()
        rollout = tasks.create_task(self._roll_out(lease))
        self._rollouts[lease.group_id] = rollout
        rollout.add_done_callback(ended)

    def _watch_unclaimed(self, tasks: asyncio.TaskGroup) -> None:
        """Give back the leases in answers that no request waits for, unless the actor works on them.

        Such an answer is a second one to the same request, which may grant other leases than the first.
        """
        loop = asyncio.get_running_loop()

        async def give_back(reply: LeaseReply) -> None:
            # By then the rollouts of the answer before have been started.
            await asyncio.sleep(UNCLAIMED_SECONDS)
            unknown = tuple(lease.group_id for lease in reply.leases if lease.group_id not in self._rollouts)
            if unknown:
                logger.warning("%d leases came twice or too late, such as %s; given back", len(unknown), unknown[0])
                await self._call(LeaseReturn(self.actor_id, unknown, ""))

        def start(reply: LeaseReply) -> None:
            work = give_back(reply)
            try:
                tasks.create_task(work)
            except RuntimeError:
                # The actor ends, and its goodbye gives all leases back.
                work.close()

        def unclaimed(message: Message) -> None:
            if isinstance(message, LeaseReply) and message.leases:
                loop.call_soon_threadsafe(start, message)

        self.buffer.unclaimed = unclaimed

    def _stop_rollouts(self, ended: Sequence[str]) -> None:
        """Stop the rollouts whose leases have ended, because their groups would be of no use."""
        stopped = [group_id for group_id in ended if group_id in self._rollouts]
        for group_id in stopped:
            self._rollouts[group_id].cancel()
        if stopped:
            logger.warning("%d leases have ended, such as %s; their rollouts are stopped", len(stopped), stopped[0])

    async def _ask_for_leases(self, num_groups: int) -> LeaseReply:
        held = tuple(self._rollouts), tuple(self._evaluating)
        request = LeaseRequest(self.actor_id, self.policy_version, num_groups, self.task.fingerprint, *held)
        reply = await self._call(request)
        if not isinstance(reply, LeaseReply):
            raise RuntimeError(f"the buffer answered {reply} to a lease request")
        return reply

    async def _roll_out(self, lease: Lease) -> None:
        """Sample, score and deliver one group. Give the lease back when the prompt leaves no room for an answer."""
        problem = self.task.train[lease.prompt_id]
        prompt_ids = task_prompt_ids(self.task, problem, self.tokenizer)
        if len(prompt_ids) + self._max_new_tokens(lease) > self.config.max_tokens:
            logger.warning(
                "prompt %d has %d tokens and leaves no room to answer; dropped", lease.prompt_id, len(prompt_ids)
            )
            await self._call(LeaseReturn(self.actor_id, (lease.group_id,), "prompt_too_long"))
        else:
            await self._deliver(lease, problem, prompt_ids)

    async def _deliver(self, lease: Lease, problem: Problem, prompt_ids: list[int]) -> None:
        work = self._completer.complete(
            problem,
            prompt_ids,
            lease.group_id,
            seed_key=lease.group_id,
            num_samples=lease.samples_per_group or self.config.samples_per_group,
            temperature=self.config.temperature,
            max_new_tokens=self._max_new_tokens(lease),
            seeded=self.config.seeded_sampling,
        )
        most_tokens = self._completer.most_tokens(self._max_new_tokens(lease))
        try:
            completed = await self._deadlines.complete(work, most_tokens)
        except OverdueError as error:
            await self._give_back_overdue(lease, error)
            return
        self._num_overdue = 0
        self.meter.sampled(len(completed), sum(completion.num_sampled for completion, _ in completed))
        kept = [(completion, score) for completion, score in completed if not score.skipped]
        if not kept:
            await self._give_back_unscored(lease)
            return
        self._num_unscored = 0
        completions, scores = zip(*kept, strict=True)
        group = build_group(lease.group_id, problem, prompt_ids, completions, scores, self.actor_id)
        receipt = await self._call(GroupDelivery(self.actor_id, pack_group(group)))
        if not isinstance(receipt, GroupReceipt):
            raise RuntimeError(f"the buffer answered {receipt} to a delivered group")
        if receipt.outcome not in ("stored", "dropped"):
            logger.warning("group %s was %s", receipt.group_id, receipt.outcome)

    async def _give_back_unscored(self, lease: Lease) -> None:
        """Give back the lease of a group without a scored completion.

        This happens with `verifier.on_timeout` or `verifier.on_error` = skip.

        Raises:
            RuntimeError: `MAX_UNSCORED_GROUPS` consecutive groups could not be scored.
        """
        self._num_unscored += 1
        if self._num_unscored == MAX_UNSCORED_GROUPS:
            raise RuntimeError(
                f"not one completion of {MAX_UNSCORED_GROUPS} groups in a row could be scored; the log says why, and"
                " verifier.deadline_seconds and verifier.memory_bytes are the limits"
            )
        logger.warning("no completion of group %s could be scored; dropped", lease.group_id)
        await self._call(LeaseReturn(self.actor_id, (lease.group_id,), "unscored"))

    async def _give_back_overdue(self, lease: Lease, error: OverdueError) -> None:
        """Give back the lease of a group whose time is over: to be sampled again, or dropped the `MAX_ATTEMPTS`th time.

        Raises:
            RuntimeError: the engine is hung; or `MAX_OVERDUE_GROUPS` consecutive groups were overdue.
        """
        self.meter.overdue()
        self._num_overdue += 1
        is_last = int(lease.group_id.partition(".")[2]) + 1 >= MAX_ATTEMPTS
        then = "dropped" if is_last else "to be sampled again"
        logger.warning("group %s (prompt %d) took %s; %s", lease.group_id, lease.prompt_id, error, then)
        await self._check_engine(f"group {lease.group_id}")
        if self._num_overdue == MAX_OVERDUE_GROUPS:
            raise RuntimeError(
                f"{MAX_OVERDUE_GROUPS} groups in a row were not finished in time; the log names them, and"
                " actor.sample_timeout_seconds is the longest time of a group"
            )
        await self._call(LeaseReturn(self.actor_id, (lease.group_id,), "overdue" if is_last else ""))

    async def _check_engine(self, what: str) -> None:
        """End the actor when the engine is hung, because then all work in it is."""
        if not await self.engine.is_responsive(ENGINE_SECONDS) and not self._deadlines.is_paused:
            raise RuntimeError(f"the engine did not finish {what}, and has made no step for {ENGINE_SECONDS:.0f} s")

    async def _watch_deadlines(self) -> None:
        while True:
            self._deadlines.check()
            if self._evaluation_deadlines is not None:
                self._evaluation_deadlines.check()
            await asyncio.sleep(self.config.heartbeat_seconds)

    def _max_new_tokens(self, lease: Lease) -> int:
        """Return the limit of the curriculum's stage, or else the run's."""
        return lease.max_new_tokens or self.config.max_new_tokens

    # --- weights -----------------------------------------------------------------------------------------------------

    async def _keep_weights_fresh(self) -> None:
        """Load every version that is published. Skip a version that is superseded while it is fetched."""
        while True:
            loaded = await self._load_next()
            if loaded is not None:
                loaded.release()

    async def _load_next(self) -> FetchedVersion | None:
        """Load the next version. Returns None when none was published in time, or when it could not be fetched.

        Waits for: the learner's next publication. Gives up after: `weights_timeout_seconds` without a sign of life of
        the learner.

        Raises:
            TimeoutError: no sign of life came in that time.
        """
        seconds = self.config.weights_timeout_seconds
        try:
            manifest = await self.weights.wait_for_new(self.publication, min(seconds, MANIFEST_SECONDS))
            self._learner_alive = time.monotonic()
        except TimeoutError as error:
            if time.monotonic() - self._learner_alive <= seconds:
                return None
            wanted = "no weights came" if self.policy_version < 0 else "no newer weights came"
            raise TimeoutError(
                f"{wanted}, and there was no sign of the learner for {seconds:.0f} s"
                " (actor.weights_timeout_seconds): its weight store did not answer, and the buffer did not hear from it"
            ) from error
        if manifest is None:
            return None
        # A version waits while an evaluation runs, because an evaluation measures one version. The fetch waits too: the
        # store might not keep the version until the evaluation has ended.
        async with self._loading:
            fetched_from, learner_then = time.monotonic(), self._learner_version
            try:
                local = await self.weights.fetch(manifest)
            # A newer version superseded this one, or the learner ended during the fetch and will publish again.
            except (RequestRefused, TimeoutError) as error:
                logger.info("policy %d was not fetched: %s", manifest.policy_version, error)
                self._note_lateness(manifest.policy_version, time.monotonic() - fetched_from, learner_then)
                return None
            # There is no room for pulled weights. The older weights serve until the next attempt.
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                logger.warning("policy %d was not stored: %s; tried again", manifest.policy_version, error)
                await asyncio.sleep(DISK_RETRY_SECONDS)
                return None
            paused_from = time.monotonic()
            with self._deadlines.paused():
                await self.engine.load(local)
            paused = time.monotonic() - paused_from
        self.policy_version, self.publication = manifest.policy_version, manifest.publication
        self.meter.loaded(paused_from - fetched_from, paused)
        logger.info("policy %d loaded, generation paused for %.3f s", self.policy_version, paused)
        await self._send_heartbeat("")
        self._note_lateness(self.policy_version, paused_from - fetched_from, learner_then)
        return local

    def _note_lateness(self, version: int, seconds: float, learner_then: int) -> None:
        """Warn when the learner advanced more than `max_staleness` versions while a version was fetched.

        Such a version is too old for new leases when it arrives.

        Args:
            version: the version that was fetched, or whose fetch ended early.
            seconds: duration of the fetch.
            learner_then: the learner's version when the fetch began.
        """
        made, before = self._learner_version - learner_then, self._lateness
        self._lateness = ""
        if learner_then >= 0 and made > self._max_staleness:
            self._lateness = (
                f"weights in time: policy {version} was {seconds:.0f} s on its way, in which the learner made"
                f" {made} versions, more than max_staleness={self._max_staleness}"
            )
        if self._lateness and not before:
            logger.warning(
                "waits for %s; a faster link, a relay on this host, weights.deltas=true, a higher"
                " weights.bytes_per_second or max_staleness, or longer steps (groups_per_batch) give it prompts",
                self._lateness,
            )

    async def _verify_first_load(self, local: FetchedVersion, engine_checksums: dict[str, str]) -> None:
        """Compare the weights that Slipstream loaded with the same weights from vLLM's own loader.

        Version 0 is in the folder that the engine started from. A later version is written to a folder, from which
        vLLM loads it once more, and which is removed then.

        Raises:
            RuntimeError: a parameter differs.
        """
        version = local.policy_version
        if version > 0 and not local.on_host:
            logger.info("policy %d stays on the learner's device and is not compared after the first load", version)
            return
        ours = await self.engine.checksums()
        if version > 0:
            reloaded = await self._reloaded_checksums(local)
            if reloaded is None:
                logger.warning("policy %d is not compared after the first load: no disk has room for it", version)
                return
            engine_checksums = reloaded
        wrong = sorted(name for name in engine_checksums if engine_checksums[name] != ours.get(name))
        if wrong:
            raise RuntimeError(
                f"policy {version}: {len(wrong)} of {len(engine_checksums)} parameters differ after the"
                f" first load, the first is {wrong[0]}; the model at {self.config.model_path} is not what the learner"
                " trains"
            )
        logger.info("policy %d: %d parameters verified after the first load", version, len(ours))

    async def _reloaded_checksums(self, local: FetchedVersion) -> dict[str, str] | None:
        """Let vLLM load `local` from a folder and return its checksums; None without room for the folder."""
        from actors.weights.vllm_loader import export_folder

        for place in (self.spool, Path(tempfile.gettempdir())):
            folder = place / f"verify-{self.actor_id}"
            try:
                await asyncio.to_thread(export_folder, local, Path(self.config.model_path), folder)
                await self.engine.reload_from_folder(str(folder))
                return await self.engine.checksums()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return None

    # --- evaluation --------------------------------------------------------------------------------------------------

    async def _evaluate(self, requested_version: int) -> None:
        """Report pass@1 on the held-out prompts. The current weights stay loaded until the evaluation ends."""
        started = time.monotonic()
        async with self._loading:
            version = self.policy_version
            problems = self.task.held_out[: self.config.evaluation_prompts]
            self._evaluation_deadlines = GroupDeadlines(self.config.sample_timeout_seconds)
            # The engine has so much to do meanwhile that groups may take any time.
            with self._deadlines.paused():
                results = await asyncio.gather(*(self._evaluate_one(problem, version) for problem in problems))
            self._evaluation_deadlines = None
        rewards, correct, lengths = np.array(results).T
        report = EvaluationReport(
            actor_id=self.actor_id,
            requested_version=requested_version,
            policy_version=version,
            num_prompts=len(results),
            pass_at_1=float(correct.mean()),
            reward_mean=float(rewards.mean()),
            completion_tokens_mean=float(lengths.mean()),
            seconds=time.monotonic() - started,
        )
        await self._call(report)
        self._evaluating.remove(requested_version)
        logger.info("policy %d: pass@1 %.3f on %d held-out prompts", version, report.pass_at_1, report.num_prompts)

    async def _evaluate_one(self, problem: Problem, version: int) -> tuple[float, float, float]:
        prompt_ids = task_prompt_ids(self.task, problem, self.tokenizer)
        if len(prompt_ids) >= self.config.max_tokens:
            # The prompt does not fit the context. It counts as wrong: leaving it out would overstate pass@1.
            if self.task.is_multi_turn:
                return 0.0, 0.0, 0.0
            assert self.pool is not None
            [score] = await self.pool.score_group(
                [verifier.base.Completion(text="", gold=problem.gold, truncated=True)]
            )
            return score.reward, 0.0, 0.0
        max_new_tokens = self.config.evaluation_max_new_tokens or self.config.max_new_tokens
        work = self._completer.complete(
            problem,
            prompt_ids,
            f"evaluation-{version}-{problem.prompt_id}",
            # Use the same seeds at every version, so that the curve shows only the policy's changes.
            seed_key=f"evaluation-{problem.prompt_id}",
            num_samples=1,
            temperature=self.config.evaluation_temperature,
            max_new_tokens=max_new_tokens,
            seeded=True,
        )
        assert self._evaluation_deadlines is not None
        try:
            most_tokens = self._completer.most_tokens(max_new_tokens)
            [(completion, score)] = await self._evaluation_deadlines.complete(work, most_tokens)
        except OverdueError as error:
            logger.warning("held-out prompt %d took %s; it counts as wrong", problem.prompt_id, error)
            await self._check_engine(f"held-out prompt {problem.prompt_id}")
            return 0.0, 0.0, 0.0
        return score.reward, float(score.verdict is Verdict.CORRECT), float(completion.num_sampled)

    # --- the buffer --------------------------------------------------------------------------------------------------

    async def _send_heartbeats(self) -> None:
        while True:
            await self._send_heartbeat(self._what_it_waits_for())
            await asyncio.sleep(max(self.config.heartbeat_seconds, self._least_heartbeat_seconds))

    def _what_it_waits_for(self) -> str:
        if self.policy_version < 0:
            return "the learner's first weights"
        return "" if self.meter.num_in_flight else self._lateness or "prompts from the buffer"

    async def _send_heartbeat(self, waiting_for: str) -> None:
        metrics = (
            self.meter.metrics()
            | {"groups_leased": float(len(self._rollouts)), "weight_pulled_bytes": float(self.weights.pulled_bytes)}
            | {f"verifier_{name}": number for name, number in (self.pool.counts() if self.pool else {}).items()}
        )
        version, held = self.policy_version, (tuple(self._rollouts), tuple(self._evaluating))
        reply = await self._call(Heartbeat("actor", self.actor_id, version, waiting_for, metrics, *held))
        if isinstance(reply, HeartbeatReply):
            self._stop_rollouts(reply.ended)
            self._closing, self._learner_version = reply.closing, reply.policy_version
            self._least_heartbeat_seconds = reply.least_seconds
            # During an evaluation a probe would wait behind it. The buffer repeats the probe.
            if not self._loading.locked():
                self._prober.offer(reply.probes, self.policy_version)
            if reply.learner_silent_seconds >= 0:
                self._learner_alive = max(self._learner_alive, time.monotonic() - reply.learner_silent_seconds)
            self._room_changed.set()

    async def _call(self, message: Message) -> Message:
        """Send `message` and return the buffer's answer.

        The connection resends the message until the answer arrives.
        """
        return await asyncio.wrap_future(self.buffer.request(message))
