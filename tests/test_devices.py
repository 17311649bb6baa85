import os
import types

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError

from configurator import InputError
from sologpt.machine import devices, installation

CPU = torch.device('cpu')


@pytest.mark.parametrize('name, message', [('cuda:99', 'not available'), ('gpu', 'not a device'),
                                           ('meta', 'not available')])
def test_device_refused(name, message):
    with pytest.raises(InputError, match=message):
        devices.find_device(name)


def test_fast_float32_is_exact():
    devices.prepare_device(CPU)
    a = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double()
    assert ((a @ a) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_memory_of_a_gpu_and_a_limit(monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (100e9, 140e9))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: 2e9)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch._C, '_cuda_setMemoryFraction', lambda fraction, device: fractions.append(fraction),
                        raising=False)
    monkeypatch.setattr(torch.cuda.memory, '_lazy_init', lambda: None)
    for device in ('cuda', 'cuda:1'):
        assert devices.usable_memory(torch.device(device)) == 102e9 and not fractions
    assert devices.usable_memory(torch.device('cuda'), 12.0) == 12e9 and fractions == [12 / 140]
    assert devices.usable_memory(torch.device('cpu')) > 1e8


@pytest.fixture
def gpu(monkeypatch):
    """A faked GPU to prepare; the attributes that are set on its matmuls, and what its allocator is told."""
    fake = types.SimpleNamespace(matmuls=types.SimpleNamespace(), allocator=[], environment={}, told=[])
    monkeypatch.setattr(torch.backends.cuda, 'matmul', fake.matmuls)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda precision: None)
    monkeypatch.setattr(torch._C, '_accelerator_setAllocatorSettings', fake.allocator.append)
    monkeypatch.setattr(torch, 'empty', lambda *size, device: None)
    monkeypatch.setattr(os, 'environ', fake.environment)
    monkeypatch.setattr(installation, 'why_no_kernels', lambda device: '')
    monkeypatch.setattr(devices, '_segments_can_grow', lambda: True)
    return fake


@pytest.mark.parametrize('accumulate, settings', [
    ('reduced', (True, True, False)), ('float32', (False, False, False)), ('float16', (True, True, True))])
def test_how_a_gpu_adds_up(gpu, accumulate, settings):
    names = ('allow_fp16_reduced_precision_reduction', 'allow_bf16_reduced_precision_reduction',
             'allow_fp16_accumulation')
    devices.prepare_device(torch.device('cuda'), accumulate=accumulate)
    assert tuple(getattr(gpu.matmuls, name) for name in names) == settings


def test_segments_grow_where_they_can(gpu, monkeypatch):
    cuda = torch.device('cuda')
    devices.prepare_device(cuda)
    assert gpu.allocator == ['expandable_segments:True']
    gpu.allocator.clear()
    devices.prepare_device(cuda, cuda_graphs=True)
    for name in devices.ALLOCATOR:
        gpu.environment[name] = 'max_split_size_mb:128'
        devices.prepare_device(cuda)
        del gpu.environment[name]
    assert gpu.allocator == []

    def refused(*size, device):
        raise RuntimeError('CUDA driver error: unknown error')
    monkeypatch.setattr(torch, 'empty', refused)
    devices.prepare_device(cuda)
    assert gpu.allocator == ['expandable_segments:True', 'expandable_segments:False']


@pytest.mark.parametrize('platform, release, nvml, can', [
    ('linux', '6.8.0-generic', True, True), ('linux', '5.15.90.1-microsoft-standard-WSL2', True, False),
    ('win32', '10', True, False), ('linux', '6.8.0-generic', False, False)])
def test_where_segments_can_grow(monkeypatch, platform, release, nvml, can):
    monkeypatch.setattr(devices.sys, 'platform', platform)
    monkeypatch.setattr(devices.platform, 'release', lambda: release)
    library = types.SimpleNamespace(**{'nvmlDeviceGetGpuFabricInfoV': None} if nvml else {})
    monkeypatch.setattr(devices.ctypes, 'CDLL', lambda name: library)
    assert devices._segments_can_grow() == can


def test_torch_has_the_allocators_private_setting():
    assert callable(torch._C._accelerator_setAllocatorSettings)


def test_a_gpu_computes_deterministically(gpu, monkeypatch):
    monkeypatch.setattr(torch, 'use_deterministic_algorithms', gpu.told.append)
    for module, name in ((torch.utils.deterministic, 'fill_uninitialized_memory'),
                         (torch.backends.cudnn, 'deterministic'), (torch.backends.cudnn, 'benchmark')):
        monkeypatch.setattr(module, name, getattr(module, name))

    def settings():
        return {name: value for name, value in gpu.environment.items() if not name.startswith('PYTEST')}
    devices.prepare_device(torch.device('cuda'))
    assert gpu.told == [] and not settings()
    devices.prepare_device(torch.device('cuda'), deterministic=True)
    assert gpu.told == [True] and torch.backends.cudnn.deterministic
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert settings() == {'CUBLAS_WORKSPACE_CONFIG': ':4096:8', 'TORCHINDUCTOR_DETERMINISTIC': '1'}
    gpu.told.clear()
    monkeypatch.setattr(devices, '_choose_float32_matmul', lambda device: None)
    devices.prepare_device(CPU, deterministic=True)
    assert gpu.told == []


def test_a_gpu_without_kernels_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(installation, 'why_no_kernels', lambda device: 'torch has no kernels for it')
    with pytest.raises(InputError, match='^device=cuda: torch has no kernels for it, or give --device=cpu$'):
        devices.prepare_device(torch.device('cuda'))


def test_auto_does_not_pass_over_a_gpu_in_silence(monkeypatch):
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, 'is_available', lambda: False)
    monkeypatch.setattr(installation, 'why_unusable', lambda: '')
    assert devices.find_device('auto') == CPU
    monkeypatch.setattr(installation, 'why_unusable', lambda: 'the driver is too old')
    with pytest.raises(InputError, match='^device=auto: the driver is too old, or give --device=cpu$'):
        devices.find_device('auto')
    with pytest.raises(InputError, match="^device='cuda' is not available: the driver is too old$"):
        devices.find_device('cuda')
    assert devices.find_device('cpu') == CPU and devices.versions()['torch'] == torch.__version__


def cublas():
    return RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')


def caused(error, cause):
    error.__cause__ = cause
    return error


def while_handling(error, earlier):
    error.__context__ = earlier
    return error


OOM = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
TRITON = RuntimeError('out of resource: shared memory, Required: 147456, Hardware limit: 101376')


@pytest.mark.parametrize('error, full', [
    (OOM, True), (cublas(), True), (RuntimeError('CUDA error: out of memory'), True),
    (RuntimeError('CUDA driver error: out of memory'), True), (RuntimeError('CUDNN_STATUS_ALLOC_FAILED'), True),
    (BackendCompilerFailed('inductor', OOM, None), True), (InductorError(cublas(), None), True),
    (caused(RuntimeError('in the backward'), caused(RuntimeError('in a hook'), OOM)), True),
    (TRITON, False), (torch.OutOfMemoryError(str(TRITON)), False), (InductorError(TRITON, None), False),
    (while_handling(KeyError('x'), OOM), False),
    (ValueError('CUDA out of memory'), False), (RuntimeError('CUDA error: an illegal memory access'), False),
    (MemoryError(), False), (None, False)])
def test_out_of_a_gpus_memory(error, full):
    assert devices.is_out_of_memory(error) == full
