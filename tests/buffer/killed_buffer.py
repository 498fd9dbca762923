"""The real server over a pipe, in a forked process that is killed at a random moment or bytecode instruction.

Forking a process that has imported everything takes milliseconds, so a test can afford hundreds of kills.
"""

import math
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import msgpack

from buffer.config import BufferConfig
from buffer.service import server
from buffer.transport import messages
from buffer.transport.credentials import Credentials
from buffer.transport.router import Incoming

RUN_ID = "run"
PACKAGE = str(Path(server.__file__).parents[1])
_LENGTH = struct.Struct("!I")


class Pipe:
    """Sends and receives whole messages over a stream socket: an identity and the message's frames each."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream

    def send(self, identity: bytes, message: messages.Message, number: int) -> None:
        body = msgpack.packb([identity, *messages.encode(message, number, RUN_ID)])
        self._stream.sendall(_LENGTH.pack(len(body)) + body)

    def poll(self, milliseconds: float) -> bool:
        return bool(select.select([self._stream], [], [], milliseconds / 1000)[0])

    def receive(self) -> Incoming:
        """The next message. Raises EOFError when the other side has closed the socket."""
        identity, *frames = msgpack.unpackb(self._read(_LENGTH.unpack(self._read(_LENGTH.size))[0]))
        message, number = messages.decode(frames, RUN_ID)
        return Incoming(identity, message, number)

    def _read(self, size: int) -> bytes:
        read = b""
        while len(read) < size:
            part = self._stream.recv(size - len(read))
            if not part:
                raise EOFError
            read += part
        return read

    def close(self) -> None:
        self._stream.close()


class PipeRouter:
    """Replaces `buffer.transport.router.Router`."""

    address = "a pipe"

    def __init__(self, pipe: Pipe) -> None:
        self.socket, self.send, self.close = pipe, pipe.send, pipe.close

    def receive(self, limit: int, now: float) -> tuple[list[Incoming], bool]:
        received: list[Incoming] = []
        while len(received) < limit and self.socket.poll(0):
            received.append(self.socket.receive())
        return received, len(received) == limit

    def note(self, identity: bytes, complaint: Exception, now: float) -> None:
        raise complaint

    def take_counts(self) -> dict[str, int]:
        return {}


def _die_after(instructions: int) -> None:
    """Make this process kill itself after the given number of bytecode instructions of the package buffer."""
    left = instructions

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    # Python 3.12 reports instructions only if some frame asks for them before tracing begins.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)


@dataclass
class KilledBuffer:
    """A buffer that is restarted after every kill. Unanswered requests are then sent again.

    Half of the processes end after a random number of instructions. The others end at a random moment, which may be
    inside SQLite.
    """

    config: BufferConfig
    random: random.Random
    max_deaths: int
    deaths: int = 0
    _pid: int = 0
    _pipe: Pipe | None = None
    _unanswered: dict[tuple[bytes, int], messages.Message] = field(default_factory=dict)
    _dies_at: float = math.inf

    def ask(self, identity: bytes, message: messages.Message, number: int) -> None:
        """Send a request, now and after every kill until the answer arrives."""
        self._unanswered[identity, number] = message
        if self._pipe is not None:
            self._try_to_send(identity, message, number)

    def answers(self) -> Iterator[tuple[bytes, messages.Message, messages.Message] | None]:
        """Every answer once, as (identity, request, answer); None after each kill."""
        while True:
            if self._pipe is None:
                self._start()
            assert self._pipe is not None
            try:
                incoming = self._receive()
            except (EOFError, ConnectionError):
                self._reap()
                yield None
                continue
            request = self._unanswered.pop((incoming.identity, incoming.number), None)
            if request is not None:
                yield incoming.identity, request, incoming.message

    def _receive(self) -> Incoming:
        """The next answer. Raises EOFError when the process has ended."""
        assert self._pipe is not None
        seconds = self._dies_at - time.monotonic()
        if seconds < 0 or not self._pipe.poll(1000 * min(seconds, 60.0)):
            assert seconds < 60.0, f"no answer to {self._unanswered}"
            os.kill(self._pid, signal.SIGKILL)
            self._dies_at = math.inf
        return self._pipe.receive()

    def _start(self) -> None:
        lives_on = self.deaths >= self.max_deaths
        dies_by_itself = not lives_on and self.random.random() < 0.5
        instructions = int(10 ** self.random.uniform(2.5, 4.8)) if dies_by_itself else 0
        seconds = math.inf if lives_on or dies_by_itself else self.random.uniform(0.001, 0.03)
        self._dies_at = time.monotonic() + seconds
        ours, theirs = socket.socketpair()
        self._pid = os.fork()
        if not self._pid:
            ours.close()
            self._live(Pipe(theirs), instructions)
        theirs.close()
        self._pipe = Pipe(ours)
        for (identity, number), message in list(self._unanswered.items()):
            self._try_to_send(identity, message, number)

    def _live(self, pipe: Pipe, instructions: int) -> None:
        """Run the server in the child process. Never returns."""
        try:
            if instructions:
                _die_after(instructions)
            # A pipe instead of a socket, as far as the server sees.
            router: Any = PipeRouter(pipe)
            server.Server(self.config, Credentials.plain(RUN_ID), open_router=lambda *_: router).run()
        except (EOFError, ConnectionError):
            os._exit(0)
        except BaseException as error:
            os.write(2, f"the buffer failed: {error!r}\n".encode())
            os._exit(1)

    def _try_to_send(self, identity: bytes, message: messages.Message, number: int) -> None:
        assert self._pipe is not None
        # When the process is dead, `answers` notices it and all requests are sent again.
        with suppress(ConnectionError):
            self._pipe.send(identity, message, number)

    def _reap(self) -> None:
        assert self._pipe is not None
        self._pipe.close()
        self._pipe = None
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        assert status == -signal.SIGKILL, f"the buffer ended by itself with status {status}"
        self._pid = 0
        self.deaths += 1

    @contextmanager
    def alive(self) -> Iterator["KilledBuffer"]:
        """Kill the process at the end."""
        try:
            yield self
        finally:
            if self._pipe is not None:
                os.kill(self._pid, signal.SIGKILL)
                self._reap()
