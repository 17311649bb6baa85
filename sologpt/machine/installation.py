"""
Installation: whether this build of torch can use the NVIDIA GPU of this machine, and what to install if it cannot.

A build of torch has kernels for some GPUs, and needs a driver that is new enough. torch.cuda.is_available() does not
say which of them is missing. So the driver is asked, by way of its own library.
"""

import ctypes
import sys
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]
    cuda: tuple[int, int]  # the newest version of CUDA that its driver supports


class Build(NamedTuple):
    """A build of torch on download.pytorch.org/whl/."""
    index: str
    cuda: int  # its major version of CUDA
    driver: int  # the oldest major version of NVIDIA's driver for it
    least: tuple[int, int]  # the compute capabilities that it has kernels for
    most: tuple[int, int]


# For torch 2.11 to 2.14, the newest first. https://github.com/pytorch/pytorch/blob/main/RELEASE.md
BUILDS = (Build('cu130', 13, 580, (7, 5), (12, 9)), Build('cu126', 12, 525, (5, 0), (9, 0)))
NO_DEVICE = (100, 34)  # cuInit: no GPU, or CUDA_VISIBLE_DEVICES hides it; a stand-in for the library of the driver
NAME_LENGTH = 256
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...


def why_unusable() -> str:
    """
    Why torch does not see a GPU that the NVIDIA driver sees, and what to do about it. '' if the driver sees none.

    It is for the case that torch.cuda.is_available() is False.
    """
    driver = _load_driver()
    if driver is None or torch.version.hip:
        return ''
    error = driver.cuInit(0)
    if error:
        broken = torch.version.cuda and error not in NO_DEVICE
        return f'the NVIDIA driver does not start (CUDA error {error}): restart the machine' if broken else ''
    gpu, mine = _first_gpu(driver), torch.version.cuda
    if mine is None:
        reason = f'torch {torch.__version__} is built without CUDA, but this machine has a {gpu.name}'
    elif gpu.cuda[0] < _major(mine):
        reason = (f'torch {torch.__version__} needs a driver for CUDA {mine}, but that of the {gpu.name} is for CUDA '
                  f'{gpu.cuda[0]}.{gpu.cuda[1]}')
    else:
        return f'torch {torch.__version__} cannot start CUDA on the {gpu.name}: restart the machine'
    return f'{reason}: {remedy(gpu, mine)}'


def why_no_kernels(device: torch.device) -> str:
    """Why this build of torch cannot compute on a GPU that it sees, and what to install. '' if it can."""
    built_for = torch.cuda.get_arch_list()
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or not built_for or any(runs_on(arch, capability) for arch in built_for):
        return ''
    driver = _load_driver()
    gpu = Gpu(torch.cuda.get_device_name(device), capability, _cuda_of(driver) if driver else (0, 0))
    return (f'torch {torch.__version__} has no kernels for the {gpu.name} (compute capability '
            f'{capability[0]}.{capability[1]}): {remedy(gpu, torch.version.cuda)}')


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """
    Whether kernels for an architecture, such as 'sm_86', 'sm_90a' or 'compute_120', run on a GPU of that capability.
    """
    kind, _, number = arch.partition('_')
    digits = number.rstrip('af')
    major, minor = int(digits[:-1]), int(digits[-1])
    if number.endswith('a'):
        return (major, minor) == capability
    if kind == 'compute':  # the driver compiles it for newer GPUs
        return (major, minor) <= capability
    return major == capability[0] and minor <= capability[1]


def remedy(gpu: Gpu, mine: str | None) -> str:
    """What to install so that torch computes on the GPU. mine: the version of CUDA of the installed torch, or None."""
    fitting = [build for build in BUILDS if build.least <= gpu.capability <= build.most]
    ways = [f'update the NVIDIA driver to {build.driver} or newer' for build in fitting
            if mine and _major(mine) == build.cuda > gpu.cuda[0]]
    ways += [_install(build) for build in fitting if gpu.cuda[0] >= build.cuda][:1]
    if not ways and fitting:
        ways = [f'update the NVIDIA driver to {fitting[0].driver} or newer, then {_install(fitting[0])}']
    return ', or '.join(ways) or 'there is no build of torch for it'


def _install(build):
    # the index in the version too: pip takes 2.13.0+cpu for 2.13.0, and would install nothing
    version = torch.__version__.partition('+')[0]
    return f'pip install torch=={version}+{build.index} --index-url https://download.pytorch.org/whl/{build.index}'


def _major(version):
    return int(version.partition('.')[0])


def _load_driver():
    """The library of the NVIDIA driver; None if there is none."""
    try:
        return ctypes.CDLL('nvcuda.dll' if sys.platform == 'win32' else 'libcuda.so.1')
    except OSError:
        return None


def _cuda_of(driver):
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def _first_gpu(driver):
    name, major, minor = ctypes.create_string_buffer(NAME_LENGTH), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetName(name, NAME_LENGTH, 0)
    driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, 0)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, 0)
    return Gpu(name.value.decode(), (major.value, minor.value), _cuda_of(driver))
