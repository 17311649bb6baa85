"""
Dropout of whole blocks of a Linear's input, so that their products need not be computed (SparseDrop,
https://arxiv.org/abs/2411.01238).

`keep` says which blocks of x, (tokens, in), are kept: bool, (tokens / block, in / block), rounded up. The three matmuls
are those of recipes.py:

    fwd(x, w, keep, block)    y  = x w^T, (tokens, out)
    dgrad(g, w, keep, block)  dx = g w,   (tokens, in)
    wgrad(g, x, keep, block)  dw = g^T x, (out, in)
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from sologpt.matmuls.elements import draw

Tensor = torch.Tensor


class BlockProducts(NamedTuple):
    """A way to compute the three matmuls when blocks of x are dropped."""
    fwd: Callable
    dgrad: Callable
    wgrad: Callable


def block_matmul(products: BlockProducts, rate: float, block: int) -> type[torch.autograd.Function]:
    """
    The autograd.Function of x, (tokens, in), and w, (out, in), that drops a share `rate` of x's blocks, scales the rest
    by 1 / (1 - rate) and multiplies. A block is `block` tokens by `block` dimensions.
    """
    class BlockMatmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            with torch.autocast(x.device.type, enabled=False):
                size = [math.ceil(n / block) for n in x.shape]
                keep = draw(x, size) >= rate
                ctx.save_for_backward(x, w, keep)
                return products.fwd(x, w.to(x.dtype), keep, block) / (1 - rate)

        @staticmethod
        def backward(ctx, g):
            x, w, keep = ctx.saved_tensors
            with torch.autocast(g.device.type, enabled=False):
                g = g / (1 - rate)
                return (products.dgrad(g, w.to(g.dtype), keep, block),
                        products.wgrad(g, x, keep, block).to(w.dtype) if ctx.needs_input_grad[1] else None)

    return BlockMatmul


# ---- zeros in place of what is dropped: nothing is skipped -----------------------------------------------------------

def _mask(t: Tensor, keep: Tensor, block: int) -> Tensor:
    return t * keep.repeat_interleave(block, 0).repeat_interleave(block, 1)[:t.size(0), :t.size(1)]


BY_MASKING = BlockProducts(lambda x, w, keep, block: _mask(x, keep, block) @ w.mT,
                           lambda g, w, keep, block: _mask(g @ w, keep, block),
                           lambda g, x, keep, block: g.mT @ _mask(x, keep, block))


# ---- matmuls of the kept blocks alone --------------------------------------------------------------------------------
# The operators are opaque to torch.compile, because how many blocks are kept is only known when they run.

def _runs(flags: list[bool], block: int) -> Iterator[slice]:
    """Slices of the blocks that are kept, neighbours together."""
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

BY_SKIPPING = BlockProducts(_block_fwd, _block_dgrad, _block_wgrad)
