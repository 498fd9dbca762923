"""Dataclasses of the launcher's settings: the top level, data, cluster, and the embedded model with its pretraining.

The dataclasses of the other sections lie in the packages that use them.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from buffer.curriculum_config import Stage
from verifier.base import RewardSpec

MODES = ("async", "sync")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The top-level settings, which concern the whole run."""

    run_dir: str | None = None
    """None: runs/DATE-TIME-TASK-ALGORITHM, with -2, -3, ... after it if that exists."""
    mode: str = "async"
    """async | sync: actors and learner work at the same time, or strictly in turn."""
    seed: int = 0
    total_steps: int
    groups_per_batch: int
    samples_per_group: int
    updates_per_batch: int = 1
    max_staleness: int
    temperature: float = 1.0
    max_new_tokens: int
    reward: list[RewardSpec]
    """Named, weighted rewards, which are added up. Exactly one of them is a grader (docs/rewards.md)."""
    curriculum: list[Stage] = field(default_factory=list)
    """Stages of the run in order; empty: one stage with all prompts."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode} is unknown; use async or sync")
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness={self.max_staleness} is below 0; use 0 for strictly in turn, or more")
        for name in ("total_steps", "groups_per_batch", "samples_per_group", "updates_per_batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is below 0; use 0 or more")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be above 0 and finite: greedy sampling explores nothing"
            )


@dataclass(frozen=True)
class DataConfig:
    """The user's files, for tasks that read files."""

    path: str = ""
    eval_path: str = ""


@dataclass(frozen=True)
class ClusterConfig:
    """The processes of the run, their addresses, cores, devices and time limits."""

    num_actors: int = 1
    relays: list[str] = field(default_factory=list)
    """Commands such as `ssh -tt node-1` that run a command line on another host. Each starts a relay on its host."""
    host: str = "127.0.0.1"
    """Address of this machine at which buffer and weight store listen. Actors on other hosts must reach it."""
    encryption: str = "curve"
    """curve: authenticated and encrypted sockets. none: plain sockets, on this machine only."""
    buffer_port: int = 0
    weights_port: int = 0
    pin_cores: bool = True
    learner_cores: int = 1
    separate_devices: bool = False
    """CUDA: every rank of the learner and every actor gets devices of its own; otherwise all see all devices."""
    max_restarts: int = 3
    """Restarts of one process without progress of the run in between, after which it is given up."""
    healthy_seconds: float = 60.0
    """How long a restarted process must live, with progress of the run, until its restarts are forgotten."""
    hung_seconds: float = 60.0
    """How long a process may be halted or silent before it is killed and restarted; 0: no limit."""
    grace_seconds: float = 0.0
    """How long the learner may take to write its last checkpoint after Ctrl-C or SIGTERM; 0: as long as it needs."""
    tensorboard: bool = False
    tensorboard_port: int = 6006
    min_free_bytes: int = 200_000_000
    cache_dir: str = "~/.cache/slipstream"

    def __post_init__(self) -> None:
        self._check_relays()
        for name in ("num_actors", "learner_cores"):
            if getattr(self, name) < 1:
                raise ValueError(f"cluster.{name}={getattr(self, name)} must be at least 1")
        for name in ("buffer_port", "weights_port", "tensorboard_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise ValueError(f"cluster.{name}={getattr(self, name)} is not a port; use 0 (any) to 65535")
        ports = [port for port in (self.buffer_port, self.weights_port, self.tensorboard_port) if port]
        if len(set(ports)) < len(ports):
            raise ValueError(
                f"cluster.buffer_port={self.buffer_port}, weights_port={self.weights_port} and"
                f" tensorboard_port={self.tensorboard_port} must differ; 0 takes any free one"
            )
        for name in ("healthy_seconds", "hung_seconds", "grace_seconds", "min_free_bytes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"cluster.{name}={getattr(self, name)} is below 0; use 0 or more")
        self._check_host()
        if self.max_restarts < 0:
            raise ValueError(f"cluster.max_restarts={self.max_restarts} is below 0; use 0 for no restarts")

    @property
    def reaches_other_hosts(self) -> bool:
        """Whether processes on other hosts can connect."""
        return not IPv4Address(self.host).is_loopback

    @property
    def longest_grace_seconds(self) -> float:
        """`grace_seconds`; math.inf without a limit."""
        return self.grace_seconds or math.inf

    def _check_relays(self) -> None:
        for command in self.relays:
            try:
                words = shlex.split(command)
            except ValueError as error:
                raise ValueError(
                    f"cluster.relays: {command!r} is not a command ({error}); close its quotation"
                ) from error
            if not words:
                raise ValueError("cluster.relays: an entry is empty; give a command such as 'ssh -tt node-1'")

    def _check_host(self) -> None:
        try:
            host = IPv4Address(self.host)
        except ValueError as error:
            raise ValueError(f"cluster.host={self.host} is no IPv4 address; use one of this machine's") from error
        if host.is_unspecified:
            raise ValueError(f"cluster.host={host} is not an address to connect to; use one address of this machine")
        if self.encryption not in ("curve", "none"):
            raise ValueError(f"cluster.encryption={self.encryption} is unknown; use curve or none")
        if self.encryption == "none" and not host.is_loopback:
            raise ValueError(
                f"cluster.encryption=none would let anyone who reaches cluster.host={host} connect; use curve, or the"
                " host 127.0.0.1"
            )


@dataclass(frozen=True)
class EmbeddedConfig:
    """The small model that the run makes if `model.path` is null."""

    tokenizer: str = "characters"
    """characters | bpe."""
    vocabulary: int = 4096
    hidden_size: int = 64
    intermediate_size: int = 170
    num_layers: int = 3
    num_heads: int = 2

    def __post_init__(self) -> None:
        if self.tokenizer not in ("characters", "bpe"):
            raise ValueError(f"embedded.tokenizer={self.tokenizer} is unknown; use characters or bpe")
        for name in ("vocabulary", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"embedded.{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 32:
            raise ValueError(
                f"embedded.hidden_size={self.hidden_size} must be num_heads={self.num_heads} times a multiple of 32,"
                " the head sizes that the CPU engine supports"
            )


@dataclass(frozen=True)
class PretrainingConfig:
    """Pretraining of the embedded model on the traces of a noisy teacher."""

    error_rate: float = 0.2
    """Probability of a teacher's error; the task defines where errors occur."""
    clean_share: float = 0.0
    """Share of the traces, the first ones, without errors: they teach the facts before the noise."""
    num_traces: int = 20000
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 4e-3
    seed: int = 0
    num_threads: int = 1

    def __post_init__(self) -> None:
        for name, least in (("num_traces", 0), ("steps", 0), ("seed", 0), ("batch_size", 1), ("num_threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"pretraining.{name}={getattr(self, name)} must be at least {least}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"pretraining.learning_rate={self.learning_rate} must be above 0")
        for name in ("error_rate", "clean_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"pretraining.{name}={getattr(self, name)} must lie between 0 and 1")
