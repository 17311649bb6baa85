"""
Devices: which one a run uses, what it is called, how it is set up, how much memory it has.
"""

import contextlib
import ctypes
import math
import os
import platform
import sys

import torch

from configurator import InputError
from sologpt.machine import clock

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def find_device(name):
    """The torch.device for 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'. Raises InputError if it is not there."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f'device={name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps') from None
    if device.type == 'cuda':
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found <= (device.index or 0):
            raise InputError(f'device={name!r} is not available ({found} CUDA devices found): use device=auto')
    elif device.type == 'mps' and not torch.backends.mps.is_available() or device.type not in ('cpu', 'cuda', 'mps'):
        raise InputError(f'device={name!r} is not available on this machine: use device=auto')
    return device


def device_name(device):
    """What the device calls itself: 'NVIDIA H200', 'AMD EPYC, 2 threads'."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type == 'cpu':
        return f'{cpu_capabilities().get("cpu_name", "CPU")}, {torch.get_num_threads()} threads'
    return device.type.upper()


def versions():
    """What a measured figure has to name: the device and the versions under it."""
    device = find_device('auto')
    return {'device': device_name(device), 'torch': torch.__version__, 'python': platform.python_version()}


def prepare(device, tf32=True, reduced_precision=True, fp16_accumulation=False):
    """
    Process-wide settings, to be made before anything is computed.

    On a GPU: TF32 for float32 matmuls if `tf32`; partial sums of 16-bit matmuls in 16 bits where a kernel adds several
    if `reduced_precision`, and all sums of float16's if `fp16_accumulation`. On a CPU: float32 matmuls by MKL or by
    oneDNN, whichever is faster here (on AMD oneDNN, twice; on Intel MKL, by a tenth), and freed memory stays with the
    process: glibc otherwise returns every large activation to the system and takes it back page by page in the next
    step (16 % of a step at width 384).
    """
    if device.type == 'cuda':
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high' if tf32 else 'highest')
        matmuls = torch.backends.cuda.matmul
        matmuls.allow_fp16_reduced_precision_reduction = reduced_precision
        matmuls.allow_bf16_reduced_precision_reduction = reduced_precision
        matmuls.allow_fp16_accumulation = fp16_accumulation
    if device.type == 'cpu':
        if sys.platform == 'linux':
            with contextlib.suppress(OSError, AttributeError):
                mallopt = ctypes.CDLL(None).mallopt
                mallopt(-3, 2 ** 30)      # M_MMAP_THRESHOLD
                mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
        a = random_matrix(256, device, torch.float32)
        seconds = {}
        for precision in ('highest', 'medium'):  # MKL, oneDNN
            torch.set_float32_matmul_precision(precision)
            seconds[precision] = clock.shortest_seconds(lambda: a @ a, device, budget=0.03)
        # 'medium' is set now; on CPUs with AMX oneDNN then computes in bfloat16, which the product shows
        exact = a.double() @ a.double()
        inexact = (a @ a - exact).abs().max() > 1e-5 * exact.abs().max()
        if inexact or seconds['highest'] < seconds['medium']:
            torch.set_float32_matmul_precision('highest')


def autocast(device, dtype):
    """The context for forward passes: matmuls in `dtype` (a name), everything else as torch's autocast decides."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[dtype])


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which an nn.Linear would multiply x: autocast's, or its own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def give_back_memory():
    """Return what the process has freed to the system, which otherwise, after prepare(), stays with it."""
    if sys.platform == 'linux':
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def seed(device, value):
    """torch.manual_seed for this device alone: cheap enough for every step."""
    if device.type == 'cpu':
        torch.default_generator.manual_seed(value)
    else:
        getattr(torch, device.type).manual_seed(value)


def memory_limit(device, gigabytes=0.0):
    """
    Bytes that this process may take of a GPU: what is free, or, from now on, `gigabytes` at most. Of a CPU, 9/10 of all
    that the machine has.
    """
    if device.type == 'cuda':
        free, there_is = torch.cuda.mem_get_info(device)
        if gigabytes:
            torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / there_is))  # of prepare()'s device
        there_is = free + torch.cuda.memory_reserved(device)
    elif hasattr(os, 'sysconf'):
        there_is = 0.9 * os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    else:
        there_is = math.inf
    return min(there_is, gigabytes * 1e9 or math.inf)


def peak_memory_gb(device):
    """The most memory held so far, in GB (1e9 bytes): of the GPU's allocator, or of the process on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == 'mps':
        return torch.mps.driver_allocated_memory() / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9


def cpu_capabilities():
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, 'get_capabilities') else {}


def random_matrix(n, device, dtype):
    """Without touching the global random state, and not constant: a GPU clocks higher on constant data."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(n, n, device=device).uniform_(-1, 1, generator=generator).to(dtype)
