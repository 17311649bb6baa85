"""
Contexts: what the tokens of a forward pass see.

A context answers the model's three questions about positions: which rows of a table of positions the tokens have, what
the embedding before each of them is, and which keys and values attention reads. So training, packed documents, an
adapter's prefix and generation with a cache share one forward.
"""

import torch

from sologpt.matmuls.attention import causal_mask

Tensor = torch.Tensor


class Context:
    """The tokens see those before them in the same row, in every layer."""
    length = 0  # positions before the tokens

    def rows(self, table: Tensor, T: int) -> Tensor:
        """The T tokens' rows of a table of positions, (block_size, ...). Raises ValueError beyond its end."""
        end = self.length + T
        if end > len(table):
            raise ValueError(f'{end} tokens, but block_size is {len(table)}')
        return table[self.length:end]

    def previous(self, x: Tensor) -> Tensor:
        """x: (B, T, n_embd) -> at each position, x of the position before it; zeros where there is none."""
        return torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)[:, :-1]

    def layer(self, i: int) -> 'Context':
        """The context of block number i."""
        return self

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        k, v: (B, H, T, hd) of the tokens -> (k, v, mask): keys and values of all positions, and which of them each
        token may see, as an attention kernel takes it.
        """
        return k, v, None


class Documents(Context):
    """The tokens see those before them in their own document. The id eot begins a document."""

    def __init__(self, idx: Tensor, eot: int):
        """idx: (B, T) ids."""
        self.begins = idx == eot
        document = self.begins.cumsum(dim=1)
        self.mask = (document[:, :, None] == document[:, None]).tril()[:, None]  # (B, 1, T, T)

    def previous(self, x):
        return super().previous(x).masked_fill(self.begins[..., None], 0.0)

    def append(self, k, v):
        return k, v, self.mask


class KVCache(Context):
    """
    The tokens also see all positions computed before. Their keys and values lie in memory that is allocated once.

    n_layer, n_head, head_dim: the model's; batch: rows; positions: for how many there is room.
    """

    def __init__(self, n_layer: int, n_head: int, head_dim: int, batch: int, positions: int):
        self.last_embedding = None
        self.layers = [self.Layer((batch, n_head, positions, head_dim)) for _ in range(n_layer)]

    @property
    def length(self):
        return self.layers[0].length

    def previous(self, x):
        before, self.last_embedding = self.last_embedding, x[:, -1:]
        return super().previous(x) if before is None else torch.cat([before, x], dim=1)[:, :-1]

    def layer(self, i):
        return self.layers[i]

    class Layer(Context):
        def __init__(self, shape):
            self.shape, self.length, self.k, self.v = shape, 0, None, None

        def append(self, k, v):
            if self.k is None:  # allocated here because autocast decides the dtype
                self.k, self.v = k.new_empty(self.shape), v.new_empty(self.shape)
            start, T = self.length, k.size(2)
            S = self.length = start + T
            self.k[:, :, start:S], self.v[:, :, start:S] = k, v
            return self.k[:, :, :S], self.v[:, :, :S], causal_mask(T, S, k.device) if 1 < T < S else None


class FixedCache(Context):
    """
    A copy of a KVCache in tensors whose shapes and addresses stay, as a compiled step needs them. The number of
    positions is a tensor, too. One position at a time is added.
    """

    def __init__(self, cache: KVCache, positions: int):
        """Room for what `cache` holds, up to `positions` positions."""
        k = cache.layers[0].k
        B, H, _, hd = k.shape
        # zeros, because what a query does not see is still multiplied, by zero
        self.layers = [self.Layer(self, *(k.new_zeros(B, H, positions, hd) for _ in range(2))) for _ in cache.layers]
        self.last_embedding = None if cache.last_embedding is None else torch.zeros_like(cache.last_embedding)
        self.position = torch.zeros(1, dtype=torch.long, device=k.device)

    def copy_from(self, cache: KVCache) -> None:
        self.position.fill_(cache.length)
        for ours, theirs in zip(self.layers, cache.layers, strict=True):
            ours.k[:, :, :cache.length] = theirs.k[:, :, :cache.length]
            ours.v[:, :, :cache.length] = theirs.v[:, :, :cache.length]
        if self.last_embedding is not None:
            self.last_embedding.copy_(cache.last_embedding)

    def rows(self, table, T):
        return table.index_select(0, self.position)

    def previous(self, x):
        before = self.last_embedding.clone()
        self.last_embedding.copy_(x)
        return before

    def layer(self, i):
        return self.layers[i]

    class Layer(Context):
        def __init__(self, whole, k, v):
            self.whole, self.k, self.v = whole, k, v

        def rows(self, table, T):
            return self.whole.rows(table, T)

        def append(self, k, v):
            position = self.whole.position
            self.k.index_copy_(2, position, k)
            self.v.index_copy_(2, position, v)
            return self.k, self.v, (torch.arange(self.k.size(2), device=k.device) <= position)[None]
