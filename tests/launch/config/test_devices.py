"""CUDA devices are assigned, and impossible settings refused in one sentence. The driver is a folder of the test."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.config import ActorConfig
from buffer.weights.config import WeightsConfig
from launch.config import devices
from launch.config.devices import assign_devices, check_devices, visible_devices
from launch.config.settings import ClusterConfig
from launch.processes.topology import processes
from learner.config import LearnerConfig, LoraConfig, OptimizerConfig

OPTIMIZER = OptimizerConfig(1e-6)
LEARNER = LearnerConfig(1, OPTIMIZER, OPTIMIZER, groups_per_batch=4, samples_per_group=2)
ACTOR = ActorConfig("model", 2, 8, 64)


@pytest.fixture
def four_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the driver's folder."""
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "nvidia")
    for number in range(4):
        (tmp_path / "nvidia" / "gpus" / f"0000:0{number}:00.0").mkdir(parents=True)
    (tmp_path / "nvidia" / "version").touch()
    return tmp_path / "nvidia"


def weights(transport: str) -> WeightsConfig:
    return WeightsConfig(transport=transport, deltas=transport == "file")


def test_devices_are_dealt_to_the_learner_first(four_devices: Path, monkeypatch: pytest.MonkeyPatch):
    assert assign_devices(2, 1, 2) == ["0,1", "2,3"]
    monkeypatch.setenv(devices.VISIBLE, "7,5,3")
    assert visible_devices() == ["7", "5", "3"] and assign_devices(1, 2, 1) == ["7", "5", "3"]
    with pytest.raises(ValueError, match=r"needs 5 CUDA devices.*and 3 are visible"):
        assign_devices(1, 2, 2)


@pytest.mark.parametrize(
    ("transport", "cluster", "learner", "actor", "complaint"),
    [
        ("ipc", {}, {"device": "cpu"}, {}, r"weights=ipc needs .*but learner\.device=cpu; use weights=file"),
        ("ipc", {"separate_devices": True}, {}, {}, r"weights=ipc needs the actors on the device"),
        ("ipc", {}, {}, {"tensor_parallel_size": 2}, r"actor\.tensor_parallel_size=2 does not allow"),
        ("ipc", {"host": "10.0.0.1"}, {}, {}, r"cluster\.host=10\.0\.0\.1 is for actors on other hosts"),
        ("ipc", {"relays": ["ssh b"]}, {}, {}, r"leave cluster\.relays out"),
        ("ipc", {}, {"lora": LoraConfig(rank=8)}, {}, r"use learner\.lora\.publish=merged"),
        ("nccl", {}, {}, {}, r"set cluster\.separate_devices=true"),
        ("nccl", {"separate_devices": True, "num_actors": 4}, {}, {}, r"needs 5 CUDA devices"),
    ],
)
def test_what_cannot_work_is_refused(
    four_devices: Path, transport: str, cluster: Any, learner: Any, actor: Any, complaint: str
):
    given = ClusterConfig(**cluster), replace(LEARNER, **learner), replace(ACTOR, **actor)
    with pytest.raises(ValueError, match=complaint):
        check_devices(weights(transport), *given)


def test_what_can_work_is_let_through_and_nothing_is_asked_of_files(four_devices: Path):
    check_devices(weights("ipc"), ClusterConfig(num_actors=2), LEARNER, ACTOR)
    check_devices(weights("nccl"), ClusterConfig(num_actors=3, separate_devices=True), LEARNER, ACTOR)
    (four_devices / "version").unlink()
    check_devices(weights("file"), ClusterConfig(), LEARNER, ACTOR)
    for transport, cluster in (("nccl", ClusterConfig()), ("file", ClusterConfig(separate_devices=True))):
        with pytest.raises(ValueError, match=r"no NVIDIA driver is loaded|without CUDA devices"):
            check_devices(weights(transport), cluster, LEARNER, ACTOR)


def test_a_group_is_counted_and_every_process_sees_its_own_devices(four_devices: Path, make_plan: Any):
    plan = make_plan("weights=nccl", "cluster.separate_devices=true", "cluster.num_actors=2")
    assert plan.sections["weights"]["group_size"] == 3
    seen = {spec.name: spec.environment.get(devices.VISIBLE) for spec in processes(plan)}
    assert seen == {"buffer": None, "learner": "0", "actor-0": "1", "actor-1": "2"}
