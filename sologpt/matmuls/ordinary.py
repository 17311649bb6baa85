"""
The matmuls of an ordinary Linear in training, as a GPU computes them best.

The gradient of the weight leaves its matmul in float32, in which it is summed over micro-batches. It is never rounded
to 16 bits, and is not converted in another pass over memory. Queries, keys and values come from one matmul, but their
gradients are multiplied one by one. To put them into one tensor first would be a pass over all three.
"""

import torch
import torch.nn as nn

from sologpt.machine import devices
from sologpt.matmuls.products import cast

Tensor = torch.Tensor


class OrdinaryMatmul(torch.autograd.Function):
    """
    x, (tokens, in), times w^T -> (tokens, out), in the dtype of x; with parts, a tensor of (tokens, rows) for each.

    w: (out, in), in any dtype. parts: the rows of w that each part takes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, parts: tuple[int, ...] | None = None):
        ctx.w_dtype, w = w.dtype, cast(w, x.dtype)
        ctx.save_for_backward(x, w)
        ctx.parts = parts or (len(w),)
        y = x @ w.mT
        return y.split(parts, dim=1) if parts else y

    @staticmethod
    def backward(ctx, *grads):
        x, w = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            of_parts = w.split(ctx.parts)
            dx = grads[0] @ of_parts[0]
            for g, part in zip(grads[1:], of_parts[1:], strict=True):
                dx = torch.addmm(dx, g, part)
        if ctx.needs_input_grad[1]:
            dw = [product_in(ctx.w_dtype, g.mT, x) for g in grads]
            dw = dw[0] if len(dw) == 1 else torch.cat(dw)
        return dx, dw, None


def product_in(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """a @ b in dtype. On an NVIDIA GPU a float32 result of 16-bit tensors is not rounded in between."""
    if dtype == torch.float32 and _can_widen(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return cast(a @ b, dtype)


def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to float32 `sums`, in place; on an NVIDIA GPU within the matmul of 16-bit tensors."""
    if _can_widen(a):
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    else:
        sums += a @ b


def _can_widen(a):
    """Whether torch has a matmul from the dtype of `a` to float32."""
    return a.dtype != torch.float32 and devices.is_nvidia(a.device)


# ---- how attention gets its queries, (B, T, H, hd), and its keys and values, (B, T, G, hd) ---------------------------

def whole(c_attn: nn.Module, x: Tensor, heads: tuple[int, int]) -> tuple[Tensor, ...]:
    """From any c_attn: x, (B, T, in), -> (B, T, (H + 2 G) hd). heads: (H, G)."""
    H, G = heads
    return c_attn(x).view(*x.shape[:2], H + 2 * G, -1).split((H, G, G), dim=2)


def by_parts(c_attn: nn.Linear, x: Tensor, heads: tuple[int, int]) -> list[Tensor]:
    """From an ordinary Linear, as three tensors."""
    H, G = heads
    head_dim, dtype = c_attn.out_features // (H + 2 * G), devices.matmul_dtype(x)
    rows = H * head_dim, G * head_dim, G * head_dim
    parts = OrdinaryMatmul.apply(x.to(dtype).flatten(0, 1), c_attn.weight, rows)
    if c_attn.bias is not None:
        parts = [part + bias for part, bias in zip(parts, c_attn.bias.to(dtype).split(rows), strict=True)]
    return [part.view(*x.shape[:2], n, head_dim) for part, n in zip(parts, (H, G, G), strict=True)]
