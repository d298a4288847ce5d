"""The ways to distribute one run: single, DDP, DeepSpeed ZeRO 1/2/3. The only module that imports deepspeed.

A strategy decides where weights, gradients and the optimizer's state live. What the rest of the harness does with
them goes through two functions here: multiply the gradients of a block by its scale, and consolidate the weights on the
first rank.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from torch.nn import Parameter

from replication.config import RunConfig
from replication.errors import UserError
from replication.model.moe import MixtureOfExperts, SwiGLU
from replication.model.size import parameter_count
from replication.model.transformer import Attention
from replication.objectives.callbacks import MultiplyGradients
from replication.objectives.layer_gain import multiply, multiply_whole
from replication.training.environment import uses_gpu
from replication.training.muon import Muon, Partitions, Piece, Placement, Shards
from replication.training.ranks import is_first

SUB_GROUP_ELEMENTS = 1_000_000_000  # of the optimizer's state that ZeRO 3 updates at a time
DeepSpeedConfig = dict[str, Any]  # its own keys, nested

BUCKET_ELEMENTS = 50_000_000  # of one reduction or gather, at most: 200 MB in fp32


def build_strategy(config: RunConfig, load_universal: bool = False) -> Strategy | str:
    """The Lightning strategy of a config. Gradients are averaged over ranks; the objective is scaled to match.

    Args:
        config: the run's.
        load_universal: whether a checkpoint follows that was resharded for another number of ranks (ZeRO only).

    Raises:
        UserError: a GPU is asked for and torch sees none, or DeepSpeed cannot run here.
    """
    if config.cluster.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("cluster.accelerator: gpu, but torch sees none on this machine; choose cpu, or fix the driver")
    if config.cluster.strategy == "single":
        return "auto"
    backend = "nccl" if uses_gpu(config) else "gloo"
    if config.cluster.strategy == "ddp":
        return DDPStrategy(
            process_group_backend=backend,
            find_unused_parameters=False,  # every expert is in the graph, with zero rows if need be
            broadcast_buffers=False,
        )
    return ZeroStrategy(config, backend, load_universal)


def is_zero(config: RunConfig) -> bool:
    return config.cluster.strategy.startswith("zero")


# ---------------------------------------------------------------- DeepSpeed


def deepspeed_config(config: RunConfig) -> DeepSpeedConfig:
    """The one complete DeepSpeed config of a run; Lightning adds the accumulation, and nothing else decides.

    Gradients are accumulated and reduced in fp32, without overlap of communication and backward. Clipping is set here
    and nowhere else: DeepSpeed clips by the global norm of the gradients that the layer scale has already multiplied.
    """
    t, gpu = config.training, uses_gpu(config)
    bucket = min(BUCKET_ELEMENTS, parameter_count(config.model))
    zero: DeepSpeedConfig = {
        "stage": int(config.cluster.strategy.removeprefix("zero")),
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_partitions": True,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,
        "ignore_unused_parameters": False,
        "parameter_alignment": False,  # parameters follow each other without gaps: _placement_of relies on it
    }
    if config.cluster.strategy == "zero3":
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": config.model.d_model * config.model.n_experts,  # norms, routers
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
            "sub_group_size": SUB_GROUP_ELEMENTS,
        }
    if config.cluster.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_sequences,
        "gradient_clipping": t.clip_norm,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {
            "enabled": t.precision == "bf16-mixed",
            "check_grad_overflow": True,  # its default changed between releases
            "immediate_grad_update": False,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a micro-batch
    }


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed ZeRO on GPUs over NCCL, or on CPU processes over gloo: the same code, so tests run the real one."""

    def __init__(self, config: RunConfig, backend: str, load_universal: bool = False) -> None:
        gpu = uses_gpu(config)
        if not gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is first imported
        self.gpu = gpu
        asked = deepspeed_config(config)
        if load_universal:
            asked["checkpoint"] = {"load_universal": True}
        super().__init__(config=asked, process_group_backend=backend, logging_level=logging.ERROR)

    @property
    def root_device(self) -> torch.device:
        return cast(torch.device, super().root_device) if self.gpu else torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        """As the parent's, which insists on CUDA."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
        else:
            DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        if self.gpu:
            super().setup_distributed()
            return
        import deepspeed

        # An operation for inference, which would take a compiler and half a minute to build, on every rank at once.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer: Trainer) -> None:
        """Shard the model; fp32 master weights start from the seed's fp32 weights, not from their bf16 rounding."""
        import deepspeed

        module = cast(LightningModule, self.lightning_module)
        if self.zero_stage_3:
            # modules that multiply by their submodules' weights in one product, which are then gathered as one
            kinds = {type(m) for m in module.modules()} & {Attention, SwiGLU, MixtureOfExperts}
            deepspeed.utils.set_z3_leaf_modules(module, list(kinds))
        start = {n: p.detach().clone() for n, p in module.named_parameters()} if self._rounds_weights() else {}
        super().setup(trainer)
        for name, parameter in module.named_parameters():
            if name in start:
                value = start[name].to(self.root_device)
                deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        for optimizer in cast(list[Any], self.optimizers):
            if isinstance(optimizer.optimizer, Muon):
                optimizer.optimizer.placement = _placement_of(optimizer)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by the accumulation; DeepSpeed must not divide it again."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def _rounds_weights(self) -> bool:
        return bool(cast(DeepSpeedConfig, self.config)["bf16"]["enabled"])

    @property
    def resolved_config(self) -> DeepSpeedConfig:
        """The config as DeepSpeed completed it: for the manifest."""
        resolved = copy.deepcopy(cast(DeepSpeedConfig, self.config))
        zero = self.deepspeed_engine._config.zero_config
        resolved["zero_optimization"] = zero.model_dump(mode="json", exclude_none=True)
        resolved["train_batch_size"] = self.deepspeed_engine.train_batch_size()
        resolved["optimizer_class"] = type(self.deepspeed_engine.optimizer).__name__
        return resolved


# ---------------------------------------------------------------- where gradients live


def gradient_multiplier(config: RunConfig) -> MultiplyGradients:
    """The strategy's way to multiply the gradients of each block's parameters by that block's scale.

    It acts at the true optimizer boundary, on accumulated and averaged gradients, before clipping.
    """
    if not is_zero(config):
        return multiply_whole
    return multiply_shards if config.cluster.strategy == "zero3" else multiply_partitions


def multiply_partitions(blocks: Sequence[Sequence[Parameter]], scale_L: Tensor) -> None:
    """ZeRO 1 and 2: each rank multiplies the pieces of gradients that its partition of the optimizer owns."""
    for block, scale in zip(blocks, scale_L, strict=True):
        owned = [p for p in block if p._hp_mapping is not None]  # type: ignore[attr-defined]
        multiply([p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group) for p in owned], scale)  # type: ignore[attr-defined]
        for p in owned:  # with offload the norms that clipping uses were taken in backward
            optimizer = getattr(p, "_zero_optimizer", None)
            if optimizer is not None and optimizer.cpu_offload:
                norms, index = optimizer.norm_for_param_grads, optimizer.get_param_id(p)
                norms[index] = norms[index] * scale.to(norms[index])


def multiply_shards(blocks: Sequence[Sequence[Parameter]], scale_L: Tensor) -> None:
    """ZeRO 3: each rank multiplies its shard of every gradient."""
    from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

    for block, scale in zip(blocks, scale_L, strict=True):
        for p in block:
            gradient = safe_get_local_grad(p)
            safe_set_local_grad(p, gradient * scale.to(gradient))


# ---------------------------------------------------------------- where the optimizer's matrices live


def _placement_of(zero: Any) -> Placement:
    """Placement of the Muon group's matrices within the flat buffers of a ZeRO optimizer."""
    if hasattr(zero, "fp16_partitioned_groups"):  # ZeRO 3: shards of each parameter, by sub-group
        pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        return Shards({f: _pieces([p.ds_shape for p in g], [p.partition_numel() for p in g]) for f, g in pairs})
    pairs = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
    return Partitions({f: _pieces([p.shape for p in g], [p.numel() for p in g]) for f, g in pairs})


def _pieces(shapes: Sequence[torch.Size], lengths: Sequence[int]) -> list[Piece]:
    starts = itertools.accumulate(lengths, initial=0)
    return [Piece(torch.Size(s), start, n) for s, start, n in zip(shapes, starts, lengths, strict=False)]


# ---------------------------------------------------------------- where weights live


def consolidated_weights(config: RunConfig, model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name, consolidated on the CPU of the first rank; elsewhere empty. Call on all ranks.

    fp32 (the master weights under ZeRO), or fp64 where the run trains in it. A tied weight counts once.
    """
    whole: dict[str, Tensor] = {}
    for name, parameter in _consolidated_parameters(config, model):
        if is_first():
            whole[name] = parameter.detach().to("cpu", copy=True)
    return whole


def _consolidated_parameters(config: RunConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if not is_zero(config):
        yield from model.named_parameters()
        return
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in model.named_parameters():
        yield name, safe_get_full_fp32_param(parameter)  # a collective
