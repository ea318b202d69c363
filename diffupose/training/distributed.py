"""Several processes that train as one."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch import distributed as dist


def start_processes(device: str) -> tuple[int, int]:
    """Join the process group that ``torchrun`` describes, if any; return rank and number of processes.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``, as in ``TrainConfig``: on the CPU, processes talk by gloo.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 0, 1
    backend = "nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend)
    return dist.get_rank(), dist.get_world_size()


def wait_for_all(num_processes: int) -> None:
    """Return when every process is here.

    Call it after the last exchange, before the process ends. gloo's threads release the tensors of an exchange a moment
    after it is done, and take Python's lock for that. A thread that waits for the lock while the interpreter ends
    aborts the process. A barrier exchanges no Python object.
    """
    if num_processes > 1:
        dist.barrier()


def stop_processes() -> None:
    """Leave the process group, if any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def average_gradients(module: nn.Module, num_processes: int) -> None:
    """Replace each gradient by its mean over the processes, in one exchange."""
    if num_processes < 2:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= num_processes
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def average(value: Tensor, num_processes: int) -> Tensor:
    """Return the mean of a tensor over the processes."""
    if num_processes < 2:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / num_processes
