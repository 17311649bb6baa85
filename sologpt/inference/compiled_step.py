"""
The step from one token to the next, compiled.

One position of a small model needs hundreds of kernels. A CPU takes longer to launch them than a GPU takes to run them.
So this step works on tensors whose shapes and addresses stay the same. It is compiled once, to fewer kernels, and on a
GPU it is replayed as a CUDA graph, which is a single launch. The idea is gpt-fast's
(https://github.com/meta-pytorch/gpt-fast).
"""

import math
import time
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from sologpt.inference.contexts import FixedCache, KVCache
from sologpt.inference.generation import Step
from sologpt.machine.devices import matmul_dtype

LEAST_ROOM = 1024  # positions in a fixed cache, if the model has so many


class BiasApart(nn.Linear):
    """
    A Linear that adds its bias in an operation of its own.

    For a single row, torch.compile turns a matmul into a kernel of its own, which reads the weight at the memory's full
    rate and is fused with what surrounds it. It does not do so for a matmul with a bias.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> 'BiasApart':
        """A layer that computes what `linear` computes, with the same parameters."""
        layer = cls(linear.in_features, linear.out_features, device='meta')
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.bias.to(matmul_dtype(x))


class CompiledStep(Step):
    """
    A Step that is compiled when it first begins, and again when the batch, the dtype or the device changes, or if a
    cache has more positions than there is room for.

    On a GPU, each call overwrites the logits that the call before it returned. The values of weights may change, but
    not their addresses.
    """

    def __init__(self, model: nn.Module, backend: str = 'inductor'):
        """model: its Linears with a bias are replaced by BiasApart. backend: torch.compile's."""
        super().__init__(model)
        self.kind = None  # what the step is compiled for: the batch, the dtype and the device of a cache
        self.room = 0  # positions in the fixed cache
        self.seconds = 0.0  # spent compiling
        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear and layer.bias is not None:
                model.set_submodule(name, BiasApart.from_linear(layer))
        # without this option, a single row is multiplied by the general kernels
        options = {'coordinate_descent_tuning': True} if backend == 'inductor' else None
        self.compiled = torch.compile(self._logits, fullgraph=True, dynamic=False, backend=backend, options=options)

    def _logits(self) -> torch.Tensor:
        x = self.model.contextual(self.model.transformer.wte(self.ids), self.cache)
        self.cache.position.add_(1)
        return self.model.lm_head(x[:, -1])

    def begin(self, cache: KVCache) -> None:
        k = cache.layers[0].k
        kind, positions = (len(k), k.dtype, k.device), k.size(2)
        if kind != self.kind or positions > self.room:
            began = time.perf_counter()
            self.ids = torch.zeros(len(k), 1, dtype=torch.long, device=k.device)
            # a power of two, so that longer and longer texts are seldom compiled for
            self.room = min(max(LEAST_ROOM, 2 ** math.ceil(math.log2(positions))), self.model.config.block_size)
            self.cache, self.kind = FixedCache(cache, self.room), kind
            if k.device.type == 'cuda':
                self.run = self._capture()
            else:
                self.compiled()
                self.run = self.compiled
            self.seconds += time.perf_counter() - began
        self.cache.copy_from(cache)

    def _capture(self) -> Callable[[], torch.Tensor]:
        """A function that replays the compiled step and returns its logits, which stay in one place."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # nothing may compile or tune during the capture
            self.compiled()
        with torch.cuda.graph(graph, stream=stream):
            logits = self.compiled()
        torch.cuda.synchronize()

        def replay():
            graph.replay()
            return logits
        return replay

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids.copy_(ids)
        return self.run()
