"""Several processes on one machine, each with a GPU (or some cores) of its own:

    torchrun --nproc_per_node=2 train.py config.yaml

Each rank explores and samples its share of tasks and samples, and takes its share of a batch's rows; gradients are added
up over ranks, so that all take the optimiser step that one process would. Rank 0 writes the run's folder and talks; what
the others sample lies in *.part files until it takes them over. A process that is the only one notices nothing of this.
"""
import datetime
import os
import sys
from typing import Any, Sequence

import torch
import torch.distributed as dist

from config import UserError


def join() -> None:
    """Meet the other ranks, if torchrun started this one."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if torch.cuda.is_available():
            if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
                raise UserError(f"torchrun: --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']} is more than the "
                                f"{torch.cuda.device_count()} GPUs here")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(both, timeout=datetime.timedelta(days=7))    # one rank may explore longer than others
        if rank():
            sys.stdout = open(os.devnull, "w")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: Sequence[Any]) -> list[Any]:
    return list(items)[rank()::world()]


def wait_for_all() -> None:
    if world() > 1:
        dist.barrier()


def take_gradients(parameters: Sequence[torch.nn.Parameter], losses: torch.Tensor) -> torch.Tensor:
    """What one row gave, losses and gradients, as a vector; the gradients are cleared."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]     # None: the row passed it by
    flat = torch.cat([losses.detach().float(), *(gradient.flatten() for gradient in gradients)])
    for p in parameters:
        p.grad = None
    return flat


def give_gradients(parameters: Sequence[torch.nn.Parameter], mine: list[torch.Tensor], rows: int,
                   losses: int) -> torch.Tensor:
    """Add up what the rows of a batch gave, row k on rank k mod N, in the order in which one process would: it
    is the same sum to the last bit. Sets the gradients, returns the losses (C,)."""
    total, sizes = None, [p.numel() for p in parameters]
    for k in range(rows):
        owner = k % world()
        if owner == rank():
            flat = mine[k // world()]
        else:
            flat = torch.empty(losses + sum(sizes), device=parameters[0].device)
        dist.broadcast(flat, owner)
        total = flat if total is None else total + flat
    for p, grad in zip(parameters, total[losses:].split(sizes)):
        p.grad = grad.view_as(p).clone()
    return total[:losses].cpu()
