"""
The cross-entropy of a large vocabulary in chunks, so that its logits never exist as a whole.

With 50,304 ids, the logits of 8 x 1,024 tokens take 1.6 GB in float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sologpt.matmuls.ordinary import add_product, product_in

Tensor = torch.Tensor


PIECE = 2 ** 21  # logits that a CPU has in float32 at a time: they stay in its cache, and are not allocated anew


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    Mean cross-entropy of x @ weight.T in nats, `chunk` rows at a time.

    The gradients are computed in the forward, while a chunk's logits exist; the backward only scales them. The idea is
    Liger-Kernel's (https://arxiv.org/abs/2410.10989). The gradient for the weight is summed in float32.

    x: (N, d), in the dtype of the matmul; weight: (V, d), in any dtype; targets: (N,), -1 is ignored; piece:
    loss_of_logits() or the same compiled; with_grad: whether gradients are wanted at all.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, chunk: int, piece: Callable, with_grad: bool):
        need_x, need_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        ctx.weight_dtype, weight = weight.dtype, weight.to(x.dtype)
        count = (targets != -1).sum().clamp(min=1)
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        dx = torch.empty_like(x) if need_x else None
        dweight = None
        # all chunks are of one size where it divides N: each size is compiled
        chunks = zip(x.split(chunk), targets.unsqueeze(1).split(chunk), strict=True)
        for i, (x_rows, target_rows) in enumerate(chunks):
            of_chunk, dlogits = piece(x_rows @ weight.mT, target_rows, need_x or need_weight)
            loss += of_chunk
            if need_x:
                torch.mm(dlogits, weight, out=dx.narrow(0, i * chunk, len(x_rows)))
            if need_weight and len(x) <= chunk:
                dweight = product_in(ctx.weight_dtype, dlogits.mT, x_rows)
            elif need_weight:
                dweight = torch.zeros_like(weight, dtype=torch.float32) if dweight is None else dweight
                add_product(dweight, dlogits.mT, x_rows)
            del dlogits  # before the next chunk's logits are made
        ctx.save_for_backward(dx, dweight, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        # in place: a second backward would find them changed, and torch then raises an error
        dx, dweight, count = ctx.saved_tensors
        grad = grad / count
        return (None if dx is None else dx.mul_(grad),
                None if dweight is None else dweight.mul_(grad).to(ctx.weight_dtype), None, None, None, None)


def loss_of_logits(logits: Tensor, targets: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """
    (the summed cross-entropy of logits, (n, V), against targets, (n, 1); its gradient for the logits, in their dtype,
    or None). A target of -1 is ignored. The gradient may take the memory of the logits.
    """
    if logits.device.type != 'cpu' or torch.compiler.is_compiling():
        return loss_at_once(logits, targets, with_grad)
    loss, rows = 0.0, max(1, PIECE // logits.size(1))
    for of_piece, target_rows in zip(logits.split(rows), targets.split(rows), strict=True):
        more, dlogits = loss_at_once(of_piece, target_rows, with_grad)
        loss += more
        if with_grad:
            of_piece.copy_(dlogits)
    return loss, logits if with_grad else None


def loss_at_once(logits: Tensor, targets: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """loss_of_logits() as a GPU computes it."""
    kept, targets = targets != -1, targets.clamp(min=0)
    logp = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = -(logp.gather(1, targets) * kept).sum()
    if not with_grad:
        return loss, None
    # d loss / d logits before the division by the count: at most 1, which suits float16
    return loss, minus_one_hot(logp.exp_(), targets).mul_(kept).to(logits.dtype)


def minus_one_hot(p: Tensor, targets: Tensor) -> Tensor:
    """p, (n, V), less 1 at each row's target, (n, 1). May overwrite p."""
    if torch.compiler.is_compiling():  # a comparison is fused with what is around it; a scatter needs p in memory
        return torch.where(torch.arange(p.size(1), device=p.device) == targets, p - 1, p)
    return p.scatter_add_(1, targets, -torch.ones_like(targets, dtype=p.dtype))
