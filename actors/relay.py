"""`python -m actors.relay RUN_DIR`: takes every version once to this host and serves it to the actors here.

The learner's link then carries a version once per host, and with `weights.relay_fanout` only to the first relays, from
which the others pull. Actors hear of a relay on their host with the next manifest, and ask the learner's store where
it is gone or slow: a relay may be started and stopped at any time.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from actors.weights.client import WeightClient
from buffer.config import load_run_config, read_section
from buffer.transport.connection import Connection, RequestRefused, host_id
from buffer.transport.credentials import Credentials, client_credentials, server_credentials
from buffer.transport.messages import Manifest, RelayHello, RelayPlace
from buffer.transport.schema import check_name
from buffer.weights.config import MEMORY_VARIABLE, WeightsConfig
from buffer.weights.relay_tree import HELLO_SECONDS
from buffer.weights.server import WeightServer
from buffer.weights.shared_memory import SegmentPool, link_folder

logger = logging.getLogger("relay")

CHUNK_BYTES = 4 << 20


class Relay:
    """Everything that was published, once more on this host.

    Args:
        folder: for the versions' files; actors on this host map them.
        store: to the learner's store; not closed here.
        server: serves on this host.
        client: pulls; it must not map.
        host_id: this host's kernel.
    """

    def __init__(
        self, folder: Path, store: Connection, server: WeightServer, client: WeightClient, host_id: str
    ) -> None:
        self._store, self._server, self._client, self._host_id = store, server, client, host_id
        self._slots = SegmentPool(folder)
        self._parent = ""
        self.policy_version = -1
        """Of the newest version that is served here."""

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_saying_hello())
            tasks.create_task(self._keep_pulling())

    async def _keep_saying_hello(self) -> None:
        while True:
            hello = RelayHello(self._server.address, self._host_id)
            # A learner that is being started again will hear the next one.
            with suppress(TimeoutError):
                place = await asyncio.wrap_future(self._store.request(hello, timeout_seconds=HELLO_SECONDS))
                self._parent = place.parent if isinstance(place, RelayPlace) else ""
            await asyncio.sleep(HELLO_SECONDS)

    async def _keep_pulling(self) -> None:
        """Waits for: the learner's next publication. A version that is overtaken meanwhile is passed over."""
        known = ""
        while True:
            try:
                manifest = await self._client.wait_for_new(known, 600.0)
                if manifest is not None:
                    await self._pass_on(replace(manifest, relay=self._parent))
                    known = manifest.publication
            except (RequestRefused, TimeoutError) as error:
                logger.info("passed over: %s", error)

    async def _pass_on(self, manifest: Manifest) -> None:
        local = await self._client.fetch(manifest)
        slot = await asyncio.to_thread(self._slots.take, manifest.num_bytes)
        slot.array[:] = np.memmap(local.path, np.uint8, mode="r")
        path = slot.publish(f"v{manifest.policy_version:08d}-{os.getpid()}.weights")
        here = replace(manifest, path=str(path.resolve()), host_id=self._host_id, relay="")
        for retired in self._server.announce(here, slot):
            self._slots.retire(retired)
        self.policy_version = manifest.policy_version
        logger.info("policy %d served, %.1f MB pulled so far", self.policy_version, self._client.pulled_bytes / 1e6)

    def close(self) -> None:
        """Stop serving and remove the versions."""
        for slot in self._server.close():
            slot.remove()
        self._slots.close()


def make_folder(run_dir: Path, name: str) -> Path:
    """RUN_DIR/relays/NAME, which leads to shared memory where there is somebody who will clear it."""
    memory = os.environ.get(MEMORY_VARIABLE)
    return link_folder(run_dir / "relays" / name, Path(memory) / name if memory else None)


def own_address(store: str, fanout: int) -> str:
    """Where to listen, at any free port: for this host alone, or for all that reach the store where relays form a tree.

    Args:
        store: the address of the learner's store.
        fanout: as `WeightsConfig.relay_fanout`.
    """
    if not fanout:
        return "tcp://127.0.0.1:*"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: it only looks for the way there.
        probe.connect((urlsplit(store).hostname, urlsplit(store).port))
        return f"tcp://{probe.getsockname()[0]}:*"


def main() -> int:
    """Relay the run in RUN_DIR until told to stop. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m actors.relay", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's folder; its config.yaml says the rest")
    parser.add_argument("--name", default=f"relay-{socket.gethostname()}-{os.getpid()}", help="unique in the run")
    parser.add_argument("--address", default="", help="where to listen; left out, where those who pull from here can")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    try:
        check_name(arguments.name, "--name")
        config = read_section(WeightsConfig, load_run_config(arguments.run_dir)["weights"], "weights")
        if config.transport != "file":
            raise ValueError(f"weights={config.transport} sends nothing that could be relayed; use weights=file")
        own, others = client_credentials(arguments.run_dir), server_credentials(arguments.run_dir)
        address = arguments.address or own_address(config.address, config.relay_fanout)
        server = WeightServer(address, others, keep_versions=config.keep_versions)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with suppress(asyncio.CancelledError):
        asyncio.run(_run(arguments.run_dir, arguments.name, config, own, server))
    return 0


async def _run(run_dir: Path, name: str, config: WeightsConfig, own: Credentials, server: WeightServer) -> None:
    def connect(address: str) -> Connection:
        return Connection(address, name, own)

    task = asyncio.current_task()
    assert task is not None
    # A hangup is how a remote shell's end is told.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with connect(config.address) as store:
        client = WeightClient(
            store, host_id="", published=run_dir, chunk_bytes=CHUNK_BYTES, deltas=config.deltas, connect=connect
        )
        relay = Relay(make_folder(run_dir, name), store, server, client, host_id())
        logger.info("%s serves at %s", name, server.address)
        try:
            await relay.run()
        finally:
            client.close()
            relay.close()


if __name__ == "__main__":
    sys.exit(main())
