"""The trainer's side of vLLM's NCCL weight transfer; the only file of the learner that imports vLLM.

vLLM's trainer drives its engines by remote calls. Here each actor drives its own engine when it reads a new manifest.
So the remote calls do nothing, and only the broadcast remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from buffer.weights.device_handle import Rendezvous
from learner.weights.store import Version


class SelfDrivenActors:
    """A `VLLMWeightSyncClient` of vLLM whose remote calls do nothing, because the actors drive their engines."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Do nothing: the actor does this, with the rendezvous in the record of its first version."""

    def start_weight_update(self) -> None:
        """Do nothing: the actor does this."""

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Do nothing: the actor does this, from the manifest."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Do nothing: the actor does this and sets the version number."""


class VersionSource:
    """A `WeightSource` of vLLM: the tensors of the next version to send, and their metadata."""

    def __init__(self, version: Version, describe: Callable[..., Any]) -> None:
        self.version, self._describe = version, describe

    def metadata(self) -> list[Any]:
        """Return a `ParamMeta` of vLLM for every tensor, in order."""
        return [self._describe(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.version]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.version)


def join(rendezvous: Rendezvous, device: torch.device, version: Version) -> Callable[[Version], None]:
    """Open the group as its rank 0.

    Waits for: all members. Gives up after: never; the caller must abandon the thread.

    Returns a function that broadcasts a version, and returns when the version has been sent.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    # Set the device of this thread, which is not the training thread. A separate stream keeps the next optimizer step
    # from waiting for actors.
    torch.cuda.set_device(device)
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    source = VersionSource(version, ParamMeta)
    information = NCCLTrainerInitInfo(
        rank=0,
        master_address=rendezvous.master_address,
        master_port=rendezvous.master_port,
        world_size=rendezvous.world_size,
        # The version is already in one buffer; packing it again would need two more.
        packed=False,
    )
    engine = WeightTransferTrainerFactory.trainer_init(information, client=SelfDrivenActors(), source=source)

    def send(sent: Version) -> None:
        source.version = sent
        with torch.cuda.stream(stream):
            engine.send_weights()

    return send
