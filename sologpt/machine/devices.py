"""
Devices: which one a run uses, what it is called, how it is set up, and how much memory it has.
"""

import contextlib
import ctypes
import math
import os
import platform
import re
import sys
from typing import Any

import torch

from configurator import InputError
from sologpt.machine import clock, installation

# by the names that train.py's key dtype has for them
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def find_device(name: str) -> torch.device:
    """
    The device for 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'. Raises InputError if this machine does not have it, and for
    'auto' if it has a GPU that this build of torch cannot use.
    """
    if name == 'auto':
        name = _first_choice()
        if name == 'cpu' and (why := installation.why_unusable()):
            raise InputError(f'device=auto: {why}, or give --device=cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f'device={name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps') from None
    if device.type == 'cuda':
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found <= (device.index or 0):
            why = not found and installation.why_unusable()
            raise InputError(f'device={name!r} is not available: {why}' if why else
                             f'device={name!r} is not available ({found} CUDA devices found): use device=auto')
    elif device.type == 'mps' and not torch.backends.mps.is_available() or device.type not in ('cpu', 'cuda', 'mps'):
        raise InputError(f'device={name!r} is not available on this machine: use device=auto')
    return device


def _first_choice() -> str:
    return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'


def device_name(device: torch.device) -> str:
    """What the device calls itself, such as 'NVIDIA H200' or 'AMD EPYC, 2 threads'."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type == 'cpu':
        return f'{cpu_capabilities().get("cpu_name", "CPU")}, {torch.get_num_threads()} threads'
    return device.type.upper()


def is_nvidia(device: torch.device) -> bool:
    """Whether the device is a GPU of NVIDIA's: torch calls AMD's cuda too."""
    return device.type == 'cuda' and not torch.version.hip


def versions() -> dict[str, str]:
    """The device and the versions of torch and Python, which a measured figure has to name."""
    device = torch.device(_first_choice())
    return {'device': device_name(device), 'torch': torch.__version__, 'python': platform.python_version()}


# how a GPU's 16-bit matmuls add up: (partial sums of a split matmul in 16 bits, all sums of float16 in float16)
ACCUMULATE = {'reduced': (True, False), 'float32': (False, False), 'float16': (True, True)}


def prepare_device(device: torch.device, tf32: bool = True, accumulate: str = 'reduced', deterministic: bool = False,
                   cuda_graphs: bool = False) -> None:
    """
    Make the settings of the whole process that suit the device, before anything is computed. Raises InputError if this
    build of torch has no kernels for the GPU.

    tf32: on a GPU, float32 matmuls round their inputs to TF32. accumulate: on a GPU, how 16-bit matmuls add up:
      'reduced'  where a kernel adds several partial sums, it may add them in 16 bits (torch's default)
      'float32'  all sums are in float32
      'float16'  float16 matmuls add up in float16: fast on GeForce cards, but sums lose digits and may overflow
    deterministic: on a GPU, use only kernels that always add up in the same order. A CPU does so anyway.
    cuda_graphs: steps will be replayed as CUDA graphs.
    """
    if device.type == 'cuda':
        if deterministic:
            _compute_deterministically()
        if why := installation.why_no_kernels(device):
            raise InputError(f'device={device}: {why}, or give --device=cpu')
        if device.index is not None:
            torch.cuda.set_device(device)
        if not cuda_graphs:  # a graph keeps its memory anyway, and not every version of torch has both
            _let_segments_grow(device)
        torch.set_float32_matmul_precision('high' if tf32 else 'highest')
        matmuls = torch.backends.cuda.matmul
        reduced, matmuls.allow_fp16_accumulation = ACCUMULATE[accumulate]
        matmuls.allow_fp16_reduced_precision_reduction = reduced
        matmuls.allow_bf16_reduced_precision_reduction = reduced
    if device.type == 'cpu':
        _keep_freed_memory()
        _choose_float32_matmul(device)


ALLOCATOR = ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF')


def _let_segments_grow(device: torch.device) -> None:
    """
    Let the allocator's segments grow: blocks of many sizes then leave fewer gaps, and a nearly full GPU still has room.
    A user's own setting of the allocator stays, and so does torch's where the driver cannot do it.
    """
    if any(map(os.environ.get, ALLOCATOR)) or not _segments_can_grow():
        return
    set_allocator = torch._C._accelerator_setAllocatorSettings
    set_allocator('expandable_segments:True')
    try:
        torch.empty(1, device=device)
    except RuntimeError:
        set_allocator('expandable_segments:False')


def _segments_can_grow() -> bool:
    """Not on Windows, where torch does not have it, nor in WSL, whose driver refuses it later (pytorch#192330)."""
    if sys.platform != 'linux' or 'microsoft' in platform.release().lower() or torch.version.hip:
        return False
    try:  # torch 2.13 calls this function, which drivers before 550 do not have, nor a container without their tools
        return hasattr(ctypes.CDLL('libnvidia-ml.so.1'), 'nvmlDeviceGetGpuFabricInfoV')
    except OSError:
        return False


def _compute_deterministically() -> None:
    """
    Let torch use only kernels that add up in a fixed order, and fail where it has none. Flash and memory-efficient
    attention then have a deterministic backward, and cuDNN is left out. An embedding's gradient is summed without
    atomics.
    """
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # with less, concurrent streams may change the order
    os.environ['TORCHINDUCTOR_DETERMINISTIC'] = '1'  # else kernels are chosen by time, and so are their sums' orders
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and nothing reads such memory
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def _keep_freed_memory() -> None:
    """
    Let freed memory stay with the process. glibc otherwise returns each large activation to the system, and takes it
    back page by page in the next step: 16 % of a step at width 384.
    """
    if sys.platform == 'linux':
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 2 ** 30)      # M_MMAP_THRESHOLD
            mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def _choose_float32_matmul(device: torch.device) -> None:
    """
    Let MKL or oneDNN multiply float32 matrices on this CPU, whichever is faster as long as it is exact.

    On AMD oneDNN takes half the time; on Intel MKL is a tenth faster.
    """
    a = random_matrix(256, device, torch.float32)
    seconds = {}
    for precision in ('highest', 'medium'):  # MKL, oneDNN
        torch.set_float32_matmul_precision(precision)
        seconds[precision] = clock.shortest_seconds(lambda: a @ a, device, budget=0.03)
    # 'medium' is set now. On a CPU with AMX, oneDNN then computes in bfloat16: the product shows it
    exact = a.double() @ a.double()
    inexact = (a @ a - exact).abs().max() > 1e-5 * exact.abs().max()
    if inexact or seconds['highest'] < seconds['medium']:
        torch.set_float32_matmul_precision('highest')


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """The context for forward passes: matmuls are in `dtype`, a name; torch's autocast decides about the rest."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[dtype])


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which an nn.Linear would multiply x: autocast's, or x's own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def give_back_memory() -> None:
    """Return freed memory to the system. After prepare_device() it otherwise stays with the process."""
    if sys.platform == 'linux':
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def seed_device(device: torch.device, value: int) -> None:
    """torch.manual_seed() for this device alone, which is cheap enough for every step."""
    if device.type == 'cpu':
        torch.default_generator.manual_seed(value)
    else:
        getattr(torch, device.type).manual_seed(value)


def usable_memory(device: torch.device, gigabytes: float = 0.0) -> float:
    """
    The bytes that this process may use: on a GPU what is free, on a CPU 9/10 of the machine's memory.

    gigabytes: a limit in GB (1e9 bytes); 0: none. A limit on a GPU holds from now on: torch raises OutOfMemoryError
    beyond it.
    """
    if device.type == 'cuda':
        free, total = torch.cuda.mem_get_info(device)
        if gigabytes:  # without a device number it is the one that prepare_device() has set
            torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
        usable = free + torch.cuda.memory_reserved(device)
    elif hasattr(os, 'sysconf'):
        usable = 0.9 * os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    else:
        usable = math.inf
    return min(usable, gigabytes * 1e9 or math.inf)


def is_out_of_memory(error: BaseException | None) -> bool:
    """
    Whether an error says that a GPU's memory is full: torch's own error, one of CUDA or of its libraries, or either of
    them inside an error of the compiler. A kernel that asks for too much shared memory raises torch's error too, but a
    smaller micro-batch does not help it.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return not str(error).startswith('out of resource')
        if isinstance(error, RuntimeError) and re.search('(?i)cuda.*out of memory|STATUS_ALLOC_FAILED', str(error)):
            return True
        error = getattr(error, 'inner_exception', None) or error.__cause__  # the compiler's errors have the former
    return False


def peak_memory_gb(device: torch.device) -> float:
    """The most memory held so far, in GB (1e9 bytes): by a GPU's allocator, or on a CPU by the process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == 'mps':
        return torch.mps.driver_allocated_memory() / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9


def cpu_capabilities() -> dict[str, Any]:
    """What torch knows about this CPU: its name, and the instructions that it has."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, 'get_capabilities') else {}


def random_matrix(n: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """
    An (n, n) matrix to measure matmuls with. It leaves the global random state as it is. It is not constant, because a
    GPU clocks higher on constant data.
    """
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(n, n, device=device).uniform_(-1, 1, generator=generator).to(dtype)
