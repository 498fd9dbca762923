"""An engine, weights and a tokenizer that need no vLLM, for the actor's tests: deterministic, versioned, stoppable."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.tasks.base import Problem
from actors.tasks.task import Task
from actors.tasks.templates import Template
from buffer.trajectory import FinishReason, VersionSpan
from buffer.transport.connection import RequestRefused
from buffer.transport.messages import Manifest

PARAMETERS = {"embed": "1", "head": "2"}


class Characters:
    """One token per character; 0 ends a text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(token) for token in token_ids if token)

    def get_added_vocab(self) -> dict[str, int]:
        return {"<end>": 0}


@dataclass
class Sampled:
    """As the engine's: what was sampled after a prompt."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason = FinishReason.STOP


def sampled(text: str, *versions: tuple[int, int], finish_reason: FinishReason = FinishReason.STOP) -> Sampled:
    """A completion with an end token and the log-probabilities -1, -2, ..."""
    token_ids = np.array([*(ord(character) for character in text), 0], np.int32)
    logprobs = -np.arange(1, len(token_ids) + 1, dtype=np.float32)
    return Sampled(token_ids, logprobs, tuple(VersionSpan(*version) for version in versions), finish_reason)


@dataclass
class Local:
    manifest: Manifest
    released: list[int]
    """Versions whose memory the learner may write again."""

    def release(self) -> None:
        self.released.append(self.policy_version)

    @property
    def policy_version(self) -> int:
        return self.manifest.policy_version


@dataclass
class FakeEngine:
    """Answers the sum in the prompt in every even completion, and one more in the odd ones."""

    version: int = -1
    requests: list[tuple[str, int | None]] = field(default_factory=list)
    """request_id and seed of each."""
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Requests wait while it is closed."""
    wrong: dict[str, str] = field(default_factory=dict)
    """Parameters that do not load as they should."""

    def __post_init__(self) -> None:
        self.open.set()

    async def sample(
        self,
        prompt_ids: Sequence[int],
        *,
        num_samples: int,
        temperature: float,
        max_new_tokens: int,
        request_id: str,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        seed: int | None = None,
    ) -> list[Sampled]:
        started = self.version
        self.requests.append((request_id, seed))
        await asyncio.sleep(0)
        await self.open.wait()
        left, right = "".join(map(chr, prompt_ids)).rstrip("=").split("+")
        spans = [(0, started), *([(2, self.version)] if self.version > started else [])]
        return [sampled(rf"\boxed{{{int(left) + int(right) + i % 2}}}", *spans) for i in range(num_samples)]

    async def load(self, weights: Local) -> None:
        self.version = weights.policy_version

    async def checksums(self) -> dict[str, str]:
        return PARAMETERS | self.wrong


class FakeWeights:
    """A store of which the test says what it publishes; `gone` versions cannot be fetched any more."""

    pulled_bytes = 0

    def __init__(self) -> None:
        self.newest: Manifest | None = None
        self.gone: set[int] = set()
        self.fetched: list[int] = []
        self.released: list[int] = []
        self.under_way = 0
        self.link = asyncio.Event()
        """Nothing arrives while it is down."""
        self.link.set()
        self._published = asyncio.Event()

    def publish(self, version: int) -> None:
        self.newest = Manifest(version, f"store:{version}", "", "", 0, ())
        self._published.set()

    async def wait_for_new(self, known_publication: str, wait_seconds: float) -> Manifest | None:
        try:
            async with asyncio.timeout(wait_seconds):
                while self.newest is None or self.newest.publication == known_publication:
                    self._published.clear()
                    await self._published.wait()
        except TimeoutError:
            return None
        return self.newest

    async def fetch(self, manifest: Manifest) -> Local:
        await asyncio.sleep(0)
        self.under_way = manifest.policy_version
        await self.link.wait()
        if manifest.policy_version in self.gone:
            # As published meanwhile: otherwise there would be nothing newer to ask for.
            self.publish(manifest.policy_version + 1)
            raise RequestRefused(f"version {manifest.policy_version} is not the newest any more")
        self.fetched.append(manifest.policy_version)
        return Local(manifest, self.released)


def sums(num_train: int = 8, num_held_out: int = 3, long_prompt: int | None = None) -> Task:
    """Problems like 3+4=; the one with the number `long_prompt` is long."""
    problems = []
    for number in range(num_train + num_held_out):
        left = "0" * 50 + str(number) if number == long_prompt else str(number)
        problems.append(Problem(number, f"{left}+4=", str(number + 4)))
    return Task("sums", problems[:num_train], problems[num_train:], Template("{question}"))


TURNS = Template("{question}", between="\0{observation}")
"""Over several turns, each ended by the end token of `Characters`."""
BOARD = ["######", "#PX_O#", "#____#", "#____#", "#____#", "######"]
CORRIDOR = Problem(0, "P11X12O14:", json.dumps({"board": BOARD, "depth": 6, "actions_per_turn": 1, "words": 0}))
"""Sokoban: two pushes to the right solve it."""
