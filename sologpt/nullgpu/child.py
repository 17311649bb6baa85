"""
Runs a script on the null GPU: python child.py SCRIPT ARGUMENTS. run.py starts it, with the library loaded beforehand.

What the library cannot see from below is written into its log from here: the bytes that operations move, the FLOPs of
attention, and where in the training loop a run is. The script itself is not changed.

How bytes are counted. An eager operation reads each tensor that it is given, and writes each one that it returns or
changes. A tensor counts once, with the elements that exist: an expanded dimension counts as 1. Of a table that is
indexed, the rows that come out count. A Triton kernel counts what Inductor says of it. Not counted is what an operation
reads twice, or keeps in between in memory of its own. What is found in the cache counts as if it were read from memory.
"""

import ctypes
import json
import math
import os
import runpy
import sys

import torch
from torch._inductor.runtime import triton_heuristics
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operations that do not read what they change
OVERWRITING = ('copy_', 'fill_', 'zero_', 'normal_', 'uniform_', 'random_', 'bernoulli_', 'exponential_',
               '_foreach_copy_', '_foreach_zero_')
INDEXING = ('embedding', 'index_select', 'index', 'gather')  # of their first tensor they read what comes out
GRADIENTS = 'grads'  # fused optimizers declare that they change these; they do so with a GradScaler alone


class Log:
    """The log of the library, which has to be loaded in this process."""

    def __init__(self):
        library = ctypes.CDLL(None)
        self.written, self._write = library.nullgpu_written, library.nullgpu_write
        self.written.restype = ctypes.c_ulong

    def write(self, event: str, **fields) -> None:
        self._write(json.dumps({'event': event} | fields).encode())

    def mark(self, what: str) -> None:
        self.write('mark', what=what, peak=torch.cuda.max_memory_allocated())


# ---- what operations cost --------------------------------------------------------------------------------------------

def tensors(value) -> list[torch.Tensor]:
    """The tensors in nested lists and tuples."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def nbytes(tensor: torch.Tensor) -> int:
    """The bytes of the elements that exist in memory: a dimension without stride counts as 1."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size]
    return math.prod(sizes) * tensor.element_size()


def op_bytes(op: torch._ops.OpOverload, args: tuple, kwargs: dict, out) -> int:
    """The bytes that an operation reads and writes. out: what it has returned."""
    name = op._schema.name.split('::')[1]
    given = list(zip(op._schema.arguments, args, strict=False))
    given += [(argument, kwargs[argument.name]) for argument in op._schema.arguments if argument.name in kwargs]
    fused = name.startswith('_fused_') and kwargs.get('grad_scale') is None
    total, seen = 0, set()
    for argument, value in given:
        changes = argument.alias_info is not None and argument.alias_info.is_write
        reads = not changes or not (argument.kwarg_only or name in OVERWRITING)
        writes = changes and not (fused and argument.name == GRADIENTS)
        for tensor in tensors(value):
            if not (name in INDEXING and not seen):
                total += nbytes(tensor) * (reads + writes)
            seen.add(id(tensor))
    made = [tensor for tensor in tensors(out) if id(tensor) not in seen]
    written = sum(nbytes(tensor) for tensor in made)
    return total + written * (2 if name in INDEXING else 1)


def attention_flops(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> int | None:
    """
    The FLOPs of an attention kernel, forward or backward; None: it is none. Causal attention counts as half, and the
    backward as 5 matmuls beside the 2 of the forward, as flash attention computes them. Packed sequences, whose lengths
    are values, count as if all were of the greatest length.
    """
    name = op._schema.name
    given = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    q, k, v = (given.get(key) for key in ('query', 'key', 'value'))
    if 'att' not in name or q is None or k is None or v is None:
        return None
    if q.dim() == 3:  # packed: (tokens, heads, head size)
        pairs = q.shape[0] * q.shape[1] * int(given.get('max_k') or k.shape[0])
    else:
        long, heads = (1, 2) if name.startswith(('aten::_flash', 'aten::_efficient')) else (2, 1)
        pairs = q.shape[0] * q.shape[heads] * q.shape[long] * k.shape[long]
    window = given.get('window_size')
    if given.get('is_causal') or window is not None and list(window)[-1] == 0:
        pairs //= 2
    flops = 2 * pairs * (q.shape[-1] + v.shape[-1])
    return flops * 5 // 2 if 'backward' in name else flops


class CountOps(TorchDispatchMode):
    """Writes an Op after each operation that has asked something of the device."""
    supports_higher_order_operators = True

    def __init__(self, log: Log):
        super().__init__()
        self.log = log

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile compiles under this mode, which then sees the operations that compiled code calls."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, before = kwargs or {}, self.log.written()
        out = func(*args, **kwargs)
        covers = self.log.written() - before
        if covers and not any(isinstance(t, FakeTensor) for t in tensors((args, kwargs, out))):
            if isinstance(func, HigherOrderOperator):  # an operation with its random state, which is the first argument
                func, *args = args
            flops = attention_flops(func, args, kwargs)
            kind, dtype = ('aten', '') if flops is None else ('attention', str(tensors(args)[0].dtype).split('.')[1])
            self.log.write('op', kind=kind, name=str(func), bytes=op_bytes(func, args, kwargs, out), flops=flops or 0,
                           dtype=dtype, covers=covers)
        return out


def count_triton_kernels(log: Log) -> None:
    """From now on write an Op after each kernel of Inductor's."""
    launch = triton_heuristics.CachingAutotuner.run

    def run(self, *args, **kwargs):
        before = log.written()
        out = launch(self, *args, **kwargs)
        gigabytes = self.inductor_meta.get('kernel_num_gb') or 0.0  # TORCHINDUCTOR_BENCHMARK_KERNEL=1 has it counted
        log.write('op', kind='triton', name=self.fn.__name__, bytes=round(1e9 * gigabytes), flops=0, dtype='',
                  covers=log.written() - before)
        return out
    triton_heuristics.CachingAutotuner.run = run


# ---- what is put in place of something -------------------------------------------------------------------------------

def replace_cudnn_attention(log: Log) -> torch.library.Library:
    """
    Let cuDNN's attention allocate its results and log a launch. The real one asks a device what it can do. It stays
    replaced as long as the returned library exists.
    """
    def forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
                return_debug_mask=False, *, scale=None):
        log.write('launch', kind='cudnn', name='attention_forward')
        B, H, T, _ = query.shape
        out = query.new_empty(B, T, H, value.shape[3]).transpose(1, 2)
        log_sum = query.new_empty((B, H, T, 1) if compute_log_sumexp else 0, dtype=torch.float32)
        seed, offset = (query.new_empty((), dtype=torch.long) for _ in range(2))
        return out, log_sum, None, None, T, key.shape[2], seed, offset, query.new_empty(0)

    def backward(grad_out, query, key, value, *args, **kwargs):
        log.write('launch', kind='cudnn', name='attention_backward')
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    library = torch.library.Library('aten', 'IMPL')
    library.impl('_scaled_dot_product_cudnn_attention', forward, 'CUDA')
    library.impl('_scaled_dot_product_cudnn_attention_backward', backward, 'CUDA')
    return library


def accept_zeros(folder: str) -> None:
    """Let this project's trainer not stop because a step is not finite: it would read that from a zero."""
    if os.path.exists(os.path.join(folder, 'sologpt', 'training', 'stopping.py')):
        from sologpt.training import stopping
        stopping.FiniteWatch.check = lambda *args, **kwargs: None


def mark_training(log: Log) -> None:
    """Write a Mark before and after each backward and each update, whoever's training loop it is."""
    register_optimizer_step_pre_hook(lambda *_: log.mark('update_begin'))
    register_optimizer_step_post_hook(lambda *_: log.mark('update_end'))
    backward = torch.autograd.backward

    def marked(*args, **kwargs):
        log.mark('backward_begin')
        backward(*args, **kwargs)
        log.mark('backward_end')
    torch.autograd.backward = marked


def main() -> None:
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    os.environ.pop('LD_PRELOAD', None)  # not for compilers that are started from here
    log = Log()
    library = replace_cudnn_attention(log)
    count_triton_kernels(log)
    mark_training(log)
    accept_zeros(sys.path[0])
    with CountOps(log):
        runpy.run_path(script, run_name='__main__')
    log.mark('end')
    del library


if __name__ == '__main__':
    main()
