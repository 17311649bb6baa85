"""The gpu suite: the battery beside nanoGPT, its table, and the quick check."""

import contextlib
import importlib
import io
import json
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, options

from configurator import InputError, resolve
from sologpt.adapters.methods import METHODS
from sologpt.bench import (
    gpu,
    gpu_card,
    gpu_measurements,
    gpu_quick,
    gpu_quick_lab,
    gpu_quick_rows,
    gpu_rows,
    gpu_session,
    gpu_table,
)
from sologpt.machine import choices, devices
from sologpt.matmuls import recipes
from sologpt.tokens import data_folder

# nanoGPT as the battery sees it: config files that are run, lines of training, a generate() that is called twice
PEER_TRAIN = '''
import os, sys
device = 'cpu'
keys = dict(arg[2:].split('=') for arg in sys.argv[1:] if arg.startswith('--'))
torch = __import__('types').SimpleNamespace(manual_seed=lambda seed: None)
for arg in sys.argv[1:]:
    if not arg.startswith('--'):
        print(open(arg).read())
        exec(open(arg).read())
tokens = int(keys['gradient_accumulation_steps']) * int(keys['batch_size']) * int(keys['block_size'])
assert os.path.exists(keys['dataset'] + '/train.bin') and keys['compile'] == 'False'
print(f'tokens per iteration will be: {tokens:,}')
for i in range(int(keys['max_iters']) + 1):
    if i % int(keys['eval_interval']) == 0:
        loss = 'nan' if keys['eval_iters'] == '0' else f'{5.5 - i / 100:.4f}'
        print(f'step {i}: train loss {loss}, val loss {loss}')
    print(f'iter {i}: loss 2.0, time {400 if i else 9000:.2f}ms, mfu 1.00%')
'''
PEER_SAMPLE = '''
import sys, time
class GPT:
    drawn = 0
    def generate(self, idx, n, temperature):
        GPT.drawn += 1
        time.sleep(0.02 * GPT.drawn)
        return self
    def tolist(self):
        return []
keys = dict(arg[2:].split('=') for arg in sys.argv[1:] if arg.startswith('--'))
exec(open(sys.argv[1]).read())
for _ in range(int(keys['num_samples'])):
    GPT().generate(None, int(keys['max_new_tokens']), temperature=1.0)
    print('text')
'''
GPU = ['--suite=gpu', '--peer=peer', '--small=True', '--device=cpu']


@pytest.fixture
def run_gpu(project, run_bench, monkeypatch):
    """The battery with some rows, in this process except the peer; returns (the figures, what it printed)."""
    (project.folder / 'peer').mkdir()
    (project.folder / 'peer' / 'train.py').write_text(PEER_TRAIN)
    (project.folder / 'peer' / 'sample.py').write_text(PEER_SAMPLE)

    def child(session, module, call):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            eval(call, vars(importlib.import_module(f'sologpt.bench.{module}')).copy())
        return json.loads(out.getvalue().splitlines()[-1])
    monkeypatch.setattr(gpu_session.Session, 'child', child)
    every = {(row.part, row.name): row for row in gpu_rows.list_rows()}

    def run(names, *argv):
        rows = [name if isinstance(name, gpu.Row) else every[name] for name in names]
        monkeypatch.setattr(gpu, 'list_rows', lambda: rows)
        measured, out = run_bench(*GPU, *argv)
        return measured['figures'], out
    return run


def test_gpu_beside_nanogpt(project, run_gpu):
    refused = gpu.Row('memory', 'refused', 1, gpu_measurements.train, gpu_session.STEP | {'n_layers': 3})
    figures, out = run_gpu([refused, *(('training_step', f'{who}, round {n}') for n in (1, 2)
                                       for who in ('nanoGPT', 'here')),
                            ('memory', 'LoRA'), ('race', 'nanoGPT'), ('race', 'here, 35 % of the tokens'),
                            ('sampling', 'nanoGPT'), ('sampling', 'here'), ('more', 'wait for a batch')])
    assert figures['small'] and figures['summary']['small'] and [card['when'] for card in figures['device']] == [
        'before', 'after']
    assert all(card['matmul_tflops'] > 0 and card['copy_gb_per_s'] > 0 for card in figures['device'])
    assert "did you mean 'n_layer'" in figures['memory']['refused']['failed'] and 'refused: ' in out

    steps, found = figures['training_step'], figures['summary']
    there, here = ([steps[f'{who}, round {n}'] for n in (1, 2)] for who in ('nanoGPT', 'here'))
    for row in there:  # 2 x 4 sequences of 32 tokens
        assert row['ms_per_step'] == 400 and row['tokens_per_s'] == 256 / 0.4 and 0 < row['memory_gb'] < 2
    assert found['speed_ratio'] == pytest.approx(sum(400 / row['ms_per_step'] for row in here) / 2)
    mfu = found['mfu']
    assert mfu['here'] / mfu['nanoGPT'] == pytest.approx(found['tokens_per_s']['here'] / 640)
    assert mfu['nanoGPT'] == pytest.approx(640 * here[0]['flops_per_token'] / here[0]['peak_flops'])
    command, = here[0]['commands']
    assert command.startswith('here: python train.py --device=cpu') and '/tmp' not in command
    assert figures['memory']['LoRA']['parameters'] > here[0]['parameters']

    target, race = figures['race']['nanoGPT'], figures['race']['here, 35 % of the tokens']
    assert target['target_val_loss'] == 5.3 and target['target_is'].startswith('as the peer printed it')
    assert target['peer'] == {'iterations': 20, 'tokens': 5120, 'seconds': 8.0, 'val_loss_printed': 5.3}
    assert race['here']['val_loss'] <= 5.3 and race['here']['tokens'] == 256 * race['here']['iterations'] <= 7 * 256
    assert found['race']['fewer']['tokens'] == 5120 / race['here']['tokens']
    sampling = figures['sampling']
    assert sampling['nanoGPT']['tokens'] == sampling['here']['tokens'] == 20
    assert 100 < sampling['nanoGPT']['tokens_per_s'] < 20 / 0.04  # the text's; the one before it took half as long
    assert figures['more']['wait for a batch']['waited_ms'] > 0
    assert (project.folder / 'figures.png').exists()
    table = (project.folder / 'figures.md').read_text()
    assert table in out and '| memory of a step, refused, GB |  | failed: command line: ' in table


def test_gpu_goes_on_where_it_was(project, run_gpu, monkeypatch):
    monkeypatch.setattr(gpu, 'read_card', lambda session, keys: {'name': 'a card'})
    calls = []

    def run(name, fails=None):
        def row(session, keys):
            calls.append(name)
            if fails:
                raise fails
            return {'value': len(calls)}
        return gpu.Row('more', name, 100, row, {})
    full = run('full', InputError('out of GPU memory with batch_size=4: take less\n  in: train.py'))
    figures, out = run_gpu([run('a'), run('b', KeyError('something'))])
    assert figures['more']['a']['value'] == 1 and figures['more']['b']['failed'] == "KeyError: 'something'"
    figures, out = run_gpu([run('a'), run('b'), full])
    assert calls == ['a', 'b', 'b', 'full'] and figures['more']['a']['value'] == 1 and len(figures['device']) == 4
    assert 'failed' not in figures['more']['b'] and 'not measured for want' not in out
    assert figures['more']['full']['failed'] == 'out of GPU memory with batch_size=4: take less'
    # less time than is kept for the end; that the memory did not suffice need not be found again
    figures, out = run_gpu([run('a'), full, run('d')], '--minutes=0.3')
    before_the_table = out.partition('| what |')[0]
    assert calls == ['a', 'b', 'b', 'full'] and 'not measured for want' in before_the_table
    assert '  more: d' in before_the_table and 'more: a' not in before_the_table
    with pytest.raises(InputError, match="no part 'moer': use more"):
        run_gpu([run('a')], '--recipes=moer')
    with pytest.raises(InputError, match="measured with dataset=None, not 'tiny'"):
        run_gpu([run('a')], '--dataset=tiny')
    (project.folder / 'figures.json').write_text('{"figures": []}')
    with pytest.raises(InputError, match='no file of this suite'):
        run_gpu([run('a')])
    figures, _ = run_gpu([run('a')], '--dataset=tiny', '--restart=True')
    assert calls[-1] == 'a' and len(figures['device']) == 2

    def interrupted(session, keys):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run_gpu([run('e'), gpu.Row('more', 'f', 1, interrupted, {})], '--dataset=tiny')
    figures = json.loads((project.folder / 'figures.json').read_text())['figures']
    assert 'value' in figures['more']['e'] and 'f' not in figures['more']


def test_the_gpus_rows_have_keys_that_train_has():
    rows = gpu_rows.list_rows()
    assert len({(row.part, row.name) for row in rows}) == len(rows)
    own = [row for row in rows if row.measure in (gpu_measurements.train, gpu_measurements.train_by_number)]
    for row in own:
        resolve(f'{ROOT}/train.py', options(row.keys))


def test_the_gpus_text_is_in_files_that_nanogpt_reads(tmp_path, monkeypatch):
    (tmp_path / 'packages').mkdir()
    for i in range(50):
        (tmp_path / 'packages' / f'{i}.py').write_text(f'{i:03d}\n' * 100)
    packages = [str(p) for p in sorted((tmp_path / 'packages').iterdir())]
    monkeypatch.setattr(gpu_session, 'installed_code', lambda: packages)
    for tokens in (5000, 10 ** 6):  # some of them, and all
        folder = tmp_path / str(tokens)
        gpu_session.prepare_code(str(folder), tokens)
        sizes = [(folder / f'{split}.bin').stat().st_size // 2 for split in ('train', 'val')]
        assert sizes[0] == 5000 if tokens == 5000 else 45 * 400 < sum(sizes) <= 50 * 401
        assert data_folder.token_files(str(folder), 'train') == [str(folder / 'train.bin')]


def test_what_nvidia_smi_says(tmp_path, monkeypatch):
    smi = tmp_path / 'nvidia-smi'
    smi.write_text('#!/bin/sh\necho "GPU-11, 580.1, 345, 1980, 3201, 75.10, 700.00, 31"\n'
                   'echo "GPU-12, 580.1, 1980, 1980, 3201, 690.10, 700.00, 61"\n')
    smi.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}', prepend=':')
    found = gpu_card.read_nvidia_smi(SimpleNamespace(uuid='12'))
    assert found['clocks.sm'] == '1980' and found['temperature.gpu'] == '61' and 'uuid' not in found
    assert gpu_card.read_nvidia_smi(SimpleNamespace(uuid='13')) == {}
    smi.unlink()
    monkeypatch.setenv('PATH', f'{tmp_path}')
    assert gpu_card.read_nvidia_smi(SimpleNamespace(uuid='12')) == {}


# ---- the budget and the table ----------------------------------------------------------------------------------------

def test_one_call_has_the_rows_that_decide():
    rows, deciding = gpu_rows.list_rows(), gpu_rows.deciding_rows()
    assert rows[:len(deciding)] == deciding  # the others come after them
    assert {(row.part, row.name) for row in deciding} >= {
        ('training_step', 'nanoGPT, round 1'), ('training_step', 'here, round 1'), ('memory', '12 GB, micro-batch 24'),
        ('race', 'nanoGPT'), ('race', 'here, 20 % of the tokens'), ('sampling', 'nanoGPT'), ('sampling', 'here'),
        ('linears', 'fp8 and int8')}
    planned, call = sum(row.seconds for row in deciding), 60 * resolve(f'{ROOT}/bench.py', [])[0]['minutes']
    assert planned + gpu_rows.FIRST + gpu_rows.LAST <= call
    # the docstring adds up the same seconds
    said = [int(n) for n in re.findall(r'^ +(\d+)   ', gpu_rows.__doc__, re.M)]
    assert said == [row.seconds for row in deciding] and f'\n    {planned}\n' in gpu_rows.__doc__


@pytest.mark.parametrize('ms, steps', [(None, 240), (140, 240), (200, 174), (10_000, 60)])
def test_a_slow_gpu_races_fewer_steps(ms, steps):
    figures = {} if ms is None else {'training_step': {'nanoGPT, round 1': {'ms_per_step': ms}}}
    assert gpu_measurements._race_steps(SimpleNamespace(small=False, figures=figures)) == steps


def test_a_small_gpu_has_a_step_in_more_pieces(tmp_path, monkeypatch):
    def session(gigabytes):
        monkeypatch.setattr(torch.cuda, 'get_device_properties',
                            lambda device: SimpleNamespace(total_memory=gigabytes * 1e9))
        monkeypatch.setattr(gpu_session.choices, 'find_dtype', lambda name, device: ('bfloat16', ''))
        return gpu_session.Session('', torch.device('cuda'), False, None, str(tmp_path), {})
    large, small = (session(gb).sized(gpu_session.STEP) for gb in (15.6, 12.6))
    assert large == gpu_session.STEP
    assert (small['batch_size'], small['gradient_accumulation_steps']) == (8, 8)
    assert session(12.6).sized(gpu_session.STEP | {'batch_size': 24})['batch_size'] == 24


def test_the_figures_as_a_table():
    step = {'flops_per_token': 0.8e9, 'peak_flops': 1e15, 'date': '2026-11-25'}
    figures = {
        'settings': {'device': 'NVIDIA H100 80GB HBM3'}, 'small': False,
        'device': [{'when': 'before', 'matmul_tflops': 700.0, 'copy_gb_per_s': 2500.0, 'cuda': '13.0', 'cudnn': 92000,
                    'triton': '3.7.1', 'idle': {'driver_version': '580.1'}},
                   {'when': 'after', 'failed': 'no time'}],
        'training_step': {
            'nanoGPT, round 1': step | {'ms_per_step': 150.0, 'tokens_per_s': 400e3, 'memory_gb': 12.0},
            'here, round 1': step | {'ms_per_step': 120.0, 'tokens_per_s': 500e3, 'memory_gb': 8.0, 'mfu': 0.4},
            'attention flash': step | {'ms_per_step': 125.0, 'mfu': 0.38}},
        'memory': {'12 GB, micro-batch 24': {'failed': 'out of GPU memory | take\nless'},
                   'foreseen': {'peak_gb': {'16': 7.72}}},
        'race': {'nanoGPT': {'peer': {'seconds': 36.0, 'tokens': 15_728_640}, 'target_val_loss': 1.5, 'steps': 240},
                 'here, 20 % of the tokens': {'here': {'seconds': 6.0, 'tokens': 3_145_728}, 'ratio': {'seconds': 6.0},
                                              'target_val_loss': 1.5},
                 'here, 12 % of the tokens': {'here': None, 'here_final_val_loss': 1.61, 'ratio': None}},
        'sampling': {'nanoGPT': {'tokens_per_s': 100.0},
                     'here': {'tokens_per_s': 150.0, 'compiled_failed': 'RuntimeError: no capture'}},
        'linears': {'fp8 and int8': {'dtype': 'bfloat16', 'tokens': 8192, 'widths': {'2048': {
            'bfloat16': {'ms': 0.4}, 'fp8': {'ms': 0.32, 'speed': 1.25}, 'int8': {'failed': 'not supported'}}}}},
        'launch_bound': {'nanoGPT, 4 x 128, T=64, eager': {'ms_per_step': 9.0, 'date': '2026-11-26'},
                         'here, 4 x 128, T=64, eager': {'ms_per_step': 6.0}},
        'matmul': {'widths 768,2048': {'tokens': 8192, 'rows': {'bfloat16': [], 'fp8': [
            {'width': 768, 'ms': 0.1, 'ratio_to_bfloat16': 2.0, 'path': 'native'}, {'width': 2048, 'skipped': ''}]}}},
        'more': {'wait for a batch': {'seconds': 12.3}}}
    figures['summary'] = gpu.summary(figures)
    measured = {'command': 'python bench.py --suite=gpu', 'date': '2026-11-27', 'device': 'NVIDIA H100 80GB HBM3',
                'torch': '2.13.0', 'python': '3.11.7', 'figures': figures}
    assert gpu_table.to_markdown(measured) == '''\
GPT-2 124M on NVIDIA H100 80GB HBM3, beside nanoGPT. torch 2.13.0, CUDA 13.0, cuDNN 92000, Triton 3.7.1, Python \
3.11.7, driver 580.1; 2026-11-25 to 2026-11-26. Command: `python bench.py --suite=gpu`.
The card before: a matmul 700.0 TFLOP/s, a copy 2,500 GB/s.

| what | nanoGPT | here | ratio |
|---|---|---|---|
| ms of a training step of 65,536 tokens | 150.0 | 120.0 | 1.25 x |
| tokens per second | 400,000 | 500,000 |  |
| MFU | 32.0% | 40.0% |  |
| memory, GB | 12.00 | 8.00 | 1.50 x |
| ms of the same step, attention flash |  | 125.0 (38.0% MFU) | 1.20 x |
| memory of a step, 12 GB, micro-batch 24, GB |  | failed: out of GPU memory \\| take less |  |
| memory of a step, foreseen, GB |  | 16 sequences 7.72 |  |
| seconds to nanoGPT's loss, 1.5000 after 240 steps, with 20 % of the tokens | 36.0 (15,728,640 tokens) | 6.0 \
(3,145,728 tokens) | 6.00 x |
| seconds to nanoGPT's loss, 1.5000 after 240 steps, with 12 % of the tokens | 36.0 (15,728,640 tokens) | not reached: \
1.6100 at the end |  |
| tokens per second of one text | 100.0 | 150.0 | 1.50 x |
| tokens per second of one text, compiled |  | failed: RuntimeError: no capture |  |
| ms of a Linear 2,048 wide, 8,192 tokens, forward and backward, `fp8` |  | 0.320; 0.400 in bfloat16 | 1.25 x |
| ms of a Linear 2,048 wide, 8,192 tokens, forward and backward, `int8` |  | failed: not supported |  |
| ms of a step of 4 x 128, T=64, eager | 9.00 | 6.00 | 1.50 x |
| ms of a Linear, 8,192 tokens, `fp8`, native |  | 0.100 (768 wide) | 0.50 x |
| more: wait for a batch |  | in the JSON file, 12 s |  |
'''


def test_a_table_of_what_was_not_measured():
    figures = {'settings': {'device': 'a card'}, 'small': True, 'device': [], 'summary': {'small': True},
               'training_step': {'nanoGPT, round 1': {'failed': 'no triton'}}}
    table = gpu_table.to_markdown({'command': 'c', 'date': '2026-11-27', 'torch': '2', 'python': '3',
                                   'figures': figures})
    assert 'these are no measurements' in table and '2026-11-27' in table
    assert '| ms of a training step of 65,536 tokens | failed: no triton | not measured |  |' in table
    assert table.count('not measured') == 1 + 1 + 2 + 4 and '12 GB, micro-batch 24' in table


# ---- the quick check -------------------------------------------------------------------------------------------------

def test_the_quick_check_on_a_cpu(run_bench):
    chosen = ['attention math', 'attention cudnn', 'matmul=strassen', 'resume', 'export to hf',
              'compiled step']
    measured, out = run_bench('--suite=gpu', '--quick=True', '--device=cpu', f'--recipes={",".join(chosen)}')
    rows = measured['figures']['rows']
    assert {name: row['result'] for name, row in rows.items()} == {
        'attention math': 'OK', 'attention cudnn': 'skipped', 'dropout, attention cudnn': 'skipped',
        'matmul=strassen:1': 'OK', 'resume from a checkpoint': 'OK', 'export to hf': 'OK',
        'compiled step': 'skipped'}
    lines = out.splitlines()
    assert lines[0] == measured['figures']['card']['name'] and lines[1].startswith(f'torch {torch.__version__}, Triton')
    assert re.search(r'^attention math +OK \([\d.]+ s\)$', out, re.M)
    assert re.search(r'^compiled step +skipped: needs CUDA \(0.0 s\)$', out, re.M)
    assert re.search(r'^7 rows: 4 OK, 0 failed, 3 skipped; \d+s$', out, re.M)
    assert gpu_quick.card_lines({'name': 'RTX', 'capability': [8, 6], 'memory_gb': 12.6, 'multiprocessors': 28,
                                 'idle': {'driver_version': '580.1'}, 'cuda': '13.0', 'cudnn': 92000, 'torch': '2.13',
                                 'triton': '3.7.1', 'python': '3.11', 'system': 'Linux'}) == [
        'RTX, compute capability 8.6, 12.6 GB, 28 multiprocessors', 'driver 580.1, CUDA 13.0, cuDNN 92000',
        'torch 2.13, Triton 3.7.1, Python 3.11, Linux']


FAKE = '''
import json, os, signal, sys, time
def run_rows(device, folder, names, end):
    for name in names:
        if name in ('dies', 'broken'):
            print('@row ' + json.dumps({'result': 'failed', 'reason': 'x', 'seconds': 0}), flush=True) \
if name == 'broken' else print('Fatal: no more', file=sys.stderr, flush=True)
            sys.exit(3) if name == 'broken' else os.kill(os.getpid(), signal.SIGKILL)
        if name == 'hangs':
            time.sleep(600)
        if name == 'leaves':
            os._exit(0)
        print('noise\\n@row ' + json.dumps({'result': 'OK', 'seconds': os.getpid()}), flush=True)
'''


@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='no process groups')
def test_a_row_that_ends_its_process_costs_that_row(tmp_path, monkeypatch):
    (tmp_path / 'fake_rows.py').write_text(FAKE)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.setattr(gpu_quick, 'CALL', 'import fake_rows; fake_rows.run_rows')
    monkeypatch.setattr(gpu_quick, 'LIMIT', 2)
    names = ['a', 'dies', 'b', 'broken', 'c', 'hangs', 'd', 'leaves']
    rows = [gpu_quick_rows.Row(name, 'eager', None) for name in names]
    found = dict(gpu_quick._outcomes('cpu', str(tmp_path), rows, 1e12))
    assert [name for name in names if found[name]['result'] == 'OK'] == ['a', 'b', 'c', 'd']
    assert found['dies']['reason'] == 'its process ended with SIGKILL: Fatal: no more'
    assert found['broken']['reason'] == 'x' and found['hangs']['reason'].startswith('not done after 2 s')
    assert found['leaves']['reason'].startswith('its process ended with status 0')
    assert len({found[name]['seconds'] for name in 'abcd'}) == 4  # in a process of its own each
    (tmp_path / 'later').mkdir()
    found = dict(gpu_quick._outcomes('cpu', str(tmp_path / 'later'), rows, 0.0))
    assert all(outcome == {'result': 'skipped', 'reason': 'no time was left', 'seconds': 0.0}
               for outcome in found.values())


def test_after_a_failure_a_process_ends_only_if_its_device_does_not_work(tmp_path, monkeypatch, capsys):
    def fails(lab):
        raise RuntimeError('CUDA error: an illegal memory access\nwas encountered')
    row = gpu_quick_rows.Row
    rows = [row('fails', 'eager', fails), row('wrong', 'eager', lambda lab: gpu_quick_lab.Losses([2.0], [1.0], 0.1)),
            row('skipped', 'eager', fails, lambda lab: 'too old')]
    monkeypatch.setattr(gpu_quick, 'list_rows', lambda: rows)

    def outcomes():
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line.removeprefix(gpu_quick.MARK)) for line in lines]
    gpu_quick.run_rows('cpu', str(tmp_path), ['fails', 'wrong', 'skipped'], math.inf)
    first, second, third = outcomes()
    assert first['reason'] == 'RuntimeError: CUDA error: an illegal memory access was encountered'
    assert second['reason'].startswith('losses 2.000; expected, within 10%, 1.000')
    assert (third['result'], third['reason']) == ('skipped', 'too old')
    monkeypatch.setattr(torch, 'ones', fails)
    with pytest.raises(SystemExit) as ended:
        gpu_quick.run_rows('cpu', str(tmp_path), ['fails', 'wrong'], math.inf)
    assert ended.value.code == gpu_quick.BROKEN and len(outcomes()) == 1


def test_what_is_wrong_is_found():
    lab, one = gpu_quick_lab, torch.ones(4)
    lab.Losses([5.0, 4.01], [5.0, 4.0], 0.01).check()
    lab.Tensors([one * 1.01], [one], 0.02).check()
    lab.Text('a', 'a').check()
    lab.Refused('out of memory: take less', 'out of memory').check()
    for found, words in (
            (lab.Losses([5.0, 4.1], [5.0, 4.0], 0.01), 'within 1%'), (lab.Losses([math.nan], [5.0], 0.5), 'losses nan'),
            (lab.Losses([5.0], [5.0, 4.0], 0.01), 'expected'), (lab.Losses([5.0, 5.0], [5.0, 5.0], 0.01), 'not fall'),
            (lab.Tensors([one, one * 1.1], [one, one], 0.05), r'off by 0\.1 '),
            (lab.Tensors([one * math.nan], [one], 0.05), 'off by nan'), (lab.Text('a', 'b'), "drew 'a', the CPU 'b'"),
            (lab.Refused('nothing', 'out of memory'), "'nothing'")):
        with pytest.raises(lab.Wrong, match=words):
            found.check()
    lab.Losses([5.0, 5.0], [5.0, 5.0], 0.01, falls=False).check()


def test_every_path_has_its_row():
    rows = gpu_quick_rows.list_rows()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) and {row.lane for row in rows} == set(gpu_quick_rows.LANES)
    assert {f'attention {name}' for name in ('sdpa', 'math', 'auto', *choices.GPU_ATTENTION)} <= set(names)
    assert {f'matmul={name}' for name in recipes.RECIPES} | {f'adapter={name}' for name in METHODS} <= set(names)
    assert set(devices.DTYPES) <= set(names)


@pytest.mark.parametrize('argv, message', [
    (['--suite=plan', '--quick=True'], 'quick=True is for --suite=gpu, not for plan'),
    (['--suite=gpu', '--quick=True', '--n_layer=3'], 'n_layer: the quick check sets'),
    (['--suite=gpu', '--quick=True', '--device=cpu', '--recipes=nothere'], "no row of the quick check has 'nothere'")])
def test_bad_input_of_the_quick_check(project, argv, message):
    with pytest.raises(InputError, match=message):
        project._in_process('bench.py', ['--dest=figures.json', *argv])
