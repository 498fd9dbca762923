"""The configuration of an actor, checked before its engine starts."""

from __future__ import annotations

from dataclasses import dataclass

COUNTS = (
    *("samples_per_group", "max_new_tokens", "max_groups_in_flight", "tensor_parallel_size"),
    *("evaluation_prompts", "chunk_bytes"),
)
DTYPES = ("float32", "bfloat16")
ABOVE_ZERO = ("kv_cache_gib", "heartbeat_seconds", "weights_timeout_seconds", "sample_timeout_seconds")
"""Settings that may be any number above 0."""


@dataclass(frozen=True)
class ActorConfig:
    """One actor's engine, sampling and evaluation."""

    model_path: str
    """A Hugging Face folder. The learner's newest weights replace its weights before the first prompt is sampled."""
    samples_per_group: int
    max_new_tokens: int
    """Largest number of tokens of a completion; in multi-turn tasks, of one turn."""
    max_tokens: int
    """Context length of the engine: prompt and completion together, in tokens."""
    temperature: float = 1.0
    max_groups_in_flight: int = 64
    dtype: str = "float32"
    tensor_parallel_size: int = 1
    kv_cache_gib: float = 1.0
    """CPU engine only: size of the key-value cache, in GiB."""
    gpu_memory_utilization: float = 0.4
    """CUDA engine only: share of the device's memory that vLLM may use."""
    seeded_sampling: bool = False
    """Sample every completion with its own seed. A synchronous run is then reproducible; costs some speed."""
    seed: int = 0
    evaluation_prompts: int = 400
    evaluation_temperature: float = 1.0
    """0 is greedy. pass@1 is estimated with one completion per held-out prompt."""
    evaluation_max_new_tokens: int = 0
    """0: as `max_new_tokens`."""
    heartbeat_seconds: float = 1.0
    weights_timeout_seconds: float = 600.0
    """Longest time without a sign of life of the learner: neither its weight store answers, nor does the buffer hear
    from it. Then the actor ends."""
    sample_timeout_seconds: float = 1800.0
    """Longest time of one group, from its start to its scores. Measured groups make the limit shorter
    (`actors/rollouts/deadlines.py`)."""
    kv_cache: str = "keep"
    """keep | recompute: whether requests in flight keep the old weights' key-value cache after a weight load, or
    compute it again with the new weights."""
    chunk_bytes: int = 4 << 20
    """Size of one chunk of weights that are pulled over the network. Four chunks are in flight at a time."""
    share_files: bool = True
    """Map the weights' file on the learner's host instead of pulling the weights."""

    def __post_init__(self) -> None:
        if self.max_new_tokens >= self.max_tokens:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in the model's context of"
                f" {self.max_tokens} tokens; lower it or use a model with a longer context"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0: greedy sampling explores nothing")
        if self.kv_cache not in ("keep", "recompute"):
            raise ValueError(f"actor.kv_cache={self.kv_cache} is unknown; use keep or recompute")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"actor.{name}={getattr(self, name)} must be at least 1")
        for name in ("evaluation_temperature", "evaluation_max_new_tokens", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"actor.{name}={getattr(self, name)} must not be below 0")
        for name in ABOVE_ZERO:
            if not getattr(self, name) > 0:
                raise ValueError(f"actor.{name}={getattr(self, name)} must be above 0")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"actor.gpu_memory_utilization={self.gpu_memory_utilization} is a share of the device; use a number"
                " above 0 and at most 1"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"actor.dtype={self.dtype} is unknown; use one of {', '.join(DTYPES)}")
        if self.max_new_tokens < self.evaluation_max_new_tokens >= self.max_tokens:
            raise ValueError(
                f"actor.evaluation_max_new_tokens={self.evaluation_max_new_tokens} leaves no room for a prompt in the"
                f" model's context of {self.max_tokens} tokens; lower it"
            )
