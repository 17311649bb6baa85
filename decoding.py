"""
Decoding by a compiled step.

A GPU reads the weights of a small model in a fraction of the time that a CPU takes to launch the hundreds of kernels of
one position. So the step works on tensors whose shapes and addresses stay: it is compiled once, to fewer kernels, and
on a GPU replayed as a CUDA graph, which is a single launch. The idea is gpt-fast's
(https://github.com/meta-pytorch/gpt-fast).
"""

import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import hardware
from matmul import matmul_dtype
from model import Context, Step


def hold_for_matmuls(model, dtype):
    """
    Hold the weights of Linears in the dtype (a name) of matmuls, to which autocast would round them in every step. The
    embedding table stays as it is: a head that is tied to it gets weights of its own.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            for name, p in layer.named_parameters(recurse=False):
                setattr(layer, name, nn.Parameter(p.detach().to(hardware.DTYPES[dtype]), requires_grad=False))


class BiasApart(nn.Linear):
    """
    For a single row torch.compile makes of a matmul a kernel of its own, which reads the weight at the memory's full
    rate and takes in what stands around it, but not of a matmul with a bias.
    """

    def forward(self, x):
        return F.linear(x, self.weight) + self.bias.to(matmul_dtype(x))


class FixedCache(Context):
    """
    What a KVCache holds, in tensors whose shapes and addresses stay, and the number of positions in a tensor as well;
    to it one position at a time is added.
    """

    def __init__(self, cache, positions):
        """Room for what such a KVCache holds, and so many positions."""
        k = cache.layers[0].k
        B, H, _, hd = k.shape
        # zeros, because what a query does not see is still multiplied, by zero
        self.layers = [self.Layer(self, *(k.new_zeros(B, H, positions, hd) for _ in range(2))) for _ in cache.layers]
        self.last_embedding = None if cache.last_embedding is None else torch.zeros_like(cache.last_embedding)
        self.position = torch.zeros(1, dtype=torch.long, device=k.device)

    def take(self, cache):
        """Hold what the KVCache holds."""
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


class CompiledStep(Step):
    """
    A Step that is compiled when it first begins, for the batch and the dtype of that cache, and anew for others. On a
    GPU the next call overwrites what it has returned, and weights may change their values, but not their place.
    """

    def __init__(self, model, backend='inductor'):
        super().__init__(model)
        self.kind, self.seconds = None, 0.0  # ... that compiling has taken
        for layer in model.modules():
            if type(layer) is nn.Linear and layer.bias is not None:
                layer.__class__ = BiasApart
        # without this option a single row is multiplied by the general kernels
        options = {'coordinate_descent_tuning': True} if backend == 'inductor' else None
        self.compiled = torch.compile(self._logits, fullgraph=True, dynamic=False, backend=backend, options=options)

    def _logits(self):
        x = self.model.contextual(self.model.transformer.wte(self.ids), self.cache)
        self.cache.position.add_(1)
        return self.model.lm_head(x[:, -1])

    def begin(self, cache):
        k = cache.layers[0].k
        kind = len(k), k.dtype, k.device
        if kind != self.kind:
            began = time.perf_counter()
            self.ids = torch.zeros(len(k), 1, dtype=torch.long, device=k.device)
            self.cache, self.kind = FixedCache(cache, self.model.config.block_size), kind
            if k.device.type == 'cuda':
                self.run = self._capture()
            else:
                self.compiled()
                self.run = self.compiled
            self.seconds += time.perf_counter() - began
        self.cache.take(cache)

    def _capture(self):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is captured may neither compile nor tune
            self.compiled()
        with torch.cuda.graph(graph, stream=stream):
            logits = self.compiled()
        torch.cuda.synchronize()

        def replay():
            graph.replay()
            return logits
        return replay

    def __call__(self, ids):
        self.ids.copy_(ids)
        return self.run()


def read(stream):
    """The ids that a model's stream() yields, as lists; each is waited for while the device computes the next."""
    coming = []
    for ids in stream:
        copied = ids.to('cpu', non_blocking=ids.is_cuda)
        coming.append((copied, torch.cuda.current_stream().record_event() if ids.is_cuda else None))
        if len(coming) == 2:
            yield _arrived(*coming.pop(0))
    for last in coming:
        yield _arrived(*last)


def _arrived(ids, event):
    if event:
        event.synchronize()
    return ids.tolist()
