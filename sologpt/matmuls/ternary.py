"""
Inference with ternary weights of 2 bits.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from sologpt.machine.devices import matmul_dtype
from sologpt.matmuls.elementwise import rms_norm
from sologpt.matmuls.formats import (
    BYTE,
    TRIT,
    Encoded,
    pack,
)
from sologpt.matmuls.products import (
    int8_sums,
    scaled,
)
from sologpt.matmuls.recipe_linear import NormalisedLinear
from sologpt.matmuls.recipes import TERNARY, per


class PackedTernary(nn.Module):
    """
    A ternary Linear for inference, with weights of 2 bits: the training forward's results, exactly. It saves memory,
    not time: to unpack them takes longer than to multiply.
    """

    def __init__(self, linear):
        super().__init__()
        values, scale = TERNARY.encode(linear.weight.detach())
        self.out_features, self.in_features = values.shape
        values = F.pad(values, (0, -values.size(1) % 4))
        self.register_buffer('packed', pack(TRIT.codes(values), TRIT.bits))
        self.register_buffer('scale', scale)
        self.bias = linear.bias

    def forward(self, x):
        dtype = matmul_dtype(x)
        a = per('row', BYTE).encode(rms_norm.apply(x).to(dtype).flatten(0, -2))
        padded = F.pad(a.values, (0, -self.in_features % 4))
        total = 0
        for i in range(4):  # every fourth weight: two bits of each byte, in two's complement
            weights = ((self.packed >> 2 * i & 3) ^ 2).view(torch.int8) - 2
            total = total + int8_sums(padded[:, i::4].contiguous(), weights)
        y = scaled(total, a, Encoded(self.packed, self.scale), dtype).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(dtype)


def pack_ternary(model):
    """Put a PackedTernary in the place of every ternary Linear. Returns the bytes of (all of them, of bfloat16)."""
    packed, before = 0, 0
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, NormalisedLinear):
                    setattr(part, name, PackedTernary(layer))
                    packed += getattr(part, name).packed.numel()
                    before += 2 * layer.weight.numel()
    return packed, before
