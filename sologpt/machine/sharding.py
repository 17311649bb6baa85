"""
How processes hold a model: each the whole of it (DDP), or each a share of it (FSDP).

A share is a DTensor: this process's rows of a parameter, of its gradient, or of an optimizer's state.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel


def replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """A module around the model that averages the gradients of all processes in its backward."""
    replicated = DistributedDataParallel(
        model, device_ids=[device.index] if device.type == 'cuda' else None,
        gradient_as_bucket_view=True)  # no second copy of the gradients
    replicated.broadcast_buffers = False  # they are constants; as an argument it is deprecated in torch 2.13
    return replicated


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype | None, compile: bool) -> None:
    """
    Let each process hold only its rows of every parameter, on `device`.

    Before, the model is on the CPU and the same in all processes; it goes to the device a block at a time. Afterwards
    its parameters are whole only within loss() and next_logits(), which all processes have to call together.

    dtype: in which a block's matrices are gathered; None: as they are. For plain Linears it should be the dtype of
    their matmuls: if they were gathered in float32, autocast's copies would be kept for the backward, of all blocks at
    once. compile: the blocks, in loss() alone. Each is one graph, and blocks that are alike share it.

    Gradients are reduced to shares after each backward, not once per step: until then they would be as large as the
    model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    as_it_is = MixedPrecisionPolicy(cast_forward_inputs=False)
    of_block = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = model.transformer.h
    # A group is gathered in one dtype, by hooks of its module. The gains of norms stay as they are, as with autocast.
    # A group of their own would have its hooks inside the block, where neither the compiler nor checkpointing can see
    # through them. So they are in the group of the whole model, which has to be made first.
    fully_shard(model, mesh=mesh, mp_policy=as_it_is, ignored_params={p for b in blocks for p in _gathered_by_block(b)})
    for block in blocks:
        gathered = _gathered_by_block(block)
        if compile:
            block.forward = torch.compile(block.forward)
        fully_shard(block, mesh=mesh, mp_policy=of_block, ignored_params=set(block.parameters()) - gathered)
    for method in ('loss', 'next_logits'):
        register_fsdp_forward_method(model, method)
    if compile:  # drawing text has a longer cache for every token, and each length would be compiled
        model.next_logits = torch.compiler.set_stance('force_eager')(model.next_logits)


def _gathered_by_block(block):
    """The block's parameters, without those of its norms."""
    norms = block.ln_1, block.ln_2, block.attn.q_norm, block.attn.k_norm
    return set(block.parameters()) - {p for norm in norms for p in norm.parameters()}


def is_share(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. To import their class takes a second, so this asks for one of its methods."""
    return hasattr(tensor, 'full_tensor')


def one_each(shares: Sequence[torch.Tensor],
             function: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """
    Yields (i, this process's rows of function(i, the whole matrix of shares[i])) for each share.

    Of n matrices each of the n processes gathers one, and computes its function: no process holds another whole. The
    function has to leave the shape as it is.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    for first in range(0, len(shares), n):
        rows = [share.to_local() for share in shares[first:first + n]]
        lengths = [t.numel() for t in rows] + [0] * (n - len(rows))
        mine = shares[first + rank] if rank < len(rows) else rows[0].new_empty(0, 0)
        height, width = mine.shape
        most = math.ceil(height / n)
        of_mine = [max(0, min(most, height - i * most)) * width for i in range(n)]  # elements that each process holds
        # each process holds adjacent rows: what arrives, in the order of the processes, is the whole matrix
        whole, results = rows[0].new_empty(height * width), rows[0].new_empty(sum(lengths))
        dist.all_to_all_single(whole, torch.cat([t.flatten() for t in rows]), of_mine, lengths)
        if rank < len(rows):
            whole = function(first + rank, whole.view(height, width)).to(whole.dtype).flatten()
        dist.all_to_all_single(results, whole, lengths, of_mine)
        for i, (t, result) in enumerate(zip(rows, results.split(lengths), strict=False), first):
            yield i, result.view_as(t)


def share_state(state: dict[str, torch.Tensor], of: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    This process's share of an optimizer's state for the parameter `of`.

    state: name -> the whole tensor, on any device. It is returned as it is if `of` is no share.
    """
    if not is_share(of):
        return state
    from torch.distributed.tensor import DTensor
    rows = math.ceil(len(of) / dist.get_world_size())

    def own(tensor):
        tensor = tensor[dist.get_rank() * rows:][:rows].to(of.device, copy=True)  # a mapped file may hold it
        return DTensor.from_local(tensor, of.device_mesh, of.placements, run_check=False, shape=of.shape,
                                  stride=of.stride())
    return {key: own(tensor) if tensor.shape == of.shape else tensor for key, tensor in state.items()}


@torch.no_grad()
def gather_whole(value: Any) -> Any:
    """
    A state dict with each share gathered on the first process's CPU; in the other processes None takes its place.

    All processes have to call it together. Tensors are gathered one at a time, so that a device never holds more. What
    is no share stays as it is.
    """
    gathered = {}  # a parameter with two names stays one

    def gather(value):
        if isinstance(value, dict):
            return {key: gather(v) for key, v in value.items()}
        if not is_share(value):
            return value.detach() if isinstance(value, torch.Tensor) else value
        if id(value) not in gathered:
            tensor = value.full_tensor()  # its storage is too large if the shares differ in size; the copy is not
            gathered[id(value)] = tensor.to('cpu', copy=True) if dist.get_rank() == 0 else None
        return gathered[id(value)]
    return gather(value)
