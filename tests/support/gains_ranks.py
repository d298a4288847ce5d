"""One of two processes that train with Gains in every way there is: gains_ranks.py FOLDER RANK.

Rank r takes half r of each micro-batch of eight sequences. The first one writes what came out of each way.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # launch/install.sh takes a script's folder off the path
# of deepspeed, which asks for its launcher's variables also where the process group stands
os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": sys.argv[2], "LOCAL_RANK": sys.argv[2], "WORLD_SIZE": "2"}

import torch
import torch.distributed as dist
from gains_models import masked, plain_loop, random_tokens, small_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from replication import Gains
from replication.errors import UserError


def my_steps(rank: int) -> list[list[torch.Tensor]]:
    return [[tokens.split(4)[rank] for tokens in random_tokens(16, seed=k).split(8)] for k in range(2)]


def ddp(rank: int, divergence: str) -> dict[str, torch.Tensor]:
    model = small_model().double()
    gains = Gains(model.model.layers, token={}, layer={"divergence": divergence})
    plain_loop(DistributedDataParallel(model), gains, my_steps(rank), clip=0.5)
    return model.state_dict()


def fsdp2(rank: int) -> dict[str, torch.Tensor]:
    mesh = dist.init_device_mesh("cpu", (2,))
    model = small_model().double()
    gains = Gains("model.layers", model, token={}, layer={})
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    plain_loop(model, gains, my_steps(rank), clip=0.5)
    return {name: p.full_tensor() for name, p in model.state_dict().items()}


def zero(rank: int, stage: int) -> str:
    """What is said where the gradients are DeepSpeed's."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    model = small_model()
    gains = Gains(model.model.layers, token={}, layer={})
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd, config=config)
    tokens = random_tokens(4)
    engine.backward(gains.loss(engine(tokens).logits, masked(tokens)))
    try:
        gains.scale()
    except UserError as error:
        return str(error)
    return "not refused"


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found: dict[str, Any] = {way: ddp(rank, way) for way in ("step_mean", "last_group")}
    found |= {"fsdp2": fsdp2(rank)} | {f"zero{stage}": zero(rank, stage) for stage in (1, 3)}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
