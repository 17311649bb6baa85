"""
Moments: how an optimizer keeps its running means from one step to the next.

Each class makes the kept tensor of a parameter, reads it as float32, and writes a new value into it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sologpt.matmuls.elements import E4M3

Tensor = torch.Tensor


class Moments:
    """Moments in float32, beside the weights."""
    copied = False  # whether read() returns a copy

    def new(self, p: Tensor) -> Tensor:
        """The kept tensor of a new parameter: zeros."""
        return torch.zeros_like(p, dtype=torch.float32)

    def read(self, kept: Tensor, p: Tensor) -> Tensor:
        """The moment of parameter p, in float32, of p's shape, on p's device."""
        return kept

    def write(self, kept: Tensor, value: Tensor) -> None:
        """Keep a new value, float32. Here it is the tensor that was read, and it has been updated in place."""


class MomentsOnCPU(Moments):
    """Moments in the CPU's memory. They are copied to the parameter's device and back in each step."""
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
    Moments in E4M3, with a float32 scale for each block of 256 (8-bit optimizers: https://arxiv.org/abs/2110.02861).

    They are rounded stochastically, so that a mean can follow small changes. The kept tensor is bytes: the elements,
    then the scales.
    """
    power: int  # 2 for a second moment, which is kept as its root: that spans half as many exponents
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
        if self.power == 2:  # never zero, because an update is divided by it
            x = x.clamp(min=2.0 ** (E4M3.min_exponent - E4M3.mantissa))
        elements.copy_(x)


MOMENTS = {  # train.py's optimizer_state -> how first and second moments are kept
    'float32': (Moments(), Moments()), '8bit': (MomentsIn8Bits(1), MomentsIn8Bits(2)),
    'cpu': (MomentsOnCPU(), MomentsOnCPU())}
