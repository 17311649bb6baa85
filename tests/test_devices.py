import types

import pytest
import torch

from configurator import InputError
from sologpt.machine import devices

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


@pytest.mark.parametrize('accumulate, settings', [
    ('reduced', (True, True, False)), ('float32', (False, False, False)), ('float16', (True, True, True))])
def test_how_a_gpu_adds_up(monkeypatch, accumulate, settings):
    names = ('allow_fp16_reduced_precision_reduction', 'allow_bf16_reduced_precision_reduction',
             'allow_fp16_accumulation')
    matmuls = types.SimpleNamespace()
    monkeypatch.setattr(torch.backends.cuda, 'matmul', matmuls)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda precision: None)
    devices.prepare_device(torch.device('cuda'), accumulate=accumulate)
    assert tuple(getattr(matmuls, name) for name in names) == settings
