"""
Contexts: what the tokens of a forward pass see.

A context answers the model's three questions about positions: which rows of a table of positions the tokens take, which
embedding stands before each of them, and which keys and values attention reads. So training, packed documents, an
adapter's prefix and generation with a cache share one forward.

    Context     the tokens of a row see one another
    Documents   they see only their own document
    KVCache     they also see positions that were computed before; it grows
    FixedCache  the same in tensors that stay where they are, for a compiled step
"""

from collections.abc import Callable
from typing import Any

import torch

from sologpt.matmuls.attention import causal_mask

Tensor = torch.Tensor


class Context:
    """Each token sees itself and the tokens before it in the same row, in every layer."""
    length = 0  # how many positions there are before the tokens

    def rows(self, table: Tensor, T: int) -> Tensor:
        """table: (block_size, ...) -> (T, ...), the rows of the T tokens. Raises ValueError beyond the table's end."""
        end = self.length + T
        if end > len(table):
            raise ValueError(f'{end} tokens, but block_size is {len(table)}')
        return table[self.length:end]

    def positions(self, T: int, block_size: int, device: torch.device) -> Tensor:
        """(T,), the positions of the T tokens. Raises ValueError beyond block_size."""
        end = self.length + T
        if end > block_size:
            raise ValueError(f'{end} tokens, but block_size is {block_size}')
        return torch.arange(self.length, end, device=device)

    def previous(self, x: Tensor) -> Tensor:
        """x: (B, T, n_embd) -> (B, T, n_embd): for each position, x of the position before it, or zeros."""
        return torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)[:, :-1]

    def layer(self, i: int) -> 'Context':
        """The context in block number i, counted from 0."""
        return self

    def append(self, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        k, v: (B, G, T, hd), of the tokens -> (k, v, mask).

        k, v: (B, G, S, hd), of the S positions that are read. mask: which of them each token may see, as attention.py
        describes it. window: a token sees itself and the window - 1 positions before it; None: all before it.
        """
        T = k.size(2)
        return k, v, causal_mask(T, T, k.device, window) if window and T > window else None


class Documents(Context):
    """Each token sees itself and the tokens before it in its own document."""

    def __init__(self, idx: Tensor, eot: int, make_mask: Callable[[Tensor], Any], windows: set[int | None]):
        """
        idx: (B, T) ids. eot: the id that begins a document. make_mask: a function of document_attention.py, which makes
        the mask that the attention kernel takes. windows: those of the layers; each mask is made once.
        """
        self.begins = idx == eot
        position = torch.arange(idx.size(1), device=idx.device, dtype=torch.int32)
        starts = torch.where(self.begins, position, 0).cummax(dim=1).values
        self.masks = {window: make_mask(torch.maximum(starts, position - window + 1) if window else starts)
                      for window in windows}

    def previous(self, x: Tensor) -> Tensor:
        return super().previous(x).masked_fill(self.begins[..., None], 0.0)

    def append(self, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor, Any]:
        return k, v, self.masks[window]


class KVCache(Context):
    """
    The tokens also see all positions that were computed before. Their keys and values lie in memory that is allocated
    once.
    """

    def __init__(self, n_layer: int, n_kv_head: int, head_dim: int, batch: int, positions: int):
        """n_layer, n_kv_head, head_dim: the model's. batch: rows. positions: how many there is room for."""
        self.last_embedding: Tensor | None = None  # (B, 1, n_embd), of the newest position
        self.layers = [self.Layer((batch, n_kv_head, positions, head_dim)) for _ in range(n_layer)]

    @property
    def length(self) -> int:
        return self.layers[0].length

    def previous(self, x: Tensor) -> Tensor:
        before, self.last_embedding = self.last_embedding, x[:, -1:]
        return super().previous(x) if before is None else torch.cat([before, x], dim=1)[:, :-1]

    def layer(self, i: int) -> Context:
        return self.layers[i]

    class Layer(Context):
        """The keys and values of one block."""

        def __init__(self, shape: tuple[int, int, int, int]):
            """shape: (B, G, positions, hd)."""
            self.shape, self.length, self.k, self.v = shape, 0, None, None

        def append(self, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
            if self.k is None:  # allocated here because autocast decides the dtype
                self.k, self.v = k.new_empty(self.shape), v.new_empty(self.shape)
            start, T = self.length, k.size(2)
            S = self.length = start + T
            self.k[:, :, start:S], self.v[:, :, start:S] = k, v
            seen = S if window is None else min(S, T + window - 1)  # by one of the tokens
            k, v = (z[:, :, S - seen:S] for z in (self.k, self.v))
            # without a mask, one token sees everything, and several are the first ones
            needs_mask = T > 1 and (T < seen or window is not None and T > window)
            return k, v, causal_mask(T, seen, k.device, window) if needs_mask else None


class FixedCache(Context):
    """
    A copy of a KVCache in tensors whose shapes and addresses stay the same, as a compiled step needs them. The number
    of positions is a tensor too. Tokens are appended one at a time.
    """

    def __init__(self, cache: KVCache, positions: int):
        """Make room for caches like `cache`, with up to `positions` positions. copy_from() fills it."""
        k = cache.layers[0].k
        B, G, _, hd = k.shape
        # zeros, because values that a query does not see are multiplied by zero, and not every number times 0 is 0
        self.layers = [self.Layer(self, *(k.new_zeros(B, G, positions, hd) for _ in range(2))) for _ in cache.layers]
        self.last_embedding = None if cache.last_embedding is None else torch.zeros_like(cache.last_embedding)
        self.position = torch.zeros(1, dtype=torch.long, device=k.device)

    def copy_from(self, cache: KVCache) -> None:
        """Hold what `cache` holds."""
        self.position.fill_(cache.length)
        for ours, theirs in zip(self.layers, cache.layers, strict=True):
            ours.k[:, :, :cache.length] = theirs.k[:, :, :cache.length]
            ours.v[:, :, :cache.length] = theirs.v[:, :, :cache.length]
        if self.last_embedding is not None:
            self.last_embedding.copy_(cache.last_embedding)

    def rows(self, table: Tensor, T: int) -> Tensor:
        return table.index_select(0, self.position)

    def positions(self, T: int, block_size: int, device: torch.device) -> Tensor:
        return self.position

    def previous(self, x: Tensor) -> Tensor:
        before = self.last_embedding.clone()
        self.last_embedding.copy_(x)
        return before

    def layer(self, i: int) -> Context:
        return self.layers[i]

    class Layer(Context):
        """The keys and values of one block, (B, G, positions, hd)."""

        def __init__(self, whole: 'FixedCache', k: Tensor, v: Tensor):
            self.whole, self.k, self.v = whole, k, v

        def append(self, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
            position = self.whole.position
            self.k.index_copy_(2, position, k)
            self.v.index_copy_(2, position, v)
            places = torch.arange(self.k.size(2), device=k.device)
            mask = places <= position
            return self.k, self.v, (mask if window is None else mask & (places > position - window))[None]
