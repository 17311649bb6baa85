"""
Attention in rows of packed documents, where each token sees itself and the tokens before it in its own document: the
masks, and which kernel is faster with its mask.

A mask is made from `starts`, (B, T) int: for each token, the position at which its document begins.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

from sologpt.machine import clock
from sologpt.matmuls.attention import ATTENTION

Tensor = torch.Tensor

BLOCK = 128  # tokens in a block of a BlockMask, FlexAttention's default


def dense_mask(starts: Tensor) -> Tensor:
    """starts: (B, T) -> (B, 1, T, T) bool: True where a query sees a key."""
    position = torch.arange(starts.size(1), device=starts.device)
    return ((position <= position[:, None]) & (position >= starts[:, :, None]))[:, None]


def block_mask(starts: Tensor) -> BlockMask:
    """
    starts: (B, T) -> the mask for FlexAttention, which skips the blocks of keys that no query of a block sees.

    Documents do not overlap, so query block i sees the key blocks first[i] to i. Of these, full[i] to i - 1 lie wholly
    within the document of every query in the block, and need no mask. Key block j is seen by the query blocks j to
    end[j] - 1, and wholly by j + 1 to full_end[j] - 1. So all lists of blocks follow from two numbers per block.
    """
    B, T = starts.shape
    n = -(-T // BLOCK)
    # positions after the end see nothing, so that the last block is not full
    queries = F.pad(starts, (0, n * BLOCK - T), value=n * BLOCK).view(B, 1, n, BLOCK)
    k = torch.arange(n, device=starts.device, dtype=torch.int32)
    i = k[:, None]  # a block; k counts those in its list
    first = (queries[..., 0] // BLOCK)[..., None]
    full = torch.minimum((queries[..., -1:] + BLOCK - 1) // BLOCK, i)
    end, full_end = ((begin <= k).sum(dim=-2, dtype=torch.int32)[..., None] for begin in (first, full))
    lists = [(full - first + 1, torch.where(k < full - first, first + k, i)), (i - full, full + k),
             (end - full_end + 1, torch.where(k == 0, i, full_end + k - 1)), (full_end - i - 1, i + 1 + k)]

    def sees(b, h, query, key):
        return (key <= query) & (key >= starts[b, query])
    tensors = []
    for counts, indices in lists:
        counts, indices = counts.expand(B, 1, n, 1), indices.clamp(max=n - 1).expand(B, 1, n, n)
        tensors += [counts[..., 0].to(torch.int32).contiguous(), indices.to(torch.int32).contiguous()]
    return BlockMask((T, T), *tensors, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees)


# by the attention kernel that takes the mask; all others take a dense one
DOCUMENT_MASK = {'flex': block_mask}


def find_document_attention(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int, int]
                            ) -> tuple[str, str]:
    """
    ('flex' or 'sdpa', why): the kernel that is faster on a GPU, each with the mask that it takes. It is measured in
    compiled code, forward and backward, with one document in each row: the case in which flex skips least.

    dtype: 16 bits. shape: (B, H, G, T, hd) for H heads of queries and G of keys. If flex does not compile there, the
    reason says why.
    """
    try:
        seconds = {name: _attention_seconds(name, device, dtype, shape) for name in ('flex', 'sdpa')}
    except Exception as e:  # Triton and Inductor have many ways to refuse
        return 'sdpa', f'flex: {type(e).__name__}: {str(e).splitlines()[0][:100]}'
    return min(seconds, key=seconds.get), ', '.join(f'{name} {1000 * s:.2f} ms' for name, s in seconds.items())


def _attention_seconds(name, device, dtype, shape):
    """Seconds of one kernel, forward and backward, and of making its mask."""
    make_mask = DOCUMENT_MASK.get(name, dense_mask)
    B, H, G, T, hd = shape
    q, k, v = (torch.randn(B, heads, T, hd, device=device, dtype=dtype).requires_grad_() for heads in (H, G, G))
    starts = torch.zeros(B, T, device=device, dtype=torch.int32)

    @torch.compile(dynamic=False)
    def attend(q, k, v, starts):
        return ATTENTION[name](q, k, v, 0.0, make_mask(starts))

    def run():
        y = attend(q, k, v, starts)
        torch.autograd.grad(y, (q, k, v), y.detach())
    return clock.shortest_seconds(run, device, budget=0.1)
