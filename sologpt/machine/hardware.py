"""
The machine under the run: which device, which number format pays on it, how fast it can be, and how much of that is
used (MFU). Nothing here is guessed: a device whose exact name is not in the table gets no datasheet figure, only the
rate that a large matmul is measured to reach.
"""

import contextlib
import ctypes
import math
import os
import platform
import re
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import InputError

GPU_ATTENTION = {'cudnn': SDPBackend.CUDNN_ATTENTION, 'flash': SDPBackend.FLASH_ATTENTION}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Dense peaks in TFLOP/s from the vendors' datasheets: (float32, TF32, bfloat16, float16), None where the hardware has
# no such units. Products of 16-bit numbers are summed in float32. The keys are matched against the whole device name
# (less the vendor), so that an "A40" is not an "RTX A4000" and a laptop's 4070 is not a desktop's.
_PEAK_TFLOPS = {
    r'V100-SXM2-\d+GB': (15.7, None, None, 125), r'V100-PCIE-\d+GB': (14, None, None, 112),
    r'T4': (8.1, None, None, 65),
    r'A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe': (19.5, 156, 312, 312),
    r'A30': (10.3, 82, 165, 165), r'A40': (37.4, 74.8, 149.7, 149.7), r'A10': (31.2, 62.5, 125, 125),
    r'A10G': (35, 35, 70, 70), r'RTX A6000': (38.7, 77.4, 154.8, 154.8),
    r'L4': (30.3, 60, 121, 121), r'L40': (90.5, 90.5, 181, 181), r'L40S': (91.6, 183, 362, 362),
    r'RTX 6000 Ada Generation': (91.1, 182, 364, 364),
    r'RTX PRO 6000 Blackwell (Workstation|Server) Edition': (126, 252, 504, 504),
    r'RTX PRO 6000 Blackwell Max-Q Workstation Edition': (110, 219, 439, 439),
    r'H100 80GB HBM3|H200|GH200 (480|144G HBM3e|120GB).*': (67, 494.7, 989.4, 989.4),
    r'H100 PCIe': (51, 378, 756, 756), r'H100 NVL|H200 NVL': (60, 418, 835, 835), r'H20': (44, 74, 148, 148),
    r'B200': (80, 1125, 2250, 2250), r'GB200': (80, 1250, 2500, 2500),
    r'MI250X( / MI250)?': (24, None, 191.5, 191.5), r'MI300X|MI325X': (163, 654, 1307, 1307),
    r'RTX 2080 Ti': (13.4, None, None, 53.8),
}
# GeForce cards sum in float32 at half their 16-bit rate: bfloat16 = 2 x float32, and TF32 = float32.
_PEAK_TFLOPS |= {f'RTX {name}': (half / 2, half / 2, half, half) for name, half in {
    '3060': 25.5, '3060 Ti': 32.4, '3070': 40.6, '3080': 59.5, '3090': 71, '3090 Ti': 80,
    '4060': 30.2, '4060 Ti': 44.1, '4070': 58.3, '4070 SUPER': 71.0, '4070 Ti': 80.2, '4070 Ti SUPER': 88.2,
    '4080': 97.5, '4080 SUPER': 104, '4090': 165.2,
    '5060': 38.4, '5060 Ti': 47.4, '5070': 61.7, '5070 Ti': 87.9, '5080': 112.6, '5090': 209.5}.items()}


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
        return f'{_cpu().get("cpu_name", "CPU")}, {torch.get_num_threads()} threads'
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
        a = _random_matrix(256, device, torch.float32)
        seconds = {}
        for precision in ('highest', 'medium'):  # MKL, oneDNN
            torch.set_float32_matmul_precision(precision)
            seconds[precision] = shortest_seconds(lambda: a @ a, device, budget=0.03)
        # 'medium' is set now; on CPUs with AMX oneDNN then computes in bfloat16, which the product shows
        exact = a.double() @ a.double()
        inexact = (a @ a - exact).abs().max() > 1e-5 * exact.abs().max()
        if inexact or seconds['highest'] < seconds['medium']:
            torch.set_float32_matmul_precision('highest')


def find_dtype(name, device, shape=None):
    """
    (dtype name, why) of the matmuls for 'auto' or a name that is checked against the device.

    On a CPU 'auto' measures: bfloat16 if it is at least 1.2 times as fast as float32 for a Linear of the run's
    `shape` (rows, in, out), forward and backward. Raises InputError.
    """
    if name != 'auto' and name not in DTYPES:
        raise InputError(f'dtype={name!r} is not known: use auto, {", ".join(DTYPES)}')
    if device.type == 'cuda':
        has_bf16 = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
        if name == 'bfloat16' and not has_bf16:
            raise InputError(f'dtype=bfloat16: {device_name(device)} only emulates it, slowly: use float16')
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
        raise InputError(f'dtype=float16 needs loss scaling, which {device.type} has not: use bfloat16 or float32')
    return name, 'as asked'


def cpu_has_float16():
    return bool(_cpu().get('avx512_fp16') or _cpu().get('amx_fp16') or _cpu().get('architecture') == 'aarch64')


def has_float8(device):
    """Whether torch casts to its 8-bit floats there, also when it compiles."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 9) or torch.__version__ >= '2.13'
    return device.type == 'cpu'


def cpu_has_int8():
    """Whether torch multiplies int8 by this CPU's own instructions; without them it is a plain loop."""
    return bool(_cpu().get('avx512_vnni'))


def autocast(device, dtype):
    """The context for forward passes: matmuls in `dtype` (a name), everything else as torch's autocast decides."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[dtype])


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which an nn.Linear would multiply x: autocast's, or its own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def find_attn_backend(name, device, dtype, block_size, shape=None):
    """
    (a backend, why) for 'auto', or for a name that is checked. On a CPU two plain matmuls and a softmax beat torch's
    flash kernel, whose small inner products run at a fraction of the matmul rate, until the (T, T) scores cost more
    (T=1024, in float32 T=512). On a GPU, in 16 bits, the fastest forward and backward with a `shape` of (B, H, T, hd);
    without one torch chooses. Raises InputError.
    """
    if name not in ('auto', 'sdpa', 'math', *GPU_ATTENTION):
        raise InputError(f'attn_backend={name!r} is not known: use auto, sdpa, math, {" or ".join(GPU_ATTENTION)}')
    if name in GPU_ATTENTION and (device.type != 'cuda' or dtype == 'float32'):
        raise InputError(f'attn_backend={name} is for a GPU, in bfloat16 or float16: use auto')
    if name != 'auto':
        return name, 'as asked'
    if device.type == 'cpu':
        return ('math' if block_size <= (512 if dtype == 'float32' else 1024) else 'sdpa'), 'by length'
    if device.type != 'cuda' or dtype == 'float32' or shape is None:
        return 'sdpa', "torch's choice"
    found = {}
    for kernel in GPU_ATTENTION:
        with contextlib.suppress(RuntimeError):  # not on this GPU, or not for this shape
            found[kernel] = _attention_seconds(kernel, device, DTYPES[dtype], shape)
    if not found:
        return 'sdpa', "torch's choice"
    return min(found, key=found.get), ', '.join(f'{kernel} {1000 * s:.2f} ms' for kernel, s in found.items())


def can_compile(device):
    """(whether torch.compile pays and works here, why not). Compiles a small function on a GPU to find out."""
    if device.type != 'cuda':
        return False, f'on {device.type} it gains little and takes a minute'
    if sys.platform == 'win32':
        return False, 'no Triton on Windows'
    try:
        x = torch.ones(32, 32, device=device)
        torch.compile(lambda t: (t @ t).relu().sum())(x)
    except Exception as e:
        return False, f'{type(e).__name__}: {str(e).splitlines()[0][:100]}'
    return True, ''


def datasheet_flops(name, dtype, tf32=True):
    """Dense peak in FLOP/s of the device called `name` for `dtype`, or None if the table has no such device."""
    name = re.sub(r'^(NVIDIA|AMD) |\b(GeForce|Tesla|Instinct) ', '', name)
    for pattern, (fp32, tf32_peak, bf16, fp16) in _PEAK_TFLOPS.items():
        if re.fullmatch(pattern, name.strip()):
            peak = {'float32': tf32_peak if tf32 and tf32_peak else fp32, 'bfloat16': bf16, 'float16': fp16}[dtype]
            return peak and peak * 1e12
    return None


def peak_flops(device, dtype, override=None, tf32=True):
    """
    (FLOP/s that MFU is measured against, where the figure comes from).

    `override` if given; the datasheet's dense peak for a known GPU; otherwise the rate of a large matmul, measured.
    """
    if override:
        return override, 'as given by peak_flops'
    measured = matmul_flops(device, DTYPES[dtype])
    listed = datasheet_flops(device_name(device), dtype, tf32) if device.type == 'cuda' else None
    if listed:
        return listed, f'datasheet, dense {dtype}; a large matmul reaches {measured / 1e12:.1f} here'
    return measured, f'a large {dtype} matmul, measured now; no datasheet figure for this device'


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


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


class StepClock:
    """Seconds that a device spends in training steps; it stands still while the run evaluates and saves."""

    def __init__(self, device):
        self.device, self.total, self._lapped, self._since = device, 0.0, 0.0, None

    def start(self):
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self):
        if self._since is not None:
            synchronize(self.device)
            self.total += time.perf_counter() - self._since
            self._since = None

    def seconds(self):
        """The total so far, without waiting for the device."""
        return self.total + (0.0 if self._since is None else time.perf_counter() - self._since)

    def lap(self):
        """Seconds since the last lap."""
        self.stop()
        lap, self._lapped = self.total - self._lapped, self.total
        self.start()
        return lap

    def forget(self):
        """The seconds so far were warm-up: they do not count."""
        self.total = self._lapped = 0.0
        if self._since is not None:
            self._since = time.perf_counter()


def duration(seconds):
    """'2h05m', '5m07s', '42s'"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h{minutes:02d}m' if hours else f'{minutes}m{seconds:02d}s' if minutes else f'{seconds}s'


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


def _cpu():
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, 'get_capabilities') else {}


def shortest_seconds(run, device, budget=0.3):
    """The shortest of as many runs as `budget` seconds hold: what the device can do, whatever else it is doing."""
    run()
    seconds, end = [], time.perf_counter() + budget
    while not seconds or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _linear_seconds(dtype, rows, n_in, n_out):
    x = torch.ones(min(rows, 512), n_in, requires_grad=True)
    w = torch.ones(n_out, n_in, requires_grad=True)

    def run():
        y = F.linear(x.to(dtype), w.to(dtype))  # the casts are part of the price
        y.backward(y.detach())
    return shortest_seconds(run, torch.device('cpu'))


def _attention_seconds(kernel, device, dtype, shape):
    """Raises RuntimeError where torch has it not."""
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))

    def run():
        with sdpa_kernel(GPU_ATTENTION[kernel]):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, (q, k, v), y.detach())
    return shortest_seconds(run, device, budget=0.1)


def _random_matrix(n, device, dtype):
    """Without touching the global random state, and not constant: a GPU clocks higher on constant data."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(n, n, device=device).uniform_(-1, 1, generator=generator).to(dtype)


def matmul_flops(device, dtype):
    """FLOP/s of a large matmul, measured now; dtype: torch's."""
    n = {'cuda': 8192, 'cpu': 1024}.get(device.type, 4096)
    a = _random_matrix(n, device, dtype)
    rate = 2 * n ** 3 / shortest_seconds(lambda: a @ a, device)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)  # the run's peak is not this one
    return rate
