"""
What 'auto' chooses on this machine: the dtype of matmuls, the attention kernel, whether to compile.

Each choice is returned as (value, why), so that a run can print the reason.
"""

import contextlib
import sys
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import InputError
from sologpt.machine import clock, devices

GPU_ATTENTION = {'cudnn': SDPBackend.CUDNN_ATTENTION, 'flash': SDPBackend.FLASH_ATTENTION}


def find_dtype(name: str, device: torch.device, shape: tuple[int, int, int] | None = None) -> tuple[str, str]:
    """
    (a dtype's name, why): the dtype of matmuls for 'auto', or the given one if the device can compute in it.

    On a CPU 'auto' measures a Linear of `shape`, (rows, in, out), forward and backward. It takes bfloat16 if that is at
    least 1.2 times as fast as float32. Raises InputError.
    """
    if name != 'auto' and name not in devices.DTYPES:
        raise InputError(f'dtype={name!r} is not known: use auto, {", ".join(devices.DTYPES)}')
    if device.type == 'cuda':
        has_bf16 = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
        if name == 'bfloat16' and not has_bf16:
            raise InputError(f'dtype=bfloat16: {devices.device_name(device)} only emulates it, slowly: use float16')
        if name == 'auto':
            return ('bfloat16', 'in hardware') if has_bf16 else ('float16', 'no bfloat16 in hardware')
    elif device.type == 'cpu':
        if name == 'float16' and not cpu_has_float16():
            raise InputError('dtype=float16: this CPU has no float16 arithmetic: use bfloat16 or float32')
        if name == 'auto':
            gain = _linear_seconds(torch.float32, *shape) / _linear_seconds(torch.bfloat16, *shape)
            why = f'a Linear is {gain:.1f}x as fast in bfloat16 as in float32'
            return ('bfloat16' if gain >= 1.2 else 'float32'), why
    elif name == 'auto':
        return 'float32', 'the default on this device'
    elif name == 'float16':
        raise InputError(f'dtype=float16 needs loss scaling, which {device.type} does not have: use bfloat16 or '
                         f'float32')
    return name, 'as asked'


def cpu_has_float16() -> bool:
    """Whether this CPU computes in float16."""
    cpu = devices.cpu_capabilities()
    return bool(cpu.get('avx512_fp16') or cpu.get('amx_fp16') or cpu.get('architecture') == 'aarch64')


def has_float8(device: torch.device) -> bool:
    """Whether torch can cast to its 8-bit floats on this device, also in compiled code."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 9) or torch.__version__ >= '2.13'
    return device.type == 'cpu'


def cpu_has_int8() -> bool:
    """Whether this CPU has instructions for int8 matmuls that torch uses. Without them torch runs a plain loop."""
    return bool(devices.cpu_capabilities().get('avx512_vnni'))


def attention_misfit(name: str, device: torch.device, dtype: str, dropout: float = 0.0, documents: bool = False,
                     compiled: bool = False) -> str:
    """
    What an attention kernel has to do with but cannot, in words; '' if there is nothing.

    dropout: the run's. documents: whether tokens see only their own document. compiled: whether the model is.
    """
    found = [
        (name in GPU_ATTENTION and documents, 'has no document_mask'),
        (name in ('flex', *GPU_ATTENTION) and (device.type != 'cuda' or dtype == 'float32'),
         'is for a GPU, in bfloat16 or float16'),
        (name == 'cudnn' and 16 * dropout % 1, f'takes dropout in sixteenths, and {dropout} is not one'),
        (name == 'flex' and not documents, 'is for document_mask=True'),
        (name == 'flex' and dropout, 'has no dropout'),
        (name == 'flex' and not compiled, 'is for a model that is compiled')]
    return next((why for is_so, why in found if is_so), '')


def find_attn_backend(name: str, device: torch.device, dtype: str, block_size: int,
                      shape: tuple[int, int, int, int, int] | None = None, dropout: float = 0.0) -> tuple[str, str]:
    """
    (a backend, why): the attention kernel for 'auto', or the given one if this GPU has it.

    On a CPU 'auto' goes by length: up to 1024 tokens (in float32, 512) two plain matmuls and a softmax are faster than
    torch's flash kernel, whose small inner products run at a fraction of the matmul rate. On a GPU in 16 bits 'auto'
    measures forward and backward with `shape`, (B, H, G, T, hd) for H heads of queries and G of keys, and `dropout`;
    None leaves the choice to torch. Raises InputError.
    """
    if name not in ('auto', 'sdpa', 'math', 'flex', *GPU_ATTENTION):
        raise InputError(f'attn_backend={name!r} is not known: use auto, sdpa, math, flex, '
                         f'{" or ".join(GPU_ATTENTION)}')
    if name != 'auto' and (shape is None or name not in GPU_ATTENTION):
        return name, 'as asked'
    if device.type == 'cpu':
        return ('math' if block_size <= (512 if dtype == 'float32' else 1024) else 'sdpa'), 'by length'
    if device.type != 'cuda' or dtype == 'float32' or shape is None:
        return 'sdpa', "torch's fused kernels"
    found = {}
    for kernel in GPU_ATTENTION if name == 'auto' else [name]:
        with contextlib.suppress(RuntimeError):  # not on this GPU, or not for this shape or dropout
            found[kernel] = _attention_seconds(kernel, device, devices.DTYPES[dtype], shape, dropout)
    if name in found:
        return name, 'as asked'
    if name != 'auto':
        raise InputError(f'attn_backend={name}: torch does not have it on {devices.device_name(device)} for heads of '
                         f'{shape[-1]} dimensions: use auto')
    if not found:
        return 'sdpa', "torch's fused kernels"
    return min(found, key=found.get), ', '.join(f'{kernel} {1000 * s:.2f} ms' for kernel, s in found.items())


def can_compile(device: torch.device) -> tuple[bool, str]:
    """(whether torch.compile works and pays here, why). On a GPU it compiles a small function to find out."""
    if device.type != 'cuda':
        return False, f'on {device.type} it gains little and takes a minute'
    if sys.platform == 'win32':
        return False, 'no Triton on Windows'
    try:
        x = torch.ones(32, 32, device=device)
        torch.compile(lambda t: (t @ t).relu().sum())(x)
    except Exception as e:
        return False, f'{type(e).__name__}: {str(e).splitlines()[0][:100]}'
    return True, 'it works here'


def _linear_seconds(dtype: torch.dtype, rows: int, n_in: int, n_out: int) -> float:
    """Seconds of a Linear's forward and backward in dtype, for at most 512 rows."""
    x = torch.ones(min(rows, 512), n_in, requires_grad=True)
    w = torch.ones(n_out, n_in, requires_grad=True)

    def run():
        y = F.linear(x.to(dtype), w.to(dtype))  # the casts are part of the price
        y.backward(y.detach())
    return clock.shortest_seconds(run, torch.device('cpu'))


def _attention_seconds(kernel: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...],
                       dropout: float) -> float:
    """Seconds of causal attention, forward and backward. Raises RuntimeError if torch does not have the kernel here."""
    B, H, G, T, hd = shape
    q, k, v = (torch.randn(B, heads, T, hd, device=device, dtype=dtype).requires_grad_() for heads in (H, G, G))

    def run():
        with sdpa_kernel(GPU_ATTENTION[kernel]), warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='(?s).*/sdp_utils')  # why the GPU does not have the kernel
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=H != G)
        torch.autograd.grad(y, (q, k, v), y.detach())
    return clock.shortest_seconds(run, device, budget=0.1)
