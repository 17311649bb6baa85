"""
Drawing text from a model, token by token.

A model here is anything with GPT's `next_logits(idx, context)`, `new_cache(batch, positions)`, `config` and
`n_virtual`. stream() yields the ids of one position after another, and generate() returns all of them.
"""

import math
from collections.abc import Collection, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

from sologpt.inference.contexts import KVCache

Tensor = torch.Tensor


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None) -> Tensor:
    """
    Draw one id per row: (B, vocab_size) -> (B,).

    temperature: 0 takes the likeliest id. top_k: draw among the k likeliest ids; None or 0: among all. top_p: draw
    among the likeliest ids that together have probability p (https://arxiv.org/abs/1904.09751). generator: where random
    numbers come from; None: torch's own.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # the probability of all likelier ids together
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered.masked_fill(before >= top_p, 0.0))
    # This draws what torch.multinomial draws. But that also checks the probabilities, and so waits for the device.
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1)


class Step:
    """Computes the logits of the position after those of a KVCache, and adds the position to it."""

    def __init__(self, model: nn.Module):
        self.model = model

    def begin(self, cache: KVCache) -> None:
        """Go on from this cache. It has to hold at least one position."""
        self.cache = cache

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: (B, 1), the newest position's -> (B, vocab_size), the logits of the next position."""
        return self.model.next_logits(ids, self.cache)


@torch.no_grad()
def stream(model: nn.Module, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None, ends: Collection[int] = (), window_step: int = 1,
           generator: torch.Generator | None = None, step: Step | None = None) -> Iterator[Tensor]:
    """
    Continue idx, (B, T) ids: yields (B,) ids, max_new_tokens times, without waiting for the device.

    temperature, top_k, top_p, generator: see sample(). ends: a row that has drawn one of these ids repeats it.
    step: what computes one new position; None means a Step.

    Up to block_size tokens, each step computes its one new position against cached keys and values. Beyond, the window
    of tokens that the model sees moves, and every move computes the whole window again. With window_step=1 it moves for
    each token, as nanoGPT does. Otherwise it moves once in window_step tokens, so that the model sees between
    block_size - window_step + 1 and block_size tokens.
    """
    step = step or Step(model)
    block_size = model.config.block_size - model.n_virtual
    length = None  # tokens in the window
    done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    end_ids = torch.tensor(list(ends), dtype=torch.long, device=idx.device)
    for _ in range(max_new_tokens):
        if length is None or length == block_size:
            keep = block_size if idx.size(1) <= block_size else block_size - window_step + 1
            window = idx[:, -keep:]
            length = window.size(1)
            cache = model.new_cache(idx.size(0), min(block_size, length + max_new_tokens))
            logits = model.next_logits(window, cache)
            if length < block_size:
                step.begin(cache)
        else:
            logits = step(idx[:, -1:])
            length += 1
        logits = logits.float()
        logits[:, model.config.n_ids:] = -math.inf
        next_ids = sample(logits, temperature, top_k, top_p, generator)
        if ends:
            next_ids = torch.where(done, idx[:, -1], next_ids)
            done |= (next_ids[:, None] == end_ids).any(dim=1)
        idx = torch.cat([idx, next_ids[:, None]], dim=1)
        yield next_ids


def generate(model: nn.Module, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
             ends: Collection[int] = (), **options) -> Tensor:
    """
    idx, (B, T) ids, and its continuation by stream(): (B, T + max_new_tokens) ids. It ends earlier if every row has
    drawn one of `ends`. options: see stream().
    """
    new = []
    for ids in stream(model, idx, max_new_tokens, temperature, top_k, ends=ends, **options):
        new.append(ids)
        if ends and all(i in ends for i in ids.tolist()):
            break
    return torch.cat([idx] + [ids[:, None] for ids in new], dim=1)


def lists_of(steps: Iterator[Tensor]) -> Iterator[list[int]]:
    """
    Yields the ids of each step of a stream() as a list. While it waits for one step's ids, the device computes the next
    ones.
    """
    coming = []
    for ids in steps:
        copied = ids.to('cpu', non_blocking=ids.is_cuda)
        coming.append((copied, torch.cuda.current_stream().record_event() if ids.is_cuda else None))
        if len(coming) == 2:
            yield _arrived(*coming.pop(0))
    for last in coming:
        yield _arrived(*last)


def _arrived(ids, event):
    """The ids as a list, when their copy is complete."""
    if event:
        event.synchronize()
    return ids.tolist()
