import statistics
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from test_adapters import base

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.machine.devices import autocast
from sologpt.matmuls.held import hold_base
from sologpt.matmuls.nf4 import NF4, NF4Linear


def nf4_grid():
    """QLoRA's appendix: quantiles of a normal distribution, 8 up to and 7 below zero, and zero itself."""
    offset, quantile = 0.9677083, statistics.NormalDist().inv_cdf
    up = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    down = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    return torch.tensor(sorted([0.0, *up, *down])) / max(up)


def gaussian(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_nf4_takes_4_13_bits_and_errs_by_9_percent():
    x = gaussian(1024, 768)
    encoded = NF4.encode(x)
    assert 4.12 <= sum(t.numel() * t.element_size() for t in encoded) * 8 / x.numel() <= 4.14
    assert 0.090 <= (encoded.decode(x.shape) - x).norm() / x.norm() <= 0.094


def test_nf4_codes_are_the_nearest_and_sizes_within_half_a_step():
    x = gaussian(96, 512) * torch.linspace(0.5, 2, 96)[:, None]
    encoded, blocks = NF4.encode(x), x.view(-1, 64)
    size = blocks.abs().amax(1)
    distance = (blocks[..., None] / size[:, None, None] - nf4_grid()).abs()
    nearest, second = distance.topk(2, largest=False).values.unbind(-1)
    codes = torch.stack([encoded.packed & 15, encoded.packed >> 4], dim=-1).view(-1, 64)
    clear = second - nearest > 1e-6
    assert clear.float().mean() > 0.999 and torch.equal(codes[clear].long(), distance.argmin(-1)[clear])
    found = encoded.decode(x.shape).view(-1, 64).abs().amax(1)
    for group, exact in zip(found.split(256), size.split(256), strict=True):
        step = (exact - size.mean()).abs().max() / 127
        assert (group - exact).abs().max() <= step * 0.501


@pytest.mark.parametrize('shape', [(7, 9), (33, 65), (1, 1), (64, 300)])
def test_nf4_of_any_shape_and_of_zeros(shape):
    x = gaussian(*shape)
    x.view(-1)[:64] = 0
    decoded = NF4.encode(x).decode(shape)
    assert decoded.shape == shape and (decoded.view(-1)[:64] == 0).all()
    assert (decoded - x).norm() <= 0.13 * x.norm()


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_nf4_linear_multiplies_by_the_decoded_weight(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias)
    layer, found = NF4Linear(linear), []
    weight, grad = NF4.encode(linear.weight).decode((80, 48)), torch.randn(2, 5, 80)
    for run in (layer, lambda x: F.linear(x, weight) + (linear.bias.to(getattr(torch, dtype)) if bias else 0)):
        x = gaussian(2, 5, 48).requires_grad_()
        with autocast(torch.device('cpu'), dtype):
            y = run(x)
        y.backward(grad.to(y.dtype))
        found.append((y, x.grad))
    (y, dx), (expected, expected_dx) = found
    assert y.dtype == getattr(torch, dtype) and torch.equal(y, expected) and torch.equal(dx, expected_dx)
    assert torch.equal(layer.weight, weight)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_nf4_gives_memory_back_to_the_system():
    code = '''
import gc, os, torch
from sologpt.matmuls import held
from sologpt.machine import devices
from model import GPT, GPTConfig
def resident():
    gc.collect()
    devices.give_back_memory()
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
devices.prepare_device(torch.device('cpu'))
with torch.device('meta'):
    model = GPT(GPTConfig(n_layer=4, n_embd=640, n_head=8, vocab_size=64, block_size=64, bias=False))
model.to_empty(device='cpu')
for p in model.parameters():
    p.data.uniform_(-1, 1)
n, before = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2), resident()
held.hold_base(model, 'nf4', 'float32')
print((before - resident()) / (n * (4 - 4.127 / 8)))
'''
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert float(run.stdout or run.stderr) > 0.8


def test_bfloat16_base_takes_half_and_is_rounded_alike_in_a_float32_run():
    held, m = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=8)), base('bfloat16')
    hold_base(held, 'bfloat16', 'bfloat16')
    assert all(p.dtype == (torch.bfloat16 if p.dim() > 1 else torch.float32) for p in held.parameters())
    for p, q in zip(m.parameters(), base().parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, q.bfloat16().float() if q.dim() > 1 else q)
    with pytest.raises(InputError, match='int3'):
        hold_base(base(), 'int3', 'float32')
