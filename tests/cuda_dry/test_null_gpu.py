"""What the null GPU refuses, and what it says of kernels."""

import re
import subprocess

import pytest

from sologpt.nullgpu.cards import find_card
from sologpt.nullgpu.events import Gemm, Op
from sologpt.nullgpu.run import launches, run_script

pytestmark = [pytest.mark.cuda_dry, pytest.mark.usefixtures('null_gpu')]

CAPTURE = '''
import torch
x = torch.ones(8, device='cuda')

def capture(work):
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
        graph.replay()
        print('captured')
    except RuntimeError as error:
        print('during capture' in str(error))

capture(lambda: x.add_(1))
capture(lambda: x.sum().item())
capture(torch.cuda.synchronize)
capture(lambda: x.mul_(2))
'''
MATMULS = '''
import torch

def multiply(product, dtype, layout):
    a, b = (torch.ones(32, 32, device='cuda').to(dtype) for _ in range(2))
    try:
        product(a, b.t() if layout == 'TN' else b)
        print('done')
    except (RuntimeError, ValueError):
        print('refused')

def scaled(a, b):
    return torch._scaled_mm(a, b, *(torch.ones((), device='cuda') for _ in range(2)), out_dtype=torch.bfloat16)

for layout in ('TN', 'NN'):
    multiply(torch._int_mm, torch.int8, layout)
    multiply(scaled, torch.float8_e4m3fn, layout)
'''
MEMORY = '''
import torch
free, total = torch.cuda.mem_get_info()
print(total == 12 * 2 ** 30)
kept = torch.empty(8 * 2 ** 30, dtype=torch.uint8, device='cuda')
try:
    torch.empty(5 * 2 ** 30, dtype=torch.uint8, device='cuda')
except torch.OutOfMemoryError:
    print('out of memory')
del kept
torch.cuda.empty_cache()
print(torch.empty(5 * 2 ** 30, dtype=torch.uint8, device='cuda').shape)
'''
KERNEL = '''
import torch
f = torch.compile(lambda x: (x * 2).relu())
print(f(torch.ones(1024, 1024, device='cuda')).shape)
'''


def run(card, code, tmp_path):
    (tmp_path / 'script.py').write_text(code)
    dry = run_script(find_card(card), str(tmp_path), 'script.py', [])
    assert dry.returncode == 0, dry.stderr
    return dry


def test_what_cannot_be_captured_fails_as_on_a_gpu(tmp_path):
    dry = run('RTX 3060', CAPTURE, tmp_path)
    assert dry.stdout.split() == ['captured', 'True', 'True', 'captured']
    assert dry.refusals == ['cudaStreamSynchronize: a stream is being captured',
                            'cudaDeviceSynchronize: a stream is being captured']


@pytest.mark.parametrize('card, results', [
    ('RTX 3060', ['done', 'refused', 'refused', 'refused']), ('H100', ['done', 'done', 'refused', 'refused'])])
def test_products_of_8_bits_need_their_layout_and_their_card(card, results, tmp_path):
    dry = run(card, MATMULS, tmp_path)
    assert dry.stdout.split() == results
    done = [event for event in dry.events if isinstance(event, Gemm) and not event.refused]
    assert {event.layout for event in done} == {'TN'} and {event.k for event in done} == {32}


@pytest.mark.parametrize('segments', ['False', 'True'])
def test_memory_is_used_up_and_given_back(segments, tmp_path, monkeypatch):
    monkeypatch.setenv('PYTORCH_ALLOC_CONF', f'expandable_segments:{segments}')
    dry = run('RTX 4070', MEMORY, tmp_path)
    assert dry.stdout.splitlines() == ['True', 'out of memory', f'torch.Size([{5 * 2 ** 30}])']


def test_a_kernel_has_the_registers_of_its_binary(tmp_path, monkeypatch):
    """Those in the log are those that NVIDIA's own tool, which Triton brings along, reads in the cubin."""
    from triton import knobs
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))  # with this kernel alone
    dry = run('RTX 4070', KERNEL, tmp_path)
    logged = {(kernel.registers, kernel.stack) for kernel in launches(dry.events, 'triton') if 'relu' in kernel.name}
    shown = [subprocess.run([knobs.nvidia.cuobjdump.path, '--dump-resource-usage', binary], capture_output=True,
                            text=True, check=True).stdout for binary in (tmp_path / 'cache').glob('**/*relu*.cubin')]
    assert logged and logged == {(int(registers), int(stack)) for text in shown
                                 for registers, stack in re.findall(r'REG:(\d+) STACK:(\d+) ', text)}
    moved, = (event.bytes for event in dry.events if isinstance(event, Op) and event.kind == 'triton')
    assert moved == pytest.approx(2 * 4 * 1024 * 1024)
