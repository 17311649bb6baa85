"""
The processes that torchrun starts for one run, and what they agree on.

Without torchrun there is one process, and these functions return its own values.
"""

import os
import sys
from typing import Any, NoReturn

import torch
import torch.distributed as dist


def find_processes() -> tuple[bool, int, int]:
    """(whether torchrun started this process, its number, how many processes there are)."""
    return 'RANK' in os.environ, int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def start_processes(device: torch.device, backend: str) -> None:
    """
    Meet the other processes.

    backend: torch.distributed's, 'nccl' or 'gloo'. On a GPU it is for the GPUs' tensors, and gloo for the CPU's.
    """
    report = sys.excepthook
    dist.init_process_group(f'cpu:gloo,cuda:{backend}' if device.type == 'cuda' else backend)
    sys.excepthook = report  # torch's own would hide the line that an InputError ends with


def wait_for_all() -> None:
    """Wait until all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def of_master(value: Any) -> Any:
    """The first process's value, in all of them."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def any_process(flag: bool) -> bool:
    """True in all processes if it is true in one of them. They use it to stop at the same step."""
    if dist.is_initialized():
        flag = torch.tensor(int(flag))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def least(tensor: torch.Tensor) -> torch.Tensor:
    """The smallest value of all processes, element by element."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over all processes, element by element."""
    if dist.is_initialized():
        tensor = tensor / dist.get_world_size()
        dist.all_reduce(tensor)
    return tensor


def end_processes() -> NoReturn:
    """Wait for the others, and end this process with exit status 0."""
    dist.barrier()
    dist.destroy_process_group()
    # an ordinary exit ends torch's threads in an order that aborts the process in one gloo run of 20
    sys.stdout.flush()
    os._exit(0)
