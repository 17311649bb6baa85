"""
How an optimizer keeps its moments from one step to the next.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sologpt.matmuls.formats import E4M3


class Moments:
    """How an optimizer keeps its moments from one step to the next: in float32, beside the weights."""
    copied = False  # whether what is read is a copy

    def new(self, p):
        """Zeros, kept, for a parameter."""
        return torch.zeros_like(p, dtype=torch.float32)

    def read(self, kept, p):
        return kept

    def write(self, kept, value):
        pass  # it is the tensor that was read, and is updated in place


class MomentsOnCPU(Moments):
    """In the CPU's memory, from and to which they are copied in each step."""
    copied = True

    def new(self, p):
        return torch.zeros(p.shape, dtype=torch.float32, device='cpu', pin_memory=p.device.type == 'cuda')

    def read(self, kept, p):
        return kept.to(p.device, non_blocking=True, copy=True)

    def write(self, kept, value):
        kept.copy_(value, non_blocking=True)


@dataclass(frozen=True)
class MomentsIn8Bits(Moments):
    """
    In E4M3, with a float32 scale for each block of 256 (8-bit optimizers: https://arxiv.org/abs/2110.02861), rounded
    stochastically, so that a mean can follow small changes. Kept as bytes: the elements, then the scales.
    """
    power: int  # a second moment is kept as its root, which spans half of the exponents
    block = 256
    copied = True

    def new(self, p):
        blocks = -(-p.numel() // self.block)
        return torch.zeros(blocks * (self.block + 4), dtype=torch.uint8, device=p.device)

    def _parts(self, kept):
        elements = kept.numel() // (self.block + 4) * self.block
        return kept[:elements].view(E4M3.dtype).view(-1, self.block), kept[elements:].view(torch.float32)[:, None]

    def read(self, kept, p):
        elements, scales = self._parts(kept)
        x = elements.float() * scales
        return (x.square_() if self.power == 2 else x).flatten()[:p.numel()].view(p.shape)

    def write(self, kept, value):
        elements, scales = self._parts(kept)
        x = value.sqrt() if self.power == 2 else value
        x = F.pad(x.flatten(), (0, elements.numel() - x.numel())).view_as(elements)
        scales.copy_(x.abs().amax(1, keepdim=True).clamp(min=1e-30) / E4M3.max)
        x = E4M3.round(x / scales, torch.rand_like(x))
        if self.power == 2:  # an update is divided by it
            x = x.clamp(min=2.0 ** (E4M3.min_exponent - E4M3.mantissa))
        elements.copy_(x)


MOMENTS = {  # train.py's optimizer_state -> how first and second moments are kept
    'float32': (Moments(), Moments()), '8bit': (MomentsIn8Bits(1), MomentsIn8Bits(2)),
    'cpu': (MomentsOnCPU(), MomentsOnCPU())}
