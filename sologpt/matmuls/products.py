"""
Products: what multiplies a[M, K] by b[N, K]^T once formats.py has encoded them. Each takes (a, b, the dtype to multiply
in, the dtype of the result). Also here: products that skip dropped blocks, products by bit operations, and, as
diagnostics, sums in fewer bits and from more numbers.
"""

import itertools

import torch
import torch.nn.functional as F

from sologpt.matmuls.formats import piece_buffer, row_pieces


def plain_product(a, b, work, out):
    """By an ordinary matmul; in float32 it is what hardware for the format would compute."""
    return scaled(a.values.to(work) @ b.values.to(work).mT, a, b, out)


def int8_product(a, b, work, out):
    """int8 by int8, summed in int32."""
    return scaled(int8_sums(a.values, b.values), a, b, out)


def int8_sums(x, w):
    """x w^T of int8 (M, K) and (N, K), in int32."""
    (M, K), N = x.shape, w.size(0)
    if x.device.type == 'cuda':  # takes 17 rows or more, and multiples of 8, along K
        if M < 17 or K % 8 or N % 8:
            x, w = F.pad(x, (0, -K % 8, 0, max(0, 17 - M))), F.pad(w, (0, -K % 8, 0, -N % 8))
        x, w = x.contiguous(), w.contiguous()
    return torch._int_mm(x, w.mT)[:M, :N]


def fp8_product(a, b, work, out, fast=False):
    """float8 by float8 on hardware that has it. fast: sums at less than float32's precision, on Hopper."""
    by_row = a.scale.dim() == 2
    scales = (a.scale.contiguous(), b.scale.mT.contiguous()) if by_row else (a.scale, b.scale)
    y = torch._scaled_mm(a.values.contiguous(), b.values.contiguous().mT, *scales,
                         out_dtype=torch.bfloat16 if by_row else out, use_fast_accum=fast)
    return cast(y, out)


def cast(y, dtype):
    """An autograd.Function that ends in a `to` without effect has wrong gradients when torch 2.11 compiles it."""
    return y if y.dtype == dtype else y.to(dtype)


def scaled(y, a, b, out):
    """y, (M, N), times the scales that a and b have left outside, in dtype `out`."""
    scales = [scale for scale in (a.scale, b.mT.scale) if scale is not None]
    if not scales:
        return cast(y, out)
    # in place where that is possible: a matmul's result is as large as memory is slow
    result = y.view(out) if out.itemsize == y.dtype.itemsize else torch.empty_like(y, dtype=out)
    buffer = piece_buffer(y)
    for rows in row_pieces(y):
        part = buffer[:rows.stop - rows.start].copy_(y[rows])
        for scale in scales:
            part.mul_(scale[rows] if scale.dim() and scale.size(0) == y.size(0) else scale)
        result[rows] = part
    return result


def strassen_product(a, b, work, out, levels=1):
    """
    By `levels` levels of Strassen's algorithm in Winograd's form: 7 products of half the size and 15 additions in place
    of 8 products. The error grows with every level.
    """
    return cast(_strassen(a.values.to(work), b.values.to(work), levels), out)


def _strassen(a, b, levels):
    """a b^T of (M, K) and (N, K)."""
    if levels == 0:
        return a @ b.mT
    M, N = a.size(0), b.size(0)
    a, b = (F.pad(t, (0, t.size(1) % 2, 0, t.size(0) % 2)) for t in (a, b))  # an odd size, made even by zeros
    (a11, a12), (a21, a22) = (half.chunk(2, dim=1) for half in a.chunk(2))
    (b11, b21), (b12, b22) = (half.chunk(2, dim=1) for half in b.chunk(2))  # of b^T: the halves of its columns, of K
    s1 = a21 + a22
    s2 = s1 - a11
    t1 = b12 - b11
    t2 = b22 - t1
    p1 = _strassen(a11, b11, levels - 1)
    u1 = p1 + _strassen(s2, t2, levels - 1)
    u2 = u1 + _strassen(a11 - a21, b22 - b12, levels - 1)
    p5 = _strassen(s1, t1, levels - 1)
    c11 = p1 + _strassen(a12, b21, levels - 1)
    c12 = u1 + p5 + _strassen(a12 - s2, b22, levels - 1)
    c21 = u2 - _strassen(a22, t2 - b21, levels - 1)
    return torch.cat([torch.cat([c11, c12], 1), torch.cat([c21, u2 + p5], 1)])[:M, :N]


# By blocks of x: what block dropout has dropped need not be multiplied.

class by_masking:
    """The matmuls of x with zeros in place of its dropped blocks: nothing is skipped."""

    @staticmethod
    def mask(t, keep, block):
        return t * keep.repeat_interleave(block, 0).repeat_interleave(block, 1)[:t.size(0), :t.size(1)]

    @classmethod
    def fwd(cls, x, w, keep, block):
        return cls.mask(x, keep, block) @ w.mT

    @classmethod
    def dgrad(cls, g, w, keep, block):
        return cls.mask(g @ w, keep, block)

    @classmethod
    def wgrad(cls, g, x, keep, block):
        return g.mT @ cls.mask(x, keep, block)


def _runs(flags, block):
    """Neighbouring blocks that are kept, together, as slices."""
    start = 0
    for kept, run in itertools.groupby(flags):
        length = len(list(run))
        if kept:
            yield slice(start * block, (start + length) * block)
        start += length


@torch.library.custom_op('sologpt::block_fwd', mutates_args=())
def _block_fwd(x: torch.Tensor, w: torch.Tensor, keep: torch.Tensor, block: int) -> torch.Tensor:
    y = x.new_zeros(x.size(0), w.size(0))
    for i, flags in enumerate(keep.tolist()):
        rows = slice(i * block, (i + 1) * block)
        for columns in _runs(flags, block):
            y[rows].addmm_(x[rows, columns], w[:, columns].mT)
    return y


@torch.library.custom_op('sologpt::block_dgrad', mutates_args=())
def _block_dgrad(g: torch.Tensor, w: torch.Tensor, keep: torch.Tensor, block: int) -> torch.Tensor:
    dx = g.new_zeros(g.size(0), w.size(1))
    for i, flags in enumerate(keep.tolist()):
        rows = slice(i * block, (i + 1) * block)
        for columns in _runs(flags, block):
            dx[rows, columns] = g[rows] @ w[:, columns]
    return dx


@torch.library.custom_op('sologpt::block_wgrad', mutates_args=())
def _block_wgrad(g: torch.Tensor, x: torch.Tensor, keep: torch.Tensor, block: int) -> torch.Tensor:
    dw = g.new_zeros(g.size(1), x.size(1))
    for i, flags in enumerate(keep.mT.tolist()):
        columns = slice(i * block, (i + 1) * block)
        for rows in _runs(flags, block):
            dw[:, columns].addmm_(g[rows].mT, x[rows, columns])
    return dw


_block_fwd.register_fake(lambda x, w, keep, block: x.new_empty(x.size(0), w.size(0)))
_block_dgrad.register_fake(lambda g, w, keep, block: g.new_empty(g.size(0), w.size(1)))
_block_wgrad.register_fake(lambda g, x, keep, block: g.new_empty(g.size(1), x.size(1)))


class by_skipping:
    """Matmuls of the kept blocks alone, in opaque operators, for how many there are is only known when they run."""
    fwd, dgrad, wgrad = _block_fwd, _block_dgrad, _block_wgrad


# Ternary weights by bit operations.

def bit_planes(w):
    """Ternary w, (N, K), as where it is 1 and where it is -1, a bit each: two of (N, K / 64) int64."""
    return _words(w == 1), _words(w == -1)


def bitplane_matmul(x, planes):
    """
    x w^T of int8 x, (M, K), and w's bit_planes, exactly, without a multiplication: each of x's 8 bits, as a plane of
    64-bit words, is and-ed with the signs of w, and the ones are counted. (M, N) in int64.
    """
    plus, minus = planes
    y = torch.zeros(x.size(0), plus.size(0), dtype=torch.int64, device=x.device)
    for bit in range(8):
        plane = _words(x >> bit & 1)[:, None]
        count = _ones(plane & plus) - _ones(plane & minus)
        y += count.sum(-1) * (-128 if bit == 7 else 2 ** bit)
    return y


def _words(bits):
    """(R, K) of zeros and ones -> (R, K / 64) int64."""
    bits = F.pad(bits.long(), (0, -bits.size(1) % 64)).unflatten(1, (-1, 64))
    return (bits << torch.arange(64, device=bits.device)).sum(-1)


def _ones(words):
    """How many bits of each int64 are set."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    return ((words + (words >> 4) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101) >> 56


# Diagnostics: what becomes of a sum in fewer bits, and how few bits give a sum in more.

def accumulated(a, b, dtype, chunk=1):
    """a b^T of (M, K) and (N, K) with an accumulator of `dtype`, which takes in the exact sums of `chunk` products."""
    total = torch.zeros(a.size(0), b.size(0), dtype=dtype, device=a.device)
    for k in range(0, a.size(1), chunk):
        total = (total.float() + a[:, k:k + chunk].float() @ b[:, k:k + chunk].float().mT).to(dtype)
    return total


def split_bfloat16(a, b, products):
    """
    float32's a b^T out of 1, 3 or 6 products of bfloat16 numbers, summed in float32: a and b are sums of a bfloat16, of
    one of what is left, and of another.
    """
    parts = []
    for t in (a, b):
        rounded = []
        for _ in range(3):
            rounded.append(t.bfloat16().float())
            t = t - rounded[-1]
        parts.append(rounded)
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)][:products]
    return sum(parts[0][i] @ parts[1][j].mT for i, j in reversed(pairs))
