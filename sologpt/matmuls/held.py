"""
In which dtype or format a model holds its weights.

    hold_matrices_in_bfloat16  training of all weights in half the memory (weights_dtype='bfloat16')
    hold_base                  the frozen base of an adapter (base_format); decode_base undoes NF4; kept_for_base says
                               what of a file need not become float32 before
    hold_block_linears_in      the frozen Linears beside an adapter, in the dtype that their matmuls need
    hold_all_linears_in        the Linears in inference, the same
"""

import torch
import torch.nn as nn

from configurator import InputError
from sologpt.machine.devices import DTYPES
from sologpt.matmuls.nf4 import NF4Linear, decoded_linear
from sologpt.matmuls.recipe_linear import block_linears

BASE_FORMATS = ('float32', 'bfloat16', 'nf4')


def kept_for_base(base_format: str) -> tuple[torch.dtype, ...]:
    """
    The dtypes in which a file's matrices may stay until hold_base() rounds them. What it makes of them is the same, and
    no copy in float32 exists.
    """
    return () if base_format == 'float32' else (torch.bfloat16, torch.float16)


def hold_matrices_in_bfloat16(model: nn.Module) -> None:
    """Hold matrices and tables in bfloat16. Vectors stay in float32."""
    for p in model.parameters():
        if p.dim() >= 2:
            p.data = p.data.bfloat16()


def hold_block_linears_in(model: nn.Module, dtype: str) -> None:
    """
    Hold the weights of the blocks' Linears in the run's dtype. Autocast would otherwise round them in every step.
    The parameters stay the same objects. They have to be frozen: an optimizer needs them in float32.
    """
    for layer in block_linears(model):
        layer.weight.data = layer.weight.to(DTYPES[dtype])


def hold_all_linears_in(model: nn.Module, dtype: str) -> None:
    """
    Hold the parameters of all Linears in dtype, for inference. Autocast would otherwise round them in every step.
    The embedding table stays as it is: a head that is tied to it gets a weight of its own, unless the table is in that
    dtype already.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            for name, p in layer.named_parameters(recurse=False):
                p.requires_grad_(False)
                if p.dtype != DTYPES[dtype]:
                    setattr(layer, name, nn.Parameter(p.to(DTYPES[dtype]), requires_grad=False))


def hold_base(model: nn.Module, base_format: str, dtype: str) -> None:
    """
    Round the matrices of an adapter's base to base_format, and hold them in it as far as the run's dtype allows.

    'nf4': the blocks' Linears in NF4, the tables and the head in bfloat16. 'bfloat16': all matrices in bfloat16. Unless
    dtype is bfloat16, what was rounded to bfloat16 is held in float32. Raises InputError.
    """
    if base_format not in BASE_FORMATS:
        raise InputError(f'base_format={base_format!r} is not known: use {", ".join(BASE_FORMATS)}')
    if base_format == 'nf4':
        linears = [name for name, layer in model.named_modules()
                   if isinstance(layer, nn.Linear) and name.startswith('transformer.h.')]
        for name in linears:  # one at a time: each weight is freed before the next is encoded
            model.set_submodule(name, NF4Linear(model.get_submodule(name)))
    if base_format != 'float32':
        hold_matrices_in_bfloat16(model)
        if dtype != 'bfloat16':
            model.float()


def decode_base(model: nn.Module) -> None:
    """Replace each NF4Linear by an ordinary Linear with the decoded weight."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear):
            model.set_submodule(name, decoded_linear(layer))
