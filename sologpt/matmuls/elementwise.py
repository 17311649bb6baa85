"""
Elementwise functions around the matmuls, with a backward of their own.

They keep for the backward what the next matmul keeps anyway, so that they add no memory, and pass over it once less.
"""

import torch
import torch.nn.functional as F

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
        y = x * scale
        if y.dtype != x.dtype:  # a `to` without effect, when compiled by torch 2.11, gives wrong gradients
            y = y.to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1) / -y.size(-1)  # the part that only changes the length of x
        return (torch.addcmul(grad, y, along) * scale).to(y.dtype)


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
