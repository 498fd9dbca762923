"""Cache published weights and serve them to the actors on this host: `python -m actors.relay RUN_DIR`.

With a relay, the learner sends each version once per host. With `weights.relay_fanout`, the learner sends it to the
first relays only, and the other relays pull from those. The next manifest names the relay to the actors on its host.
They use the learner's store when the relay is gone or slow, so a relay may start and stop at any time.
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
from buffer.transport.credentials import WEIGHTS, Credentials, client_credentials, server_credentials
from buffer.transport.messages import Manifest, RelayHello, RelayPlace
from buffer.transport.roles import ACTOR
from buffer.transport.schema import check_name
from buffer.weights.config import MEMORY_VARIABLE, WeightsConfig
from buffer.weights.relay_tree import HELLO_SECONDS
from buffer.weights.server import WeightServer
from buffer.weights.shared_memory import SegmentPool, link_folder

logger = logging.getLogger("relay")

CHUNK_BYTES = 4 << 20


class Relay:
    """Caches published weights and serves them to actors on this host.

    Args:
        folder: folder for the versions' files, which actors on this host map.
        store: connection to the learner's store; stays open after `close`.
        server: serves the versions.
        client: pulls the versions; it must not map files.
        host_id: id of this host's kernel.
    """

    def __init__(
        self, folder: Path, store: Connection, server: WeightServer, client: WeightClient, host_id: str
    ) -> None:
        self._store, self._server, self._client, self._host_id = store, server, client, host_id
        self._segments = SegmentPool(folder)
        self._parent = ""
        """Address of the relay to pull from; empty: pull from the learner."""
        self.policy_version = -1
        """The newest version that this relay serves."""

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_saying_hello())
            tasks.create_task(self._keep_pulling())

    async def _keep_saying_hello(self) -> None:
        while True:
            hello = RelayHello(self._server.address, self._host_id)
            # A learner that is restarting gets the next hello.
            with suppress(TimeoutError):
                place = await asyncio.wrap_future(self._store.request(hello, timeout_seconds=HELLO_SECONDS))
                self._parent = place.parent if isinstance(place, RelayPlace) else ""
            await asyncio.sleep(HELLO_SECONDS)

    async def _keep_pulling(self) -> None:
        """Pull and serve every version. Skip a version that is superseded during the pull.

        Waits for: the learner's next publication.
        """
        known = ""
        while True:
            try:
                manifest = await self._client.wait_for_new(known, 600.0)
                if manifest is not None:
                    await self._serve(replace(manifest, relay=self._parent))
                    known = manifest.publication
            except (RequestRefused, TimeoutError) as error:
                logger.info("skipped a version: %s", error)

    async def _serve(self, manifest: Manifest) -> None:
        local = await self._client.fetch(manifest)
        segment = await asyncio.to_thread(self._segments.take, manifest.num_bytes)
        segment.array[:] = np.memmap(local.path, np.uint8, mode="r")
        path = segment.publish(f"v{manifest.policy_version:08d}-{os.getpid()}.weights")
        here = replace(manifest, path=str(path.resolve()), host_id=self._host_id, relay="")
        for retired in self._server.announce(here, segment):
            self._segments.retire(retired)
        self.policy_version = manifest.policy_version
        logger.info("policy %d served, %.1f MB pulled so far", self.policy_version, self._client.pulled_bytes / 1e6)

    def close(self) -> None:
        """Stop serving and remove the versions' files."""
        for segment in self._server.close():
            segment.remove()
        self._segments.close()


def make_folder(run_dir: Path, name: str) -> Path:
    """Make and return RUN_DIR/relays/NAME.

    It is a link to shared memory when `SLIPSTREAM_MEMORY` names a folder, else a folder on disk.
    """
    memory = os.environ.get(MEMORY_VARIABLE)
    return link_folder(run_dir / "relays" / name, Path(memory) / name if memory else None)


def own_address(store: str, fanout: int) -> str:
    """Choose the address to listen on, with any free port.

    Without a tree of relays, only this host connects, so the address is the loopback. In a tree, relays on other hosts
    connect, so it is the address from which this host reaches the learner's store.

    Args:
        store: address of the learner's store.
        fanout: as `weights.relay_fanout`; 0: no tree.
    """
    if not fanout:
        return "tcp://127.0.0.1:*"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: connecting a UDP socket only chooses the local address.
        probe.connect((urlsplit(store).hostname, urlsplit(store).port))
        return f"tcp://{probe.getsockname()[0]}:*"


def main() -> int:
    """Relay the run in RUN_DIR until SIGTERM, SIGINT or SIGHUP. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m actors.relay", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of the run; its config.yaml holds all other settings")
    parser.add_argument(
        "--name", default=f"relay-{socket.gethostname()}-{os.getpid()}", help="name of this relay, unique in the run"
    )
    parser.add_argument(
        "--address",
        default="",
        help="address to listen on; default: loopback, or with weights.relay_fanout the one that reaches the learner",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    try:
        check_name(arguments.name, "--name")
        config = read_section(WeightsConfig, load_run_config(arguments.run_dir)["weights"], "weights")
        if config.transport != "file":
            raise ValueError(f"weights={config.transport} sends nothing that could be relayed; use weights=file")
        own = client_credentials(arguments.run_dir, ACTOR).for_weights()
        others = server_credentials(arguments.run_dir, WEIGHTS)
        address = arguments.address or own_address(config.address, config.relay_fanout)
        pulls = config.concurrent_pulls
        server = WeightServer(address, others, keep_versions=config.keep_versions, concurrent_pulls=pulls)
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
    # SIGHUP arrives when the remote shell that started the relay ends.
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
