"""One network under DeepSpeed: packed forward passes, gradient accumulation, optimizer step, gather, save and load.

No other file imports DeepSpeed. Losses arrive divided by counts over all ranks, so gradients are summed, never
averaged, over microbatches and ranks: how a batch is cut into microbatches does not change the step. A loss that is not
finite makes the gradient of every rank not finite, and all ranks skip such a step.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.environ.get("SLIPSTREAM_DEVICE") == "cuda" else "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from learner.batches.batch import MicroBatch
from learner.config import OptimizerConfig
from learner.distributed.state_file import read_state_file, write_state
from learner.models.lora import NamedTensor, adapter_tensors, whole_tensors
from learner.models.policy import PolicyModel, ValueModel

GATHER_ELEMENTS = 1 << 26
"""Parameter elements gathered at a time when weights are collected from ZeRO-3 shards."""
PERSISTENT_ELEMENTS = 1 << 14
"""Under ZeRO-3, parameters of at most this many elements (norms and biases) stay gathered between steps."""
LONGEST_WAIT_SECONDS = 24 * 3600.0
"""How long a rank waits for the others in a collective. Rank 0 alone publishes, digests and flushes checkpoints and
waits for the buffer, which takes as long as it takes. A rank that ended or is halted, and ranks that wait for each
other, are found by torchrun and by the launcher, not by this limit."""
STATE_CLASSES = (LossScaler, ZeroStageEnum, fragment_address)
"""Classes that DeepSpeed's saved state may hold besides tensors and plain containers."""


def init_distributed(device: torch.device, timeout_seconds: float = LONGEST_WAIT_SECONDS) -> None:
    """Join the ranks that torchrun started. A process started without torchrun becomes rank 0 of 1."""
    if "RANK" not in os.environ:
        single_rank = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
        os.environ.update(single_rank)
    if device.type == "cpu":
        # DeepSpeed would compile a C++ library for half a minute; gloo is enough for the few ranks of a CPU run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="gloo" if device.type == "cpu" else "nccl",
        timeout=datetime.timedelta(seconds=timeout_seconds),
        verbose=False,
    )


class TrainingEngine:
    """One network with its optimizer, sharded by DeepSpeed.

    Args:
        model: the network; its forward takes the fields of a `MicroBatch`.
        optimizer: AdamW settings.
        zero_stage: 0 (replicated; in bfloat16 the same as 1) to 3 (parameters sharded).
        bfloat16: parameters in bfloat16 with float32 master weights.
        cpu_offload: optimizer state in host memory.
        device: device of the network.
        full_base: loads the full-precision base weights if the network holds them in four bits; None otherwise.
    """

    def __init__(
        self,
        model: PolicyModel | ValueModel,
        optimizer: OptimizerConfig,
        *,
        zero_stage: int,
        bfloat16: bool,
        cpu_offload: bool,
        device: torch.device,
        full_base: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.device, self._full_base = device, full_base
        self.attention_crossover_tokens = model.attention_crossover_tokens
        """As in `learner.batches.packing.even_cuts`."""
        # DeepSpeed's replicated bfloat16 optimizer starts Adam's bias correction at the second step; stage 1 does not.
        self._zero_stage = max(zero_stage, 1) if bfloat16 else zero_stage
        self._max_grad_norm = optimizer.max_grad_norm
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._has_frozen_parameters = len(trained) < len(list(model.parameters()))
        self._engine, *_ = deepspeed.initialize(
            model=model.to(device),
            model_parameters=trained,
            config=_deepspeed_config(optimizer, self._zero_stage, bfloat16, cpu_offload, device),
        )
        if self._zero_stage == 0 and self.world_size == 1:
            # The reduction over one rank would copy all gradients to a flat buffer and back.
            self._engine.enable_backward_allreduce = False
        self._write_problem = ""
        self._guard_files()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size()

    @property
    def is_sharded(self) -> bool:
        """Whether each rank saves its own shard, which only the same rank of the same number of ranks can load."""
        return self._zero_stage > 0

    def forward(self, micro: MicroBatch) -> Any:
        """Return the network's outputs on the scored tokens of one microbatch."""
        outputs = self._engine(*micro.inputs)
        if self._zero_stage == 3 and not torch.is_grad_enabled():
            self._discard_unfinished_trace()
        return outputs

    def _discard_unfinished_trace(self) -> None:
        """Discard the layer order that DeepSpeed began to trace in a forward pass without a backward pass.

        DeepSpeed uses the traced order to prefetch parameters and to keep them for the backward pass, so that each is
        gathered once per microbatch instead of twice. A trace that ends with the forward pass is invalid for the next
        backward pass. Where scoring and training alternate, no trace would stay valid for long.
        """
        coordinator = self._engine.optimizer.parameter_offload.get_param_coordinator()
        if coordinator.is_record_trace():
            coordinator._invalidate_trace()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, which is this rank's share of a sum over ranks. `last` ends the accumulation."""
        self._engine.set_gradient_accumulation_boundary(last)
        # An infinite loss may have a finite gradient. The factor NaN makes that gradient NaN, and the reduction makes
        # it NaN on every rank.
        factor = torch.where(torch.isfinite(loss.detach()), float(self.world_size), math.nan)
        # DeepSpeed averages over ranks, but the losses are shares of one sum.
        self._engine.backward(loss * factor, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip the gradient, make the step and clear the gradient. Returns the global gradient norm before clipping.

        If the norm is not finite, every rank skips the step: parameters and optimizer state stay unchanged.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._zero_stage == 0:
            return self._replicated_step()
        self._engine.step()
        # DeepSpeed's sharded optimizers check the norm and report -1 or infinity for a step that they skip.
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.inf

    def _replicated_step(self) -> float:
        trained = [p for p in self._engine.module.parameters() if p.grad is not None]
        total = nn.utils.get_total_norm([p.grad for p in trained])
        norm = float(total)
        if math.isfinite(norm):
            # Clip here, because DeepSpeed would compute the norm a second time.
            if self._max_grad_norm:
                nn.utils.clip_grads_with_norm_(trained, self._max_grad_norm, total)
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm

    def gather(self, dtype: torch.dtype, *, adapters: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield what `gathered` yields, as copies in `dtype` in host memory."""
        for name, tensor in self.gathered(adapters=adapters):
            yield name, tensor.to("cpu", dtype, copy=True)

    def gathered(self, *, adapters: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield the network as (name, tensor), gathered in buckets of bounded size.

        A tensor is valid only until the next one is taken. Every rank must iterate to the end; rank 0 gets the tensors,
        the others get empty ones. Tied parameters appear once. Adapters are merged into the weights they belong to;
        with `adapters` only the adapters are yielded, in float32.
        """
        for tensor in self._whole(adapters=adapters):
            yield tensor.name, tensor.value() if dist.get_rank() == 0 else torch.empty(0)

    def copy_to(self, module: nn.Module) -> None:
        """Copy the weights, adapters merged, to `module`, which has the same architecture. Every rank must call it."""
        targets = dict(module.named_parameters())
        for tensor in self._whole():
            with torch.no_grad():
                targets[tensor.name].copy_(tensor.value())

    def _whole(self, *, adapters: bool = False) -> Iterator[NamedTensor]:
        """Yield the network's tensors, each while its parameters are gathered on every rank."""
        for bucket in self._buckets(adapters):
            parameters = [parameter for tensor in bucket for parameter in tensor.parameters]
            with deepspeed.zero.GatheredParameters(parameters, enabled=self._zero_stage == 3):
                yield from bucket

    def _buckets(self, adapters: bool) -> Iterator[list[NamedTensor]]:
        bucket: list[NamedTensor] = []
        size = 0
        base = self._full_base() if self._full_base and not adapters else None
        network = self._engine.module
        for tensor in adapter_tensors(network) if adapters else whole_tensors(network, base):
            elements = sum(int(getattr(part, "ds_numel", part.numel())) for part in tensor.parameters)
            if bucket and size + elements > GATHER_ELEMENTS:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += elements
        if bucket:
            yield bucket

    def save(self, folder: Path) -> None:
        """Write trained parameters and optimizer state to `folder`. Every rank must call it.

        Raises:
            OSError: when this rank's part cannot be written; raised after the last barrier, so no rank is left waiting.
        """
        self._write_problem = ""
        self._engine.save_checkpoint(str(folder), tag="state", save_latest=False, exclude_frozen_parameters=True)
        if self._write_problem:
            raise OSError(self._write_problem)

    def _guard_files(self) -> None:
        """Make DeepSpeed's file writes delay their errors and its reads allow nothing but `STATE_CLASSES`.

        DeepSpeed writes between barriers, where an error would leave the other ranks waiting; `save` raises it later.
        """
        files = self._engine.checkpoint_engine

        def delaying_errors(write: Callable[..., None]) -> Callable[..., None]:
            def attempt(*arguments: Any, **named: Any) -> None:
                try:
                    write(*arguments, **named)
                except OSError as error:
                    # Keep only the text: the error's traceback would keep the file open and its disk space in use.
                    self._write_problem = str(error)

            return attempt

        files.makedirs = delaying_errors(os.makedirs)
        files.save = delaying_errors(lambda state_dict, path: write_state(state_dict, Path(path)))
        files.load = lambda path, map_location=None: read_state_file(Path(path), STATE_CLASSES)
        # DeepSpeed's recovery script would unpickle any file; the exported policy makes it unnecessary.
        self._engine._copy_recovery_script = lambda save_path: None

    def load(self, folder: Path) -> None:
        """Load what `save` wrote. Every rank must call it.

        Raises:
            FileNotFoundError: `folder` holds no saved state.
        """
        if not (folder / "state").is_dir():
            raise FileNotFoundError(f"{folder} holds no training state")
        self._engine.load_checkpoint(
            str(folder),
            tag="state",
            # Frozen parameters are not saved: they still have the values that the network was created with.
            load_module_strict=not self._has_frozen_parameters,
            load_lr_scheduler_states=False,
        )


def _deepspeed_config(
    optimizer: OptimizerConfig, zero_stage: int, bfloat16: bool, cpu_offload: bool, device: torch.device
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage == 3:
        # DeepSpeed's other defaults suit microbatches. A parameter that is used again within 1e9 elements stays
        # gathered. A model of up to half as many parameters therefore gathers each parameter once per microbatch, a
        # larger model up to twice; 5e7 elements are prefetched. Parameters above this threshold are released after each
        # backward pass, because keeping them would put the whole model on every device.
        zero["stage3_param_persistence_threshold"] = PERSISTENT_ELEMENTS
    if cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm if zero_stage else 0.0,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": _pair(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                # DeepSpeed would compile its own AdamW on first use, which needs a C++ or CUDA toolchain.
                "torch_adam": True,
                "fused": True,
            },
        },
        "steps_per_print": 1 << 30,
    }


def _pair(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values]


def shut_down_distributed() -> None:
    """Leave the process group, so that no other rank waits for this one."""
    if dist.is_initialized():
        dist.destroy_process_group()
