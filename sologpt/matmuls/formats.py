"""
Formats with one scale for a whole tensor, for each row, or for each column.

encode() turns an operand of a matmul into an Encoded: values on a grid of numbers (elements.py), and a scale that stays
outside the matmul. block_formats.py has the formats whose scales belong to blocks, and sparse24.py 2:4 sparsity. All of
them have the same interface, by which gemms.py uses them:

    encode(x, times=None)   x * times, (R, C), as an Encoded; times is (1, C)
    mT                      the format whose encoding of x^T is the transpose of this one's of x
    kept                    whether the encoding is worth keeping for the backward
    significant_bits        how many binary digits the Encoded's values have, at most; a bfloat16 has 8

Infinities and NaN never become numbers: their scale is NaN or infinite, and so is all that shares it.

Sources: https://arxiv.org/abs/2501.17116 (FP4 with outliers kept), https://arxiv.org/abs/2402.17764 (ternary, by the
mean).
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from sologpt.matmuls.elements import BYTE, Float, Int

Tensor = torch.Tensor


class Encoded(NamedTuple):
    """A tensor as values * scale. scale: None, of one element, (rows, 1) or (1, columns)."""
    values: Tensor
    scale: Tensor | None

    @property
    def mT(self) -> 'Encoded':
        return Encoded(self.values.mT, self.scale if self.scale is None or self.scale.dim() == 0 else self.scale.mT)

    def decode(self) -> Tensor:
        """values * scale, in float32."""
        values = self.values.float()
        return values if self.scale is None else values * self.scale


@dataclass(frozen=True)
class Format:
    """
    Elements that share a float32 scale: all of a tensor, those of a row, or those of a column.

    The scale brings the largest magnitude to the largest number of the grid. With `mean` it brings the mean magnitude
    to 1 instead, and larger ones are cut. With `outliers`, a quantile of |x|, larger magnitudes are cut before the
    scale is chosen; what was cut is added again without rounding.
    """
    element: Float | Int
    shared: str = 'tensor'  # 'tensor', 'row' or 'column'
    mean: bool = False
    outliers: float | None = None

    @property
    def kept(self) -> bool:
        """Whether to keep the encoding for the backward: if its values are bytes."""
        return self.outliers is None and (isinstance(self.element, Int) or self.element.dtype is not None)

    @property
    def significant_bits(self) -> int:
        return self.element.significant_bits if self.outliers is None else 24  # outliers are as in float32

    @property
    def mT(self) -> 'Format':
        return replace(self, shared={'row': 'column', 'column': 'row'}.get(self.shared, self.shared))

    def encode(self, x: Tensor, times: Tensor | None = None) -> Encoded:
        """x * times, (R, C) in any float dtype; times: (1, C) or None."""
        if self.shared == 'column':
            return self.mT.encode(x.mT if times is None else (x * times).mT).mT
        if self.shared == 'row' and self.element == BYTE:
            return _encode_rows_as_bytes(x, times)
        x = x.float() if times is None else x * times
        whole = x
        if self.outliers is not None:
            bound = _quantile(x.abs(), self.outliers)
            x = x.clamp(-bound, bound)
        size = self._size(x).clamp(min=1e-5 if self.mean else 1e-12)
        largest = 1 if self.mean else self.element.max
        scale = largest / size
        values = self._round(x * scale)
        if self.outliers is not None:
            values = values + (whole - x) * scale
        return Encoded(values, size / largest)

    def _size(self, x: Tensor) -> Tensor:
        """The magnitude that decides the scale."""
        if self.mean:
            return x.abs().mean()
        return x.abs().amax(-1, keepdim=True) if self.shared == 'row' else x.abs().amax()

    def _round(self, values: Tensor) -> Tensor:
        """To the grid, in bytes where there is such a dtype."""
        if isinstance(self.element, Float) and self.element.dtype:  # torch's cast rounds alike, but overflows
            return values.clamp(-self.element.max, self.element.max).to(self.element.dtype)
        values = self.element.round(values)
        return values.to(torch.int8) if isinstance(self.element, Int) else values


def is_float8(format) -> bool:
    """Whether a format encodes in torch's own 8-bit floats, with the scale outside."""
    return isinstance(format, Format) and format.kept and isinstance(format.element, Float)


def _quantile(x: Tensor, q: float) -> Tensor:
    """The value at that rank. torch.quantile takes at most 2^24 elements."""
    return x.flatten().kthvalue(max(1, math.ceil(q * x.numel()))).values


# ---- several elementwise operations on a large matrix, a few rows at a time ------------------------------------------

CACHED = 2 ** 18  # elements that fit in a CPU's cache


def row_pieces(x: Tensor) -> list[slice]:
    """
    The rows of x, (R, C), as slices.

    In eager mode on a CPU a slice is small enough to stay in the cache while several elementwise operations follow each
    other in a buffer: 1.5 times as fast at 2048 x 2048. Elsewhere there is one slice.
    """
    step = max(1, CACHED // x.size(1))
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        step = x.size(0)
    return [slice(i, min(i + step, x.size(0))) for i in range(0, x.size(0), step)]


def piece_buffer(x: Tensor) -> Tensor:
    """A float32 buffer for the largest of x's row_pieces()."""
    return torch.empty(row_pieces(x)[0].stop, x.size(1), device=x.device)


def _encode_rows_as_bytes(x: Tensor, times: Tensor | None) -> Encoded:
    """x * times, (R, C) and (1, C) or None, in int8 with a scale per row."""
    transposed = x.stride(-1) != 1
    if transposed:  # the rows in memory are the columns of x
        x, times = x.mT, None if times is None else times.mT
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    buffer = piece_buffer(x)

    def part(rows):
        y = buffer[:rows.stop - rows.start].copy_(x[rows])
        if times is not None:
            y.mul_(times[rows] if transposed else times)
        return y

    if transposed:
        size = torch.stack([part(rows).abs_().amax(0) for rows in row_pieces(x)]).amax(0).clamp_(min=1e-30)
        for rows in row_pieces(x):
            values[rows] = part(rows).mul_(127 / size).round_()
        return Encoded(values.mT, (size / 127)[:, None])
    scales = []
    for rows in row_pieces(x):
        y = part(rows)
        size = torch.maximum(y.amax(-1, keepdim=True), -y.amin(-1, keepdim=True)).clamp_(min=1e-30)
        values[rows] = y.mul_(127 / size).round_()
        scales.append(size / 127)
    return Encoded(values, torch.cat(scales))
