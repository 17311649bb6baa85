"""
Recipes: in which number format each operand of a Linear's three matmuls is multiplied.

A Linear y = x w^T multiplies three times in a training step. With `tokens` rows:

                         a, (M, K)            b, (N, K)              sums over K
    fwd     y  = x w^T   x    (tokens, in)    w    (out, in)         in
    dgrad   dx = g w     g    (tokens, out)   w^T  (in, out)         out
    wgrad   dw = g^T x   g^T  (out, tokens)   x^T  (in, tokens)      tokens

g is the gradient of y, (tokens, out). Each of them is a b^T: both operands lie with K, the dimension that is summed,
along their rows. A format rounds an operand along K, because a scale per row, or per block of a row, is what hardware
can take out of the sum. So w is rounded along `in` for fwd and along `out` for dgrad: these are two roundings, unless
the format treats both dimensions alike (one scale for the tensor, or square blocks).

A row of RECIPES is one recipe: Recipe(fwd, dgrad, wgrad), each a Gemm(format of a, format of b). None leaves an operand
in the run's dtype. The formats:

    per('tensor' | 'row' | 'column', element)   one float32 scale for what is named (formats.py)
    mx(element)                                 a power of two for 32 elements along K (block_formats.py)
    nvfp4((rows, columns))                      E2M1 with an E4M3 scale for each block (block_formats.py)
    Sparse24()                                  2 of each 4 elements (sparse24.py)

Elements are E4M3, E5M2, E3M2, E2M3, E2M1, BYTE and TRIT (elements.py). A new number format is a row here, made of
these, or of an element or format of its own, and a test. Nothing else has to know it: where the hardware cannot
multiply it (recipe_linear.find_product), it is emulated exactly, by a matmul of the rounded operands with float32 sums.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sologpt.matmuls.block_formats import BlockFormat
from sologpt.matmuls.elements import BYTE, E2M1, E2M3, E3M2, E4M3, E5M2, TRIT, Float, Int
from sologpt.matmuls.formats import Format
from sologpt.matmuls.sparse24 import Sparse24

OperandFormat = Format | BlockFormat | Sparse24


@dataclass(frozen=True)
class Gemm:
    """The formats of a and b in a b^T; None leaves an operand in the run's dtype."""
    a: OperandFormat | None = None
    b: OperandFormat | None = None
    # both operands are first rotated at random along K, in blocks of that size, which spreads outliers
    hadamard: int = 0

    def __post_init__(self):
        assert getattr(self.a, 'shared', None) != 'column', \
            'a cannot have a scale along K: only a scale of b can be moved to the other operand'

    @property
    def moves_scale(self) -> bool:
        """Whether b has a scale along K. It cannot leave the sum: a is multiplied by it before a is rounded."""
        return getattr(self.b, 'shared', None) == 'column'


@dataclass(frozen=True)
class Recipe:
    """The formats of the three matmuls, and what else a recipe changes."""
    fwd: Gemm
    dgrad: Gemm
    wgrad: Gemm
    estimator: Callable[[torch.Tensor], torch.Tensor] | None = None  # of w: its gradient is multiplied by this
    latent: bool = False  # the model's weights are the rounded ones: sampling and export have to round too
    normalised: bool = False  # the Linear normalises its input first
    keep_last: float = 0.0  # the share of the blocks, the last ones, that stay in the run's dtype by default
    until: float = 1.0  # the share of the steps in which the recipe is followed by default


def dge(w: torch.Tensor, power: float = 5.0, most: float = 3.0) -> torch.Tensor:
    """
    The differentiable gradient estimator for weights in E2M1 with a scale per row, (out, in) -> (out, in).

    It is the derivative of a power curve that runs through the steps of the rounding, at most `most`
    (https://arxiv.org/abs/2501.17116).
    """
    w = w.float()
    u = w.abs() * (E2M1.max / w.abs().amax(-1, keepdim=True).clamp(min=1e-12))
    grid = E2M1.decode(torch.arange(8, device=w.device))  # made there: a copy would make the program wait
    above = torch.searchsorted(grid, u.contiguous(), right=True).clamp(max=len(grid) - 1)
    lo, hi = grid[above - 1], grid[above]
    return ((2 * (u - lo) / (hi - lo) - 1).abs().pow(1 / power - 1) / power).clamp(max=most)


def all_three(format: OperandFormat) -> Recipe:
    """The recipe that rounds all six operands to one format."""
    return Recipe(*[Gemm(format, format)] * 3)


def per(shared: str, element: Float | Int, **options) -> Format:
    """A format with one scale per 'tensor', 'row' or 'column'."""
    return Format(element, shared, **options)


def mx(element: Float, **options) -> BlockFormat:
    """OCP's MX format of these elements."""
    return BlockFormat(element, (1, 32), **options)


def nvfp4(block: tuple[int, int], **options) -> BlockFormat:
    """NVIDIA's 4-bit format, with blocks of (rows, columns)."""
    return BlockFormat(E2M1, block, 'e4m3', **options)


def fp8_block(rows: int, columns: int) -> BlockFormat:
    """E4M3 with a power of two per block; the blocks are DeepSeek-V3's (https://arxiv.org/abs/2412.19437)."""
    return BlockFormat(E4M3, (rows, columns))


# unbiased: stochastic, and times 3/4 so that OCP's scale cuts nothing (https://arxiv.org/abs/2502.20586)
MXFP4_UNBIASED = mx(E2M1, scaling='floor', stochastic=True, prescale=0.75)
FP4_KEEPING_OUTLIERS = per('row', E2M1, outliers=0.99)
TERNARY = per('tensor', TRIT, mean=True)
RECIPES = {
    # name: Recipe(fwd: x and w, dgrad: g and w^T, wgrad: g^T and x^T)
    'fp8': Recipe(Gemm(per('tensor', E4M3), per('tensor', E4M3)),
                  Gemm(per('tensor', E5M2), per('tensor', E4M3)),
                  Gemm(per('tensor', E5M2), per('tensor', E4M3))),
    'fp8_row': all_three(per('row', E4M3)),
    'fp8_block': Recipe(Gemm(fp8_block(1, 128), fp8_block(128, 128)),
                        Gemm(fp8_block(1, 128), fp8_block(128, 128)),
                        Gemm(fp8_block(1, 128), fp8_block(1, 128))),
    'mxfp8': all_three(mx(E4M3)),
    'mxfp6_e2m3': all_three(mx(E2M3)),
    'mxfp6_e3m2': all_three(mx(E3M2)),
    'mxfp4': Recipe(Gemm(mx(E2M1), mx(E2M1)),
                    Gemm(MXFP4_UNBIASED, MXFP4_UNBIASED, hadamard=32),
                    Gemm(MXFP4_UNBIASED, MXFP4_UNBIASED, hadamard=32)),
    'nvfp4': Recipe(Gemm(nvfp4((1, 16)), nvfp4((16, 16))),
                    Gemm(nvfp4((1, 16), stochastic=True), nvfp4((16, 16))),
                    Gemm(nvfp4((1, 16), stochastic=True), nvfp4((1, 16)), hadamard=16), keep_last=0.15),
    'fp4_dge': Recipe(Gemm(FP4_KEEPING_OUTLIERS, per('row', E2M1)),
                      Gemm(per('tensor', E5M2), per('column', E2M1)),
                      Gemm(per('tensor', E5M2), FP4_KEEPING_OUTLIERS.mT), estimator=dge),
    'int8': Recipe(Gemm(per('row', BYTE), per('row', BYTE)),
                   Gemm(per('row', BYTE), per('column', BYTE)),
                   Gemm(per('row', BYTE), per('column', BYTE))),
    'ternary': Recipe(Gemm(per('row', BYTE), TERNARY),
                      Gemm(None, TERNARY),
                      Gemm(None, per('column', BYTE)), latent=True, normalised=True),
    'sparse24': Recipe(Gemm(None, Sparse24()), Gemm(None, Sparse24()), Gemm(None, None), latent=True, until=0.7),
}
NAMES = (*RECIPES, 'strassen', 'block_dropout')  # the last two change the matmul, not the numbers
GEMMS = ('fwd', 'dgrad', 'wgrad')
