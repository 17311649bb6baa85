"""
The three matmuls of a Linear by a recipe, as an autograd.Function.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from sologpt.matmuls.elements import draw
from sologpt.matmuls.formats import Encoded
from sologpt.matmuls.products import cast
from sologpt.matmuls.recipes import Gemm, OperandFormat, Recipe

Tensor = torch.Tensor


def recipe_matmul(recipe: Recipe, products: Sequence[Callable]) -> type[torch.autograd.Function]:
    """
    The autograd.Function of x, (tokens, in), and w, (out, in) -> (tokens, out), whose matmuls follow the recipe.

    products: those of fwd, dgrad and wgrad (see products.py). Where one encoding of x, w or g serves two matmuls, it is
    made once. That of x or w is then kept for the backward instead of the tensor.
    """
    fwd, dgrad, wgrad = recipe.fwd, recipe.dgrad, recipe.wgrad
    keep_x = _serves_both(fwd.a, wgrad.b, fwd, wgrad) and fwd.a.kept and not fwd.moves_scale
    keep_w = _serves_both(fwd.b, dgrad.b, fwd, dgrad) and fwd.b.kept
    share_g = _serves_both(dgrad.a, wgrad.a, dgrad, wgrad) and not (dgrad.moves_scale or wgrad.moves_scale)
    turns = max(gemm.hadamard for gemm in (fwd, dgrad, wgrad))

    class RecipeMatmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            with torch.autocast(x.device.type, enabled=False):
                a = fwd.a.encode(x) if keep_x else Encoded(x, None)
                b = fwd.b.encode(w) if keep_w else Encoded(w, None)
                # drawn here and kept, because both operands of a matmul need the same signs
                signs = torch.where(draw(x, (turns, 1)) < 0.5, 1.0, -1.0) if turns else None
                ctx.save_for_backward(*a, *b, signs, w if recipe.estimator else None)
                ctx.dtypes = x.dtype, w.dtype
                return multiply(fwd, products[0], a if keep_x else x, b if keep_w else w, x.dtype, signs=signs)

        @staticmethod
        def backward(ctx, g):
            x, x_scale, w, w_scale, signs, weight = ctx.saved_tensors
            x_dtype, w_dtype = ctx.dtypes
            dx = dw = None
            with torch.autocast(g.device.type, enabled=False):
                g = dgrad.a.encode(g) if share_g else g
                if ctx.needs_input_grad[0]:
                    b = Encoded(w, w_scale).mT if keep_w else w.mT
                    dx = multiply(dgrad, products[1], g, b, x_dtype, signs=signs)
                if ctx.needs_input_grad[1]:
                    b = Encoded(x, x_scale).mT if keep_x else x.mT
                    dw = multiply(wgrad, products[2], g.mT, b, x_dtype, w_dtype, signs)
                    if recipe.estimator:
                        dw = cast(dw * recipe.estimator(weight), w_dtype)
            return dx, dw

    return RecipeMatmul


def _serves_both(format: OperandFormat | None, of_transpose: OperandFormat | None, *gemms: Gemm) -> bool:
    """Whether a tensor's encoding in one of the gemms is the transpose of its transpose's encoding in the other."""
    return format is not None and of_transpose == format.mT and not any(gemm.hadamard for gemm in gemms)


def multiply(gemm: Gemm, product: Callable, a: Tensor | Encoded, b: Tensor | Encoded, dtype: torch.dtype,
             out: torch.dtype | None = None, signs: Tensor | None = None) -> Tensor:
    """
    a b^T, (M, N), as `gemm` says.

    a: (M, K); b: (N, K); either may be encoded already. dtype: the run's, in which operands without a format are
    multiplied. out: the result's dtype; None: dtype. signs: of the random rotation, (its size or more, 1).
    """
    if gemm.hadamard:
        a, b = (rotate(t, signs[:gemm.hadamard]) for t in (a, b))
    if not isinstance(b, Encoded):
        b = _encode(gemm.b, b)
    times = None
    if gemm.moves_scale:
        b, times = Encoded(b.values, None), b.scale
    if not isinstance(a, Encoded):
        a = _encode(gemm.a, a, times)
    work = dtype if gemm.a is None or gemm.b is None else torch.float32
    return product(a, b, work, out or dtype)


def _encode(format: OperandFormat | None, x: Tensor, times: Tensor | None = None) -> Encoded:
    if format is None:
        return Encoded(x if times is None else x * times, None)
    return format.encode(x, times)


def rotate(t: Tensor, signs: Tensor) -> Tensor:
    """
    t, (rows, K), with each len(signs) elements along K multiplied by diag(signs) H / sqrt(len(signs)), an orthogonal
    matrix. Rotating both operands alike leaves their product as it is.
    """
    size = len(signs)
    turn = signs * hadamard(size, t.device)  # of 1 and -1, which TF32 does not round
    return (F.pad(t.float(), (0, -t.size(1) % size)).unflatten(1, (-1, size)) @ turn).flatten(1) / size ** 0.5


def hadamard(size: int, device: torch.device) -> Tensor:
    """
    Sylvester's matrix of 1 and -1, (size, size), for a power of two up to 64: -1 where i & j has an odd number of ones.
    It is computed on the device, because to copy it there would make the program wait.
    """
    i = torch.arange(size, device=device)
    common = i[:, None] & i
    for half in (4, 2, 1):
        common = common ^ (common >> half)
    return 1.0 - 2.0 * (common & 1)
