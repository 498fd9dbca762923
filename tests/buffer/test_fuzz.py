"""Mutated messages: many through the decoder and the service, some through a real socket. A longer run: `fuzz.py`.

FUZZ_SEED in the environment repeats a run whose failure named its seed.
"""

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import zmq

from buffer.service.server import Server
from buffer.transport import messages
from buffer.transport.connection import Connection
from buffer.transport.credentials import RunKeys
from buffer.transport.packed_group import check_group, read_group_header, unpack_group
from buffer.transport.schema import WireError
from tests.buffer.fuzz import WAYS, Buffer, fuzz_all_ways, group_of, mutant

REFUSED = ("wire_errors", "foreign_run", "wrong_role", "invalid")
"""Counters of the messages after too many of which a peer is ignored."""
SEED = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(1 << 32))


def test_a_hundred_thousand_mutants_raise_nothing_and_the_ledger_holds_in_every_configuration():
    sent, sound = fuzz_all_ways(SEED, lambda _, number: number >= 100_000 / len(WAYS))
    # With too few valid mutants the service is not tested; with too many the mutations are too weak.
    assert 0.02 < sound / sent < 0.5, f"seed {SEED}"


def test_check_group_refuses_exactly_what_unpack_group_refuses():
    chance, packed = random.Random(SEED), group_of("0.0", 0, 3)
    agreed = {True: 0, False: 0}
    for index in range(3_000):
        arrays = bytearray(packed.arrays_frame)
        for _ in range(chance.randint(0, 2)):
            at = chance.randrange(len(arrays))
            arrays[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        group = read_group_header(packed.header_frame, bytes(arrays))
        verdicts = []
        for check in (check_group, unpack_group):
            try:
                check(group)
                verdicts.append(True)
            except WireError:
                verdicts.append(False)
        assert verdicts[0] == verdicts[1], f"seed {SEED}, {index}: {arrays.hex()}"
        agreed[verdicts[0]] += 1
    assert min(agreed.values()) > 300


def test_a_server_under_mutants_still_answers_a_good_client(make_config: Any, tmp_path: Path):
    keys = RunKeys.new("fuzzed")
    server = Server(make_config(address="tcp://127.0.0.1:*"), keys.buffer)
    thread = threading.Thread(target=server.run)
    thread.start()
    source, chance, deadline = Buffer(tmp_path), random.Random(SEED), time.monotonic() + 120
    client = keys.clients["actor"]
    try:
        with zmq.Context() as context, Connection(server.address, "good", client, timeout_seconds=60) as good:
            for peer in range(20):
                with context.socket(zmq.DEALER) as bad:
                    bad.curve_serverkey, bad.linger = client.server_public, 5_000
                    bad.curve_publickey, bad.curve_secretkey = client.public, client.secret
                    bad.setsockopt(zmq.IDENTITY, b"bad-%d" % peer)
                    bad.connect(server.address)
                    for number in range(100):
                        bad.send_multipart(mutant(source.messages(chance), number, chance) or [b""])
                status = good.call(messages.StatusRequest())
                assert isinstance(status, messages.Status), f"seed {SEED}"
            # Each of the twenty was ignored after its twentieth bad message.
            while sum(status.counts.get(name, 0) for name in REFUSED) < 20 * 20:
                assert time.monotonic() < deadline, f"seed {SEED}: {status.counts}"
                status = good.call(messages.StatusRequest())
                assert isinstance(status, messages.Status)
            assert status.counts["ignored"] > 0
    finally:
        source.ledger.close()
        server.stop()
        thread.join()
