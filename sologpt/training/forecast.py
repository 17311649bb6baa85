"""
Forecast: how much of a GPU's memory a training step takes, found out without a GPU.

The step runs on tensors that have shapes and dtypes but no data (torch's fake tensors), and what is alive at each
moment is added up. Eager, that is every tensor that an operation makes. Compiled, it is what torch's partitioner keeps
for the backward, which its graphs show, and what must exist because a kernel that is not fused reads it: a matmul,
attention. What Inductor fuses takes nothing.

Not seen are the kernels' own workspaces, and what the allocator loses between blocks (SLACK).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sologpt.machine import devices
from sologpt.matmuls.attention import ATTENTION
from sologpt.matmuls.chunked_loss import loss_at_once, loss_of_logits
from sologpt.training import schedules
from sologpt.training.liveness import Alive, Liveness, nbytes
from sologpt.training.loss import TrainingLoss

SLACK = 1.05  # a step fits where this times its peak is free
CPU = torch.device('cpu')


@dataclass
class Usage:
    """Bytes of a step in micro-batches of `batch_size` sequences: what stays, and the peak of each phase."""
    batch_size: int
    weights: int
    gradients: int  # of the micro-batch before
    optimizer: int  # its state
    activations: int  # kept by the forward for the backward
    forward: int  # the forward's peak, the loss included: its logits, and the gradients that it computes
    backward: int
    update: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward, self.update)

    @property
    def temporary(self) -> int:
        """The rest of the peak: logits, new gradients, an optimizer's intermediate results."""
        return self.peak - self.weights - self.gradients - self.optimizer - (
            self.activations if self.peak > self.update else 0)


class Forecast:
    """
    The Usage of a model's step. It is found for two sizes of micro-batch, and grows evenly with the size.

    If blocks are computed again, the peak of a small micro-batch is in the loss, and that of a large one in a block,
    which grows faster. So it is found for two large ones too, and the greater value counts.
    """

    def __init__(self, model: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], block_size: int,
                 dtype: str, compile: bool = False, offloaded: bool = False, gpu: bool = True):
        """
        model: as it is trained, on any device, the meta device included; it is not changed. offloaded: the optimizer's
        state lies in the CPU's memory. gpu: the model trains on one. The step has several micro-batches: from the
        second one on, gradients exist during the forward.
        """
        tokens = 2 * max(model.config.loss_chunk, 1024)  # memory grows evenly from two chunks of the loss on
        least = -(-tokens // block_size)
        sizes = [(least, 2 * least)] + [(16 * least, 32 * least)] * (model.config.checkpoint_activations is True)
        self._known = [[_step(model, make_optimizer, size, block_size, dtype, compile, offloaded, gpu)
                        for size in pair] for pair in sizes]

    def at(self, batch_size: int) -> Usage:
        found = [_extended(few, many, batch_size) for few, many in self._known]
        return Usage(*(max(values) for values in zip(*(vars(usage).values() for usage in found), strict=True)))

    def fitting(self, limit: float, sizes: list[int]) -> list[int]:
        """Those of `sizes` whose step fits in `limit` bytes."""
        return [size for size in sizes if SLACK * self.at(size).peak <= limit]


def _extended(few, many, batch_size):
    """The Usage on the line through two others."""
    part = (batch_size - few.batch_size) / (many.batch_size - few.batch_size)
    return Usage(*(round(value + part * (getattr(many, name) - value)) for name, value in vars(few).items()))


def _step(model, make_optimizer, batch_size, block_size, dtype, compile, offloaded, gpu):
    """The Usage for one size of micro-batch."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a checkpoint's random state is real
    model = _fake_copy(model, mode)
    weights = nbytes([*model.parameters(), *model.buffers()])
    with mode:
        gradients, state, update = _update(model, make_optimizer)
    if gpu and not compile:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.LayerNorm):
                model.set_submodule(name, LayerNormInFloat32(module))
    with mode:
        x = torch.zeros(batch_size, block_size, dtype=torch.int64)
        if compile:
            activations, forward, backward = _compiled(model, x, x.clone(), dtype)
        else:
            activations, forward, backward = _eager(model, x, x.clone(), dtype, loss_at_once if gpu else loss_of_logits)
    batch = 4 * nbytes([x])  # with its targets, and the next one, which is on its way
    elsewhere = state if offloaded else 0
    held = weights + state + gradients
    return Usage(batch_size, weights, gradients, state - elsewhere, activations, *(
        batch + peak - elsewhere for peak in (held + forward, held + backward, weights + update)))


def _fake_copy(model, mode):
    """The model, with fake tensors on the CPU in place of its own."""
    with mode:
        fakes = {id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad) for p in model.parameters()}
        fakes |= {id(b): torch.empty(b.shape, dtype=b.dtype) for b in model.buffers()}
    copied = copy.deepcopy(model, fakes)
    # a CPU has no others; they keep as much, and flex, which reads no dense mask, as much as causal attention
    for block in copied.transformer.h:
        if block.attn.attend is ATTENTION['flex']:
            block.attn.attend = ATTENTION['causal']
        elif block.attn.attend not in (ATTENTION['sdpa'], ATTENTION['math']):
            block.attn.attend = ATTENTION['sdpa']
    return copied


class LayerNormInFloat32(nn.Module):
    """A LayerNorm as autocast computes it on a GPU: from a float32 copy, which is kept. Compiled, the copy is fused."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.float())


def _update(model, make_optimizer):
    """Bytes of (gradients, the optimizer's state, the peak of an update, without the weights)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with Alive([*model.parameters(), *model.buffers()]) as alive:
        optimizer = make_optimizer(model)
        schedules.set_rates(optimizer, 0, 0.0)
        for _ in range(2):  # the first one makes the state
            for p in trained:
                p.grad = torch.empty_like(p)
            alive.forget_peak()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            gradients = nbytes([p.grad for p in trained])
            optimizer.zero_grad(set_to_none=True)
        return gradients, alive.now, alive.peak


def _eager(model, x, y, dtype, piece):
    """Bytes that a micro-step makes: (kept for the backward, the forward's peak, the backward's peak)."""
    with Alive([x, y, *model.parameters(), *model.buffers()]) as alive:
        with devices.autocast(CPU, dtype):
            loss = model.loss(x, y, piece)
        kept, forward = alive.now, alive.peak
        alive.forget_peak()
        loss.backward()
        return kept, forward, alive.peak


def _compiled(model, x, y, dtype):
    """The bytes of _eager(), from the graphs of torch.compile."""
    graphs, kept_by_loss = _trace(model, x, y, dtype)
    forward, *of_chunk, backward = graphs
    made = {node.name for node in forward.nodes if node.op != 'placeholder'}
    forward_peak, kept = Liveness(forward).run()
    if of_chunk:
        weight = model.lm_head.weight
        cast = weight.numel() * devices.DTYPES[dtype].itemsize if devices.DTYPES[dtype] != weight.dtype else 0
        chunk_peak, _ = Liveness(of_chunk[0]).run()
        forward_peak, kept = max(forward_peak, kept + kept_by_loss + cast + chunk_peak), kept + kept_by_loss
    backward_peak, _ = Liveness(backward).run(frees=lambda node: node.name in made)
    return kept, forward_peak, kept + backward_peak


def _trace(model, x, y, dtype):
    """
    (the graphs of forward, of a chunk of the loss if it has chunks, and of backward; bytes that such a loss keeps).
    """
    from functorch.compile import make_boxed_func  # a second's worth of imports
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)
    torch._dynamo.reset()
    loss_of = TrainingLoss(model, compile=True, fullgraph=True, backend=aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table()))
    with devices.autocast(CPU, dtype):
        loss = loss_of(x, y)
    kept = nbytes([t for t in loss.grad_fn.saved_tensors if t is not None]) if model.config.loss_chunk else 0
    loss.backward()
    torch._dynamo.reset()  # so that these graphs do not count among those of the model that trains
    return graphs, kept
