"""
Diagnostics of sums: what a short accumulator loses, and how several short products regain it.
"""

import torch

Tensor = torch.Tensor


def accumulated(a: Tensor, b: Tensor, dtype: torch.dtype, chunk: int = 1) -> Tensor:
    """a b^T of (M, K) and (N, K), with an accumulator of `dtype` that takes in the exact sums of `chunk` products."""
    total = torch.zeros(a.size(0), b.size(0), dtype=dtype, device=a.device)
    for k in range(0, a.size(1), chunk):
        total = (total.float() + a[:, k:k + chunk].float() @ b[:, k:k + chunk].float().mT).to(dtype)
    return total


def split_bfloat16(a: Tensor, b: Tensor, products: int) -> Tensor:
    """
    a b^T of float32 (M, K) and (N, K), out of 1, 3 or 6 products of bfloat16 matrices that are summed in float32.

    A float32 is split into three bfloat16 numbers: it rounded, the rest rounded, and the rest of that rounded.
    """
    parts = []
    for t in (a, b):
        rounded = []
        for _ in range(3):
            rounded.append(t.bfloat16().float())
            t = t - rounded[-1]
        parts.append(rounded)
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)][:products]
    return sum(parts[0][i] @ parts[1][j].mT for i, j in reversed(pairs))
