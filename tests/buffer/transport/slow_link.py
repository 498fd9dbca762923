"""A TCP proxy that lets a bounded number of bytes per second through in each direction."""

import socket
import threading
import time
from contextlib import suppress

BLOCK_BYTES = 1 << 14


class SlowLink:
    """Listens on a free port of this host and forwards connections to `port`.

    Kernel buffers are small, as on a long link that holds little.
    """

    def __init__(self, port: int, bytes_per_second: float) -> None:
        self._port, self._rate = port, bytes_per_second
        self.num_bytes_up = self.num_bytes_down = 0
        """Bytes carried to the server, and from it."""
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BLOCK_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket()
                far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BLOCK_BYTES)
                far.connect(("127.0.0.1", self._port))
                self._ends += [near, far]
                threading.Thread(target=self._carry, args=(near, far, "num_bytes_up"), daemon=True).start()
                threading.Thread(target=self._carry, args=(far, near, "num_bytes_down"), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, count: str) -> None:
        free = time.monotonic()
        with suppress(OSError):
            while block := source.recv(BLOCK_BYTES):
                free = max(free, time.monotonic()) + len(block) / self._rate
                time.sleep(max(0.0, free - time.monotonic()))
                target.sendall(block)
                setattr(self, count, getattr(self, count) + len(block))
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End all connections."""
        for end in [self._listener, *self._ends]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
