import types

import pytest
import torch

from sologpt.machine import clock, peaks

CPU = torch.device('cpu')


@pytest.mark.parametrize('name, dtype, tflops', [
    ('NVIDIA A100-SXM4-40GB', 'bfloat16', 312), ('NVIDIA A100 80GB PCIe', 'float32', 156),
    ('NVIDIA H100 80GB HBM3', 'bfloat16', 989.4), ('NVIDIA H100 PCIe', 'bfloat16', 756),
    ('NVIDIA H200', 'bfloat16', 989.4),
    ('NVIDIA H200 NVL', 'bfloat16', 835), ('Tesla T4', 'float16', 65), ('Tesla V100-SXM2-16GB', 'float16', 125),
    ('NVIDIA L4', 'bfloat16', 121), ('NVIDIA L40', 'bfloat16', 181), ('NVIDIA A40', 'bfloat16', 149.7),
    ('NVIDIA GeForce RTX 4070', 'bfloat16', 58.3), ('NVIDIA GeForce RTX 4070 Ti SUPER', 'bfloat16', 88.2),
    ('NVIDIA GeForce RTX 4090', 'float32', 82.6), ('NVIDIA GeForce RTX 4090 D', 'bfloat16', 147.1),
    ('NVIDIA GeForce RTX 3070 Ti', 'bfloat16', 43.5), ('NVIDIA GeForce RTX 3080 Ti', 'float32', 34.1),
    ('NVIDIA RTX A4000', 'bfloat16', 76.7), ('NVIDIA RTX A5000', 'float32', 55.6),
    ('NVIDIA B300 SXM6 AC', 'bfloat16', 2250), ('NVIDIA GB300', 'bfloat16', 2500),
    ('AMD Instinct MI300X', 'bfloat16', 1307),
])
def test_datasheet_peak(name, dtype, tflops):
    assert peaks.datasheet_flops(name, dtype) == tflops * 1e12


@pytest.mark.parametrize('name', [
    'NVIDIA RTX A2000', 'NVIDIA GeForce RTX 4070 Laptop GPU', 'NVIDIA GeForce GTX 1080',
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
    peak, source = peaks.find_peak(CPU, 'float32')
    a = torch.ones(256, 256)
    assert peak > 2 * 256 ** 3 / clock.shortest_seconds(lambda: a @ a, CPU) / 20  # the same order of magnitude
    assert 'measured' in source
    assert peaks.find_peak(CPU, 'float32', override=5e12) == (5e12, 'as given by peak_flops')


@pytest.mark.parametrize('multiprocessors, tflops', [(68, 59.5), (70, 61.3)])
def test_two_cards_of_one_name(monkeypatch, multiprocessors, tflops):
    monkeypatch.setattr(peaks, 'matmul_flops', lambda device, dtype: 50e12)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA GeForce RTX 3080')
    monkeypatch.setattr(torch.cuda, 'get_device_properties',
                        lambda device: types.SimpleNamespace(multi_processor_count=multiprocessors))
    assert peaks.find_peak(torch.device('cuda'), 'bfloat16')[0] == pytest.approx(tflops * 1e12)


def test_a_smaller_matmul_is_measured_where_a_large_one_does_not_fit(monkeypatch):
    tried = []

    def measured(n, device, dtype):
        tried.append(n)
        if n > 2048:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return 1e12
    monkeypatch.setattr(peaks, '_square_matmul_flops', measured)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda device: None)
    assert peaks.matmul_flops(torch.device('cuda'), torch.bfloat16) == 1e12 and tried == [8192, 4096, 2048]
