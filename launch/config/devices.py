"""Finds the visible CUDA devices, assigns them to processes, and checks the weight transport. Does not import torch."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

from actors.config import ActorConfig
from buffer.weights.config import WeightsConfig
from launch.config.settings import ClusterConfig
from learner.config import LearnerConfig

DRIVER = Path("/proc/driver/nvidia")
VISIBLE = "CUDA_VISIBLE_DEVICES"


def has_cuda() -> bool:
    """Whether an NVIDIA driver is loaded."""
    return (DRIVER / "version").exists()


def visible_devices() -> list[str]:
    """The devices in `CUDA_VISIBLE_DEVICES`; without that variable, the numbers of all devices of the driver."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [device for device in named.split(",") if device]
    return [str(number) for number, _ in enumerate((DRIVER / "gpus").glob("*"))]


def assign_devices(num_ranks: int, num_actors: int, workers_per_actor: int) -> list[str]:
    """Values of `CUDA_VISIBLE_DEVICES` for the learner and then for each actor; no device is used twice.

    Raises:
        ValueError: there are too few devices.
    """
    devices, needed = visible_devices(), num_ranks + num_actors * workers_per_actor
    if len(devices) < needed:
        raise ValueError(
            f"cluster.separate_devices=true needs {needed} CUDA devices, for learner.num_ranks={num_ranks} and"
            f" cluster.num_actors={num_actors} x actor.tensor_parallel_size={workers_per_actor}, and {len(devices)} are"
            " visible; lower these numbers, or leave cluster.separate_devices out"
        )
    bounds = [0, *range(num_ranks, needed + 1, workers_per_actor)]
    return [",".join(devices[start:stop]) for start, stop in pairwise(bounds)]


def check_devices(weights: WeightsConfig, cluster: ClusterConfig, learner: LearnerConfig, actor: ActorConfig) -> None:
    """Check that the devices suit `weights.transport` and `cluster.separate_devices`.

    Raises:
        ValueError: they do not.
    """
    transport = weights.transport
    if transport != "file" and (learner.device == "cpu" or not has_cuda()):
        why = "learner.device=cpu" if learner.device == "cpu" else "no NVIDIA driver is loaded on this machine"
        raise ValueError(f"weights={transport} needs the learner on a CUDA device, but {why}; use weights=file")
    if cluster.separate_devices:
        if not has_cuda():
            raise ValueError("cluster.separate_devices=true on a machine without CUDA devices; leave it out")
        assign_devices(learner.num_ranks, cluster.num_actors, actor.tensor_parallel_size)
    if transport == "file":
        return
    if learner.lora.publishes_adapters:
        raise ValueError(
            f"weights={transport} sends whole weights and learner.lora.publish=adapter does not; use"
            " learner.lora.publish=merged or weights=file"
        )
    if cluster.relays:
        raise ValueError(f"weights={transport} sends nothing through relays; leave cluster.relays out, or weights=file")
    if not cluster.host.startswith("127."):
        raise ValueError(
            f"weights={transport} reaches actors on this machine only but cluster.host={cluster.host} is for"
            " actors on other hosts; use weights=file or leave cluster.host out"
        )
    if transport == "nccl" and not cluster.separate_devices:
        raise ValueError(
            "weights=nccl needs a device of its own for every member of its group; set cluster.separate_devices=true,"
            " or weights=ipc on one device"
        )
    if transport == "ipc" and (cluster.separate_devices or actor.tensor_parallel_size > 1):
        raise ValueError(
            "weights=ipc needs the actors on the device of the learner's rank 0, which"
            f" cluster.separate_devices={str(cluster.separate_devices).lower()} with actor.tensor_parallel_size="
            f"{actor.tensor_parallel_size} does not allow; use weights=file or weights=nccl"
        )
