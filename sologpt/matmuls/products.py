"""
Products: how a[M, K] times b[N, K]^T is computed once both operands are encoded.

Each product is called as product(a, b, work, out):

    a     Encoded, (M, K), with a scale of None, one element or (M, 1)
    b     Encoded, (N, K), with a scale of None, one element or (N, 1)
    work  the dtype to multiply in, where the product has a choice
    out   the dtype of the result, (M, N)

The scales are applied to the result, because K, the dimension that is summed, is not among theirs.
"""

import torch
import torch.nn.functional as F

from sologpt.matmuls.formats import Encoded, piece_buffer, row_pieces

Tensor = torch.Tensor


def plain_product(a: Encoded, b: Encoded, work: torch.dtype, out: torch.dtype) -> Tensor:
    """By an ordinary matmul. In float32 it gives what hardware for the format would give."""
    return scaled(a.values.to(work) @ b.values.to(work).mT, a, b, out)


def bfloat16_product(a: Encoded, b: Encoded, work: torch.dtype, out: torch.dtype) -> Tensor:
    """
    By a bfloat16 matmul with float32 sums, on an NVIDIA GPU, of values that bfloat16 holds exactly.

    The product of two bfloat16s is exact in float32. So this multiplies the same numbers as plain_product(), at twice
    the rate of TF32. The sums leave the matmul in float32: with a result in bfloat16, a kernel that splits the sum may
    add its parts in bfloat16.
    """
    y = torch.mm(a.values.to(torch.bfloat16), b.values.to(torch.bfloat16).mT, out_dtype=torch.float32)
    return scaled(y, a, b, out)


def int8_product(a: Encoded, b: Encoded, work: torch.dtype, out: torch.dtype) -> Tensor:
    """int8 by int8, summed in int32."""
    return scaled(int8_sums(a.values, b.values), a, b, out)


def int8_sums(x: Tensor, w: Tensor) -> Tensor:
    """x w^T of int8 (M, K) and (N, K), in int32."""
    return int8_sums_on_gpu(x, w) if x.device.type == 'cuda' else torch._int_mm(x, w.mT)


def int8_sums_on_gpu(x: Tensor, w: Tensor) -> Tensor:
    """x w^T of int8 (M, K) and (N, K), in int32, by cuBLASLt. It multiplies row-major by column-major matrices."""
    (M, K), N = x.shape, w.size(0)
    if M < 17 or K % 8 or N % 8:  # torch asks for at least 17 rows, and multiples of 8 for K and N
        x, w = F.pad(x, (0, -K % 8, 0, max(0, 17 - M))), F.pad(w, (0, -K % 8, 0, -N % 8))
    return int8_mm(x.contiguous(), w.contiguous().mT)[:M, :N]


# torch.compile may give torch._int_mm operands in another order of memory: it takes contiguous() as a hint.
@torch.library.custom_op('sologpt::int8_mm', mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """a b of int8 (M, K) and (K, N), in int32. Compiled, both keep the strides that they have here."""
    return torch._int_mm(a, b)


@int8_mm.register_fake
def _(a, b):
    return a.new_empty(a.size(0), b.size(1), dtype=torch.int32)


def fp8_product(a: Encoded, b: Encoded, work: torch.dtype, out: torch.dtype, fast: bool = False) -> Tensor:
    """
    float8 by float8, on hardware that has it. fast: on Hopper, sums in about 14 bits instead of float32's 24.
    """
    by_row = a.scale.dim() == 2
    scales = (a.scale.contiguous(), b.scale.mT.contiguous()) if by_row else (a.scale, b.scale)
    # a: (M, K) in row-major order; b^T: (K, N) in column-major order, as tensor cores read it
    y = torch._scaled_mm(a.values.contiguous(), b.values.contiguous().mT, *scales,
                         out_dtype=torch.bfloat16 if by_row else out, use_fast_accum=fast)
    return cast(y, out)


def cast(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y in dtype."""
    # compiled by torch 2.11, an autograd.Function that ends in a `to` without effect has wrong gradients
    return y if y.dtype == dtype else y.to(dtype)


def scaled(y: Tensor, a: Encoded, b: Encoded, out: torch.dtype) -> Tensor:
    """y, (M, N), times the scales of a and b, in dtype `out`. May overwrite y."""
    scales = [scale for scale in (a.scale, b.mT.scale) if scale is not None]
    if not scales:
        return cast(y, out)
    # in place where the sizes are the same: a result is as large as memory is slow
    result = y.view(out) if out.itemsize == y.dtype.itemsize else torch.empty_like(y, dtype=out)
    buffer = piece_buffer(y)
    for rows in row_pieces(y):
        part = buffer[:rows.stop - rows.start].copy_(y[rows])
        for scale in scales:
            part.mul_(scale[rows] if scale.dim() and scale.size(0) == y.size(0) else scale)
        result[rows] = part
    return result


def strassen_product(a: Encoded, b: Encoded, work: torch.dtype, out: torch.dtype, levels: int = 1) -> Tensor:
    """
    By `levels` levels of Strassen's algorithm, in Winograd's form: 7 products of half the size and 15 additions instead
    of 8 products. Each level adds to the error.
    """
    return cast(_strassen(a.values.to(work), b.values.to(work), levels), out)


def _strassen(a: Tensor, b: Tensor, levels: int) -> Tensor:
    """a b^T of (M, K) and (N, K)."""
    if levels == 0:
        return a @ b.mT
    M, N = a.size(0), b.size(0)
    a, b = (F.pad(t, (0, t.size(1) % 2, 0, t.size(0) % 2)) for t in (a, b))  # zeros make odd sizes even
    (a11, a12), (a21, a22) = (half.chunk(2, dim=1) for half in a.chunk(2))
    (b11, b21), (b12, b22) = (half.chunk(2, dim=1) for half in b.chunk(2))  # b^T's blocks: halves of N, then of K
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
