"""
Elementwise functions around the matmuls, with a backward of their own, and modules that apply them.

They keep for the backward what the next matmul keeps anyway, so that they add no memory, and pass over it once less.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from sologpt.matmuls.products import cast

RMS_EPS = 1e-6  # in every norm without a gain


class rms_norm(torch.autograd.Function):
    """
    x / sqrt(mean(x^2) + eps) over the last dimension, without a gain (https://arxiv.org/abs/1910.07467).

    torch's own keeps x for the backward; this keeps y, which the next matmul keeps anyway. On a CPU torch's takes twice
    as long.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square() / x.size(-1) + RMS_EPS)
        y = cast(x * scale, x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1) / -y.size(-1)  # the part that only changes the length of x
        return (torch.addcmul(grad, y, along) * scale).to(y.dtype)


class rms_norm_with_gain(torch.autograd.Function):
    """
    x / sqrt(mean(x^2) + eps) * gain over the last dimension. It is rounded once, at the end.

    The backward reads x, which the residual stream keeps, and computes the rest again. With s = 1 / sqrt(mean(x^2) +
    eps), and g the gradient of y:

        d_gain = sum of g x s over all rows
        dx     = s g gain - s^3 x mean(g x gain)

    Both sums are matrix-vector products of g x. A CPU computes them in a third of the time of a product and a sum.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square() / x.size(-1) + eps)
        ctx.save_for_backward(x, gain, scale)
        return cast(x * scale * gain, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, gain, scale = ctx.saved_tensors
        rows, g = (cast(z.flatten(0, -2), torch.float32) for z in (x, grad))
        s = scale.flatten(0, -2)
        product = g * rows
        d_gain = torch.mv(product.mT, s.squeeze(1)) if ctx.needs_input_grad[1] else None
        along = torch.mv(product, gain).unsqueeze(1) * s.square() / -x.size(-1)
        dx = (g * gain).addcmul_(rows, along).mul_(s)
        return cast(dx, x.dtype).view_as(x), d_gain, None


class swiglu(torch.autograd.Function):
    """
    silu(gate) * up of x = [gate, up], (..., 2n) -> (..., n) (https://arxiv.org/abs/2002.05202).

    Only x is kept for the backward; autograd would keep silu(gate) as well.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        if torch.compiler.is_compiling():
            return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)
        dx = torch.empty_like(x)  # both halves are written where they belong
        d_gate, d_up = dx.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=d_gate)
        return dx


class relu_squared(torch.autograd.Function):
    """relu(x)^2 (https://arxiv.org/abs/2109.08668). Its backward takes one elementwise pass less than autograd's."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, grad):
        y, = ctx.saved_tensors
        return (grad * y).mul_(2)


# ---- modules ---------------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def forward(self, x, context=None):
        """x: (..., n). The context is there because parts between the embedding and the first block are given it."""
        return rms_norm.apply(x)


class RMSNormWithGain(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        """x: (..., n)."""
        return rms_norm_with_gain.apply(x, self.weight, self.eps)


class ReLUSquared(nn.Module):
    def forward(self, x):
        return relu_squared.apply(x)


class SwiGLU(nn.Module):
    def forward(self, x):
        """x: (..., 2n), the gate and what it multiplies -> (..., n)."""
        return swiglu.apply(x)
