"""
The three matmuls of a Linear by a recipe, with their backward.
"""

import functools
import math

import torch
import torch.nn.functional as F

from sologpt.matmuls.formats import (
    Encoded,
    Format,
)
from sologpt.matmuls.products import (
    cast,
)


def recipe_matmul(recipe, products):
    """
    The autograd.Function of x, (tokens, in), and w, (out, in), whose matmuls follow the recipe by these three products.
    An operand's encoding serves the backward too where its transpose is what is asked for there.
    """
    fwd, dgrad, wgrad = recipe.fwd, recipe.dgrad, recipe.wgrad
    keep_x = fwd.a is not None and fwd.a.kept and wgrad.b == fwd.a.mT and not (fwd.hadamard or wgrad.hadamard)
    keep_w = fwd.b is not None and fwd.b.kept and dgrad.b == fwd.b.mT and not (fwd.hadamard or dgrad.hadamard)
    keep_x = keep_x and getattr(fwd.b, 'shared', None) != 'column'  # whose scale x would have to take over
    turns = max(rule.hadamard for rule in (fwd, dgrad, wgrad))

    class RecipeMatmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            with torch.autocast(x.device.type, enabled=False):
                a = fwd.a.encode(x) if keep_x else Encoded(x, None)
                b = fwd.b.encode(w) if keep_w else Encoded(w, None)
                # drawn here and kept: torch.compile may draw anew what is drawn in the backward, for either operand
                signs = torch.randint(0, 2, (turns, 1), device=x.device) * 2.0 - 1 if turns else None
                ctx.save_for_backward(*a, *b, signs, w if recipe.estimator else None)
                ctx.dtypes = x.dtype, w.dtype
                return gemm(fwd, products[0], a if keep_x else x, b if keep_w else w, x.dtype, signs=signs)

        @staticmethod
        def backward(ctx, g):
            x, x_scale, w, w_scale, signs, weight = ctx.saved_tensors
            x_dtype, w_dtype = ctx.dtypes
            dx = dw = None
            with torch.autocast(g.device.type, enabled=False):
                if ctx.needs_input_grad[0]:
                    b = Encoded(w, w_scale).mT if keep_w else w.mT
                    dx = gemm(dgrad, products[1], g, b, x_dtype, signs=signs)
                if ctx.needs_input_grad[1]:
                    b = Encoded(x, x_scale).mT if keep_x else x.mT
                    dw = gemm(wgrad, products[2], g.mT, b, x_dtype, w_dtype, signs)
                    if recipe.estimator:
                        dw = cast(dw * recipe.estimator(weight), w_dtype)
            return dx, dw

    return RecipeMatmul


def gemm(rule, product, a, b, dtype, out=None, signs=None):
    """
    a b^T by the rule, in dtype `out` (None: dtype). a: (M, K), b: (N, K), either of them possibly encoded already.
    dtype: the one that operands without a format are multiplied in; signs: of the rotation, random ones.
    """
    if rule.hadamard:
        a, b = (rotate(t, signs[:rule.hadamard]) for t in (a, b))
    if not isinstance(b, Encoded):
        b = encode(rule.b, b)
    times = None
    if isinstance(rule.b, Format) and rule.b.shared == 'column':
        # a scale along K cannot leave the sum: it goes over to a, before a is rounded
        b, times = Encoded(b.values, None), b.scale
    if not isinstance(a, Encoded):
        a = encode(rule.a, a, times)
    work = dtype if rule.a is None or rule.b is None else torch.float32
    return product(a, b, work, out or dtype)


def encode(format, x, times=None):
    if format is None:
        return Encoded(x if times is None else x * times, None)
    return format.encode(x, times)


def rotate(t, signs):
    """t, (rows, K), of which every len(signs) elements along K are turned by the orthogonal matrix diag(signs) H."""
    size = len(signs)
    turn = signs * HADAMARD[:size, :size].to(t.device)  # of ones, which TF32 does not round
    return (F.pad(t.float(), (0, -t.size(1) % size)).unflatten(1, (-1, size)) @ turn).flatten(1) / size ** 0.5


def _hadamard(size):
    """Sylvester's matrix of ones and minus ones; its upper left corners are the smaller ones."""
    return functools.reduce(torch.kron, [torch.tensor([[1.0, 1.0], [1.0, -1.0]])] * int(math.log2(size)))


HADAMARD = _hadamard(64)


def block_matmul(multiply, rate, block):
    """
    The autograd.Function of x, (tokens, in), and w, (out, in): dropout of whole blocks of x, of `block` tokens by
    `block` dimensions, and the matmul (SparseDrop, https://arxiv.org/abs/2411.01238). multiply: by_skipping or
    by_masking.
    """
    class BlockMatmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            with torch.autocast(x.device.type, enabled=False):
                size = [math.ceil(n / block) for n in x.shape]
                keep = torch.rand(size, device=x.device) >= rate
                ctx.save_for_backward(x, w, keep)
                return multiply.fwd(x, w.to(x.dtype), keep, block) / (1 - rate)

        @staticmethod
        def backward(ctx, g):
            x, w, keep = ctx.saved_tensors
            with torch.autocast(g.device.type, enabled=False):
                g = g / (1 - rate)
                return (multiply.dgrad(g, w.to(g.dtype), keep, block),
                        multiply.wgrad(g, x, keep, block).to(w.dtype) if ctx.needs_input_grad[1] else None)

    return BlockMatmul
