"""
The cross-entropy of a large vocabulary in chunks, so that its logits never exist as a whole.

With 50,304 ids, the logits of 8 x 1,024 tokens take 1.6 GB in float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    Mean cross-entropy of x @ weight.T in nats, `chunk` rows at a time.

    The gradients are computed in the forward, while a chunk's logits exist; the backward only scales them. The idea is
    Liger-Kernel's (https://arxiv.org/abs/2410.10989).

    x: (N, d) and weight: (V, d), both in the dtype of the matmul; targets: (N,), -1 is ignored; piece: loss_of_chunk()
    or the same compiled; with_grad: whether gradients are wanted at all.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, chunk: int, piece: Callable, with_grad: bool):
        need_x, need_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        count = (targets != -1).sum().clamp(min=1)
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, x.size(0), chunk):
            rows = slice(start, start + chunk)  # all of one size where it divides N: each size is compiled
            loss = loss + piece(x[rows], weight, targets[rows, None], dx[rows] if need_x else None, dweight)
        ctx.save_for_backward(dx, dweight, count)
        ctx.dtype = weight.dtype
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dweight, count = ctx.saved_tensors
        grad = grad / count
        return (None if dx is None else dx * grad,
                None if dweight is None else (dweight * grad).to(ctx.dtype), None, None, None, None)


def loss_of_chunk(x: Tensor, weight: Tensor, targets: Tensor, dx: Tensor | None, dweight: Tensor | None) -> Tensor:
    """
    The summed cross-entropy of x, (n, d), against targets, (n, 1).

    Writes the gradient for x into dx and adds the gradient for weight to dweight, unless they are None.
    """
    kept, targets = targets != -1, targets.clamp(min=0)
    logp = F.log_softmax(x @ weight.mT, dim=-1, dtype=torch.float32)  # (n, V)
    loss = -(logp.gather(1, targets) * kept).sum()
    if dx is not None or dweight is not None:
        # d loss / d logits before the division by the count: at most 1, which suits float16
        dlogits = minus_one_hot(logp.exp_(), targets).to(x.dtype)
        if dx is not None:
            dx.copy_(dlogits @ weight * kept)
        if dweight is not None:
            dweight += dlogits.mT @ (x * kept)
    return loss


def minus_one_hot(p: Tensor, targets: Tensor) -> Tensor:
    """p, (n, V), less 1 at each row's target, (n, 1). May overwrite p."""
    if torch.compiler.is_compiling():  # a comparison is fused with what is around it; a scatter needs p in memory
        return torch.where(torch.arange(p.size(1), device=p.device) == targets, p - 1, p)
    return p.scatter_add_(1, targets, -torch.ones_like(targets, dtype=p.dtype))
