"""
The processes that torchrun starts for one run, and what they agree on.
"""

import os
import sys

import torch
import torch.distributed as dist


def find_processes():
    """(whether torchrun started this process, its number, how many there are)."""
    return 'RANK' in os.environ, int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def start(device, backend):
    """Meet the other processes. backend: torch.distributed's for the GPUs' tensors, on a CPU for all."""
    report = sys.excepthook
    dist.init_process_group(f'cpu:gloo,cuda:{backend}' if device.type == 'cuda' else backend)
    sys.excepthook = report  # torch's own would swallow the line that an InputError ends with


def wait():
    """For all processes to come here."""
    if dist.is_initialized():
        dist.barrier()


def of_master(value):
    """The first process's value, everywhere."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def any_process(flag):
    """True everywhere if it is True anywhere, so that all processes stop at the same step."""
    if dist.is_initialized():
        flag = torch.tensor(int(flag))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def least(tensor):
    """Of all processes' values."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def mean(tensor):
    """Of all processes' values."""
    if dist.is_initialized():
        tensor = tensor / dist.get_world_size()
        dist.all_reduce(tensor)
    return tensor


def end():
    """Leave together, and end this process."""
    dist.barrier()
    dist.destroy_process_group()
    # all is saved. An ordinary exit ends torch's threads in an order that aborts the process in one gloo run of 20
    sys.stdout.flush()
    os._exit(0)
