"""
In which dtype a model's weights are held.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import InputError
from sologpt.machine import devices
from sologpt.machine.devices import DTYPES, matmul_dtype
from sologpt.matmuls.formats import NF4
from sologpt.matmuls.recipe_linear import layers

BASE_FORMATS = ('float32', 'bfloat16', 'nf4')


class NF4Linear(nn.Module):
    """A frozen Linear whose weight is held in NF4, and decoded for every product."""

    def __init__(self, linear):
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        for name, tensor in NF4.encode(linear.weight)._asdict().items():
            self.register_buffer(name, tensor)

    @property
    def encoded(self):
        return NF4(*(getattr(self, name) for name in NF4._fields))

    @property
    def weight(self):
        """Decoded, in float32."""
        return self.encoded.decode(self.shape)

    def flops_per_token(self):
        return 4 * self.shape.numel()

    def forward(self, x):
        dtype = matmul_dtype(x)
        y = nf4_matmul.apply(x.to(dtype), self.shape, *self.encoded)
        return y if self.bias is None else y + self.bias.to(dtype)


class nf4_matmul(torch.autograd.Function):
    """x, (..., in), by the transpose of an encoded weight, which backward decodes again rather than keep it decoded."""

    @staticmethod
    def forward(ctx, x, shape, *encoded):
        ctx.save_for_backward(*encoded)
        ctx.shape = shape
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, NF4(*encoded).decode(shape, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ NF4(*ctx.saved_tensors).decode(ctx.shape, grad.dtype), *[None] * 6


def hold_base(model, base_format, dtype):
    """
    Round the model's matrices to base_format and, as far as the run's dtype allows, hold them in it: 'nf4' the blocks'
    Linears, and the tables and the head in bfloat16; 'bfloat16' all. In a run in another dtype than bfloat16 what is
    rounded to bfloat16 stays in float32.
    """
    if base_format not in BASE_FORMATS:
        raise InputError(f'base_format={base_format!r} is not known: use {", ".join(BASE_FORMATS)}')
    if base_format == 'nf4':
        linears = [name for name, layer in model.named_modules()
                   if isinstance(layer, nn.Linear) and name.startswith('transformer.h.')]
        for name in linears:  # each is free to go when the next one is encoded
            model.set_submodule(name, NF4Linear(model.get_submodule(name)))
    if base_format != 'float32':
        hold_in_bfloat16(model)
        if dtype != 'bfloat16':
            model.float()


def hold_linears_in(model, dtype):
    """
    Hold the blocks' frozen Linears in the run's dtype, to which autocast would otherwise round them in every product.
    """
    for layer in layers(model):
        layer.weight.data = layer.weight.to(DTYPES[dtype])


def decode_base(model):
    """Put ordinary Linears in the place of what hold_base() has put in theirs."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear):
            model.set_submodule(name, decoded(layer))


def decoded(layer):
    if not isinstance(layer, NF4Linear):
        return layer
    linear = nn.Linear(*layer.shape[::-1], bias=False, device='meta')
    linear.weight, linear.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
    return linear


def hold_in_bfloat16(model):
    """The model's matrices and tables in half the memory; vectors stay float32."""
    for p in model.parameters():
        if p.dim() >= 2:
            p.data = p.data.bfloat16()


def hold_for_matmuls(model, dtype):
    """
    Hold the weights of Linears in the dtype (a name) of matmuls, to which autocast would round them in every step. The
    embedding table stays as it is: a head that is tied to it gets weights of its own.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            for name, p in layer.named_parameters(recurse=False):
                setattr(layer, name, nn.Parameter(p.detach().to(devices.DTYPES[dtype]), requires_grad=False))
