"""Several processes on one training: each takes a share of the batch, and gradients are averaged.

Started by torchrun, one thread a process:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m sfumato train recipes/mini.yaml

On two otherwise idle CPU cores this is no faster than one process with two threads (52 and 57 samples a second of the
built-in U-Net), but it suffers less from other work on the machine, because the processes meet once a step instead
of in every operator. Without torchrun there is one process and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def group(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, for the length of the block; each takes a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
    # The first process may prepare data for hours while the others wait.
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=24))
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replace each gradient by its mean over the processes, in one message."""
    if world() == 1:
        return
    grads: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= world()
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def share(batch_size: int) -> int:
    """This process's part of a batch; ValueError when it does not divide evenly."""
    if batch_size % world():
        raise ValueError(f"batch_size {batch_size} cannot be shared by {world()} processes; use a multiple")
    return batch_size // world()
