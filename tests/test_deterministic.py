"""deterministic=True: what it is refused with, and that it changes nothing on a CPU."""

import os

import pytest
import torch
from conftest import ROOT

from configurator import InputError, resolve
from sologpt.machine import processes
from sologpt.training import checks


@pytest.mark.parametrize('keys, device, message', [
    (dict(train_minutes=1.0), 'cpu', 'a clock is never the same; give --train_minutes=0'),
    (dict(batch_size='auto', total_batch_size=4096), 'cuda', 'batch_size=auto, which is chosen by time: give a number'),
    (dict(attn_backend='cudnn'), 'cuda', 'attn_backend=cudnn, whose backward is not: use auto'),
    (dict(), 'mps', 'deterministic=True is for CUDA and CPUs: leave it out')])
def test_what_cannot_be_deterministic_is_refused(monkeypatch, keys, device, message):
    config = resolve(os.path.join(ROOT, 'train.py'), [])[0] | keys
    monkeypatch.setattr(checks, 'find_device', lambda name: torch.device(device))
    checks.check(config)
    with pytest.raises(InputError, match=message):
        checks.check(config | {'deterministic': True})


@pytest.mark.parametrize('device, refused', [('cuda', True), ('cpu', False)])
def test_several_gpus_are_refused(monkeypatch, device, refused):
    config = resolve(os.path.join(ROOT, 'train.py'), [])[0] | {'deterministic': True}
    monkeypatch.setattr(checks, 'find_device', lambda name: torch.device(device))
    monkeypatch.setattr(checks, 'find_processes', lambda: (True, 0, 2))
    if refused:
        with pytest.raises(InputError, match='is for one GPU'):
            checks.check(config)
    else:
        checks.check(config)
    assert processes.find_processes()[0] is False


def test_on_a_cpu_it_changes_nothing(project):
    ordinary, deterministic = (project.train(out_dir=f'out-{flag}', deterministic=flag)[0]['model'].state_dict()
                               for flag in (False, True))
    assert all(torch.equal(ordinary[name], deterministic[name]) for name in ordinary)
    assert not torch.are_deterministic_algorithms_enabled()
