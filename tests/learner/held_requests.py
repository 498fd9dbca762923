"""A connection to the buffer whose requests the test answers."""

import math
from concurrent.futures import Future

from buffer.transport.messages import Message


class Buffer:
    """Keeps every request; the test answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[Message, Future[Message]]] = []

    def request(self, message: Message, timeout_seconds: float) -> Future[Message]:
        assert timeout_seconds == math.inf
        self.asked.append((message, Future()))
        return self.asked[-1][1]
