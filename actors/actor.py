"""One actor: leases prompts, samples and scores groups, delivers them, and loads new weights.

These tasks run concurrently on one event loop:

- leases: ask the buffer for prompts while fewer than `max_groups_in_flight` groups are in flight;
- one rollout per lease: sample, score and deliver a group;
- weights: fetch and load new versions (`actors/loading.py`);
- heartbeats: report version and metrics to the buffer;
- one evaluation at a time, when the buffer asks for it;
- weight probes, one at a time, when the buffer asks for one.

An error in any of them ends the process, and the supervisor decides whether to restart it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from actors.config import ActorConfig
from actors.loading import Loader
from actors.metrics import Meter
from actors.rollouts.completer import Completer
from actors.rollouts.deadlines import GroupDeadlines, OverdueError
from actors.rollouts.evaluation import Evaluator
from actors.rollouts.probe import Prober
from actors.rollouts.trajectories import TextTokenizer, build_group, task_prompt_ids
from actors.tasks.task import Problem, Task
from actors.weights.interface import VersionClient
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
from verifier.scoring.pool import ScoringPool

if TYPE_CHECKING:
    from actors.engine.engine import Engine

logger = logging.getLogger(__name__)

GOODBYE_SECONDS = 1.0
UNCLAIMED_SECONDS = 0.1
"""Time after which leases in an answer that no request waits for are given back."""
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
        clock: seconds of a monotonic clock.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.actor_id, self.config, self.task, self.tokenizer = actor_id, config, task, tokenizer
        self.engine, self.pool, self.buffer, self.weights, self._clock = engine, pool, buffer, weights, clock
        self.meter = Meter()
        self._completer = Completer(config, task, tokenizer, engine, pool, self.meter)
        self._prober = Prober(actor_id, config.temperature, engine)
        self._deadlines = GroupDeadlines(config.sample_timeout_seconds, clock)
        self._evaluator = Evaluator(config, task, tokenizer, pool, self._completer, self._check_engine, clock)
        parts = engine, weights, spool, self._deadlines, self.meter, max_staleness
        self._loader = Loader(config, *parts, lambda: self._send_heartbeat(""), clock)
        self._closing = False
        self._least_heartbeat_seconds = 0.0
        """Time between two heartbeats that the buffer asks for: longer with thousands of actors."""
        self._num_unscored = self._num_overdue = 0
        self._rollouts: dict[str, asyncio.Task[None]] = {}
        """One per lease, from its grant to the receipt of its group, by group id."""
        self._evaluating: list[int] = []
        """Requested versions of the evaluations that are not reported yet."""
        self._room_changed = asyncio.Event()

    @property
    def policy_version(self) -> int:
        """The version in the engine; -1: none yet."""
        return self._loader.policy_version

    async def run(self) -> None:
        """Generate until cancelled. Whatever ends it, the actor first gives back what it holds.

        Waits for: the learner's first weights. Gives up after: `weights_timeout_seconds` without a sign of life of the
        learner.

        Raises:
            ExceptionGroup: with the error of the task that failed.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                self._watch_unclaimed(tasks)
                # Heartbeats must not stop once they have begun: a silent peer counts as hung.
                tasks.create_task(self._send_heartbeats())
                await self._loader.load_first()
                tasks.create_task(self._loader.keep_fresh())
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
            self._evaluator.check()
            await asyncio.sleep(self.config.heartbeat_seconds)

    def _max_new_tokens(self, lease: Lease) -> int:
        """Return the limit of the curriculum's stage, or else the run's."""
        return lease.max_new_tokens or self.config.max_new_tokens

    async def _evaluate(self, requested_version: int) -> None:
        """Report pass@1 on the held-out prompts. The current weights stay loaded until the evaluation ends."""
        started = self._clock()
        async with self._loader.lock:
            version = self.policy_version
            # The engine has so much to do meanwhile that groups may take any time.
            with self._deadlines.paused():
                results = await self._evaluator.evaluate(version)
        report = EvaluationReport(
            actor_id=self.actor_id,
            requested_version=requested_version,
            policy_version=version,
            num_prompts=results.num_prompts,
            pass_at_1=results.pass_at_1,
            reward_mean=results.reward_mean,
            completion_tokens_mean=results.completion_tokens_mean,
            seconds=self._clock() - started,
        )
        await self._call(report)
        self._evaluating.remove(requested_version)
        logger.info("policy %d: pass@1 %.3f on %d held-out prompts", version, report.pass_at_1, report.num_prompts)

    # --- the buffer --------------------------------------------------------------------------------------------------

    async def _send_heartbeats(self) -> None:
        while True:
            await self._send_heartbeat(self._what_it_waits_for())
            await asyncio.sleep(max(self.config.heartbeat_seconds, self._least_heartbeat_seconds))

    def _what_it_waits_for(self) -> str:
        if self.policy_version < 0:
            return "the learner's first weights"
        return "" if self.meter.num_in_flight else self._loader.lateness or "prompts from the buffer"

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
            self._closing = reply.closing
            self._loader.heard(reply)
            self._least_heartbeat_seconds = reply.least_seconds
            # During an evaluation a probe would wait behind it. The buffer repeats the probe.
            if not self._loader.lock.locked():
                self._prober.offer(reply.probes, self.policy_version)
            self._room_changed.set()

    async def _call(self, message: Message) -> Message:
        """Send `message` and return the buffer's answer.

        The connection resends the message until the answer arrives.
        """
        return await asyncio.wrap_future(self.buffer.request(message))
