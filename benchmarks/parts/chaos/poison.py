"""Messages that no correct process sends, with an actor's key: garbage, extremes, and what only a learner may say."""

from __future__ import annotations

import random
import secrets

import msgpack
import zmq

from buffer.transport import messages
from buffer.transport.connection import bounded_socket
from buffer.transport.credentials import Credentials
from buffer.transport.schema import Frames

NUM_MESSAGES = 19
"""Messages of one fault: one fewer than make the server ignore the connection."""
ANSWER_MILLISECONDS = 1_000
_EXTREMES = (0, -1, 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), 1e300, "", "x" * 4_000, None, [], {}, b"", [0] * 300)


def send_poison(credentials: Credentials, address: str, chance: random.Random) -> bool:
    """Send `NUM_MESSAGES` from a new connection to the server at `address`. Returns whether the server answered one.

    Args:
        credentials: of a client; `for_weights` if the server is the weight store.
        address: of the server.
        chance: decides the messages.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        socket = bounded_socket(context, zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, f"poison-{secrets.token_hex(4)}".encode())
        if credentials.encrypted:
            socket.curve_serverkey = credentials.server_public
            socket.curve_publickey = credentials.public
            socket.curve_secretkey = credentials.secret
        socket.connect(address)
        for number in range(NUM_MESSAGES):
            socket.send_multipart(_poison(credentials.run_id, number, chance))
        # Closing discards what is not sent yet, so wait for a first answer.
        return bool(socket.poll(ANSWER_MILLISECONDS))
    finally:
        context.destroy(linger=0)


def _poison(run_id: str, number: int, chance: random.Random) -> Frames:
    sound: list[messages.Message] = [
        messages.LearnerHello(chance.choice((0, 1, 2**40))),
        messages.CheckpointCommitted(2**40),
        messages.Close(),
        messages.Heartbeat("learner", "learner-0", 2**40, "", {}),
        messages.LeaseReturn("actor-0", tuple(f"{occurrence}.0" for occurrence in range(50)), "poison"),
        messages.EvaluationReport("actor-0", 0, 2**40, 1, 1e300, -1e300, 0.0, 0.0),
    ]
    frames = messages.encode(chance.choice(sound), number, run_id)
    match chance.randrange(3):
        case 0:
            return [chance.randbytes(chance.randrange(1, 300)) for _ in range(chance.randrange(1, 4))]
        case 1:
            header = msgpack.unpackb(frames[0])
            if header[4]:
                header[4][chance.randrange(len(header[4]))] = chance.choice(_EXTREMES)
            return [msgpack.packb(header), *frames[1:]]
        case _:
            return frames
