"""
How much of a GPU's memory a training step takes, foreseen without one: the step runs on tensors that have shapes and
dtypes but no data (torch's fake tensors), and what is alive at each moment is added up.

Eager, that is every tensor that an operation makes. Compiled, it is what torch's partitioner keeps for backward, which
can be read off its graphs, and of the rest what has to exist because a matmul, attention or another kernel that is
not fused reads it; what Inductor fuses takes nothing. Not seen: the kernels' own workspaces, and what the allocator
loses between blocks (SLACK).
"""

import contextlib
import copy
import operator
import weakref
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configurator import InputError
from sologpt.machine import devices
from sologpt.matmuls.attention import ATTENTION
from sologpt.training import schedules
from sologpt.training.loss import TrainingLoss

SLACK = 1.05  # a step fits where this times its memory is there
CPU = torch.device('cpu')
# parts of the names of operations that Inductor does not fuse with what is around them
KERNELS = ('mm', 'scaled_dot_product', 'attention', 'embedding_dense', 'index_put', 'scatter', 'sort', 'topk', 'cumsum')


@dataclass
class Usage:
    """Bytes of a step in micro-batches of `batch_size` sequences: what is always there, and each phase's peak."""
    batch_size: int
    weights: int
    gradients: int  # that are there from the micro-batch before
    optimizer: int  # its state
    activations: int  # kept by forward for backward
    forward: int  # the most that forward holds, the loss included: its logits, and the gradients that it computes
    backward: int
    update: int

    @property
    def peak(self):
        return max(self.forward, self.backward, self.update)

    @property
    def temporary(self):
        """What the peak has besides: logits, new gradients, an optimizer's intermediate results."""
        return self.peak - self.weights - self.gradients - self.optimizer - (
            self.activations if self.peak > self.update else 0)


class Forecast:
    """
    The Usage of a model: all of it is known of two sizes of micro-batch, and grows evenly with them.

    model: as it is trained, on any device, the meta device included; it is not touched. make_optimizer: of a model.
    offloaded: whether the optimizer's state lies in the CPU's memory. gpu: whether that is where it trains. A step is
    taken to have several micro-batches: from the second on the gradients are there during forward.
    """

    def __init__(self, model, make_optimizer, block_size, dtype, compile=False, offloaded=False, gpu=True):
        tokens = 2 * max(model.config.loss_chunk, 1024)  # from two pieces of the loss on, memory grows evenly
        least = -(-tokens // block_size)
        self._known = [_step(model, make_optimizer, size, block_size, dtype, compile, offloaded, gpu)
                       for size in (least, 2 * least)]

    def at(self, batch_size):
        few, many = self._known
        part = (batch_size - few.batch_size) / (many.batch_size - few.batch_size)
        values = {name: round(value + part * (getattr(many, name) - value)) for name, value in vars(few).items()}
        return Usage(**values)

    def fitting(self, limit, sizes):
        """Those of `sizes` whose step fits in `limit` bytes."""
        return [size for size in sizes if SLACK * self.at(size).peak <= limit]


def fake_copy(model, mode):
    """The model with fake tensors on the CPU in the place of its own."""
    with mode:
        fakes = {id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad) for p in model.parameters()}
        fakes |= {id(b): torch.empty(b.shape, dtype=b.dtype) for b in model.buffers()}
    copied = copy.deepcopy(model, fakes)
    for block in copied.transformer.h:
        if block.attn.attend not in (ATTENTION['sdpa'], ATTENTION['math']):  # a CPU has no others; they keep as much
            block.attn.attend = ATTENTION['sdpa']
    return copied


def _step(model, make_optimizer, batch_size, block_size, dtype, compile, offloaded, gpu):
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a checkpoint's random state is real
    model = fake_copy(model, mode)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = nbytes([*model.parameters(), *model.buffers()])
    with mode, Alive([*model.parameters(), *model.buffers()]) as alive:
        optimizer = make_optimizer(model)
        schedules.set_rates(optimizer, 0, 0.0)
        for _ in range(2):  # the first makes the state
            for p in trained:
                p.grad = torch.empty_like(p)
            alive.forget_peak()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            gradients = nbytes([p.grad for p in trained])
            optimizer.zero_grad(set_to_none=True)
        update, state = alive.peak, alive.now
    for module in model.modules() if gpu and not compile else ():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = LayerNormOfGPU
    with mode:
        x = torch.zeros(batch_size, block_size, dtype=torch.int64)
        activations, forward, backward = (_compiled if compile else _eager)(model, x, x.clone(), dtype)
    batch = 4 * nbytes([x])  # with its targets, and the next one, which is on its way
    elsewhere = state if offloaded else 0
    held = weights + state + gradients
    return Usage(batch_size, weights, gradients, state - elsewhere, activations, *(
        batch + peak - elsewhere for peak in (held + forward, held + backward, weights + update)))


def nbytes(tensors):
    """Of the storages of tensors, each counted once."""
    return sum({s._cdata: s.nbytes() for s in [t.untyped_storage() for t in tensors]}.values())


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made in this mode and that still exist."""

    def __init__(self, tensors):
        """tensors: that there are already, for a view of one is made as well."""
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(t.untyped_storage() for t in tensors)

    def forget_peak(self):
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)


class LayerNormOfGPU(nn.LayerNorm):
    """There autocast computes it in float32, from a copy, which is kept; compiled, the copy is fused."""

    def forward(self, x):
        return super().forward(x.float())


def _eager(model, x, y, dtype):
    """Bytes of what a micro-step makes: (kept for backward, the most in forward, the most in backward)."""
    with Alive([x, y, *model.parameters(), *model.buffers()]) as alive:
        with devices.autocast(CPU, dtype):
            loss = model.loss(x, y)
        kept, forward = alive.now, alive.peak
        alive.forget_peak()
        loss.backward()
        return kept, forward, alive.peak


def _compiled(model, x, y, dtype):
    """The same from the graphs of torch.compile."""
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
    in_loss = nbytes([t for t in loss.grad_fn.saved_tensors if t is not None]) if model.config.loss_chunk else 0
    loss.backward()
    torch._dynamo.reset()  # this model's graphs are not to count among those of the one that trains
    forward, *of_chunk, backward = graphs
    made = {node.name for node in forward.nodes if node.op != 'placeholder'}
    forward_peak, kept = Liveness(forward).run()
    if of_chunk:
        weight = model.lm_head.weight
        cast = weight.numel() * devices.DTYPES[dtype].itemsize if devices.DTYPES[dtype] != weight.dtype else 0
        chunk_peak, _ = Liveness(of_chunk[0]).run()
        forward_peak, kept = max(forward_peak, kept + in_loss + cast + chunk_peak), kept + in_loss
    backward_peak, _ = Liveness(backward).run(frees=lambda node: node.name in made)
    return kept, forward_peak, kept + backward_peak


class Liveness:
    """When the tensors of a graph come and go, in bytes, if all that can be fused is."""

    def __init__(self, graph):
        self.nodes, self.place = list(graph.nodes), {node: i for i, node in enumerate(graph.nodes)}
        self.storages = {node: {s._cdata: s for s in self._storages(node)} for node in self.nodes}
        self.exists, self.until = {}, {}
        for node in reversed(self.nodes):
            self.exists[node] = self._exists(node)
            # what does not exist is computed where it is used, from what it is made of
            self.until[node] = max([self.place[node], *(
                self.until[user] if self._is_view(user, node) or not self.exists[user] else self.place[user]
                for user in node.users)])

    @staticmethod
    def _storages(node):
        return [s for t in tree_leaves(node.meta.get('val')) if isinstance(t, torch.Tensor)
                and isinstance((s := t.untyped_storage()).nbytes(), int)]  # not a random state's, of unknown length

    def _is_view(self, user, node):
        return user.target is operator.getitem or bool(self.storages[user].keys() & self.storages[node].keys())

    def _is_kernel(self, node):
        return (not isinstance(node.target, torch._ops.OpOverload)
                or any(part in node.target.overloadpacket.__name__ for part in KERNELS))

    def _exists(self, node):
        """Whether it is in memory: a kernel's, a reduction's, or what one of these, or the graph's output, reads."""
        if node.op != 'call_function' or self._is_kernel(node):
            return True
        size = sum(s.nbytes() for s in self.storages[node].values())
        if any(size < s.nbytes() for source in node.all_input_nodes for s in self.storages[source].values()):
            return True
        return any(self.exists[user] if self._is_view(user, node) else user.op == 'output' or self._is_kernel(user)
                   for user in node.users)

    def run(self, frees=lambda node: False):
        """(the most bytes, those at the end) of what the graph makes. frees: which inputs go after their last use."""
        ends, maker, until = {}, {}, {}
        for node in self.nodes:
            for key in self.storages[node]:
                maker.setdefault(key, node)
                until[key] = max(until.get(key, 0), self.until[node])
        for key, i in until.items():
            ends.setdefault(i, []).append(key)
        now = peak = 0
        for i, node in enumerate(self.nodes):
            if node.op == 'output':
                break
            if node.op != 'placeholder' and self.exists[node]:
                now += sum(s.nbytes() for key, s in self.storages[node].items() if maker[key] is node)
            peak = max(peak, now)
            for key in ends.get(i, []):
                made_by = maker[key]
                if frees(made_by) if made_by.op == 'placeholder' else self.exists[made_by]:
                    now -= self.storages[made_by][key].nbytes()
        return peak, now


def divisors(n):
    """Those of n, the largest first."""
    return [size for size in range(n, 0, -1) if n % size == 0]


@contextlib.contextmanager
def out_of_memory_advice(batch_size, accumulation, limit, forecast):
    """
    Turns running out of a GPU's memory into an InputError that names a micro-batch that fits, and as many more of
    them. limit: bytes there are. forecast: a function that makes a Forecast.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        sizes = divisors(batch_size)[1:]
        size, expected = next(iter(sizes), None), ', a guess'
        with contextlib.suppress(Exception):  # whatever it is, it would hide what has happened
            foreseen = forecast()
            size = max(foreseen.fitting(limit, sizes), default=None)
            expected = f', which is foreseen to take {foreseen.at(size).peak / 1e9:.1f} GB' if size else ''
        raise InputError(
            f'out of GPU memory with batch_size={batch_size}, of {limit / 1e9:.1f} GB: ' + (
                f'the same step in smaller pieces is --batch_size={size} '
                f'--gradient_accumulation_steps={accumulation * batch_size // size}{expected}' if size else
                'use --checkpoint_activations=True, --optimizer_state=8bit, an adapter, a smaller block_size or a '
                'smaller model')) from None


def fastest(sizes, seconds, forecast, limit, device):
    """
    Of sizes of a micro-batch, those that fit in `limit` bytes are timed one after the other, each about half or twice
    the one before, as long as tokens per second rise: on a GPU from the largest down, on a CPU from the smallest up.
    seconds(size): of a micro-step. Returns the fastest and, in words, what was found. Raises InputError.
    """
    fitting = forecast.fitting(limit, sizes)
    if not fitting:
        raise InputError(f'not even batch_size=1 fits in {limit / 1e9:.1f} GB: a step would take '
                         f'{forecast.at(1).peak / 1e9:.1f} GB; use --checkpoint_activations=True, '
                         f'--optimizer_state=8bit or an adapter')
    order = sorted(fitting, reverse=device.type != 'cpu')
    speeds, tried = {}, None
    for size in order:
        if tried and max(size, tried) < 2 * min(size, tried):
            continue
        try:
            speeds[size] = size / seconds(size)
        except torch.OutOfMemoryError:  # the forecast was wrong
            continue
        finally:
            torch.cuda.empty_cache()  # a larger one's blocks are of no use to a smaller one
        tried = size
        if speeds[size] < 1.02 * max((v for s, v in speeds.items() if s != size), default=0.0):
            break
    if not speeds:
        raise InputError(f'out of GPU memory with each batch_size of {", ".join(map(str, order))}')
    best = max(speeds, key=speeds.get)
    found = ', '.join(f'{size}: {speed / speeds[best]:.2f}' for size, speed in sorted(speeds.items()))
    return best, f'fastest of {found} (tokens per second, {best} = 1)'
