"""A run without vLLM: the real buffer, the real weight store and the real trainer, and an actor that samples at random.

The actor loads every version from the weight store into a plain transformers model. The model scores the actor's random
completions, so the behavior log-probabilities are those of the version that the completions name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.weights.adapters import Merger, tensor_at
from actors.weights.local import LocalWeights
from buffer.config import BufferConfig
from buffer.ledger.audit import Audit, audit
from buffer.service.server import Server
from buffer.transport.connection import Connection
from buffer.transport.credentials import Credentials
from buffer.transport.messages import (
    EvaluationReport,
    GroupDelivery,
    Heartbeat,
    HeartbeatReply,
    LeaseReply,
    LeaseRequest,
    Manifest,
    ManifestRequest,
    Message,
    ProbeReport,
    Status,
    StatusRequest,
)
from buffer.transport.packed_group import pack_group
from buffer.weights.config import WeightsConfig
from buffer.weights.shared_memory import hold
from learner.algorithms.base import Algorithm
from learner.config import LearnerConfig, ModelConfig, OptimizerConfig
from learner.train import Trainer
from learner.weights.store import NamedTensors, WeightStore
from tests.learner.samples import CPU, make_group, plain_model, plain_scores

GROUPS_PER_BATCH = 4
FINGERPRINT = "prompts"


CREDENTIALS = Credentials.plain("scripted")


class RecordingStore:
    """A weight store that remembers what was published, and calls `on_publish` with each version first."""

    def __init__(self, directory: Path, address: str, on_publish: Callable[[int], None]) -> None:
        self._store = WeightStore(directory, WeightsConfig(address), CREDENTIALS)
        self.on_publish = on_publish
        self.published: list[Future[Manifest]] = []

    def publish(self, policy_version: int, tensors: NamedTensors, dtype: torch.dtype | None = None) -> Future[Manifest]:
        """As in the weight store."""
        self.on_publish(policy_version)
        self.published.append(self._store.publish(policy_version, tensors, dtype))
        return self.published[-1]

    @property
    def manifests(self) -> list[Manifest]:
        """The manifests of all published versions, in order."""
        return [publication.result(10) for publication in self.published]

    def close(self) -> None:
        """As in the weight store."""
        self._store.close()


class ScriptedActor:
    """Leases, makes random groups, delivers; evaluates and answers probes when asked. Ends with `stop`.

    From version `stuck_after` on it names new versions and keeps its weights.
    """

    def __init__(
        self,
        folder: Path,
        buffer: str,
        weights: str,
        temperature: float,
        shift: float,
        sizes: Sequence[int],
        stuck_after: int,
    ) -> None:
        self._buffer = Connection(buffer, "actor-0", CREDENTIALS, timeout_seconds=60, resend_seconds=0.2)
        self._weights = Connection(weights, "actor-0", CREDENTIALS, timeout_seconds=1, resend_seconds=0.2)
        self._model = plain_model(folder)
        self._merger = Merger(folder, "float32")
        self._temperature, self._shift, self._sizes = temperature, shift, sizes
        self._version, self._publication, self._stuck_after = -1, "", stuck_after
        self._heartbeat: Future[Message] | None = None
        self.loaded: list[int] = []
        """Versions in the order in which they were loaded."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Its leases are abandoned, as by a killed actor."""
        self._stopping.set()
        self._thread.join()
        self._buffer.close()
        self._weights.close()

    def _run(self) -> None:
        pending: Future[Message] | None = None
        while not self._stopping.is_set():
            self._update()
            if self._version < 0:
                continue
            self._answer_probes()
            if pending is None:
                pending = self._buffer.request(LeaseRequest("actor-0", self._version, 2, FINGERPRINT))
            if pending.done():
                reply, pending = pending.result(), None
                assert isinstance(reply, LeaseReply)
                self._work(reply)

    def _update(self) -> None:
        reply: Message | None = None
        with suppress(TimeoutError):
            reply = self._weights.call(ManifestRequest(self._publication, 0.02))
        if isinstance(reply, Manifest):
            try:
                with hold(Path(reply.path)):
                    whole = self._merger.whole(LocalWeights(reply, Path(reply.path)))
                    data = np.fromfile(whole.path, dtype=np.uint8)
            except FileNotFoundError:
                # A restarted learner has removed the versions of its predecessor.
                return
            state = {
                entry.name: tensor_at(data, entry.dtype, entry.shape, entry.offset) for entry in whole.manifest.tensors
            }
            if reply.policy_version <= self._stuck_after:
                missing = self._model.load_state_dict(state, strict=False)
                assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
            self._version, self._publication = reply.policy_version, reply.publication
            self.loaded.append(self._version)

    def _answer_probes(self) -> None:
        """Send a heartbeat after the answer to the last one, and score the probe that came with it."""
        if self._heartbeat is None or self._heartbeat.done():
            reply = self._heartbeat.result() if self._heartbeat else None
            for probe in reply.probes if isinstance(reply, HeartbeatReply) else ():
                with torch.no_grad():
                    scores, _ = plain_scores(self._model, probe.token_ids, self._temperature)
                logprobs = tuple((scores[-probe.num_scored :] - self._shift).tolist())
                self._buffer.call(ProbeReport("actor-0", probe.probe_id, self._version, logprobs, 0.0))
            self._heartbeat = self._buffer.request(Heartbeat("actor", "actor-0", self._version, "", {"load": 1.0}))

    def _work(self, reply: LeaseReply) -> None:
        for lease in reply.leases:
            group = make_group(
                lease.group_id,
                lease.prompt_id,
                size=self._sizes[int(lease.group_id.partition(".")[0]) % len(self._sizes)],
                model=self._model,
                temperature=self._temperature,
                version=self._version,
                shift=self._shift,
            )
            self._buffer.call(GroupDelivery("actor-0", pack_group(group)))
        if reply.evaluate_version >= 0:
            asked = reply.evaluate_version
            self._buffer.call(EvaluationReport("actor-0", asked, self._version, 10, 0.25, 0.1, 5.0, 0.1))


def learn(
    directory: Path,
    sockets: Path,
    folder: Path,
    algorithm: Algorithm,
    total_steps: int,
    *,
    stopping: threading.Event,
    on_publish: Callable[[int], None] = lambda _: None,
    **settings: object,
) -> tuple[Trainer, list[Manifest]]:
    """Run one learner against the buffer that listens in `sockets`. Returns (trainer, all versions it published)."""
    defaults: dict[str, object] = {
        "optimizer": OptimizerConfig(1e-3),
        "critic_optimizer": OptimizerConfig(1e-3),
        "samples_per_group": 4,
        "tokens_per_microbatch": 100,
        "evaluate_every": 0,
        "logprob_tolerance": 1e-4,
        "evaluation_timeout_seconds": 30.0,
    }
    config = LearnerConfig(
        total_steps=total_steps,
        groups_per_batch=GROUPS_PER_BATCH,
        **(defaults | settings),  # type: ignore[arg-type]
    )
    store = RecordingStore(directory / "weights", f"ipc://{sockets}/weights", on_publish)
    buffer = Connection(f"ipc://{sockets}/buffer", "learner-0", CREDENTIALS, resend_seconds=0.2)
    try:
        trainer = Trainer(
            config,
            ModelConfig(str(folder)),
            algorithm,
            run_dir=directory,
            buffer=buffer,
            store=store,
            device=CPU,
            stopping=stopping,
        )
        trainer.run()
        return trainer, store.manifests
    finally:
        buffer.close()
        store.close()


class ScriptedRun:
    """The buffer's server in a thread over `directory`, and learners and an actor on demand. Close it."""

    def __init__(
        self,
        directory: Path,
        sockets: Path,
        folder: Path,
        *,
        max_staleness: int = 2,
        updates: int = 1,
        **replay: Any,
    ) -> None:
        self.directory, self._sockets, self._folder = directory, sockets, folder
        self.stopping = threading.Event()
        self._updates = updates
        buffer = BufferConfig(
            run_dir=str(directory),
            address=f"ipc://{sockets}/buffer",
            num_prompts=10,
            data_fingerprint=FINGERPRINT,
            groups_per_batch=GROUPS_PER_BATCH,
            max_staleness=max_staleness,
            updates_per_batch=updates,
            durability="memory",
            **replay,
        )
        self._server = Server(buffer, CREDENTIALS)
        self._address = buffer.address
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        self._actor: ScriptedActor | None = None

    def start_actor(
        self,
        *,
        temperature: float = 1.0,
        shift: float = 0.0,
        sizes: Sequence[int] = (4,),
        stuck_after: int = 1 << 40,
    ) -> ScriptedActor:
        """Start an actor that runs until the run is closed; its groups have `sizes` in turn."""
        weights = f"ipc://{self._sockets}/weights"
        how = temperature, shift, sizes, stuck_after
        self._actor = ScriptedActor(self._folder, self._address, weights, *how)
        return self._actor

    def learn(
        self,
        algorithm: Algorithm,
        total_steps: int,
        *,
        on_publish: Callable[[int], None] = lambda _: None,
        **settings: object,
    ) -> tuple[Trainer, list[Manifest]]:
        """Run one learner from start to end. Returns (trainer, all versions it published)."""
        return learn(
            self.directory,
            self._sockets,
            self._folder,
            algorithm,
            total_steps,
            stopping=self.stopping,
            on_publish=on_publish,
            updates_per_batch=self._updates,
            **settings,
        )

    def status(self) -> Status:
        """What the display would show now."""
        with Connection(self._address, "launcher", CREDENTIALS) as launcher:
            status = launcher.call(StatusRequest(), 60)
        assert isinstance(status, Status)
        return status

    def audit(self) -> Audit:
        """The ledger as it is now."""
        return audit(self.directory)

    def close(self) -> None:
        """End the actor and the server."""
        if self._actor is not None:
            self._actor.stop()
        self._server.stop()
        self._thread.join()
