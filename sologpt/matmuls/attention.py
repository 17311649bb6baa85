"""
Attention kernels: the same function, softmax(q k^T / sqrt(hd) + mask) v, computed in several ways.

Every kernel is called as attend(q, k, v, dropout, mask):

    q        (B, H, T, hd): queries
    k, v     (B, G, S, hd): keys and values; the T queries are the last T of the S positions. Each of the G heads
             serves H / G heads of queries (grouped queries, https://arxiv.org/abs/2305.13245)
    dropout  the probability that a weight is dropped; 0 outside training
    mask     (T, S) or (B, 1, T, S) bool: True where a query may see a key. None means causal with T = S, or one query
             that sees every key
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sologpt.machine import devices

Tensor = torch.Tensor

# The kernels of a GPU, the preferred one first. cuDNN is not among them: it makes a new plan for each length, which
# takes up to half a second, and its results with a mask are wrong on some GPUs (pytorch#193893, pytorch#196678).
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# (major compute capability, head size) -> options of FlexAttention's kernels for 16 bits. Where Inductor's own options
# spill registers into memory, these do not, if BLOCK of document_attention.py divides the length. This was read from
# what torch 2.13 compiles for 7.5, 8.0, 8.6, 8.9, 9.0 and 12.0, in both architectures of the model. Their speed was not
# measured on a GPU. What is not named stays Inductor's. With (7, 128), the backward still spills 8 bytes per thread.
FLEX_BLOCKS = {
    (7, 64): {'fwd_BLOCK_M': 32, 'fwd_BLOCK_N': 32, 'fwd_num_stages': 1, 'fwd_num_warps': 8, 'bwd_num_warps': 8},
    (7, 128): {'fwd_BLOCK_M': 32, 'fwd_BLOCK_N': 32, 'fwd_num_stages': 1, 'fwd_num_warps': 8, 'bwd_num_warps': 8},
    (8, 64): {'fwd_num_warps': 8, 'bwd_BLOCK_M1': 32, 'bwd_BLOCK_N1': 128, 'bwd_BLOCK_M2': 128, 'bwd_BLOCK_N2': 32,
              'bwd_num_stages': 2, 'bwd_num_warps': 8},
    (8, 128): {'bwd_num_stages': 2, 'bwd_num_warps': 8},
    (9, 64): {'fwd_num_warps': 8},
    (9, 128): {'bwd_BLOCK_M1': 64, 'bwd_BLOCK_N1': 64, 'bwd_BLOCK_M2': 64, 'bwd_BLOCK_N2': 64},
    (12, 64): {'fwd_num_warps': 8, 'bwd_BLOCK_M1': 32, 'bwd_BLOCK_N1': 128, 'bwd_BLOCK_M2': 128, 'bwd_BLOCK_N2': 64,
               'bwd_num_stages': 2, 'bwd_num_warps': 8},
    (12, 128): {'bwd_num_stages': 2, 'bwd_num_warps': 8}}


def sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None) -> Tensor:
    """Attention by torch's fused kernels for any length and any mask: (B, H, T, hd)."""
    if q.size(2) == 1 and mask is not None:
        return single_query(q, k, v, dropout, mask)
    grouped = q.size(1) != k.size(1)
    if grouped and (mask is not None or not takes_grouped_queries(q)):
        grouped, (k, v) = False, (for_each_query(z, q.size(1)) for z in (k, v))
    is_causal = mask is None and q.size(2) > 1
    with sdpa_kernel(ANY_LENGTH, set_priority=True) if q.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal,
                                              enable_gqa=grouped)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None) -> Tensor:
    """
    sdpa() without a cache, a mask or dropout (T = S): (B, H, T, hd). It is one operation for every length, T = 1
    included, as torch.export needs it.
    """
    k, v = (for_each_query(z, q.size(1)) for z in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def takes_grouped_queries(q: Tensor) -> bool:
    """
    Whether a fused kernel of torch takes q, (B, H, T, hd), with fewer heads of keys and values, if there is no mask. On
    a GPU only flash does, which is for 16 bits and not for every GPU. The others leave such heads to torch's math.
    """
    if q.device.type != 'cuda':
        return q.device.type == 'cpu'
    has_flash = bool(torch.version.hip) or torch.cuda.get_device_capability(q.device) >= (8, 0)
    return has_flash and q.dtype != torch.float32


def for_each_query(z: Tensor, H: int) -> Tensor:
    """z: (B, G, S, hd), keys or values -> (B, H, S, hd), each head as often as it serves queries."""
    B, G, S, hd = z.shape
    return z if G == H else z[:, :, None].expand(B, G, H // G, S, hd).flatten(1, 2)


def single_query(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor) -> Tensor:
    """
    Attention of one query (T = 1), written out in sums: (B, H, 1, hd).

    A fused kernel with a mask gives a whole head to one multiprocessor of the GPU. torch.compile spreads these sums
    over all of them.
    """
    k, v = (z[:, :, None] for z in (k, v))  # (B, G, 1, S, hd)
    shared = q.unflatten(1, (k.size(1), -1))  # (B, G, H/G, 1, hd): its queries read a key's head where it lies
    scores = (shared.float() * k).sum(-1, keepdim=True).mT * q.size(-1) ** -0.5  # (B, G, H/G, 1, S)
    weights = F.softmax(scores.masked_fill(~mask.unsqueeze(-3), -math.inf), dim=-1)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return (weights.mT * v).sum(-2, keepdim=True).to(v.dtype).flatten(1, 2)


def causal_mask(T: int, S: int, device: torch.device, window: int | None = None) -> Tensor:
    """
    (T, S) bool: which of S positions the last T may see. Torch's own is_causal takes the first T instead. window: each
    sees itself and the window - 1 positions before it; None: all before it.
    """
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return mask if window is None else mask.triu(S - T - window + 1)


def math_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None) -> Tensor:
    """
    Attention by two matmuls and a softmax: (B, H, T, hd). Its scores exist in memory. Without a mask, each quarter of a
    long text is multiplied with the keys up to its end alone, which saves three eighths of the work.
    """
    T = q.size(2)
    if T == 1:
        return sdpa(q, k, v, dropout, mask)
    if mask is not None:
        return _by_products(q, k, v, dropout, mask)
    rows = T if T < 512 else math.ceil(T / 4)  # in shorter texts the matmuls would be too small
    results, end = [], 0
    for queries in q.split(rows, dim=2):
        end += queries.size(2)
        mask = causal_mask(queries.size(2), end, q.device)
        results.append(_by_products(queries, k[:, :, :end], v[:, :, :end], dropout, mask))
    return torch.cat(results, dim=2)


def _by_products(q, k, v, dropout, mask):
    """math_attention() with a mask. The queries that share a head of keys are rows of one matrix."""
    B, H, T, hd = q.shape
    G, S = k.shape[1:3]
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    bias = bias.expand(B, H, T, S).reshape(B * G, -1, S)
    q, k, v = q.reshape(B * G, -1, hd), k.reshape(B * G, S, hd), v.reshape(B * G, S, hd)
    scores = torch.baddbmm(bias, q, k.mT, alpha=hd ** -0.5)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout, training=dropout > 0)
    return (weights @ v).view(B, H, T, hd)


def cudnn(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None) -> Tensor:
    """Causal attention by cuDNN: (B, H, T, hd). One query, or a mask, goes to sdpa()."""
    if mask is not None or q.size(2) == 1:
        return sdpa(q, k, v, dropout, mask)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *ANY_LENGTH], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True,
                                              enable_gqa=q.size(1) != k.size(1))


def flex(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | BlockMask | None = None) -> Tensor:
    """
    Attention with a BlockMask by FlexAttention (https://arxiv.org/abs/2412.05496): (B, H, T, hd). It skips what no
    query of a block sees, and has no dropout. Another mask, or none, goes to sdpa().
    """
    if not isinstance(mask, BlockMask):
        return sdpa(q, k, v, dropout, mask)
    if dropout:
        raise ValueError('FlexAttention has no dropout')
    return flex_attention(q, k, v, block_mask=mask, kernel_options={'BACKEND': 'TRITON'} | flex_blocks(q),
                          enable_gqa=q.size(1) != k.size(1))


def flex_blocks(q: Tensor) -> dict[str, int]:
    """The entries of FLEX_BLOCKS for queries (B, H, T, hd) on a GPU of NVIDIA; nothing elsewhere."""
    if not devices.is_nvidia(q.device):
        return {}
    major, _ = torch.cuda.get_device_capability(q.device)
    return FLEX_BLOCKS.get((major, q.size(-1)), {})


ATTENTION = {'sdpa': sdpa, 'causal': causal_sdpa, 'math': math_attention, 'flash': sdpa, 'cudnn': cudnn, 'flex': flex}
