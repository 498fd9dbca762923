"""One actor: leases prompts, samples and scores groups, delivers them, and keeps its weights fresh.

Four kinds of task run side by side on one event loop: credit (ask the buffer for leases while there is room in flight),
a rollout per lease, weights (fetch the next version behind the generation, load it in the middle of it) and heartbeats.
Any error in one of them ends the process; the supervisor decides what follows.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.config import ActorConfig
from actors.metrics import Meter
from actors.rollouts.episode import play
from actors.rollouts.trajectories import (
    Continuation,
    TextTokenizer,
    build_group,
    completions_to_score,
    single_turn,
    split_stops,
    task_prompt_ids,
)
from actors.tasks.task import Problem, Task
from actors.weights.interface import FetchedVersion, VersionClient
from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.messages import (
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
from verifier.base import Completion, Score, Verdict
from verifier.scoring.pool import ScoringPool

if TYPE_CHECKING:
    from actors.engine.engine import Engine, SampledCompletion

logger = logging.getLogger(__name__)

DISK_RETRY_SECONDS = 5.0
MAX_UNSCORED_GROUPS = 50
"""Groups in a row of which nothing could be scored, after which something else is wrong than a hard answer."""


class Actor:
    """Generation for one buffer.

    Args:
        actor_id: unique in the run.
        config: sampling and evaluation.
        task: prompts and golds; the buffer speaks of them by number.
        tokenizer: the model's.
        engine: started.
        pool: scores completions; None for a multi-turn task, whose environment does.
        buffer: connection to the buffer.
        weights: pulls versions from the learner.
        spool: folder for this actor's files.
        max_staleness: the run's, in versions: with older weights the buffer gives out no prompts.
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
        self.stop, self.stop_token_ids = split_stops(task.stop, tokenizer)
        self.policy_version = -1
        self.publication = ""
        self.meter = Meter()
        self._max_staleness = max_staleness
        self._learner_version = -1
        """As the last heartbeat's answer had it."""
        self._lateness = ""
        """Why it may have no prompts: the last version took too long to come here."""
        self._closing = False
        self._leased = self._num_unscored = 0
        self._credit_changed = asyncio.Event()
        self._loading = asyncio.Lock()

    async def run(self, engine_checksums: dict[str, str]) -> None:
        """Work until cancelled.

        Waits for: the learner's first weights, at most `weights_timeout_seconds`.
        """
        deadline, loaded = time.monotonic() + self.config.weights_timeout_seconds, None
        while loaded is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no weights from the learner within {self.config.weights_timeout_seconds:.0f} s")
            loaded = await self._load_next()
        async with asyncio.TaskGroup() as tasks:
            # From the first sign of life on: whoever falls silent after it counts as hung.
            tasks.create_task(self._keep_beating())
            await self._verify_first_load(loaded, engine_checksums)
            loaded.release()
            tasks.create_task(self._keep_weights_fresh())
            tasks.create_task(self._spend_credit(tasks))

    # --- leases ------------------------------------------------------------------------------------------------------

    async def _spend_credit(self, tasks: asyncio.TaskGroup) -> None:
        """Ask for as many groups as fit in flight.

        Waits for: the buffer's admission. Unblocked by: batches taken by the learner, or newer weights here, of which
        the buffer hears by heartbeat.
        """
        while True:
            while self._leased >= self.config.max_groups_in_flight and not self._closing:
                self._credit_changed.clear()
                await self._credit_changed.wait()
            reply = await self._ask_for_leases(max(self.config.max_groups_in_flight - self._leased, 0))
            self._closing = reply.closing
            for lease in reply.leases:
                self._leased += 1
                tasks.create_task(self._roll_out(lease))
            if reply.evaluate_version >= 0:
                tasks.create_task(self._evaluate(reply.evaluate_version))
            elif self._closing and not reply.leases:
                await asyncio.sleep(0.5)

    async def _ask_for_leases(self, num_groups: int) -> LeaseReply:
        reply = await self._call(LeaseRequest(self.actor_id, self.policy_version, num_groups, self.task.fingerprint))
        if not isinstance(reply, LeaseReply):
            raise RuntimeError(f"the buffer answered {reply} to a lease request")
        return reply

    async def _roll_out(self, lease: Lease) -> None:
        """Sample, score and deliver one group; an impossible prompt is given back with the reason."""
        problem = self.task.train[lease.prompt_id]
        prompt_ids = task_prompt_ids(self.task, problem, self.tokenizer)
        if len(prompt_ids) + self._max_new_tokens(lease) > self.config.max_tokens:
            logger.warning(
                "prompt %d has %d tokens and leaves no room to answer; dropped", lease.prompt_id, len(prompt_ids)
            )
            await self._call(LeaseReturn(self.actor_id, (lease.group_id,), "prompt_too_long"))
        else:
            await self._deliver(lease, problem, prompt_ids)
        self._leased -= 1
        self._credit_changed.set()

    async def _deliver(self, lease: Lease, problem: Problem, prompt_ids: list[int]) -> None:
        completed = await self._complete(
            problem,
            prompt_ids,
            lease.group_id,
            noise=lease.group_id,
            num_samples=lease.samples_per_group or self.config.samples_per_group,
            temperature=self.config.temperature,
            max_new_tokens=self._max_new_tokens(lease),
            seeded=self.config.seeded_sampling,
        )
        self.meter.sampled(len(completed), sum(continuation.num_sampled for continuation, _ in completed))
        kept = [(continuation, score) for continuation, score in completed if not score.skipped]
        if not kept:
            await self._give_back_unscored(lease)
            return
        self._num_unscored = 0
        continuations, scores = zip(*kept, strict=True)
        group = build_group(lease.group_id, problem, prompt_ids, continuations, scores, self.actor_id)
        receipt = await self._call(GroupDelivery(self.actor_id, pack_group(group)))
        if not isinstance(receipt, GroupReceipt):
            raise RuntimeError(f"the buffer answered {receipt} to a delivered group")
        if receipt.outcome not in ("stored", "dropped"):
            logger.warning("group %s was %s", receipt.group_id, receipt.outcome)

    async def _give_back_unscored(self, lease: Lease) -> None:
        """Nothing of the group could be scored, and the configuration says to leave such completions out."""
        self._num_unscored += 1
        if self._num_unscored == MAX_UNSCORED_GROUPS:
            raise RuntimeError(
                f"not one completion of {MAX_UNSCORED_GROUPS} groups in a row could be scored; the log says why, and"
                " verifier.deadline_seconds and verifier.memory_bytes are the limits"
            )
        logger.warning("no completion of group %s could be scored; dropped", lease.group_id)
        await self._call(LeaseReturn(self.actor_id, (lease.group_id,), "unscored"))

    def _max_new_tokens(self, lease: Lease) -> int:
        """What the curriculum's stage allows; without one, what the run does."""
        return lease.max_new_tokens or self.config.max_new_tokens

    async def _complete(
        self,
        problem: Problem,
        prompt_ids: list[int],
        request_id: str,
        *,
        noise: str,
        num_samples: int,
        temperature: float,
        max_new_tokens: int,
        seeded: bool,
    ) -> list[tuple[Continuation, Score]]:
        """Completions of one prompt with their scores: answered once and graded, or played turn by turn.

        Args:
            noise: what the seeds are made of; completions of the same prompt still differ.
            seeded: whether sampling has a seed; an environment's noise always has one.
        """
        how = {"temperature": temperature, "max_new_tokens": max_new_tokens}

        async def play_one(index: int) -> tuple[Continuation, Score]:
            async def sample(token_ids: Sequence[int], turn: int) -> SampledCompletion:
                seed = self._seed(noise, index, turn) if seeded else None
                [choice] = await self._sample(
                    token_ids, f"{request_id}.{index}.{turn}", num_samples=1, seed=seed, **how
                )
                return choice

            limits = {"max_new_tokens": max_new_tokens, "max_tokens": self.config.max_tokens}
            seed = self._seed(noise, index)
            return await play(self.task, problem, prompt_ids, self.tokenizer, sample, seed=seed, **limits)

        if self.task.is_multi_turn:
            return await asyncio.gather(*(play_one(index) for index in range(num_samples)))
        seed = self._seed(noise) if seeded else None
        sampled = await self._sample(prompt_ids, request_id, num_samples=num_samples, seed=seed, **how)
        prefill = self.task.template.prefill
        assert self.pool is not None
        scores = await self.pool.score_group(completions_to_score(problem, sampled, self.tokenizer, prefill))
        return [(single_turn(choice), score) for choice, score in zip(sampled, scores, strict=True)]

    async def _sample(self, prompt_ids: Sequence[int], request_id: str, **how: Any) -> list[SampledCompletion]:
        """Completions of one prompt.

        Waits for: the engine. Gives up after: `sample_timeout_seconds`, with a TimeoutError that ends the actor.
        """
        seconds = self.config.sample_timeout_seconds
        with self.meter.in_flight():
            try:
                async with asyncio.timeout(seconds):
                    return await self.engine.sample(
                        prompt_ids,
                        request_id=request_id,
                        stop=self.stop,
                        stop_token_ids=self.stop_token_ids,
                        **how,
                    )
            except TimeoutError as error:
                raise TimeoutError(f"the engine did not finish request {request_id} within {seconds:.0f} s") from error

    def _seed(self, group_id: str, *parts: int) -> int:
        """Of the prompt's occurrence, not of the attempt: a group sampled again is sampled the same."""
        occurrence = group_id.split(".", 1)[0]
        return zlib.crc32(":".join(map(str, (self.config.seed, occurrence, *parts))).encode())

    # --- weights -----------------------------------------------------------------------------------------------------

    async def _keep_weights_fresh(self) -> None:
        """Load every version as it is published; one that is overtaken while it is fetched is skipped."""
        while True:
            loaded = await self._load_next()
            if loaded is not None:
                loaded.release()

    async def _load_next(self) -> FetchedVersion | None:
        """Load the next version; None when there was none in time, or it was overtaken while it was fetched.

        Waits for: the learner's next publication. Gives up after: `weights_timeout_seconds`.
        """
        manifest = await self.weights.wait_for_new(self.publication, self.config.weights_timeout_seconds)
        if manifest is None:
            return None
        # An evaluation measures one version, so a newer one waits until it is through; the store may not keep it that
        # long, so it is fetched afterwards.
        async with self._loading:
            fetched_from, learner_then = time.monotonic(), self._learner_version
            try:
                local = await self.weights.fetch(manifest)
            # Overtaken by a newer version, or the learner died on the way and will publish anew.
            except (RequestRefused, TimeoutError) as error:
                logger.info("policy %d was not fetched: %s", manifest.policy_version, error)
                self._note_lateness(manifest.policy_version, time.monotonic() - fetched_from, learner_then)
                return None
            # Pulled weights need room; there may be some again, and meanwhile the older weights serve.
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                logger.warning("policy %d was not stored: %s; tried again", manifest.policy_version, error)
                await asyncio.sleep(DISK_RETRY_SECONDS)
                return None
            paused_from = time.monotonic()
            await self.engine.load(local)
            paused = time.monotonic() - paused_from
        self.policy_version, self.publication = manifest.policy_version, manifest.publication
        self.meter.loaded(paused_from - fetched_from, paused)
        logger.info("policy %d loaded, generation paused for %.3f s", self.policy_version, paused)
        await self._beat("")
        self._note_lateness(self.policy_version, paused_from - fetched_from, learner_then)
        return local

    def _note_lateness(self, version: int, seconds: float, learner_then: int) -> None:
        """A version that the learner leaves more than `max_staleness` behind on its way is of no use when it is here.

        Args:
            version: that was fetched, or broken off.
            seconds: it took.
            learner_then: the learner's version when that began.
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
        """Compare the weights as loaded by us with the same weights as loaded by vLLM's own loader.

        Version 0 is the folder the engine started from. A later version is written out as a folder and loaded again.
        """
        version = local.policy_version
        if version > 0 and not local.on_host:
            logger.info("policy %d stays on the learner's device and is not compared after the first load", version)
            return
        if version > 0:
            from actors.weights.vllm_loader import export_folder

            folder = await asyncio.to_thread(export_folder, local, Path(self.config.model_path), self.spool / "verify")
        ours = await self.engine.checksums()
        if version > 0:
            await self.engine.reload_from_folder(str(folder))
            engine_checksums = await self.engine.checksums()
        wrong = sorted(name for name in engine_checksums if engine_checksums[name] != ours.get(name))
        if wrong:
            raise RuntimeError(
                f"policy {version}: {len(wrong)} of {len(engine_checksums)} parameters differ after the"
                f" first load, the first is {wrong[0]}; the model at {self.config.model_path} is not what the learner"
                " trains"
            )
        logger.info("policy %d: %d parameters verified after the first load", version, len(ours))

    # --- evaluation --------------------------------------------------------------------------------------------------

    async def _evaluate(self, requested_version: int) -> None:
        """pass@1 on held-out prompts with the weights of this moment, which stay until it is done."""
        started = time.monotonic()
        async with self._loading:
            version = self.policy_version
            problems = self.task.held_out[: self.config.evaluation_prompts]
            results = await asyncio.gather(*(self._evaluate_one(problem, version) for problem in problems))
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
        logger.info("policy %d: pass@1 %.3f on %d held-out prompts", version, report.pass_at_1, report.num_prompts)

    async def _evaluate_one(self, problem: Problem, version: int) -> tuple[float, float, float]:
        prompt_ids = task_prompt_ids(self.task, problem, self.tokenizer)
        if len(prompt_ids) >= self.config.max_tokens:
            # The model cannot answer what it cannot read; leaving it out would flatter the policy.
            if self.task.is_multi_turn:
                return 0.0, 0.0, 0.0
            assert self.pool is not None
            [score] = await self.pool.score_group([Completion(text="", gold=problem.gold, truncated=True)])
            return score.reward, 0.0, 0.0
        max_new_tokens = self.config.evaluation_max_new_tokens or self.config.max_new_tokens
        [(continuation, score)] = await self._complete(
            problem,
            prompt_ids,
            f"evaluation-{version}-{problem.prompt_id}",
            # The same noise at every version, so that curves differ by the policy alone.
            noise=f"evaluation-{problem.prompt_id}",
            num_samples=1,
            temperature=self.config.evaluation_temperature,
            max_new_tokens=max_new_tokens,
            seeded=True,
        )
        return score.reward, float(score.verdict is Verdict.CORRECT), float(continuation.num_sampled)

    # --- talk with the buffer ----------------------------------------------------------------------------------------

    async def _keep_beating(self) -> None:
        while True:
            waiting_for = "" if self.meter.num_in_flight else self._lateness or "prompts from the buffer"
            await self._beat(waiting_for)
            await asyncio.sleep(self.config.heartbeat_seconds)

    async def _beat(self, waiting_for: str) -> None:
        metrics = (
            self.meter.metrics()
            | {"groups_leased": float(self._leased), "weight_pulled_bytes": float(self.weights.pulled_bytes)}
            | {f"verifier_{name}": number for name, number in (self.pool.counts() if self.pool else {}).items()}
        )
        reply = await self._call(Heartbeat("actor", self.actor_id, self.policy_version, waiting_for, metrics))
        if isinstance(reply, HeartbeatReply):
            self._closing, self._learner_version = reply.closing, reply.policy_version
            self._credit_changed.set()

    async def _call(self, message: Message) -> Message:
        """Ask the buffer. The connection resends until it answers; a buffer that is gone for good ends the run."""
        return await asyncio.wrap_future(self.buffer.request(message))
