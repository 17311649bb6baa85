import functools
import time

import pytest
import torch

from configurator import InputError
from sologpt.machine import choices, clock, devices, peaks

CPU = torch.device('cpu')


@pytest.mark.parametrize('name, dtype, tflops', [
    ('NVIDIA A100-SXM4-40GB', 'bfloat16', 312), ('NVIDIA A100 80GB PCIe', 'float32', 156),
    ('NVIDIA H100 80GB HBM3', 'bfloat16', 989.4), ('NVIDIA H100 PCIe', 'bfloat16', 756),
    ('NVIDIA H200', 'bfloat16', 989.4),
    ('NVIDIA H200 NVL', 'bfloat16', 835), ('Tesla T4', 'float16', 65), ('Tesla V100-SXM2-16GB', 'float16', 125),
    ('NVIDIA L4', 'bfloat16', 121), ('NVIDIA L40', 'bfloat16', 181), ('NVIDIA A40', 'bfloat16', 149.7),
    ('NVIDIA GeForce RTX 4070', 'bfloat16', 58.3), ('NVIDIA GeForce RTX 4070 Ti SUPER', 'bfloat16', 88.2),
    ('NVIDIA GeForce RTX 4090', 'float32', 82.6), ('AMD Instinct MI300X', 'bfloat16', 1307),
])
def test_datasheet_peak(name, dtype, tflops):
    assert peaks.datasheet_flops(name, dtype) == tflops * 1e12


@pytest.mark.parametrize('name', [
    'NVIDIA RTX A4000', 'NVIDIA GeForce RTX 4070 Laptop GPU', 'NVIDIA GeForce GTX 1080',
    'NVIDIA A100-SXM4-40GB MIG 1g.5gb', 'NVIDIA RTX 4000 Ada Generation', 'NVIDIA GeForce RTX 3080 Max-Q', ''])
def test_unknown_device_gets_no_datasheet_figure(name):
    assert peaks.datasheet_flops(name, 'bfloat16') is None


def test_no_bfloat16_peak_where_it_is_emulated():
    assert peaks.datasheet_flops('Tesla T4', 'bfloat16') is None
    assert peaks.datasheet_flops('NVIDIA A100-SXM4-40GB', 'float32', tf32=False) == 19.5e12


def test_mfu_against_the_own_card():
    # nanoGPT's "15.4 %" of an A100, logged on an RTX 4070
    peak = peaks.datasheet_flops('NVIDIA GeForce RTX 4070', 'bfloat16')
    assert 0.154 * 312e12 / peak == pytest.approx(0.824, abs=1e-3)


def test_peak_is_measured_where_unknown():
    peak, source = peaks.peak_flops(CPU, 'float32')
    a = torch.ones(256, 256)
    assert peak > 2 * 256 ** 3 / clock.shortest_seconds(lambda: a @ a, CPU) / 20  # the same order of magnitude
    assert 'measured' in source
    assert peaks.peak_flops(CPU, 'float32', override=5e12) == (5e12, 'as given by peak_flops')


@pytest.mark.parametrize('name, message', [('cuda:99', 'not available'), ('gpu', 'not a device'),
                                           ('meta', 'not available')])
def test_device_refused(name, message):
    with pytest.raises(InputError, match=message):
        devices.find_device(name)


def test_dtype(monkeypatch):
    assert choices.find_dtype('float32', CPU)[0] == 'float32'
    with pytest.raises(InputError, match='dtype=.float8. is not known'):
        choices.find_dtype('float8', CPU)
    with pytest.raises(InputError, match='which mps has not'):
        choices.find_dtype('float16', torch.device('mps'))
    monkeypatch.setattr(choices, 'cpu_has_float16', lambda: False)
    with pytest.raises(InputError, match='no float16'):
        choices.find_dtype('float16', CPU)


@pytest.mark.parametrize('bf16_seconds, chosen', [(1.0, 'bfloat16'), (1.8, 'float32'), (3.0, 'float32')])
def test_auto_dtype_on_a_cpu_is_the_measured_one(monkeypatch, bf16_seconds, chosen):
    seconds = {torch.float32: 2.0, torch.bfloat16: bf16_seconds}
    monkeypatch.setattr(choices, '_linear_seconds', lambda dtype, *shape: seconds[dtype])
    assert choices.find_dtype('auto', CPU, (64, 8, 32))[0] == chosen


@pytest.mark.parametrize('capability, chosen', [((7, 5), 'float16'), ((8, 6), 'bfloat16')])
def test_auto_dtype_on_a_gpu_is_what_it_has(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    assert choices.find_dtype('auto', torch.device('cuda'))[0] == chosen


def test_fast_float32_is_exact():
    devices.prepare(CPU)
    a = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double()
    assert ((a @ a) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_clock_stands_still(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    stopwatch = clock.StepClock(CPU)
    stopwatch.start()
    now[0] = 5.0
    assert stopwatch.lap() == 5.0 and stopwatch.total == 5.0
    stopwatch.forget()  # the first step
    now[0] = 6.0
    stopwatch.stop()
    now[0] = 100.0  # an evaluation
    stopwatch.start()
    now[0] = 102.0
    assert stopwatch.lap() == 3.0 and stopwatch.total == 3.0
    now[0] = 104.0  # steps after the last log line
    stopwatch.stop()
    assert stopwatch.total == 5.0


def test_memory_of_a_gpu_and_a_limit(monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (100e9, 140e9))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: 2e9)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch._C, '_cuda_setMemoryFraction', lambda fraction, device: fractions.append(fraction),
                        raising=False)
    monkeypatch.setattr(torch.cuda.memory, '_lazy_init', lambda: None)
    for device in ('cuda', 'cuda:1'):
        assert devices.memory_limit(torch.device(device)) == 102e9 and not fractions
    assert devices.memory_limit(torch.device('cuda'), 12.0) == 12e9 and fractions == [12 / 140]
    assert devices.memory_limit(torch.device('cpu')) > 1e8


def test_a_gpus_attention_is_the_kernel_that_is_faster_there(monkeypatch):
    seconds = {'cudnn': 2e-3, 'flash': 1e-3}
    monkeypatch.setattr(choices, '_attention_seconds', lambda kernel, *_: seconds[kernel])
    find = functools.partial(choices.find_attn_backend, device=torch.device('cuda'), block_size=1024)
    assert find('auto', dtype='bfloat16', shape=(1, 1, 8, 8)) == ('flash', 'cudnn 2.00 ms, flash 1.00 ms')
    assert find('auto', dtype='bfloat16')[0] == find('auto', dtype='float32', shape=(1, 1, 8, 8))[0] == 'sdpa'
    assert find('cudnn', dtype='float16')[0] == 'cudnn'

    def has_none(*_):
        raise RuntimeError('No available kernel')
    monkeypatch.setattr(choices, '_attention_seconds', has_none)
    assert find('auto', dtype='bfloat16', shape=(1, 1, 8, 8))[0] == 'sdpa'
    with pytest.raises(InputError, match='attn_backend=flash is for a GPU, in bfloat16 or float16'):
        find('flash', dtype='float32')


def test_duration():
    assert [clock.duration(s) for s in (0, 59.9, 307, 7500)] == ['0s', '59s', '5m07s', '2h05m']
