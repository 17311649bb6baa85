"""
NF4, the 4-bit format of QLoRA's frozen weights (https://arxiv.org/abs/2305.14314), and a Linear that holds them.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from sologpt.machine.devices import matmul_dtype
from sologpt.matmuls.elements import pack

Tensor = torch.Tensor

# the quantiles of a normal distribution, from -1 to 1, with a zero (QLoRA, appendix E)
NF4_GRID = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
NF4_BLOCK = 64  # weights that share a largest magnitude
NF4_GROUP = 256  # largest magnitudes that share a scale


class NF4(NamedTuple):
    """
    A tensor in NF4 with double quantisation: 4.13 bits per element.

    An element is the nearest number of NF4_GRID times the largest magnitude in its block of 64. That magnitude is
    quantised too: an 8-bit integer times a scale per 256 blocks, plus the mean of all magnitudes.
    """
    packed: Tensor  # uint8, two codes in a byte
    sizes: Tensor  # int8, the quantised magnitudes
    scales: Tensor  # float32
    mean: Tensor  # float32
    grid: Tensor  # NF4_GRID on the same device

    @classmethod
    def encode(cls, x: Tensor) -> 'NF4':
        """x: of any shape; the last block may be incomplete."""
        x = x.detach().float().flatten()
        blocks = F.pad(x, (0, -len(x) % NF4_BLOCK)).view(-1, NF4_BLOCK)
        size = blocks.abs().amax(-1)
        grid = NF4_GRID.to(x.device, copy=True)
        middles = (grid[1:] + grid[:-1]) / 2
        codes = torch.bucketize(blocks / size.clamp(min=1e-30)[:, None], middles, out_int32=True)
        mean = size.mean()
        groups = F.pad(size - mean, (0, -len(size) % NF4_GROUP)).view(-1, NF4_GROUP)
        scales = groups.abs().amax(-1).clamp(min=1e-30) / 127
        sizes = (groups / scales[:, None]).round().to(torch.int8).flatten()[:len(size)]
        return cls(pack(codes.flatten(), 4), sizes, scales, mean, grid)

    def decode(self, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor, of that shape."""
        pairs = torch.stack([self.grid.repeat(16), self.grid.repeat_interleave(16)], dim=1)  # the two of each byte
        padded = F.pad(self.sizes.float(), (0, -len(self.sizes) % NF4_GROUP)).view(-1, NF4_GROUP)
        size = (padded * self.scales[:, None] + self.mean).flatten()[:len(self.sizes)]
        values = F.embedding(self.packed.int(), pairs).view(-1, NF4_BLOCK) * size[:, None]
        return values.flatten()[:math.prod(shape)].view(shape).to(dtype)


class NF4Linear(nn.Module):
    """A frozen Linear that holds its weight in NF4 and decodes it for every matmul."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        for name, tensor in NF4.encode(linear.weight)._asdict().items():
            self.register_buffer(name, tensor)

    @property
    def encoded(self) -> NF4:
        return NF4(*(getattr(self, name) for name in NF4._fields))

    @property
    def weight(self) -> Tensor:
        """Decoded, in float32."""
        return self.encoded.decode(self.shape)

    def flops_per_token(self) -> int:
        """FLOPs of the forward and of dgrad; a frozen weight has no wgrad."""
        return 4 * self.shape.numel()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        dtype = matmul_dtype(x)
        y = NF4Matmul.apply(x.to(dtype), self.shape, *self.encoded)
        return y if self.bias is None else y + self.bias.to(dtype)


def decoded_linear(layer: nn.Module) -> nn.Module:
    """An NF4Linear as an ordinary Linear, frozen, with the decoded weight. Any other layer is returned as it is."""
    if not isinstance(layer, NF4Linear):
        return layer
    linear = nn.Linear(*layer.shape[::-1], bias=False, device='meta')
    linear.weight, linear.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
    return linear


class NF4Matmul(torch.autograd.Function):
    """x, (..., in), times w^T, (in, out). The backward decodes w again, so that it is not kept decoded until then."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: torch.Size, *encoded: Tensor) -> Tensor:
        ctx.save_for_backward(*encoded)
        ctx.shape = shape
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, NF4(*encoded).decode(shape, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ NF4(*ctx.saved_tensors).decode(ctx.shape, grad.dtype), *[None] * 6
