"""The interface of published weights that the actor and its engine call, the same for every `weights.transport`.

`file`: `WeightClient` in `actors/weights/client.py`, whose versions are `LocalWeights`. `ipc` and `nccl`:
`DeviceClient` in `actors/weights/device_client.py`, whose versions are `DeviceWeights`.
"""

from __future__ import annotations

from typing import Any, Protocol

from buffer.transport.messages import Manifest


class FetchedVersion(Protocol):
    """One version that the engine can load until `release`."""

    @property
    def policy_version(self) -> int:
        """Completed optimizer steps behind these weights."""

    @property
    def on_host(self) -> bool:
        """Whether this process can read the bytes; False while they stay on the learner's CUDA device."""

    def update_info(self) -> dict[str, Any]:
        """Return the argument of the `update_weights` call of vLLM's weight-transfer engine, in plain types."""

    def init_info(self) -> dict[str, Any] | None:
        """Return the argument of vLLM's `init_weight_transfer_engine`: the NCCL group to join. None: no group."""

    def release(self) -> None:
        """Allow the learner to reuse the memory. Call after the load, or when the version is not needed."""


class VersionClient(Protocol):
    """Fetches versions from the learner's weight store."""

    @property
    def pulled_bytes(self) -> int:
        """Bytes received over the network so far."""

    async def wait_for_new(self, known_publication: str, wait_seconds: float) -> Manifest | None:
        """Wait for a manifest other than `known_publication`; None when there is none after `wait_seconds`."""

    async def fetch(self, manifest: Manifest) -> FetchedVersion:
        """Make a version available to the engine.

        Raises:
            RuntimeError: the version is not what the learner published, or cannot be reached from this host.
            RequestRefused: the version is gone; ask for the newest manifest.
            TimeoutError: the version did not arrive in time.
            OSError: there is no room for it.
        """

    def close(self) -> None:
        """Close the connections that this client opened."""
