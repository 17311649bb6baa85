"""
Formats whose blocks have scales of their own: MX and NVFP4.

A block's scale cannot stay outside a matmul, because it changes along the dimension that is summed. So the values of
an Encoded are elements times their block's scale. float32 holds them exactly, and so does bfloat16 where the digits of
element and scale are 8 or fewer together.

Sources: OCP Microscaling Formats 1.0 (MX); https://arxiv.org/abs/2506.08027 (MX scales that are rounded up);
https://arxiv.org/abs/2509.25149 (NVFP4); https://arxiv.org/abs/2502.20586 (the factor 3/4).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from sologpt.matmuls.elements import E4M3, Float
from sologpt.matmuls.formats import Encoded

Tensor = torch.Tensor


@dataclass(frozen=True)
class BlockFormat:
    """
    The elements of a block share a scale.

    block: (rows, columns). An incomplete last block of a row or column counts as if it were filled up with zeros.

    scaling: which scales there are:
      'floor'  a power of two, 2^(floor(log2 amax) - the largest exponent of the grid), as OCP has it; the largest
               elements may be cut
      'rceil'  the smallest power of two with which nothing is cut
      'e4m3'   a number of E4M3, times one float32 for the whole tensor, which stays outside (NVFP4)

    stochastic: elements are rounded up or down at random, such that their mean is x.

    prescale: x is multiplied by it before it is rounded, and the outer scale divides by it again. With 3/4 nothing is
    cut, so that stochastic rounding with 'floor' is unbiased.

    dtype: of the values that encode() returns. If significant_bits is at most 8, bfloat16 holds them exactly too, from
    2^-126 on.
    """
    element: Float
    block: tuple[int, int]
    scaling: str = 'rceil'
    stochastic: bool = False
    prescale: float = 1.0
    dtype: torch.dtype = torch.float32

    kept: ClassVar[bool] = False  # not for the backward, which needs blocks along another dimension

    @property
    def significant_bits(self) -> int:
        return self.element.significant_bits + (E4M3.significant_bits if self.scaling == 'e4m3' else 0)

    @property
    def mT(self) -> 'BlockFormat':
        return replace(self, block=self.block[::-1])

    def blocks(self, x: Tensor) -> Tensor:
        """(R, C) -> (R / rows, rows, C / columns, columns), filled up with zeros."""
        (rows, columns), (R, C) = self.block, x.shape
        if R % rows or C % columns:
            x = F.pad(x, (0, -C % columns, 0, -R % rows))
        return x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What hardware would store: elements on the grid, by blocks, their scales, and the tensor's scale or None."""
        x = self.blocks(x.float())
        amax = x.abs().amax((1, 3), keepdim=True)
        outer = None
        if self.scaling == 'e4m3':
            outer = (amax.abs().amax() / (E4M3.max * self.element.max)).clamp(min=1e-30)
            scale = E4M3.round(amax / self.element.max / outer)
            x = x * self.prescale / torch.where(scale == 0, 1.0, scale * outer)
        else:
            scale = power_of_two(amax, self.element, self.scaling)
            x = x * self.prescale / scale
        return self.element.round(x, torch.rand_like(x) if self.stochastic else None), scale, outer

    def encode(self, x: Tensor, times: Tensor | None = None) -> Encoded:
        """x * times, (R, C) in any float dtype; times: (1, C) or None."""
        x = x if times is None else x * times
        whole = x.size(0) % self.block[0] == 0 == x.size(1) % self.block[1]
        if whole and x.stride(0) == 1 != x.stride(1):  # in the order of memory: the compiler fuses more
            return self.mT.encode(x.mT).mT
        elements, scale, outer = self.split(x)
        values = (elements * scale).to(self.dtype).flatten(2, 3).flatten(0, 1)[:x.size(0), :x.size(1)]
        if self.prescale != 1:
            outer = torch.full((), 1 / self.prescale, device=x.device) * (1 if outer is None else outer)
        return Encoded(values, outer)


_TINIEST = 0x400000  # the bits of 2^-127, a subnormal in float32


def power_of_two(amax: Tensor, element: Float, scaling: str) -> Tensor:
    """
    The scales of blocks whose largest magnitudes are amax, in float32: from 2^-127 to 2^127, or NaN, as in E8M0.

    scaling: 'floor' or 'rceil'. The exponents are taken from the bits: logarithms in float32 err next to powers of two.
    """
    if scaling == 'floor':
        code = (amax.view(torch.int32) >> 23) - element.max_exponent
    else:
        # the bits of two float32s differ by k << 23 where their quotient is 2^k, and by more where it is larger
        largest = (element.max_exponent + 127 << 23) + int((element.max / 2 ** element.max_exponent - 1) * 2 ** 23)
        code = ((amax.view(torch.int32) - largest + 0x7FFFFF) >> 23) + 127
    code = code.clamp(0, 254)
    scale = torch.where(code == 0, _TINIEST, code << 23).view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)


def e8m0(scale: Tensor) -> Tensor:
    """The uint8 codes of powers of two: the exponent + 127, and 255 for NaN."""
    bits = scale.contiguous().view(torch.int32)
    return torch.where(scale.isnan(), 255, bits >> 23).to(torch.uint8)
