"""
Elements: the grids of numbers that a value may be rounded to, their codes, and how codes are packed into bytes.

A grid is a Float (sign, exponent and mantissa bits) or an Int. Both round to the nearest number, and to the even one
of two that are equally near; with noise they round stochastically. Values stay in float32, where every number of every
grid is exact; codes() gives the bits that hardware would store. Infinities and NaN have no codes here: who shares a
scale with them becomes NaN (see formats.py).

Sources: OCP Microscaling Formats 1.0 for E4M3, E5M2, E3M2, E2M3 and E2M1; https://arxiv.org/abs/2402.17764 for ternary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Float:
    """Floating-point numbers: a sign bit, `exponent` bits and `mantissa` bits, with subnormals, up to `max`."""
    exponent: int
    mantissa: int
    max: float
    dtype: torch.dtype | None = None  # torch's own, if it has one

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def significant_bits(self) -> int:
        """How many binary digits the numbers have, from the first 1 to the last."""
        return 1 + self.mantissa

    @property
    def max_exponent(self) -> int:
        """The exponent of the largest number."""
        return math.floor(math.log2(self.max))

    @property
    def min_exponent(self) -> int:
        """The exponent of the smallest normal number."""
        return 2 - 2 ** (self.exponent - 1)

    def round(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """
        float32 x to the nearest number of the grid, and to the largest where x is beyond it.

        noise: of x's shape, uniform in [0, 1). With it x goes to one of its two neighbours, such that the mean over the
        noise is x, as long as x is within the range.
        """
        # the exponent bits of a float32, alone, are the power of two at or below it
        power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
        ulp = power.clamp(min=2.0 ** self.min_exponent) * 2.0 ** -self.mantissa
        steps = x / ulp
        steps = steps.round() if noise is None else (steps + noise).floor()
        return (steps * ulp).clamp(-self.max, self.max)

    def __post_init__(self):
        # made now, because the first use may be under a mode in which tensors have no data
        object.__setattr__(self, 'grid', self._grid())

    def _grid(self) -> torch.Tensor:
        """The numbers that are not negative, in ascending order: a number's place is its code."""
        normal = [2.0 ** e * (1 + m / 2 ** self.mantissa)
                  for e in range(self.min_exponent, self.max_exponent + 1) for m in range(2 ** self.mantissa)]
        subnormal = [2.0 ** self.min_exponent * m / 2 ** self.mantissa for m in range(2 ** self.mantissa)]
        return torch.tensor([v for v in subnormal + normal if v <= self.max])

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """
        The uint8 codes of numbers of the grid, float32: the sign bit, then the place.

        Only by arithmetic on the bits of a float32, so that torch.compile makes it a part of a larger kernel on every
        GPU; a cast to an 8-bit float needs a recent one.
        """
        bits, size = values.view(torch.int32), values.abs()
        normal = ((bits & 0x7FFFFFFF) >> (23 - self.mantissa)) - ((126 + self.min_exponent) << self.mantissa)
        subnormal = (size * 2.0 ** (self.mantissa - self.min_exponent)).int()
        place = torch.where(size < 2.0 ** self.min_exponent, subnormal, normal)
        return (place + ((bits < 0).int() << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The float32 numbers of these codes."""
        codes = codes.int()
        place = codes & (2 ** (self.bits - 1) - 1)
        normal = ((place << (23 - self.mantissa)) + ((126 + self.min_exponent) << 23)).view(torch.float32)
        subnormal = place * 2.0 ** (self.min_exponent - self.mantissa)
        size = torch.where(place < 2 ** self.mantissa, subnormal, normal)
        return torch.where(codes > place, -size, size)


@dataclass(frozen=True)
class Int:
    """The integers from -max to max, in `bits` bits."""
    max: int
    bits: int

    @property
    def significant_bits(self) -> int:
        """How many binary digits the numbers have, from the first 1 to the last."""
        return self.max.bit_length()

    def round(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """float32 x to the nearest integer in the range; with noise in [0, 1) stochastically."""
        return (x.round() if noise is None else (x + noise).floor()).clamp(-self.max, self.max)

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """The uint8 codes: two's complement in that many bits."""
        return (values.to(torch.int32) & (2 ** self.bits - 1)).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The float32 integers of these codes."""
        codes, half = codes.int(), 2 ** (self.bits - 1)
        return ((codes ^ half) - half).float()


E4M3 = Float(4, 3, 448.0, torch.float8_e4m3fn)
E5M2 = Float(5, 2, 57344.0, torch.float8_e5m2)
E3M2 = Float(3, 2, 28.0)
E2M3 = Float(2, 3, 7.5)
E2M1 = Float(2, 1, 6.0)
BYTE = Int(127, 8)
TRIT = Int(1, 2)


# torch.compile may draw in the backward again what a forward has drawn, if it follows from no input: the gradients are
# then those of other numbers. So this operation takes an input, and is one that the compiler does not know.
@torch.library.custom_op('sologpt::draw', mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Random float32 numbers in [0, 1), of that shape, on the device of `like`."""
    return torch.rand(shape, device=like.device)


@draw.register_fake
def _(like, shape):
    return like.new_empty(shape, dtype=torch.float32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes of 2, 4, 6 or 8 bits, (..., n) -> bytes, (..., n * bits / 8). The first code is in the low bits."""
    size = math.lcm(bits, 8)
    groups = codes.unflatten(-1, (-1, size // bits)).int()
    word = sum(groups[..., i] << (bits * i) for i in range(size // bits))
    return torch.stack([word >> (8 * j) & 255 for j in range(size // 8)], dim=-1).flatten(-2).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of pack(): bytes, (..., n * bits / 8) -> uint8 codes, (..., n)."""
    size = math.lcm(bits, 8)
    groups = packed.unflatten(-1, (-1, size // 8)).int()
    word = sum(groups[..., j] << (8 * j) for j in range(size // 8))
    codes = [word >> (bits * i) & (2 ** bits - 1) for i in range(size // bits)]
    return torch.stack(codes, dim=-1).flatten(-2).to(torch.uint8)


def to_bfloat16_stochastically(x: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16, up or down, such that the mean is x: 16 random bits are added, then 16 bits are cut off."""
    rounded = random_16_bits(x).add_(x.view(torch.int32)).bitwise_and_(-65536).view(torch.float32)
    # an infinity stays what it is, but a NaN may be a number then
    return torch.where(x == x, rounded, x).to(torch.bfloat16)


def random_16_bits(like: torch.Tensor) -> torch.Tensor:
    """Random numbers from 0 to 65535, int32, of the shape of `like`."""
    if like.device.type == 'cpu' and not torch.compiler.is_compiling():  # which draws 64 bits in the time of 16
        drawn = torch.empty(math.ceil(like.numel() / 4), dtype=torch.int64).random_(-2 ** 63, None)
        return drawn.view(torch.uint16)[:like.numel()].view(like.shape).to(torch.int32)
    return torch.randint(0, 1 << 16, like.shape, dtype=torch.int32, device=like.device)
