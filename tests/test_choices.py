import functools

import pytest
import torch

from configurator import InputError
from sologpt.machine import choices

CPU = torch.device('cpu')


def test_dtype(monkeypatch):
    assert choices.find_dtype('float32', CPU)[0] == 'float32'
    with pytest.raises(InputError, match='dtype=.float8. is not known'):
        choices.find_dtype('float8', CPU)
    with pytest.raises(InputError, match='which mps does not have'):
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


def test_a_gpus_attention_is_the_kernel_that_is_faster_there(monkeypatch):
    seconds = {'cudnn': 2e-3, 'flash': 1e-3}
    monkeypatch.setattr(choices, '_attention_seconds', lambda kernel, *_: seconds[kernel])
    monkeypatch.setattr(choices.devices, 'device_name', lambda device: 'a GPU')
    find = functools.partial(choices.find_attn_backend, device=torch.device('cuda'), block_size=1024)
    assert find('auto', dtype='bfloat16', shape=(1, 1, 1, 8, 8)) == ('flash', 'cudnn 2.00 ms, flash 1.00 ms')
    assert find('auto', dtype='bfloat16')[0] == find('auto', dtype='float32', shape=(1, 1, 1, 8, 8))[0] == 'sdpa'
    for given in (dict(), dict(shape=(1, 1, 1, 8, 8))):
        assert find('cudnn', dtype='float16', **given) == ('cudnn', 'as asked')

    def has_none(*_):
        raise RuntimeError('No available kernel')
    monkeypatch.setattr(choices, '_attention_seconds', has_none)
    assert find('auto', dtype='bfloat16', shape=(1, 1, 1, 8, 8))[0] == 'sdpa'
    with pytest.raises(InputError, match='attn_backend=flash: torch does not have it on'):
        find('flash', dtype='float16', shape=(1, 1, 1, 8, 8))


@pytest.mark.parametrize('name', ['cudnn', 'flash', 'flex'])
def test_attention_kernels_of_a_gpu_in_16_bits(name):
    asks = dict(documents=name == 'flex', compiled=True)
    for device, dtype in (('cpu', 'bfloat16'), ('cuda', 'float32')):
        why = choices.attention_misfit(name, torch.device(device), dtype, **asks)
        assert why == 'is for a GPU, in bfloat16 or float16'
    assert choices.attention_misfit(name, torch.device('cuda'), 'float16', **asks) == ''
