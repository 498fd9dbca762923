"""Stand-ins without vLLM for the actor's tests: an engine, a version client, a tokenizer and tasks."""

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
    """A tokenizer with one token per character; token 0 ends a text."""

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
    """Stands in for `SampledCompletion`."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason = FinishReason.STOP


def sampled(text: str, *versions: tuple[int, int], finish_reason: FinishReason = FinishReason.STOP) -> Sampled:
    """A completion of `text` and an end token, with the log-probabilities -1, -2, ..."""
    token_ids = np.array([*(ord(character) for character in text), 0], np.int32)
    logprobs = -np.arange(1, len(token_ids) + 1, dtype=np.float32)
    return Sampled(token_ids, logprobs, tuple(VersionSpan(*version) for version in versions), finish_reason)


@dataclass
class Scored:
    """Stands in for `ScoredTokens`."""

    policy_version: int
    logprobs: tuple[float, ...]


@dataclass
class Local:
    manifest: Manifest
    released: list[int]
    """Versions that were released."""
    on_host: bool = False

    def release(self) -> None:
        self.released.append(self.policy_version)

    @property
    def policy_version(self) -> int:
        return self.manifest.policy_version


@dataclass
class FakeEngine:
    """Answers with the sum in the prompt in even completions, and with the sum plus one in odd ones."""

    version: int = -1
    requests: list[tuple[str, int | None]] = field(default_factory=list)
    """(request_id, seed) of each request."""
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Requests wait until this event is set."""
    wrong: dict[str, str] = field(default_factory=dict)
    """Wrong checksums of loaded weights, by parameter."""
    digested: list[int] = field(default_factory=list)
    """Versions whose checksums were computed."""
    stuck: set[str] = field(default_factory=set)
    """Requests of these groups, and of all their attempts, never end; OCCURRENCE or a whole request_id."""
    aborted: list[str] = field(default_factory=list)
    hung: bool = False

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
        if self.stuck & {request_id, request_id.partition(".")[0]}:
            try:
                await asyncio.Event().wait()
            finally:
                self.aborted.append(request_id)
        await self.open.wait()
        left, right = "".join(map(chr, prompt_ids)).rstrip("=").split("+")
        spans = [(0, started), *([(2, self.version)] if self.version > started else [])]
        return [sampled(rf"\boxed{{{int(left) + int(right) + i % 2}}}", *spans) for i in range(num_samples)]

    async def score(self, token_ids: Sequence[int], num_scored: int, temperature: float, request_id: str) -> Scored:
        self.requests.append((request_id, None))
        return Scored(self.version, tuple(-float(token) for token in token_ids[-num_scored:]))

    async def load(self, weights: Local) -> None:
        self.version = weights.policy_version

    async def is_responsive(self, seconds: float) -> bool:
        return not self.hung

    async def checksums(self) -> dict[str, str]:
        self.digested.append(self.version)
        return PARAMETERS | (self.wrong if self.version >= 0 else {})


class FakeWeights:
    """A version client whose versions the test publishes; versions in `gone` cannot be fetched."""

    pulled_bytes = 0

    def __init__(self) -> None:
        self.newest: Manifest | None = None
        self.gone: set[int] = set()
        self.fetched: list[int] = []
        self.released: list[int] = []
        self.under_way = 0
        self.link = asyncio.Event()
        """Fetches wait until this event is set."""
        self.link.set()
        self.unreachable = False
        self._published = asyncio.Event()

    def publish(self, version: int) -> None:
        self.newest = Manifest(version, f"store:{version}", "", "", 0, ())
        self._published.set()

    async def wait_for_new(self, known_publication: str, wait_seconds: float) -> Manifest | None:
        if self.unreachable:
            await asyncio.sleep(wait_seconds)
            raise TimeoutError("no answer")
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
            # Publish a newer version, so that the actor has something to fetch next.
            self.publish(manifest.policy_version + 1)
            raise RequestRefused(f"version {manifest.policy_version} is not the newest any more")
        self.fetched.append(manifest.policy_version)
        return Local(manifest, self.released)


def sums(num_train: int = 8, num_held_out: int = 3, long_prompt: int | None = None) -> Task:
    """Problems like 3+4=. The prompt of problem `long_prompt` is long."""
    problems = []
    for number in range(num_train + num_held_out):
        left = "0" * 50 + str(number) if number == long_prompt else str(number)
        problems.append(Problem(number, f"{left}+4=", str(number + 4)))
    return Task("sums", problems[:num_train], problems[num_train:], Template("{question}"))


TURNS = Template("{question}", between="\0{observation}")
"""A multi-turn template in which the end token of `Characters` ends each turn."""
BOARD = ["######", "#PX_O#", "#____#", "#____#", "#____#", "######"]
CORRIDOR = Problem(0, "P11X12O14:", json.dumps({"board": BOARD, "depth": 6, "actions_per_turn": 1, "words": 0}))
"""A Sokoban problem that two pushes to the right solve."""
