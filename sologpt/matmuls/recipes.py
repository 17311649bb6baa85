"""
Linear layers whose three matmuls follow a recipe.

Each of the three multiplies a[M, K] by b[N, K]^T and rounds its operands along K, the dimension that is summed:

  fwd     y  = x w^T          x: (tokens, in), w: (out, in)
  dgrad   dx = g w            a = g: (tokens, out), b = w^T
  wgrad   dw = g^T x          a = g^T, b = x^T

A recipe names the format of either operand of each (RECIPES); formats.py says what a format does. A new recipe is a
row in the table. The weights stay parameters of an nn.Linear: convert() only changes the layers' class.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sologpt.matmuls.formats import (
    BYTE,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    TRIT,
    BlockFormat,
    Format,
    Sparse24,
)


@dataclass(frozen=True)
class Gemm:
    """The formats of a and b; None leaves an operand as it is, in the run's dtype."""
    a: object = None
    b: object = None
    hadamard: int = 0  # K is turned by a random rotation, block by block of that size, which spreads outliers

    def __post_init__(self):
        assert getattr(self.a, 'shared', None) != 'column', 'a scale of a along K has nowhere to go; b may have one'


@dataclass(frozen=True)
class Recipe:
    fwd: Gemm
    dgrad: Gemm
    wgrad: Gemm
    estimator: Callable | None = None  # of w: what the weights' gradient is multiplied by, element by element
    latent: bool = False  # the model's weights are what `fwd` makes of the parameters: sampling has to do it too
    normalised: bool = False  # the Linear's input is normalised first
    keep_last: float = 0.0  # the share of the last blocks that stays in the run's dtype
    until: float = 1.0  # the share of the run in which it holds


def dge(w, power=5.0, most=3.0):
    """
    The differentiable gradient estimator of FP4 weights with a scale per row (https://arxiv.org/abs/2501.17116): the
    derivative of a power curve through the steps of the rounding, at most 3.
    """
    w = w.float()
    u = w.abs() * (E2M1.max / w.abs().amax(-1, keepdim=True).clamp(min=1e-12))
    grid = E2M1.grid.to(w.device)
    above = torch.searchsorted(grid, u.contiguous(), right=True).clamp(max=len(grid) - 1)
    lo, hi = grid[above - 1], grid[above]
    return ((2 * (u - lo) / (hi - lo) - 1).abs().pow(1 / power - 1) / power).clamp(max=most)


def all_three(format):
    """A recipe that rounds every operand alike, along the dimension that is summed."""
    return Recipe(*[Gemm(format, format)] * 3)


def per(shared, element, **options):
    return Format(element, shared, **options)


def mx(element, **options):
    return BlockFormat(element, (1, 32), **options)


def nvfp4(block, **options):
    return BlockFormat(E2M1, block, 'e4m3', **options)


def fp8_block(rows, columns):
    return BlockFormat(E4M3, (rows, columns))


# unbiased: stochastic, and multiplied by 3/4 so that OCP's scale cuts nothing (https://arxiv.org/abs/2502.20586)
MXFP4_UNBIASED = mx(E2M1, scaling='floor', stochastic=True, prescale=0.75)
FP4_KEEPING_OUTLIERS = per('row', E2M1, outliers=0.99)
TERNARY = per('tensor', TRIT, mean=True)
RECIPES = {
    # the operands of y = x w^T, of dx = g w, of dw = g^T x
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
NAMES = (*RECIPES, 'strassen', 'block_dropout')
GEMMS = ('fwd', 'dgrad', 'wgrad')
