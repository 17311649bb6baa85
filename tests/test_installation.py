import ctypes
import types

import pytest
import torch

from sologpt.machine import installation
from sologpt.machine.installation import Gpu

CU130 = 'pip install torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130'
CU126 = 'pip install torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126'
AMPERE, VOLTA, BLACKWELL = (8, 6), (7, 0), (12, 0)


class Driver:
    """The library of an NVIDIA driver, with one GPU."""

    def __init__(self, capability=AMPERE, cuda=(12, 4), error=0):
        self.capability, self.cuda, self.error = capability, cuda, error

    def cuInit(self, flags):
        return self.error

    def cuDriverGetVersion(self, version):
        version._obj.value = 1000 * self.cuda[0] + 10 * self.cuda[1]

    def cuDeviceGetName(self, name, length, device):
        name.value = b'NVIDIA GeForce RTX 3060'

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capability[attribute - installation.MAJOR]


def install(monkeypatch, torch_version, cuda, driver):
    monkeypatch.setattr(torch, '__version__', torch_version)
    monkeypatch.setattr(torch, 'version', types.SimpleNamespace(cuda=cuda, hip=None))

    def load(name):
        if driver is None:
            raise OSError(f'{name}: cannot open shared object file')
        return driver
    monkeypatch.setattr(ctypes, 'CDLL', load)


@pytest.mark.parametrize('torch_version, cuda, driver, why', [
    ('2.13.0+cpu', None, None, ''), ('2.13.0', '13.0', None, ''),
    ('2.13.0+cpu', None, Driver(error=100), ''), ('2.13.0', '13.0', Driver(error=100), ''),
    ('2.13.0+cpu', None, Driver(error=803), ''),
    ('2.13.0', '13.0', Driver(error=803), 'the NVIDIA driver does not start (CUDA error 803): restart the machine'),
    ('2.13.0', '13.0', Driver(cuda=(13, 0)),
     'torch 2.13.0 cannot start CUDA on the NVIDIA GeForce RTX 3060: restart the machine'),
    ('2.13.0', '13.0', Driver(),
     'torch 2.13.0 needs a driver for CUDA 13.0, but that of the NVIDIA GeForce RTX 3060 is for CUDA 12.4: update the '
     f'NVIDIA driver to 580 or newer, or {CU126}'),
    ('2.13.0+cpu', None, Driver(),
     f'torch 2.13.0+cpu is built without CUDA, but this machine has a NVIDIA GeForce RTX 3060: {CU126}'),
    ('2.13.0+cpu', None, Driver(cuda=(13, 1)),
     f'torch 2.13.0+cpu is built without CUDA, but this machine has a NVIDIA GeForce RTX 3060: {CU130}')])
def test_why_torch_does_not_see_a_gpu(monkeypatch, torch_version, cuda, driver, why):
    install(monkeypatch, torch_version, cuda, driver)
    assert installation.why_unusable() == why


@pytest.mark.parametrize('capability, cuda, mine, what', [
    (AMPERE, (13, 0), None, CU130), (AMPERE, (12, 4), None, CU126), (VOLTA, (13, 0), '13.0', CU126),
    (BLACKWELL, (13, 0), '12.6', CU130), (BLACKWELL, (12, 8), '13.0', 'update the NVIDIA driver to 580 or newer'),
    (BLACKWELL, (12, 8), '12.6', f'update the NVIDIA driver to 580 or newer, then {CU130}'),
    (VOLTA, (11, 4), None, f'update the NVIDIA driver to 525 or newer, then {CU126}'),
    ((3, 5), (11, 4), None, 'there is no build of torch for it')])
def test_what_to_install(monkeypatch, capability, cuda, mine, what):
    monkeypatch.setattr(torch, '__version__', '2.13.0')
    assert installation.remedy(Gpu('a GPU', capability, cuda), mine) == what


@pytest.mark.parametrize('capability, refused', [
    ((7, 0), True), ((6, 1), True), ((7, 5), False), ((8, 7), False), ((8, 9), False), ((9, 0), False),
    ((10, 3), False), ((11, 0), True), ((12, 1), False)])
def test_a_gpu_that_torch_has_no_kernels_for(monkeypatch, capability, refused):
    install(monkeypatch, '2.13.0', '13.0', Driver(capability, (13, 0)))
    monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120'])
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Tesla V100-SXM2-16GB')
    why = installation.why_no_kernels(torch.device('cuda'))
    assert bool(why) == refused
    if capability == VOLTA:
        assert why == f'torch 2.13.0 has no kernels for the Tesla V100-SXM2-16GB (compute capability 7.0): {CU126}'


@pytest.mark.parametrize('arch, capability, runs', [
    ('sm_86', (8, 9), True), ('sm_86', (8, 0), False), ('sm_90a', (9, 0), True), ('sm_90a', (10, 0), False),
    ('sm_100f', (10, 3), True), ('compute_120', (12, 1), True), ('compute_90', (12, 0), True),
    ('compute_120', (9, 0), False), ('sm_120', (8, 9), False)])
def test_which_kernels_run_where(arch, capability, runs):
    assert installation.runs_on(arch, capability) == runs
