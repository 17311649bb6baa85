"""
Inference with ternary weights: packed in 2 bits, or as bit planes.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from sologpt.machine.devices import matmul_dtype
from sologpt.matmuls.elements import BYTE, TRIT, pack
from sologpt.matmuls.elementwise import rms_norm
from sologpt.matmuls.formats import Encoded
from sologpt.matmuls.products import int8_sums, scaled
from sologpt.matmuls.recipe_linear import RecipeLinear
from sologpt.matmuls.recipes import TERNARY, per


class PackedTernary(nn.Module):
    """
    A Linear with ternary weights of 2 bits. Its results are exactly those of the forward in training.

    It saves memory, not time: unpacking the weights takes longer than multiplying them.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        values, scale = TERNARY.encode(linear.weight.detach())
        self.out_features, self.in_features = values.shape
        values = F.pad(values, (0, -values.size(1) % 4))
        self.register_buffer('packed', pack(TRIT.codes(values), TRIT.bits))  # (out, in / 4)
        self.register_buffer('scale', scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)."""
        dtype = matmul_dtype(x)
        a = per('row', BYTE).encode(rms_norm.apply(x).to(dtype).flatten(0, -2))
        padded = F.pad(a.values, (0, -self.in_features % 4))
        total = 0
        for i in range(4):  # each fourth weight: two bits of each byte, in two's complement
            weights = ((self.packed >> 2 * i & 3) ^ 2).view(torch.int8) - 2
            total = total + int8_sums(padded[:, i::4].contiguous(), weights)
        y = scaled(total, a, Encoded(self.packed, self.scale), dtype).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(dtype)


def pack_ternary(model: nn.Module) -> tuple[int, int]:
    """
    Replace each RecipeLinear of a model, converted by 'ternary', by a PackedTernary.

    Returns the bytes of the packed weights, and the bytes that they would take in bfloat16.
    """
    packed, before = 0, 0
    for name, layer in list(model.named_modules()):
        if isinstance(layer, RecipeLinear):
            replacement = PackedTernary(layer)
            model.set_submodule(name, replacement)
            packed += replacement.packed.numel()
            before += 2 * layer.weight.numel()
    return packed, before


# ---- bit planes: a matmul without multiplications --------------------------------------------------------------------
# An int8 is the sum of its 8 bits times powers of two, and a ternary weight is one bit minus another. So the product of
# two vectors is a sum of counts: how often a bit of x meets a 1 of w, less how often it meets a -1, times a power of
# two. 64 elements of K share an int64.

def bit_planes(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ternary w, (N, K) -> two of (N, K / 64) int64: a bit for each 1, and a bit for each -1."""
    return _words(w == 1), _words(w == -1)


def bitplane_matmul(x: torch.Tensor, planes: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x w^T of int8 x, (M, K), and the bit_planes() of w, (N, K): exact, (M, N) in int64."""
    plus, minus = planes
    y = torch.zeros(x.size(0), plus.size(0), dtype=torch.int64, device=x.device)
    for bit in range(8):
        plane = _words(x >> bit & 1)[:, None]
        count = _ones(plane & plus) - _ones(plane & minus)
        y += count.sum(-1) * (-128 if bit == 7 else 2 ** bit)  # two's complement: the highest bit counts negatively
    return y


def _words(bits: torch.Tensor) -> torch.Tensor:
    """(R, K) of zeros and ones -> (R, K / 64) int64."""
    bits = F.pad(bits.long(), (0, -bits.size(1) % 64)).unflatten(1, (-1, 64))
    return (bits << torch.arange(64, device=bits.device)).sum(-1)


def _ones(words: torch.Tensor) -> torch.Tensor:
    """How many bits of each int64 are set."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    return ((words + (words >> 4) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101) >> 56
