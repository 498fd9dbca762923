"""Device memory and broadcasts, with the CPU in place of the device."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.weights.device_client import DeviceClient, DeviceWeights, rank_offset
from buffer.transport.connection import Connection, RequestRefused, host_id
from buffer.transport.credentials import Credentials
from buffer.weights.config import WeightsConfig
from buffer.weights.device_handle import DeviceHandle, Record, Rendezvous, pack_record, unpack_record
from learner.weights.device_store import DeviceMemory, GroupBroadcast, Join, open_store
from learner.weights.store import Version, WeightStore

CPU, CREDENTIALS = torch.device("cpu"), Credentials.plain("test")
SETTINGS = {"keep_versions": 1, "deltas": False}


@pytest.fixture
def address(socket_folder: Path) -> str:
    return f"ipc://{socket_folder}/weights"


@pytest.fixture
def buffers() -> list[Tensor]:
    """The buffers for which a record was made, in order."""
    return []


@pytest.fixture
def describe(buffers: list[Tensor]) -> Callable[[Tensor], Record]:
    """Names a buffer by its number instead of a device's handle."""

    def number(buffer: Tensor) -> Record:
        buffers.append(buffer)
        return DeviceHandle("GPU-0", "00ff", len(buffer), len(buffers) - 1, "01", 7, "02", True)

    return number


def device_store(folder: Path, address: str, describe: Callable[[Tensor], Record]) -> WeightStore:
    config = WeightsConfig(address, transport="ipc", **SETTINGS)
    return WeightStore(folder, config, CREDENTIALS, DeviceMemory(folder, None, CPU, describe))


def group_store(folder: Path, config: WeightsConfig, join: Join) -> WeightStore:
    group = GroupBroadcast(config, CPU, join)
    return WeightStore(folder, config, CREDENTIALS, DeviceMemory(folder, None, CPU, group.describe), group)


def version(number: int) -> Version:
    return [("embed", torch.full((3, 5), float(number))), ("norm", torch.arange(4) + number / 2)]


def fetch(address: str, folder: Path, known: str = "") -> DeviceWeights:
    async def newest(client: DeviceClient) -> DeviceWeights:
        manifest = await client.wait_for_new(known, 20.0)
        assert manifest is not None
        return await client.fetch(manifest)

    with Connection(address, "actor-0", CREDENTIALS) as connection:
        return asyncio.run(newest(DeviceClient(connection, host_id=host_id(), published=folder, rank_offset=1)))


def test_a_version_is_read_where_the_record_says_and_stays_while_it_is_held(
    tmp_path: Path, address: str, buffers: list[Tensor], describe: Callable[[Tensor], Record]
):
    store = device_store(tmp_path / "weights", address, describe)
    try:
        store.publish(1, version(1), torch.bfloat16).result(timeout=20)
        held = fetch(address, tmp_path / "weights")
        told = held.update_info()
        assert (held.policy_version, held.on_host, held.init_info()) == (1, False, None)
        assert (told["names"], told["dtype_names"]) == (["embed", "norm"], ["bfloat16"] * 2)
        buffer = buffers[told["handle"]["storage_offset"]]
        for (_, tensor), shape, offset in zip(version(1), told["shapes"], told["offsets"], strict=True):
            flat = buffer[offset : offset + 2 * tensor.numel()].view(torch.bfloat16)
            assert torch.equal(flat.view(shape), tensor.bfloat16())
        before = buffer.clone()
        for number in range(2, 6):
            store.publish(number, version(number), torch.bfloat16).result(timeout=20)
        assert torch.equal(buffer, before)
        held.release()
        for number in range(6, 9):
            store.publish(number, version(number), torch.bfloat16).result(timeout=20)
        # The released buffer is reused, so the number of copies on the device does not grow.
        assert not torch.equal(buffer, before) and len(buffers) == 3
    finally:
        store.close()


def test_a_version_on_another_host_is_refused_with_a_way_out(
    tmp_path: Path, address: str, describe: Callable[[Tensor], Record]
):
    store = device_store(tmp_path / "weights", address, describe)
    try:
        manifest = store.publish(1, version(1)).result(timeout=20)
        with Connection(address, "actor-0", CREDENTIALS) as connection:
            elsewhere = DeviceClient(connection, host_id="elsewhere", published=tmp_path / "weights")
            with pytest.raises(RuntimeError, match=r"policy 1 is on a device of another host.*weights=file"):
                asyncio.run(elsewhere.fetch(manifest))
            here = DeviceClient(connection, host_id=host_id(), published=tmp_path / "weights")
            Path(manifest.path).unlink()
            with pytest.raises(RequestRefused, match="not kept any more"):
                asyncio.run(here.fetch(manifest))
    finally:
        store.close()


def test_the_group_is_told_of_a_version_before_it_is_sent_and_opened_once(tmp_path: Path, address: str):
    config = WeightsConfig(address, transport="nccl", group_size=3, **SETTINGS)
    folder, happened = tmp_path / "weights", []
    met = threading.Event()

    def join(rendezvous: Rendezvous, device: torch.device, first: Version):
        happened.append(("opened", rendezvous.world_size, [name for name, _ in first]))

        def send(sent: Version) -> None:
            assert met.wait(20)
            happened.append(("sent", float(sent[0][1][0, 0])))

        return send

    store = group_store(folder, config, join)
    try:
        publication = store.publish(0, version(0))
        held = fetch(address, folder)
        assert not publication.done()
        group = held.init_info()
        assert group is not None and held.update_info().keys() == {"names", "dtype_names", "shapes"}
        assert (group["world_size"], group["rank_offset"], group["packed"]) == (3, 1, False)
        met.set()
        publication.result(timeout=20)
        held.release()
        store.publish(1, version(1)).result(timeout=20)
        assert happened == [("opened", 3, ["embed", "norm"]), ("sent", 0.0), ("sent", 1.0)]
        later = fetch(address, folder)
        later.release()
        assert later.init_info() == group
    finally:
        store.close()


def test_a_member_that_does_not_come_ends_the_learner_with_a_sentence(tmp_path: Path, address: str):
    config = WeightsConfig(address, transport="nccl", group_size=5, rendezvous_seconds=0.05, **SETTINGS)
    never = threading.Event()
    store = group_store(tmp_path / "weights", config, lambda *_: lambda _: bool(never.wait(20)))
    try:
        with pytest.raises(OSError, match=r"policy 3: not all 4 workers.*weights\.rendezvous_seconds=0.*weights=file"):
            store.publish(3, version(3)).result(timeout=20)
    finally:
        store.close()
        never.set()


def test_records_survive_the_way_and_others_are_refused():
    for record in (
        Rendezvous("127.0.0.1", 5, 3),
        DeviceHandle("GPU-0", "ab" * 64, 1 << 40, 3, "cd", 4, "ef" * 64, True),
    ):
        assert unpack_record(pack_record(record)) == record
    for other in (b"\x00" * 64, b"[]", b'{"kind": "Rendezvous"}', b'{"kind": "Segment"}'):
        with pytest.raises(RuntimeError, match="holds no record of a device"):
            unpack_record(other)


def test_ranks_of_the_actors_follow_the_learners():
    assert [rank_offset(f"actor-{number}", 2, 7) for number in range(3)] == [1, 3, 5]
    for name in ("actor-3", "actor-host-17", "mine"):
        with pytest.raises(ValueError, match=rf"actor-0 to actor-2, and {name} is none of them"):
            rank_offset(name, 2, 7)


def test_the_transport_file_publishes_the_bytes_themselves(tmp_path: Path, address: str):
    store = open_store(tmp_path / "weights", WeightsConfig(address), CREDENTIALS, None, CPU)
    try:
        manifest = store.publish(1, version(1)).result(timeout=20)
        assert Path(manifest.path).stat().st_size == manifest.num_bytes
        assert all(entry.checksum for entry in manifest.tensors)
    finally:
        store.close()
