"""
Number formats: which numbers there are, who shares a scale, how a tensor is rounded to them, and how codes are packed.

A format's encode() gives an Encoded: values on the format's grid and a scale that stays outside a matmul. Scales of
blocks cannot stay outside and are part of the values, which are then exact in float32. Infinities and NaN never become
numbers: the scale they share makes everything that it scales NaN. They have no codes; a block's scale code says it.

References: OCP Microscaling Formats 1.0 (MX), https://arxiv.org/abs/2506.08027 (its scales rounded up),
https://arxiv.org/abs/2509.25149 (NVFP4), https://arxiv.org/abs/2501.17116 (FP4 with outliers kept),
https://arxiv.org/abs/2402.17764 (ternary), https://arxiv.org/abs/2305.14314 (NF4).
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Float:
    """Floating-point numbers of a sign, `exponent` bits and `mantissa` bits, with subnormals."""
    exponent: int
    mantissa: int
    max: float
    dtype: torch.dtype | None = None  # torch's own, if it has one

    @property
    def bits(self):
        return 1 + self.exponent + self.mantissa

    @property
    def max_exponent(self):
        return math.floor(math.log2(self.max))

    @property
    def min_exponent(self):
        """That of the smallest normal number."""
        return 2 - 2 ** (self.exponent - 1)

    def round(self, x, noise=None):
        """
        float32 x to the nearest number, to the even one in the middle between two, at most to the largest. With
        noise in [0, 1): to one of the two neighbours, so that the mean over the noise is x (within the range).
        """
        # a float32's exponent field, alone, is the power of two at or below it
        power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
        ulp = power.clamp(min=2.0 ** self.min_exponent) * 2.0 ** -self.mantissa
        steps = x / ulp
        steps = steps.round() if noise is None else (steps + noise).floor()
        return (steps * ulp).clamp(-self.max, self.max)

    def __post_init__(self):  # not at its first use, which may be where all tensors are without data
        object.__setattr__(self, 'grid', self._grid())

    def _grid(self):
        """The numbers that are not negative, in order: the code of a number is its place."""
        normal = [2.0 ** e * (1 + m / 2 ** self.mantissa)
                  for e in range(self.min_exponent, self.max_exponent + 1) for m in range(2 ** self.mantissa)]
        subnormal = [2.0 ** self.min_exponent * m / 2 ** self.mantissa for m in range(2 ** self.mantissa)]
        return torch.tensor([v for v in subnormal + normal if v <= self.max])

    def codes(self, values):
        """uint8 codes of numbers on the grid: the sign bit above the place."""
        place = torch.searchsorted(self.grid.to(values.device), values.abs().contiguous())
        return (place + (values.signbit() << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes):
        codes = codes.int()
        sign = 1 - 2 * (codes >> (self.bits - 1)).float()
        return sign * self.grid.to(codes.device)[codes & (2 ** (self.bits - 1) - 1)]


@dataclass(frozen=True)
class Int:
    """Integers between -max and max."""
    max: int
    bits: int

    def round(self, x, noise=None):
        return (x.round() if noise is None else (x + noise).floor()).clamp(-self.max, self.max)

    def codes(self, values):
        """uint8 codes: two's complement of that many bits."""
        return (values.to(torch.int32) & (2 ** self.bits - 1)).to(torch.uint8)

    def decode(self, codes):
        codes, half = codes.int(), 2 ** (self.bits - 1)
        return ((codes ^ half) - half).float()


E4M3 = Float(4, 3, 448.0, torch.float8_e4m3fn)
E5M2 = Float(5, 2, 57344.0, torch.float8_e5m2)
E3M2 = Float(3, 2, 28.0)
E2M3 = Float(2, 3, 7.5)
E2M1 = Float(2, 1, 6.0)
BYTE = Int(127, 8)
TRIT = Int(1, 2)


def pack(codes, bits):
    """uint8 codes of so many bits (2, 4, 6 or 8), (..., n) -> (..., n * bits / 8) bytes, the first in the low bits."""
    size = math.lcm(bits, 8)
    groups = codes.unflatten(-1, (-1, size // bits)).int()
    word = sum(groups[..., i] << (bits * i) for i in range(size // bits))
    return torch.stack([word >> (8 * j) & 255 for j in range(size // 8)], dim=-1).flatten(-2).to(torch.uint8)


def unpack(packed, bits):
    """The codes that pack() took."""
    size = math.lcm(bits, 8)
    groups = packed.unflatten(-1, (-1, size // 8)).int()
    word = sum(groups[..., j] << (8 * j) for j in range(size // 8))
    codes = [word >> (bits * i) & (2 ** bits - 1) for i in range(size // bits)]
    return torch.stack(codes, dim=-1).flatten(-2).to(torch.uint8)


class Encoded(NamedTuple):
    """values * scale is the tensor. scale: None, of one element, (rows, 1) or (1, columns)."""
    values: torch.Tensor
    scale: torch.Tensor | None

    @property
    def mT(self):
        return Encoded(self.values.mT, self.scale if self.scale is None or self.scale.dim() == 0 else self.scale.mT)

    def decode(self):
        values = self.values.float()
        return values if self.scale is None else values * self.scale


@dataclass(frozen=True)
class Format:
    """
    Elements that share a scale, a float32 that brings the largest to the largest number of the grid: all of them, those
    of a 'row' or those of a 'column'. In `mean` format the mean magnitude becomes 1 instead, and what is larger is cut.
    """
    element: Float | Int
    shared: str = 'tensor'  # 'tensor', 'row', 'column'
    mean: bool = False
    outliers: float | None = None  # if given: what is beyond this quantile of |x| is cut off, and kept as it is

    @property
    def kept(self):
        """Whether to keep an encoding for the backward: its values are bytes."""
        return self.outliers is None and (isinstance(self.element, Int) or self.element.dtype is not None)

    @property
    def mT(self):
        """The format in which the transpose of what this encodes is the transpose of its encoding."""
        return replace(self, shared={'row': 'column', 'column': 'row'}.get(self.shared, self.shared))

    def encode(self, x, times=None):
        """x * times, of which times is (1, columns) or None, of any float dtype."""
        if self.shared == 'column':
            return self.mT.encode(x.mT if times is None else (x * times).mT).mT
        if self.shared == 'row' and self.element == BYTE:
            return _encode_rows_as_bytes(x, times)
        x = x.float() if times is None else x * times
        whole = x
        if self.outliers is not None:
            bound = _quantile(x.abs(), self.outliers)
            x = x.clamp(-bound, bound)
        size = x.abs().mean() if self.mean else x.abs().amax(-1, keepdim=True) if self.shared == 'row' else _amax(x)
        size = size.clamp(min=1e-5 if self.mean else 1e-12)
        largest = 1 if self.mean else self.element.max
        scale = largest / size
        values = x * scale
        if isinstance(self.element, Float) and self.element.dtype:  # torch's cast is the same rounding; it may not cut
            values = values.clamp(-self.element.max, self.element.max).to(self.element.dtype)
        else:
            values = self.element.round(values)
            if isinstance(self.element, Int):
                values = values.to(torch.int8)
        if self.outliers is not None:
            values = values + (whole - x) * scale
        return Encoded(values, size / largest)


@dataclass(frozen=True)
class BlockFormat:
    """
    Elements of a block share a scale. `block` is (rows, columns); a row's or column's incomplete last block counts as
    whole. `scaling` is

      'floor'  a power of two, 2^(floor(log2 amax) - the largest exponent of the grid): OCP's; the largest may be cut
      'rceil'  the smallest power of two with which nothing is cut
      'e4m3'   an E4M3 number, times one float32 for the whole tensor, which stays outside (NVFP4)
    """
    element: Float
    block: tuple[int, int]
    scaling: str = 'rceil'
    stochastic: bool = False
    prescale: float = 1.0  # x is multiplied by it before it is rounded, so that nothing is cut; the scale takes it back

    kept = False  # for the backward: there the blocks lie along another dimension

    @property
    def mT(self):
        return replace(self, block=self.block[::-1])

    def blocks(self, x):
        """(R, C) -> (R / rows, rows, C / columns, columns), padded by zeros."""
        (rows, columns), (R, C) = self.block, x.shape
        if R % rows or C % columns:
            x = F.pad(x, (0, -C % columns, 0, -R % rows))
        return x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))

    def split(self, x):
        """The parts that are stored: elements on the grid and scales, by blocks, and the tensor's scale or None."""
        x = self.blocks(x.float())
        amax = x.abs().amax((1, 3), keepdim=True)
        outer = None
        if self.scaling == 'e4m3':
            outer = (_amax(amax) / (E4M3.max * self.element.max)).clamp(min=1e-30)
            scale = E4M3.round(amax / self.element.max / outer)
            x = x * self.prescale / torch.where(scale == 0, 1.0, scale * outer)
        else:
            scale = power_of_two(amax, self.element, self.scaling)
            x = x * self.prescale / scale
        return self.element.round(x, torch.rand_like(x) if self.stochastic else None), scale, outer

    def encode(self, x, times=None):
        elements, scale, outer = self.split(x if times is None else x * times)
        values = (elements * scale).flatten(2, 3).flatten(0, 1)[:x.size(0), :x.size(1)]
        if self.prescale != 1:
            outer = torch.full((), 1 / self.prescale, device=x.device) * (1 if outer is None else outer)
        return Encoded(values, outer)


TINIEST = 0x400000  # the bits of 2^-127, in float32 a subnormal


def power_of_two(amax, element, rounding):
    """
    The scale, a float32 with an exponent alone (E8M0: 2^-127 to 2^127, or NaN), of blocks with the largest magnitude
    amax. By bits, for float32 logarithms err next to powers of two.
    """
    if rounding == 'floor':
        code = (amax.view(torch.int32) >> 23) - element.max_exponent
    else:
        # the difference of two float32s' bits is k << 23 where their quotient is 2^k, and more where that is more
        largest = (element.max_exponent + 127 << 23) + int((element.max / 2 ** element.max_exponent - 1) * 2 ** 23)
        code = ((amax.view(torch.int32) - largest + 0x7FFFFF) >> 23) + 127
    code = code.clamp(0, 254)
    scale = torch.where(code == 0, TINIEST, code << 23).view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)


def e8m0(scale):
    """The uint8 code of a power of two: its exponent + 127; 255 for NaN."""
    bits = scale.contiguous().view(torch.int32)
    return torch.where(scale.isnan(), 255, bits >> 23).to(torch.uint8)


def _patterns24():
    """The 90 matrices of 4 x 4 zeros and ones with two ones in every row and column, as (90, 16)."""
    rows = [row for row in itertools.product((0.0, 1.0), repeat=4) if sum(row) == 2]
    return torch.tensor([sum(choice, ()) for choice in itertools.product(rows, repeat=4)
                         if all(sum(column) == 2 for column in zip(*choice, strict=True))])


PATTERNS24 = _patterns24()


@dataclass(frozen=True)
class Sparse24:
    """
    Of each 4 x 4 block the 8 elements, 2 in every row and 2 in every column, whose magnitudes sum to most; so the
    transpose is sparse in the same way (https://arxiv.org/abs/2102.08124). Elements are as they were.
    """

    kept = True  # to encode it again takes longer

    @property
    def mT(self):
        return self

    def encode(self, x, times=None):
        x = x if times is None else x * times
        return Encoded(x * self.mask(x), None)

    def mask(self, x):
        """(R, C) -> bool; incomplete blocks at the end of rows and columns count as whole."""
        (R, C), patterns = x.shape, PATTERNS24.to(x.device)
        size = F.pad(x.detach().abs().float(), (0, -C % 4, 0, -R % 4))
        blocks = size.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).permute(1, 3, 0, 2).flatten(2).flatten(0, 1)
        best = (patterns @ blocks).max(0).indices  # of (90, blocks); argmax is slower
        mask = patterns.bool()[best].view(*(n // 4 for n in size.shape), 4, 4)
        return mask.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:R, :C]


# NormalFloat of 4 bits: the quantiles of a normal distribution, from -1 to 1, with a zero (QLoRA, appendix E)
NF4_GRID = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
NF4_BLOCK, NF4_GROUP = 64, 256  # weights that share a largest magnitude, magnitudes that share a scale


class NF4(NamedTuple):
    """
    A tensor in NF4 with double quantisation, 4.13 bits per element: the nearest number of NF4_GRID, times the largest
    magnitude of 64 elements, which is itself an 8-bit integer about the mean of all, times a scale per 256.
    """
    packed: torch.Tensor  # uint8, two codes a byte
    sizes: torch.Tensor  # int8
    scales: torch.Tensor  # float32
    mean: torch.Tensor  # float32
    grid: torch.Tensor  # NF4_GRID, on the same device

    @classmethod
    def encode(cls, x):
        """x: a tensor whose last element may stand in an incomplete block."""
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

    def decode(self, shape, dtype=torch.float32):
        pairs = torch.stack([self.grid.repeat(16), self.grid.repeat_interleave(16)], dim=1)  # of each byte
        padded = F.pad(self.sizes.float(), (0, -len(self.sizes) % NF4_GROUP)).view(-1, NF4_GROUP)
        size = (padded * self.scales[:, None] + self.mean).flatten()[:len(self.sizes)]
        values = F.embedding(self.packed.int(), pairs).view(-1, NF4_BLOCK) * size[:, None]
        return values.flatten()[:math.prod(shape)].view(shape).to(dtype)


def to_bfloat16_stochastically(x):
    """float32 -> bfloat16, up or down with the probability that makes the mean x: by 16 random bits and a cut."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    rounded = ((x.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _amax(x):
    return x.abs().amax()


def _quantile(x, q):
    """torch.quantile, without its limit of 2^24 elements: the value at that rank."""
    return x.flatten().kthvalue(max(1, math.ceil(q * x.numel()))).values


CACHED = 2 ** 18  # elements


def row_pieces(x):
    """
    The rows of x, (R, C), as slices: in eager mode on a CPU of so few rows that several elementwise operations on them,
    one after the other in a buffer, find them in the cache (1.5 times as fast at 2048 x 2048); elsewhere one slice.
    """
    step = max(1, CACHED // x.size(1))
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        step = x.size(0)
    return [slice(i, min(i + step, x.size(0))) for i in range(0, x.size(0), step)]


def piece_buffer(x):
    """A float32 buffer for the largest of x's row_pieces."""
    return torch.empty(row_pieces(x)[0].stop, x.size(1), device=x.device)


def _encode_rows_as_bytes(x, times):
    """x * times, (R, C) and (1, C) or None, in int8 with a scale per row."""
    transposed = x.stride(-1) != 1
    if transposed:  # the rows in memory are columns of x
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
