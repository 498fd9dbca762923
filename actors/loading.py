"""Loads the published versions into the engine, and verifies the first one.

Owned by `actors/actor.py`, on its event loop. A version is fetched while generation goes on; then generation is paused
and the version loaded. A version that is superseded while it is fetched is skipped.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from actors.config import ActorConfig
from actors.metrics import Meter
from actors.rollouts.deadlines import GroupDeadlines
from actors.weights.interface import FetchedVersion, VersionClient
from buffer.files import has_no_space
from buffer.transport.connection import RequestRefused
from buffer.transport.messages import HeartbeatReply

if TYPE_CHECKING:
    from actors.engine.engine import Engine

logger = logging.getLogger(__name__)

DISK_RETRY_SECONDS = 5.0
MANIFEST_SECONDS = 10.0
"""Longest wait for one answer of the weight store about its newest version."""


class Loader:
    """The weights of one actor's engine.

    Args:
        config: of the actor.
        engine: a started engine, with the weights of the model's folder.
        weights: fetches versions from the learner.
        spool: the actor's folder; it holds the copy of the first version that vLLM loads for the comparison.
        deadlines: of the groups under way; a load pauses them.
        meter: counts the loads.
        max_staleness: the run's bound, in versions. The buffer grants no leases to an actor with older weights.
        tell: sends a heartbeat with the new version.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        config: ActorConfig,
        engine: Engine,
        weights: VersionClient,
        spool: Path,
        deadlines: GroupDeadlines,
        meter: Meter,
        max_staleness: int,
        tell: Callable[[], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        self._config, self._engine, self._weights, self._spool = config, engine, weights, spool
        self._deadlines, self._meter, self._max_staleness = deadlines, meter, max_staleness
        self._tell, self._clock = tell, clock
        self.policy_version = -1
        """The version in the engine; -1: the folder's weights."""
        self._publication = ""
        self.lock = asyncio.Lock()
        """Held during fetch and load; whoever else holds it keeps the version in the engine."""
        self.lateness = ""
        """What the actor waits for when the last version was fetched too slowly; empty: it was in time."""
        self._folder_checksums: dict[str, str] = {}
        """Checksums of the weights that the engine loaded from its folder, by parameter, if version 0 came first."""
        self._learner_version = -1
        """The learner's version in the last answer to a heartbeat."""
        self._learner_alive = clock()
        """Time of the last sign of life of the learner."""

    def heard(self, reply: HeartbeatReply) -> None:
        """Note what the buffer says of the learner."""
        self._learner_version = reply.policy_version
        if reply.learner_silent_seconds >= 0:
            self._learner_alive = max(self._learner_alive, self._clock() - reply.learner_silent_seconds)

    async def load_first(self) -> None:
        """Load the first version and verify it. Waits and fails as `load_next` and `verify` do."""
        loaded = await self.load_next()
        while loaded is None:
            loaded = await self.load_next()
        await self.verify(loaded)
        loaded.release()

    async def keep_fresh(self) -> None:
        """Load every version that is published. Skip a version that is superseded while it is fetched."""
        while True:
            loaded = await self.load_next()
            if loaded is not None:
                loaded.release()

    async def load_next(self) -> FetchedVersion | None:
        """Load the next version. Returns None when none was published in time, or when it could not be fetched.

        Waits for: the learner's next publication. Gives up after: `weights_timeout_seconds` without a sign of life of
        the learner.

        Raises:
            TimeoutError: no sign of life came in that time.
        """
        seconds = self._config.weights_timeout_seconds
        try:
            manifest = await self._weights.wait_for_new(self._publication, min(seconds, MANIFEST_SECONDS))
            self._learner_alive = self._clock()
        except TimeoutError as error:
            if self._clock() - self._learner_alive <= seconds:
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
        async with self.lock:
            fetched_from, learner_then = self._clock(), self._learner_version
            try:
                local = await self._weights.fetch(manifest)
            # A newer version superseded this one, or the learner ended during the fetch and will publish again.
            except (RequestRefused, TimeoutError) as error:
                logger.info("policy %d was not fetched: %s", manifest.policy_version, error)
                self._note_lateness(manifest.policy_version, self._clock() - fetched_from, learner_then)
                return None
            # There is no room for pulled weights. The older weights serve until the next attempt.
            except OSError as error:
                if not has_no_space(error):
                    raise
                logger.warning("policy %d was not stored: %s; tried again", manifest.policy_version, error)
                await asyncio.sleep(DISK_RETRY_SECONDS)
                return None
            fetch_seconds = self._clock() - fetched_from
            if self.policy_version < 0 and manifest.policy_version == 0:
                # The folder's weights, still in the engine, are those of version 0. No other version needs the digests.
                self._folder_checksums = await self._engine.checksums()
            paused_from = self._clock()
            with self._deadlines.paused():
                await self._engine.load(local)
            paused = self._clock() - paused_from
        self.policy_version, self._publication = manifest.policy_version, manifest.publication
        self._meter.loaded(fetch_seconds, paused)
        logger.info("policy %d loaded, generation paused for %.3f s", self.policy_version, paused)
        await self._tell()
        self._note_lateness(self.policy_version, fetch_seconds, learner_then)
        return local

    def _note_lateness(self, version: int, seconds: float, learner_then: int) -> None:
        """Warn when the learner advanced more than `max_staleness` versions while a version was fetched.

        Such a version is too old for new leases when it arrives.

        Args:
            version: the version that was fetched, or whose fetch ended early.
            seconds: duration of the fetch.
            learner_then: the learner's version when the fetch began.
        """
        made, before = self._learner_version - learner_then, self.lateness
        self.lateness = ""
        if learner_then >= 0 and made > self._max_staleness:
            self.lateness = (
                f"weights in time: policy {version} was {seconds:.0f} s on its way, in which the learner made"
                f" {made} versions, more than max_staleness={self._max_staleness}"
            )
        if self.lateness and not before:
            logger.warning(
                "waits for %s; a faster link, a relay on this host, weights.deltas=true, a higher"
                " weights.bytes_per_second or max_staleness, or longer steps (groups_per_batch) give it prompts",
                self.lateness,
            )

    async def verify(self, local: FetchedVersion) -> None:
        """Compare the weights that Slipstream loaded first with the same weights from vLLM's own loader.

        Version 0 is in the folder that the engine started from. A later version is written to a folder, from which
        vLLM loads it once more, and which is removed then.

        Raises:
            RuntimeError: a parameter differs.
        """
        version, expected = local.policy_version, self._folder_checksums
        if version > 0 and not local.on_host:
            logger.info("policy %d stays on the learner's device and is not compared after the first load", version)
            return
        ours = await self._engine.checksums()
        if version > 0:
            reloaded = await self._reloaded_checksums(local)
            if reloaded is None:
                logger.warning("policy %d is not compared after the first load: no disk has room for it", version)
                return
            expected = reloaded
        wrong = sorted(name for name in expected if expected[name] != ours.get(name))
        if wrong:
            raise RuntimeError(
                f"policy {version}: {len(wrong)} of {len(expected)} parameters differ after the first load, the first"
                f" is {wrong[0]}; the model at {self._config.model_path} is not what the learner trains"
            )
        logger.info("policy %d: %d parameters verified after the first load", version, len(ours))

    async def _reloaded_checksums(self, local: FetchedVersion) -> dict[str, str] | None:
        """Let vLLM load `local` from a folder and return its checksums; None without room for the folder."""
        from actors.weights.vllm_loader import export_folder

        for place in (self._spool, Path(tempfile.gettempdir())):
            folder = place / f"verify-{self._spool.name}"
            try:
                await asyncio.to_thread(export_folder, local, Path(self._config.model_path), folder)
                await self._engine.reload_from_folder(str(folder))
                return await self._engine.checksums()
            except OSError as error:
                if not has_no_space(error):
                    raise
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return None
