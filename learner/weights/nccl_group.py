"""vLLM's NCCL weight transfer, the trainer's side: the only file of the learner that knows vLLM.

vLLM's trainer would drive its engines by remote calls. Here an actor drives its own engine when it reads of a version,
so the trainer's calls have nothing to do, and what is left is the broadcast in which both meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from buffer.weights.device_handle import Rendezvous
from learner.weights.store import Version


class SelfDrivenActors:
    """vLLM's `VLLMWeightSyncClient` of engines that nobody has to call."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The actor does it with the rendezvous of the first version it reads of."""

    def start_weight_update(self) -> None:
        """The actor pauses and starts by itself."""

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """The manifest says what comes."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The actor gives the version its number."""


class VersionSource:
    """vLLM's `WeightSource`: the tensors of the version that is sent next, and their metadata."""

    def __init__(self, version: Version, describe: Callable[..., Any]) -> None:
        self.version, self._describe = version, describe

    def metadata(self) -> list[Any]:
        """A `ParamMeta` of vLLM's for every tensor, in order."""
        return [self._describe(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.version]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.version)


def join(rendezvous: Rendezvous, device: torch.device, version: Version) -> Callable[[Version], None]:
    """Open the group as its rank 0.

    Waits for: all members. Gives up after: whatever the caller's patience is.

    Returns what broadcasts a version and returns when it has left the device.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    # Of this thread, which is not the one that trains; on the training's stream the next step would wait for actors.
    torch.cuda.set_device(device)
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    source = VersionSource(version, ParamMeta)
    information = NCCLTrainerInitInfo(
        rank=0,
        master_address=rendezvous.master_address,
        master_port=rendezvous.master_port,
        world_size=rendezvous.world_size,
        # The version lies in one buffer already; packing it again would take another two.
        packed=False,
    )
    engine = WeightTransferTrainerFactory.trainer_init(information, client=SelfDrivenActors(), source=source)

    def send(sent: Version) -> None:
        source.version = sent
        with torch.cuda.stream(stream):
            engine.send_weights()

    return send
