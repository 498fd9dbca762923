"""Checks before the run whether the published weights fit in /dev/shm, which has 64 MB in a container by default.

If they do not fit, the run publishes in RUN_DIR instead. That is slower, but cannot run out of memory later.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from buffer.config import read_section
from buffer.machine import available_memory_bytes
from buffer.weights.config import WeightsConfig
from buffer.weights.device_handle import RECORD_BYTES
from buffer.weights.layout import ALIGNMENT_BYTES
from buffer.weights.shared_memory import max_segments
from launch.config.adapters import folder_layers, folder_shapes
from launch.config.devices import has_cuda
from launch.config.plan import RunPlan
from launch.processes.guardian import SHARED_MEMORY
from learner.config import LearnerConfig, LoraConfig

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
EXCHANGE_BYTES_PER_THREAD = 4 << 20
"""On a CPU, the workers of one vLLM engine exchange results in shared memory, one buffer per thread of each worker."""


def shared_memory_shortage(plan: RunPlan) -> str:
    """One sentence if the published weights do not fit in shared memory, with the way out; empty if they fit.

    The model's folder must exist. Relays are not counted: they use the shared memory of other hosts.
    """
    weights = read_section(WeightsConfig, plan.sections["weights"], "weights")
    if not weights.shared_memory:
        return ""
    count, each, exchanged = (
        max_segments(weights.keep_versions),
        version_bytes(plan.sections),
        _exchanged_bytes(plan),
    )
    wanted = count * each + exchanged
    # Shared memory counts towards the container's memory limit too.
    free, memory = free_bytes(), available_memory_bytes()
    if wanted <= min(free, memory):
        return ""
    where, way_out = (
        (f"{SHARED_MEMORY} has {_mb(free)} free", f"--shm-size={math.ceil(wanted / 1e9)}g gives a container more of it")
        if free <= memory
        else (f"{_mb(memory)} of memory are free", "--memory gives a container more of it")
    )
    workers = f" and {_mb(exchanged)} that vLLM's workers need in any case" if exchanged else ""
    return (
        f"note: the weights would take up to {_mb(wanted)} of shared memory ({count} versions of {_mb(each)}{workers}),"
        f" but {where}, so they lie in {plan.run_dir / 'weights'}, which is slower; {way_out}"
    )


def free_bytes() -> int:
    """Free bytes in /dev/shm; 0 if it does not exist or is not writable."""
    return shutil.disk_usage(SHARED_MEMORY).free if os.access(SHARED_MEMORY, os.W_OK) else 0


def version_bytes(sections: Mapping[str, Any]) -> int:
    """Size of one published version: all tensors of the model, the adapters alone, or a record of device memory."""
    if sections["weights"]["transport"] != "file":
        return RECORD_BYTES
    folder, learner = Path(sections["model"]["path"]), read_section(LearnerConfig, sections["learner"], "learner")
    lora = learner.lora
    if lora.publishes_adapters:
        # Each target layer has two float32 matrices, [rank, in] and [out, rank].
        sides = [sum(shape) for name, shape in folder_layers(folder).items() if _is_target(name, lora)]
        return sum(4 * lora.rank * side + 2 * ALIGNMENT_BYTES for side in sides)
    number_bytes = NUMBER_BYTES[learner.publish_dtype]
    shapes = folder_shapes(folder)
    if shapes:
        return sum(math.prod(shape) * number_bytes + ALIGNMENT_BYTES for shape in shapes.values())
    # Shapes in .bin files are unknown. Assume that their dtype has the size of the published dtype.
    return sum(path.stat().st_size for path in folder.glob("pytorch_model*.bin"))


def _is_target(name: str, lora: LoraConfig) -> bool:
    return not lora.target_modules or any(f".{name}".endswith(f".{target}") for target in lora.target_modules)


def _exchanged_bytes(plan: RunPlan) -> int:
    workers = plan.sections["actor"]["tensor_parallel_size"]
    if workers == 1 or has_cuda():
        return 0
    return int(plan.cluster.num_actors * workers * plan.cores.actor_threads * EXCHANGE_BYTES_PER_THREAD)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
