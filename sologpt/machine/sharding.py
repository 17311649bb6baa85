"""
How processes share a model: whole in each (DDP), or a share in each (FSDP).
"""

import math

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def replicate(model, device):
    """The model, whole on `device` in every process, as a module whose backward averages the gradients."""
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == 'cuda' else None, broadcast_buffers=False,  # constants
        gradient_as_bucket_view=True)  # there is no second copy of them


def shard(model, device, dtype, compile):
    """
    From here on each process holds its rows of every parameter, on `device`; the model, the same in all of them, is on
    the CPU before, and goes there a block at a time. Only in loss() and next_logits() is it a whole: all processes have
    to call them together.

    dtype: in which a block's matrices are gathered; None: as they are. Those of plain Linears are to be gathered in
    that of their matmuls: what autocast makes of float32 ones is kept for the backward, of all blocks at once.
    compile: each block by itself.

    Gradients are divided after each backward, not once per step: until then they would be as large as the model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    as_it_is = MixedPrecisionPolicy(cast_forward_inputs=False)
    of_block = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        norms = [norm for norm in (block.ln_1, block.ln_2) if list(norm.parameters())]
        if norms and dtype not in (None, torch.float32):  # autocast leaves their gains as they are
            fully_shard(norms, mesh=mesh, mp_policy=as_it_is)
        if compile:
            block.forward = torch.compile(block.forward)
        fully_shard(block, mesh=mesh, mp_policy=of_block)
    fully_shard(model, mesh=mesh, mp_policy=as_it_is)
    for method in ('loss', 'next_logits'):
        register_fsdp_forward_method(model, method)


def is_share(tensor):
    """Whether it is a DTensor, told without the second that importing them takes."""
    return hasattr(tensor, 'full_tensor')


def one_each(shares, function):
    """
    Yields (i, this process's rows of function(i, shares[i] made whole)), of matrices whose shape function leaves. Each
    process gathers and computes one of n of them, and has no other whole.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    for first in range(0, len(shares), n):
        rows = [share.to_local() for share in shares[first:first + n]]
        lengths = [t.numel() for t in rows] + [0] * (n - len(rows))
        mine = shares[first + rank] if rank < len(rows) else rows[0].new_empty(0, 0)
        height, width = mine.shape
        most = math.ceil(height / n)
        of_mine = [max(0, min(most, height - i * most)) * width for i in range(n)]  # elements that each process has
        # every process has rows that follow each other: what arrives, in the order of processes, is the whole matrix
        whole, results = rows[0].new_empty(height * width), rows[0].new_empty(sum(lengths))
        dist.all_to_all_single(whole, torch.cat([t.flatten() for t in rows]), of_mine, lengths)
        if rank < len(rows):
            whole = function(first + rank, whole.view(height, width)).to(whole.dtype).flatten()
        dist.all_to_all_single(results, whole, lengths, of_mine)
        for i, (t, result) in enumerate(zip(rows, results.split(lengths), strict=False), first):
            yield i, result.view_as(t)


def share(state, of):
    """
    An optimizer's state of the parameter `of`, name -> tensor on any device, whole: as this process holds it, if `of`
    is a share.
    """
    if not is_share(of):
        return state
    from torch.distributed.tensor import DTensor
    rows = math.ceil(len(of) / dist.get_world_size())

    def own(tensor):
        tensor = tensor[dist.get_rank() * rows:][:rows].to(of.device, copy=True)  # from what may be a file
        return DTensor.from_local(tensor, of.device_mesh, of.placements, run_check=False, shape=of.shape,
                                  stride=of.stride())
    return {key: own(tensor) if tensor.shape == of.shape else tensor for key, tensor in state.items()}


@torch.no_grad()
def whole(value):
    """
    A state dict with each share gathered, on the first process's CPU; elsewhere None stands in its place. One tensor
    at a time: a device never holds more. All processes have to call it together. What is no share stays as it is.
    """
    gathered = {}  # a parameter with two names stays one

    def gather(value):
        if isinstance(value, dict):
            return {key: gather(v) for key, v in value.items()}
        if not is_share(value):
            return value.detach() if isinstance(value, torch.Tensor) else value
        if id(value) not in gathered:
            tensor = value.full_tensor()  # in more memory than it needs, where the shares are not of one size
            gathered[id(value)] = tensor.to('cpu', copy=True) if dist.get_rank() == 0 else None
        return gathered[id(value)]
    return gather(value)
