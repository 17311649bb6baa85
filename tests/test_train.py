import json
import os
import pickle
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, options, write_tokens

from configurator import InputError
from model import GPT
from sologpt.files import checkpoint
from sologpt.machine import choices, clock, devices
from sologpt.matmuls.recipe_linear import restore
from sologpt.matmuls.recipes import NAMES
from sologpt.tokens.loader import eval_batches
from sologpt.training import step


def log(folder, out='out'):
    with open(folder / out / 'log.jsonl', encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def losses(folder, out='out'):
    """iter -> loss of every step, and iter -> val_loss."""
    records = log(folder, out)[1:]
    steps = [r['iter'] for r in records if 'loss' in r]
    assert steps == sorted(set(steps))  # each step once
    return ({r['iter']: r['loss'] for r in records if 'loss' in r},
            {r['iter']: r['val_loss'] for r in records if 'val_loss' in r})


def test_it_learns_and_reports(project):
    ran, out = project.train(max_iters=200, eval_interval=100)
    steps, val = losses(project.folder)
    # each byte follows from the one before but for a coin toss: ln 2 at best
    assert val[0] > 5 and 0.69 < val[200] < 1.6 and list(val) == [0, 100, 200]
    assert list(steps) == list(range(200))
    line = (r'iter (\d+): loss ([\d.]+), time ([\d.]+)ms, mfu ([\d.]+)%, tok/s ([\d.]+)k, lr [\d.e-]+, mem [\d.]+GB, '
            r'eta \d+s')
    printed = re.findall(line, out)
    assert len(printed) == 200 and 'step 100: train loss ' in out
    last, record = printed[-1], [r for r in log(project.folder) if 'loss' in r][-1]
    assert float(last[1]) == pytest.approx(record['loss'], abs=1e-4)
    # the figures agree with each other: 64 tokens a step, MFU against the given peak
    assert record['tokens'] == 200 * 64
    assert record['tokens_per_s'] == pytest.approx(64 / record['time_ms'] * 1000)
    assert record['mfu'] == pytest.approx(ran['model'].flops_per_token(16) * record['tokens_per_s'] / 1e12)
    header = log(project.folder)[0]
    assert header['config']['n_embd'] == 32 and header['matmul'] == 'in float32' and header['tokens_per_iter'] == 64
    assert header['data'] == {'name': 'tiny', 'source': 'a test', 'train_tokens': 2500, 'val_tokens': 500,
                              'vocab_size': 256, 'bytes_per_token': 1.0}


def test_the_modern_recipe_learns_faster(project):
    project.train(max_iters=40, eval_interval=40, out_dir='gpt2')
    ran, out = project.train(max_iters=40, eval_interval=40, arch='modern', smear=True, optimizer='muon',
                             schedule='wsd')
    gpt2, modern = (losses(project.folder, o)[1][40] for o in ('gpt2', 'out'))
    assert modern < gpt2 - 0.5
    lr = [r['lr'] for r in log(project.folder) if 'loss' in r]
    assert lr[2:20] == [0.01] * 18 and lr[30] == pytest.approx(0.005) and lr[39] == pytest.approx(0.0005)
    flops = ran["header"].record["flops_per_token"]
    assert f'Muon adds {100 * ran["opt"].flops() / (64 * flops):.1f} %' in out
    assert len(project.sample(start='a')) > 20


def test_the_vocabulary_of_the_modern_one_is_padded(project):
    write_tokens(project.folder / 'data' / 'few', [1, 2] * 99, [1, 2] * 99, vocab_size=65)
    assert project.train(dataset='few')[0]['model'].config.vocab_size == 65  # as nanoGPT's
    model = project.train(dataset='few', arch='modern')[0]['model']
    assert model.config.vocab_size == 128 and model.config.n_ids == 65


def test_a_chosen_micro_batch_changes_nothing_else(project, monkeypatch):
    setup = dict(total_batch_size=16 * 16, max_iters=4, eval_interval=2, eval_iters=1)
    for name, fastest in (('one', 1), ('eight', 8)):
        def choose(sizes, seconds, forecast, limit, device, fastest=fastest):
            assert sizes == [16, 8, 4, 2, 1] and seconds(fastest) > 0 and forecast.at(fastest).peak < limit
            return fastest, 'as asked'
        monkeypatch.setattr(step, 'fastest', choose)
        run, out = project.train(out_dir=name, batch_size='auto', **setup)
        assert f'= {fastest} sequences x 16 tokens x {16 // fastest} accumulated' in out
    project.train(out_dir='given', batch_size=4, **setup)
    (one, val), (eight, val8), (given, _) = (losses(project.folder, name) for name in ('one', 'eight', 'given'))
    for other in (eight, given):
        assert list(other.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert list(val.values()) == pytest.approx(list(val8.values()), rel=1e-5)
    assert checkpoint.read_checkpoint('eight/ckpt.pt')['config']['batch_size'] == 'auto'
    run, out = project.resume(out_dir='eight', max_iters=5)  # what was chosen then, without a trial
    assert run['step'].batch_size == 8 and 'batch_size: as chosen before' in out


def test_accumulation_is_a_larger_batch(project):
    project.train(batch_size=8, out_dir='one')
    project.train(batch_size=2, gradient_accumulation_steps=4, out_dir='four')
    ran, out = project.train(batch_size=2, total_batch_size=128, out_dir='derived')
    assert 'tokens per iteration will be: 128 = 2 sequences x 16 tokens x 4 accumulated x 1 processes' in out
    one, four, derived = (losses(project.folder, o) for o in ('one', 'four', 'derived'))
    assert four == derived
    assert list(one[0].values()) == pytest.approx(list(four[0].values()), rel=1e-5)


@pytest.mark.parametrize('overrides', [
    dict(dropout=0.2),
    dict(dropout=0.2, gradient_accumulation_steps=16, batch_size=3),  # 48 of 155 windows a step: over epochs
    dict(dtype='bfloat16', bias=True),
    dict(dtype='float16', patience=9),
    dict(arch='modern', smear=True, optimizer='muon', momentum_warmup=6, schedule='wsd', dtype='bfloat16'),
    dict(arch='modern', optimizer='muon', embd_lr=1e-3, dtype='float16'),
    dict(optimizer_state='8bit', checkpoint_activations='selective', dropout=0.2),
    dict(optimizer_state='cpu', arch='modern', optimizer='muon'),
    dict(optimizer_state='8bit', dtype='float16'),
    dict(optimizer_state='8bit', arch='modern', optimizer='muon', weights_dtype='bfloat16', dtype='bfloat16'),
])
def test_resumed_run_is_the_same_run(project, overrides, monkeypatch):
    monkeypatch.setattr(choices, 'cpu_has_float16', lambda: True)
    schedule = dict(max_iters=8, lr_decay_iters=8) | overrides
    straight, _ = project.train(out_dir='straight', **schedule)
    # stopped between two evaluations, as Ctrl-C does
    project.train(out_dir='halves', **schedule | dict(max_iters=4))
    halves, out = project.resume(out_dir='halves', max_iters=8, dtype=schedule.get('dtype', 'float32'))
    weights = [list(run['model'].state_dict().values()) for run in (straight, halves)]
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)
    (steps, val), (steps2, val2) = (losses(project.folder, o) for o in ('straight', 'halves'))
    assert steps == steps2 and len(steps) == 8
    assert val.items() <= val2.items()  # which has the evaluation at its first end too
    if overrides.get('gradient_accumulation_steps'):
        assert straight['batches'].epoch(4) > 1
    if overrides.get('dtype') == 'float16':
        assert checkpoint.read_checkpoint('halves/ckpt.pt')['scaler']['scale'] <= 2.0 ** 15


@pytest.mark.parametrize('attn_backend', ['sdpa', 'math'])
def test_documents_are_kept_apart_also_after_a_resume(project, attn_backend):
    ids = np.random.default_rng(0).integers(60, 100, 3000) * (np.arange(3000) % 7 > 0)
    write_tokens(project.folder / 'data' / 'documents', ids[:2500], ids[2500:])
    setup = dict(dataset='documents', arch='modern', smear=True, dropout=0.2, attn_backend=attn_backend, max_iters=8)
    project.train(out_dir='packed', **setup)
    straight, out = project.train(out_dir='straight', document_mask=True, **setup)
    assert f'attention {attn_backend}, within documents (as asked); ' in out
    project.train(out_dir='halves', document_mask=True, **setup | dict(max_iters=4, lr_decay_iters=8))
    halves, out = project.resume(out_dir='halves', max_iters=8)
    assert ', within documents (as asked); ' in out
    for a, b in zip(*(run['model'].state_dict().values() for run in (straight, halves)), strict=True):
        assert torch.equal(a, b)
    (packed, _), (steps, val), (steps2, val2) = (losses(project.folder, o) for o in ('packed', 'straight', 'halves'))
    assert steps == steps2 and val.items() <= val2.items() and packed[7] != steps[7]
    # an evaluation is that of each document alone
    alone, total, n = GPT.from_checkpoint('straight/ckpt.pt')[0].eval(), 0.0, 0
    for x, y in eval_batches(straight['data'].val, 4, 2, torch.device('cpu')):
        for row, targets in zip(x, y, strict=True):
            begins = [0, *(i for i in range(1, 16) if row[i] == 0), 16]
            for start, end in zip(begins, begins[1:], strict=False):
                with torch.no_grad():
                    total += alone.loss(row[None, start:end], targets[None, start:end]).item() * (end - start)
                n += end - start
    assert val[8] == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize('model', [dict(arch='gpt2'), dict(arch='modern', smear=True, optimizer='muon')],
                         ids=['gpt2-adamw', 'modern-muon'])
@pytest.mark.parametrize('name', NAMES)
def test_every_matmul_trains_and_resumes(project, name, model, monkeypatch):
    monkeypatch.setattr(clock, 'shortest_seconds', lambda *_, **__: 1.0)  # of a Linear, for the header
    # fp8's last part is in float32: across a resume, and across the change itself
    spec = {'fp8': 'fp8:until=0.75', 'block_dropout': 'block_dropout:0.05,size=16'}.get(name, name)
    setup = model | dict(matmul=spec, gradient_accumulation_steps=2, max_iters=8)
    straight, out = project.train(out_dir='straight', **setup)
    assert f'matmuls of the blocks: {name}' in out
    saved = straight['built'].config['matmul']
    assert 'keep_last=' in saved and 'until=' in saved  # what was done, whatever a later version's defaults are
    halves = {'fp8': 'fp8', 'sparse24': 'sparse24:until=1.0'}.get(name, spec)  # not its end
    project.train(out_dir='halves', **setup | dict(max_iters=4, lr_decay_iters=8, matmul=halves))
    halves, _ = project.resume(out_dir='halves', max_iters=8, matmul=saved)
    for a, b in zip(*(run['model'].state_dict().values() for run in (straight, halves)), strict=True):
        assert torch.equal(a, b)
    (steps, val), (steps2, val2) = (losses(project.folder, o) for o in ('straight', 'halves'))
    assert steps == steps2 and val.items() <= val2.items()
    project.train(out_dir='plain', **model | dict(gradient_accumulation_steps=2, max_iters=8))
    plain = losses(project.folder, 'plain')[1]
    assert val[8] < val[0] - 1 and abs(val[8] - plain[8]) < (0.15 if name == 'ternary' else 0.03)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_bfloat16_weights_are_half_the_memory_and_resume(project, optimizer):
    setup = dict(weights_dtype='bfloat16', dtype='bfloat16', optimizer=optimizer)
    straight, _ = project.train(out_dir='straight', max_iters=9, prune='0.5:0-0.5', **setup)
    project.train(out_dir='halves', max_iters=5, lr_decay_iters=9, prune='0.5:0-1', **setup)
    halves, _ = project.resume(out_dir='halves', max_iters=9, prune='0.5:0-0.5', dtype='bfloat16')
    for a, b in zip(*(run['model'].state_dict().values() for run in (straight, halves)), strict=True):
        assert torch.equal(a, b)
    saved = checkpoint.read_checkpoint('halves/ckpt.pt')
    assert all(p.dtype == (torch.bfloat16 if p.dim() == 2 else torch.float32) for p in saved['model'].values())
    moments = [t for state in saved['optimizer']['state'].values() for t in state.values()]
    assert all(t.dtype == torch.float32 for t in moments)
    project.train(out_dir='wide', max_iters=9, **setup | dict(weights_dtype='float32'))
    assert abs(losses(project.folder, 'wide')[1][9] - losses(project.folder, 'straight')[1][9]) < 0.1
    for name, p in saved['model'].items():  # of the blocks' matrices half is zero, since step 4
        share = (p == 0).float().mean().item()
        assert share == pytest.approx(0.5, abs=0.02) if '.h.' in name and p.dim() == 2 else share < 0.2, name


@pytest.mark.parametrize('name', ['ternary', 'sparse24'])
def test_samples_are_of_the_weights_that_were_trained(project, name):
    ran, _ = project.train(matmul='sparse24:until=1.0' if name == 'sparse24' else name, max_iters=4)
    model, prompt = ran['model'].eval(), torch.tensor([[70, 77, 84]])
    sampled, out = project._in_process('sample.py', options(dict(
        out_dir='out', start='FMT', temperature=0, num_samples=1, max_new_tokens=20, device='cpu', dtype='float32')))
    assert out.startswith(bytes(model.generate(prompt, 20, temperature=0)[0].tolist()).decode(errors='replace'))
    expected = model(prompt)[0]
    torch.testing.assert_close(sampled['model'](prompt)[0], expected)
    restore(model)
    assert (model(prompt)[0] - expected).abs().max() > 0.01


BASE = dict(out_dir='base', max_iters=40, eval_interval=40)
ADAPT = dict(init_from='base', dataset='new', learning_rate=0.02, gradient_accumulation_steps=2, max_iters=8)


@pytest.fixture
def new(project):
    """data/new, in which other bytes follow each other than in data/tiny."""
    ids = np.arange(3000) * 11 % 40 + 60
    write_tokens(project.folder / 'data' / 'new', ids[:2500], ids[2500:])
    return project


@pytest.mark.parametrize('method, arch, more', [
    ('lora', 'gpt2', dict(dropout=0.1, adapter_dropout=0.1, loraplus_lr_ratio=4.0, use_rslora=True,
                          learning_rate=3e-3)),
    ('lora', 'modern', dict(base_format='nf4', checkpoint_activations=True)),
    ('lora', 'modern', dict(base_format='bfloat16', dtype='bfloat16')),
    ('lora', 'gpt2', dict(matmul='int8')), ('lora', 'gpt2', dict(dtype='float16')),
    ('lora', 'gpt2', dict(matmul='fp8:until=0.75', base_format='bfloat16', dtype='bfloat16')),
    ('dora', 'gpt2', dict(base_format='nf4', dtype='bfloat16')), ('dora', 'modern', dict(checkpoint_activations=True)),
    ('vera', 'gpt2', dict(adapter_r=8)), ('vera', 'modern', dict(adapter_r=8, base_format='nf4')),
    ('bottleneck', 'gpt2', dict(base_format='nf4')), ('bottleneck', 'modern', dict(adapter_targets='mlp.c_proj')),
    ('prompt', 'gpt2', dict(block_size=12)), ('prompt', 'modern', dict(block_size=12, base_format='nf4')),
    ('prefix', 'gpt2', dict(block_size=12, checkpoint_activations=True)), ('prefix', 'modern', dict(block_size=12)),
])
def test_every_adapter_trains_and_resumes(new, project, method, arch, more, monkeypatch):
    monkeypatch.setattr(clock, 'shortest_seconds', lambda *_, **__: 1.0)
    monkeypatch.setattr(choices, 'cpu_has_float16', lambda: True)
    project.train(arch=arch, smear=arch == 'modern', **BASE)
    base_bytes = (project.folder / 'base' / 'best.pt').read_bytes()
    virtual = dict(adapter_r=4) if method in ('prompt', 'prefix') else {}
    setup = ADAPT | dict(adapter=method, arch=arch, smear=arch == 'modern') | virtual | more
    straight, out = project.train(out_dir='straight', **setup)
    matmul = setup.get('matmul', '')
    project.train(out_dir='halves', **setup | dict(max_iters=4, lr_decay_iters=8, matmul=matmul.partition(':')[0]))
    halves, _ = project.resume(out_dir='halves', max_iters=8, dtype=setup.get('dtype', 'float32'), matmul=matmul)
    saved, again = (checkpoint.read_checkpoint(f'{name}/ckpt.pt') for name in ('straight', 'halves'))
    for name in saved['model'].keys() | again['model'].keys():
        assert torch.equal(saved['model'][name], again['model'][name]), name
    (steps, val), (steps2, val2) = (losses(project.folder, o) for o in ('straight', 'halves'))
    assert steps == steps2 and val.items() <= val2.items() and val[8] < val[0]
    # the checkpoint holds the adapter alone, and so do the moments
    trained = straight['built'].n_trained
    shared = sum(t.numel() for name, t in saved['model'].items() if name.startswith('base_model.vera'))
    assert sum(t.numel() for t in saved['model'].values()) == trained + shared
    assert sum(s['exp_avg'].numel() for s in saved['optimizer']['state'].values()) == trained
    assert (project.folder / 'base' / 'best.pt').read_bytes() == base_bytes
    assert f'adapter: {method}, {trained / straight["built"].n_params:.2%} of the parameters' in out
    assert f'{straight["built"].n_params:,} parameters, {trained:,} trained' in out
    # and goes on, from its files, where it ended
    ran, _ = project.train(out_dir='more', **setup | dict(adapter='', adapter_from='straight', max_iters=1))
    assert losses(project.folder, 'more')[1][0] == pytest.approx(val[8], abs=1e-2 if 'matmul' in more else 1e-6)
    # the text is that of the model that was trained
    model = straight['model'].eval()
    with devices.autocast(torch.device('cpu'), straight['machine'].dtype):
        ids = model.generate(torch.tensor([[70, 77, 84]]), 20, temperature=0)[0].tolist()
    sampled = project.sample(out_dir='straight', start='FMT', temperature=0, dtype=straight['machine'].dtype)
    assert sampled.startswith(bytes(ids[:12]).decode(errors='replace'))


def test_an_adapter_is_of_its_base_alone(new, project):
    project.train(**BASE)
    project.train(**BASE | dict(seed=1, out_dir='other'))
    project.train(adapter='lora', **ADAPT)
    os.rename('base', 'moved')
    with pytest.raises(InputError, match="no folder or checkpoint 'base'"):
        project.resume(max_iters=9)
    with pytest.raises(InputError, match='trained on another base than other'):
        project.resume(max_iters=9, base='other')
    with pytest.raises(InputError, match='trained on another base than other'):
        project.sample(init_from='other', adapter='out')
    with pytest.raises(InputError, match='has lora_alpha=32.0, but this run asks for 9.0'):
        project.resume(max_iters=9, base='moved', lora_alpha=9)
    assert project.resume(max_iters=9, base='moved')[0]['progress'].iter_num == 9
    assert len(project.sample(init_from='moved', adapter='out', start='a')) > 20
    with pytest.raises(InputError, match='ckpt.pt has adapter=, but this run asks for lora'):
        project.resume(out_dir='other', adapter='lora', max_iters=99)
    with pytest.raises(InputError, match='out/best.pt holds an adapter alone'):
        project.train(init_from='out', out_dir='third')
    with pytest.raises(InputError, match='adapter=dora, but out is a lora'):
        project.train(init_from='moved', adapter='dora', adapter_from='out', out_dir='third')
    with pytest.raises(InputError, match='out has adapter_r=16, but this run asks for 4'):
        project.train(init_from='moved', adapter_r=4, adapter_from='out', out_dir='third')
    with pytest.raises(InputError, match='out_dir=moved is where the base is'):
        project.train(init_from='moved/best.pt', adapter='lora', out_dir='moved')
    with pytest.raises(InputError, match='where the base of a resumed adapter is'):
        project.train(init_from='moved', adapter='lora', base='other')
    assert project.sample(init_from='moved', out_dir='out') == project.sample(init_from='moved', adapter='out')
    assert project.resume(max_iters=10, base='moved', adapter_dropout=0.5)[0]['model'].get_submodule(
        'transformer.h.0.attn.c_attn').dropout.p == 0.5


def test_finetuning_all_weights_of_an_earlier_run(project):
    project.train(arch='modern', bias=True, **BASE)
    val = losses(project.folder, 'base')[1][40]
    few = {k: v for k, v in TINY.items() if not k.startswith('n_')}
    ran, _ = project._in_process('train.py', options(few | dict(init_from='base', max_iters=2)))
    assert losses(project.folder)[1][0] == pytest.approx(val, abs=1e-6)
    assert ran['built'].n_trained == ran['built'].n_params
    assert ran['model'].config.arch == 'modern' and ran['model'].config.bias
    write_tokens(project.folder / 'data' / 'other', [1] * 99, [1] * 99,
                 tokenizer={'kind': 'chars', 'chars': ['a', 'b']})
    with pytest.raises(InputError, match='base was trained with another tokenizer'):
        project.train(init_from='base', dataset='other')
    project.train(out_dir='three', matmul='ternary', max_iters=2)
    with pytest.raises(InputError, match='trained with matmul=ternary, which is part of the model: give'):
        project.train(init_from='three')
    with pytest.raises(InputError, match='it can have no adapter'):
        project.train(init_from='three', adapter='lora')


def test_two_processes_train_an_adapter_as_one(new, project):
    project.train(**BASE)
    setup = ADAPT | dict(adapter='lora', base_format='nf4')
    project.train(out_dir='one', **setup)
    ran = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                          os.path.join(ROOT, 'train.py'), *options(TINY | setup | dict(out_dir='two'))],
                         capture_output=True, text=True, cwd=project.folder, timeout=120,
                         env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert ran.returncode == 0, ran.stderr
    for ours, theirs in zip(losses(project.folder, 'one'), losses(project.folder, 'two'), strict=True):
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)


def test_rows_of_a_batch_have_adapters_of_their_own(new, project):
    project.train(**BASE)
    for method in ('lora', 'vera'):
        project.train(out_dir=method, adapter=method, adapter_r=4, **ADAPT | dict(learning_rate=0.1))
    greedy = dict(start='FMT', temperature=0)
    alone = {name: project.sample(out_dir=name, **greedy) for name in ('base', 'lora', 'vera')}
    assert len(set(alone.values())) == 3
    out = project._in_process('sample.py', options(greedy | dict(
        adapters='lora,vera', adapter_ids='2,0,1,2', device='cpu', dtype='float32', max_new_tokens=20)))[1]
    names = {'vera': 'vera', 'the base': 'base', 'lora': 'lora'}
    assert out == ''.join(f'[{name}]\n{alone[names[name]]}' for name in ('vera', 'the base', 'lora', 'vera'))
    for wrong, message in ((dict(adapter_ids='3'), 'must be numbers from 0 to 2'),
                           (dict(adapter_ids='x'), 'must be numbers'), (dict(adapter='lora'), 'are both given'),
                           (dict(adapter_ids='1,1', num_samples=3), 'but adapter_ids has 2 rows'),
                           (dict(adapters='lora,nothere'), "no folder 'nothere'"),
                           (dict(adapters='', adapter_ids='1'), 'adapter_ids are numbers of adapters')):
        with pytest.raises(InputError, match=message):
            project.sample(**dict(adapters='lora,vera', num_samples=2, out_dir='base') | wrong)


def test_loss_scaling_starts_at_2_to_the_15(project, monkeypatch):
    monkeypatch.setattr(choices, 'cpu_has_float16', lambda: True)
    ran, _ = project.train(dtype='float16', max_iters=1)
    assert ran['scaler'].is_enabled() and ran['scaler'].get_scale() == 2.0 ** 15


def test_resume_keeps_the_config_and_goes_on_from_the_last_step(project):
    project.train(dropout=0.1, n_layer=1, max_iters=4, lr_decay_iters=9)
    ran, out = project.resume(max_iters=6)
    assert ran['dropout'] == 0.1 and ran['n_layer'] == 1
    assert ran['rates'].decay_iters == 9 and ran['step'].batch_size == 4
    assert 'iter 4:' in out and 'iter 3:' not in out and 'step 4:' not in out  # evaluated before it stopped


def test_resuming_another_architecture_is_refused(project):
    project.train()
    before = (project.folder / 'out' / 'ckpt.pt').read_bytes(), log(project.folder)
    with pytest.raises(InputError, match='has n_embd=32, but this run asks for 64'):
        project.resume(n_embd=64, max_iters=9)
    with pytest.raises(InputError, match='has arch=gpt2, but this run asks for modern'):
        project.resume(arch='modern', max_iters=9)
    with pytest.raises(InputError, match='has qk_norm=False, but this run asks for True'):
        project.resume(qk_norm=True, max_iters=9)
    with pytest.raises(InputError, match='dropout=1.5 must be in'):
        project.resume(dropout=1.5, max_iters=9)
    with pytest.raises(InputError, match="optimizer's state does not fit"):
        project.resume(optimizer='muon', max_iters=9)
    with pytest.raises(InputError, match='nothing left to do'):
        project.resume()
    write_tokens(project.folder / 'data' / 'other', [1] * 99, [1] * 99,
                 tokenizer={'kind': 'chars', 'chars': ['a', 'b']})
    with pytest.raises(InputError, match='another tokenizer'):
        project.resume(max_iters=9, dataset='other')
    assert before == ((project.folder / 'out' / 'ckpt.pt').read_bytes(), log(project.folder))


def test_best_and_newest(project):
    project.train(max_iters=3)
    project.resume(max_iters=9, learning_rate=9.0, min_lr=9.0)  # ruins the model
    newest, best = checkpoint.read_checkpoint('out/ckpt.pt'), checkpoint.read_checkpoint('out/best.pt')
    val = losses(project.folder)[1]
    assert newest['iter_num'] == 9 and best['iter_num'] == newest['best_iter'] == 3 and val[9] > val[3]
    assert best['best_val_loss'] == newest['best_val_loss'] == val[3]
    project.train(max_iters=2, eval_interval=100, always_save_checkpoint=False, out_dir='only')
    assert checkpoint.read_checkpoint('only/best.pt')['iter_num'] == 2  # the end is evaluated whatever the interval
    project.train(max_iters=2, learning_rate=9.0, min_lr=9.0, always_save_checkpoint=False, out_dir='worse')
    assert os.listdir('worse') == ['log.jsonl']  # worse than at the start


def test_a_new_run_keeps_what_an_earlier_one_left(project):
    project.train(max_iters=3)
    before = {p.name: p.read_bytes() for p in (project.folder / 'out').iterdir()}
    _, out = project.train(max_iters=1)
    after = {p.name: p.read_bytes() for p in (project.folder / 'out').iterdir()}
    assert all(after[f'{name}.old'] == content for name, content in before.items())
    assert 'kept the earlier ckpt.pt, best.pt, log.jsonl in out as *.old' in out
    assert checkpoint.read_checkpoint('out/ckpt.pt')['iter_num'] == 1


def test_a_log_that_was_cut_off(project):
    project.train(max_iters=3)
    with open('out/log.jsonl', 'a') as f:
        f.write('{"iter": 3, "lo')
    project.resume(max_iters=6)
    assert list(losses(project.folder)[0]) == list(range(6))


def test_reported_seconds_are_those_of_all_steps(project):
    _, out = project.train(max_iters=120, eval_interval=1000, log_interval=50)
    seconds = [r['seconds'] for r in log(project.folder) if 'val_loss' in r][-1]
    times = [r['time_ms'] / 1000 for r in log(project.folder) if 'loss' in r][1:]
    assert seconds > 1.1 * 50 * sum(times)  # 100 of the steps are in the lines, and 119 count


def test_patience(project):
    ran, _ = project.train(learning_rate=0.0, min_lr=0.0, max_iters=30, patience=2)
    assert ran['progress'].iter_num == 6  # the first evaluation is the best; two are not below it


def test_max_minutes(project):
    ran, out = project.train(max_iters=100000, eval_interval=100000, max_minutes=0.08)
    assert 0 < ran['progress'].iter_num < 100000
    assert checkpoint.read_checkpoint('out/best.pt')['iter_num'] == ran['progress'].iter_num


def test_a_slow_machines_schedule_ends_with_its_time(project):
    ran, _ = project.train(max_iters=100000, eval_interval=100000, train_minutes=0.02, schedule='wsd:0.5')
    lr = [r['lr'] for r in log(project.folder) if 'loss' in r]
    assert 20 < ran['progress'].iter_num < 100000 and len(lr) == ran['progress'].iter_num
    assert lr[len(lr) // 4] == 0.01 and lr[-1] < 0.001 and lr[len(lr) // 2:] == sorted(lr[len(lr) // 2:], reverse=True)
    assert checkpoint.read_checkpoint('out/ckpt.pt')['train_seconds'] == pytest.approx(1.2, abs=0.3)
    with pytest.raises(InputError, match='has trained its train_minutes=0.02: give more'):
        project.resume(max_iters=200000)
    stopped = ran['progress'].iter_num
    assert project.resume(max_iters=stopped + 2, train_minutes=0)[0]['progress'].iter_num == stopped + 2
    ran, _ = project.train(max_iters=4, train_minutes=9.0)  # and a fast one's with max_iters
    assert ran['progress'].iter_num == 4


def test_eval_only_also_after_a_resume_and_writes_nothing(project):
    project.train()
    before = {p.name: p.read_bytes() for p in (project.folder / 'out').iterdir()}
    _, out = project.resume(eval_only=True)
    assert f'val loss {losses(project.folder)[1][6]:.4f}' in out and 'iter' not in out.split('val loss')[1]
    assert before == {p.name: p.read_bytes() for p in (project.folder / 'out').iterdir()}


def test_loss_that_is_not_finite_stops_the_run(project):
    project.train(max_iters=3)
    good = (project.folder / 'out' / 'ckpt.pt').read_bytes()
    with pytest.raises(InputError, match=r'not finite at iter [3-9]: stopped'):
        project.resume(max_iters=40, eval_interval=40, learning_rate=1e30, min_lr=1e30, log_interval=10, grad_clip=0.0)
    assert (project.folder / 'out' / 'ckpt.pt').read_bytes() == good


def test_finetunes_a_folder_in_hugging_face_format(project):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=256, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    theirs.save_pretrained('hf')
    base = {k: v for k, v in TINY.items() if not k.startswith('n_')}
    ran, out = project._in_process('train.py', options(base | dict(init_from='hf', eval_only=True)))
    ids = torch.from_numpy(np.fromfile('data/tiny/val.bin', '<u2').astype(np.int64))
    windows = [i * 30 // 8 * 16 for i in range(8)]
    with torch.no_grad():
        expected = np.mean([theirs(ids[None, w:w + 17], labels=ids[None, w:w + 17]).loss.item() for w in windows])
    assert float(re.search(r'val loss ([\d.]+)', out)[1]) == pytest.approx(expected, abs=1e-4)
    ran, _ = project._in_process('train.py', options(base | dict(init_from='hf')))
    assert ran['model'].config.block_size == 16 and losses(project.folder)[1][6] < expected
    with pytest.raises(InputError, match='hf has n_layer=1, but this run asks for 2'):
        project.train(init_from='hf')
    with pytest.raises(InputError, match='hf has 32 positions'):
        project._in_process('train.py', options(base | dict(init_from='hf', block_size=64)))
    # out_dir is a folder of peft's
    peft = pytest.importorskip('peft')
    ran, _ = project._in_process('train.py', options(base | dict(init_from='hf', adapter='dora', learning_rate=0.1)))
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(theirs, 'out')(ids[None, :32]).logits
        torch.testing.assert_close(ran['model'].eval()(ids[None, :32], ids[None, :32])[0], theirs,
                                   atol=1e-4, rtol=1e-4)


def as_nanogpt(path, ran):
    """The checkpoint as nanoGPT writes it: fewer keys, unfused optimizer, the best loss a tensor, its own config."""
    saved = torch.load(path, weights_only=True)
    groups = saved['optimizer']['param_groups']
    for group in groups:
        group['fused'] = None
    args = {k: v for k, v in saved['model_args'].items() if k not in ('activation', 'tied', 'n_ids')}
    config = {k: saved['config'][k] for k in ('dataset', 'batch_size', 'gradient_accumulation_steps', 'max_iters',
                                              'learning_rate', 'eval_interval', 'eval_iters', 'warmup_iters')}
    torch.save({'model': {f'_orig_mod.{k}': v for k, v in saved['model'].items()}, 'optimizer': saved['optimizer'],
                'model_args': args, 'iter_num': saved['iter_num'],
                'best_val_loss': torch.tensor(saved['best_val_loss']),
                'config': config | {'device': 'cuda', 'dtype': 'float16', 'compile': True, 'backend': 'nccl',
                                    'lr_decay_iters': 600000, 'min_lr': 6e-5}}, path)


def test_nanogpt_folder_and_checkpoint(project):
    """meta.pkl instead of meta.json; a config file as nanoGPT's are; a ckpt.pt as nanoGPT's is; resumed and sampled."""
    data = project.folder / 'data' / 'tiny'
    (data / 'meta.json').unlink()
    chars = [chr(i) for i in range(256)]
    with open(data / 'meta.pkl', 'wb') as f:
        pickle.dump({'vocab_size': 256, 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}, f)
    (project.folder / 'train_tiny.py').write_text(
        "# a config\nimport time\nout_dir = 'out'\nwandb_log = False # override\n"
        "wandb_run_name = 'ft-' + str(time.time())\ndataset = 'tiny'\nalways_save_checkpoint = False\n")
    ran, _ = project.train('train_tiny.py')
    as_nanogpt('out/ckpt.pt', ran)
    os.remove('out/best.pt')
    before = losses(project.folder)[1][6]
    ran, out = project.resume(max_iters=30)
    assert 'iter 6:' in out and losses(project.folder)[1][30] < before
    as_nanogpt('out/ckpt.pt', ran)
    os.remove('out/best.pt')
    assert len(project.sample(start='a')) >= 20


def test_wandb_goes_on_after_a_resume(project):
    wandb = pytest.importorskip('wandb')
    ran, _ = project.train(wandb_log=True, wandb_run_name='test')
    first = ran['report'].log.wandb_run.id
    assert checkpoint.read_checkpoint('out/ckpt.pt')['wandb_id'] == first
    ran, _ = project.resume(max_iters=8, wandb_log=True)  # a checkpoint does not choose to use an account
    assert ran['report'].log.wandb_run.id == first and wandb.run is None
    runs = list((project.folder / 'wandb').glob('offline-run-*'))
    assert len(runs) == 2 and all(first in r.name for r in runs)


def test_heavy_libraries_are_imported_only_when_used(project):
    heavy = {'wandb', 'datasets', 'tiktoken', 'transformers', 'huggingface_hub', 'safetensors', 'matplotlib'}
    code = (f'import sys, runpy; runpy.run_path(sys.argv.pop(1), run_name="__main__"); '
            f'print(sorted({heavy} & set(sys.modules)))')
    command = [sys.executable, '-c', code, os.path.join(ROOT, 'train.py'), *options(TINY | dict(max_iters=1))]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=project.folder, timeout=100,
                         env=os.environ | {'PYTHONPATH': ROOT})
    assert ran.stdout.endswith('\n[]\n'), ran.stdout + ran.stderr


@pytest.mark.parametrize('overrides, message', [
    (dict(n_embed=5), "no config key 'n_embed'; did you mean 'n_embd'"),
    (dict(max_iters='many'), 'max_iters must be int'),
    (dict(max_iters=0), 'max_iters=0 must be at least 1'),
    (dict(dataset='nothere'), 'no data in data/nothere'),
    (dict(block_size=600), 'too few for block_size=600'),
    (dict(n_head=3), 'n_embd=32 is not divisible by n_head=3'),
    (dict(device='cuda'), "device='cuda' is not available"),
    (dict(dtype='fp8'), "dtype='fp8' is not known"),
    (dict(attn_backend='fast'), "attn_backend='fast' is not known"),
    (dict(compile='maybe'), "compile='maybe' is not known: use auto or True or False or cuda_graphs"),
    (dict(total_batch_size=100), 'total_batch_size=100 tokens cannot be made'),
    (dict(arch='llamas'), "arch='llamas' is not known"), (dict(norm='batch'), "norm='batch' is not known"),
    (dict(optimizer='sgd'), "optimizer='sgd' is not known"), (dict(schedule='step'), "schedule='step' is not known"),
    (dict(optimizer='muon:9'), 'optimizer=muon:9: Muon takes 1 to 6 iterations'),
    (dict(schedule='wsd:2'), 'the share of the steps that decays must be'),
    (dict(schedule='cosine:0.5'), "schedule='cosine:0.5' is not known"),
    (dict(embd_lr=-1), 'embd_lr=-1.0 must be at least 0'),
    (dict(arch='modern', n_head=32, n_embd=96), 'a head_dim of 3 is odd'),
    (dict(sharding='zero'), "sharding='zero' is not known: use fsdp"),
    (dict(sharding='fsdp'), 'is for several processes: start train.py by torchrun'),
    (dict(batch_size='all'), "batch_size='all' must be a number, or auto"),
    (dict(batch_size=0), 'batch_size=0 must be at least 1'),
    (dict(batch_size='auto'), 'batch_size=auto keeps the tokens of a step: give total_batch_size'),
    (dict(batch_size='auto', total_batch_size=100), 'total_batch_size=100 tokens cannot be made of sequences of'),
    (dict(optimizer_state='4bit'), "optimizer_state='4bit' is not known: use float32 or 8bit or cpu"),
    (dict(checkpoint_activations='all'), "checkpoint_activations='all' is not known: use False or True or selective"),
    (dict(checkpoint_activations='selective', adapter='lora', init_from='base'), 'adapters change in place what'),
    (dict(memory_limit=12), 'memory_limit=12.0 is for a GPU, not for cpu'),
    (dict(compile='cuda_graphs'), 'compile=cuda_graphs is for one process on a GPU'),
    (dict(accumulate='float64'), "accumulate='float64' is not known: use reduced or float32 or float16"),
    (dict(attn_backend='cudnn'), 'attn_backend=cudnn is for a GPU'),
    (dict(attn_backend='flash', document_mask=True), 'attn_backend=flash has no document_mask'),
    (dict(seed=-1), 'seed=-1 must be at least 0'), (dict(beta1=1.5), 'beta1=1.5 must be below 1'),
    (dict(learning_rate=-1), 'learning_rate=-1.0 must be'), (dict(peak_flops=0), 'peak_flops=0.0 must be above 0'),
    (dict(sample_tokens=5, sample_start='a', dataset='chars'), "the character 'a' is not among"),
    (dict(wandb_log=True, wandb_project='a/b'), 'W&B does not start'),
    (dict(init_from='resume'), 'no checkpoint out/ckpt.pt'),
    (dict(init_from='gpt2'), "gpt2 needs tokens of GPT-2's tokenizer"),
    (dict(matmul='fp7'), "matmul='fp7' is not known: use fp8"),
    (dict(matmul='int8:gemms=all'), "gemms=all must be some of fwd\\+dgrad\\+wgrad"),
    (dict(matmul='sparse24:gemms=fwd'), 'belong together'),
    (dict(matmul='int8:keep_last=2'), 'keep_last=2 must be from 0 to 1'),
    (dict(matmul='int8:until=1.5'), 'until=1.5 must be from 0 to 1'), (dict(prune=1), 'share of zeros must be below 1'),
    (dict(prune='half'), "prune='half' must be a share such as 0.5"),
    (dict(prune=0.5, train_minutes=1), 'give --train_minutes=0'),
    (dict(matmul='ternary:until=0.5'), 'ternary weights are the model'),
    (dict(prune='0.5:0.9-0.7'), 'it must begin before it ends'),
    (dict(weights_dtype='float16'), "weights_dtype='float16' is not known"),
    (dict(weights_dtype='bfloat16'), 'needs matmuls in it, but dtype is float32'),
    (dict(out_dir='data/tiny/val.bin/x'), 'cannot be written'),
    (dict(adapter='lora'), 'an adapter needs a base; set init_from'),
    (dict(adapter='lorra', init_from='base'), "adapter='lorra' is not known: use lora, or another of"),
    (dict(adapter='lora', init_from='base', adapter_targets='q_proj'), "the adapter is for 'q_proj', which"),
    (dict(adapter='lora', init_from='base', adapter_targets='.*'), 'only Linears of blocks can have one'),
    (dict(adapter='lora', init_from='base', optimizer='muon'), "optimizer='muon' is for the matrices of a base"),
    (dict(adapter='lora', init_from='base', prune=0.5), 'the weights are frozen'),
    (dict(adapter='lora', init_from='base', weights_dtype='bfloat16', dtype='bfloat16'), 'use base_format'),
    (dict(adapter='lora', init_from='base', matmul='sparse24'), 'matmul=sparse24 rounds the weights'),
    (dict(adapter='lora', init_from='base', matmul='fp8', base_format='nf4'), 'leave one of them out'),
    (dict(adapter='lora', init_from='base', base_format='int4'), "base_format='int4' is not known"),
    (dict(adapter='lora', init_from='base', base_format='bfloat16'), 'needs matmuls in it, but dtype is float32'),
    (dict(adapter='prefix', init_from='base'), '16 virtual tokens leave no room in block_size=16'),
    (dict(adapter='prompt', init_from='base', adapter_r=4), 'use --block_size=12'),
    (dict(adapter='lora', init_from='base', adapter_r=0), 'adapter_r=0 must be at least 1'),
    (dict(adapter='lora', init_from='base', adapter_dropout=1), 'adapter dropout 1.0 must be in'),
    (dict(adapter_from='nothere', init_from='base'), "no folder 'nothere' with an adapter"),
    (dict(base_format='nf4'), 'base_format=nf4 is for the base of an adapter'),
    (dict(document_mask=True, dataset='chars'), 'the tokenizer of data/chars has no end of text'),
    (dict(document_mask=True, adapter='prompt', init_from='base', adapter_r=4, block_size=12),
     'document_mask would need the virtual tokens'),
    (dict(document_mask=True, adapter='prefix', init_from='base', adapter_r=4, block_size=12),
     'document_mask would need the virtual tokens'),
])
def test_bad_input_is_refused_and_nothing_overwritten(project, overrides, message):
    write_tokens(project.folder / 'data' / 'chars', [1] * 99, [1] * 99, vocab_size=2,
                 tokenizer={'kind': 'chars', 'chars': ['b', 'c']})
    os.mkdir('out')
    if overrides.get('init_from') == 'base':
        project.train(out_dir='base', max_iters=1)
    if overrides.get('init_from') != 'resume':
        for name in ('ckpt.pt', 'best.pt', 'log.jsonl'):
            (project.folder / 'out' / name).write_text('precious')
    before = {p: p.read_bytes() for p in project.folder.rglob('*') if p.is_file()}
    if overrides.get('device') == 'cuda' and torch.cuda.is_available():
        pytest.skip('there is one')
    with pytest.raises(InputError, match=message):
        project.train(**overrides)
    # W&B's own files, and the lock, which goes when the process does
    after = {p: p.read_bytes() for p in project.folder.rglob('*')
             if p.is_file() and 'wandb' not in p.parts and not p.name.startswith('.run')}
    assert before == after


def test_batch_that_cannot_be_divided(project, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(InputError, match='gradient_accumulation_steps=3 cannot be divided among 2 processes'):
        project.train(gradient_accumulation_steps=3)


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_saves_and_can_go_on(project, signum):
    run = subprocess.Popen(project.command('train.py', *options(TINY | dict(max_iters=100000, eval_interval=100000,
                                                                            dropout=0.1))),
                           stdout=subprocess.PIPE, text=True, cwd=project.folder)
    for line in run.stdout:
        if line.startswith('iter 20:'):
            run.send_signal(signum)
            break
    out = run.stdout.read()
    assert run.wait(30) == 0 and 'go on with --init_from=resume --out_dir=out' in out
    stopped = checkpoint.read_checkpoint('out/ckpt.pt')['iter_num']
    assert stopped > 20
    project.resume(max_iters=stopped + 2, lr_decay_iters=100000)
    project.train(out_dir='straight', max_iters=stopped + 2, eval_interval=100000, dropout=0.1, lr_decay_iters=100000)
    assert losses(project.folder)[0] == losses(project.folder, 'straight')[0]


def test_two_processes_train_as_one(project):
    setup = dict(gradient_accumulation_steps=4, dropout=0.0, max_iters=6, patience=5, max_minutes=5.0)
    project.train(out_dir='one', **setup)
    ran = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                          os.path.join(ROOT, 'train.py'), *options(TINY | setup | dict(out_dir='two'))],
                         capture_output=True, text=True, cwd=project.folder, timeout=120,
                         env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert ran.returncode == 0, ran.stderr
    one, two = losses(project.folder, 'one'), losses(project.folder, 'two')
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)
    assert ran.stdout.count('iter 3:') == ran.stdout.count('step 3:') == 1
    assert ran.stdout.count('saving checkpoint') == 2


def test_interrupted_processes_save_once(project):
    run = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                            os.path.join(ROOT, 'train.py'),
                            *options(TINY | dict(gradient_accumulation_steps=2, max_iters=99999, eval_interval=99999))],
                           stdout=subprocess.PIPE, text=True, cwd=project.folder, start_new_session=True)
    for line in run.stdout:
        if line.startswith('iter 20:'):
            os.killpg(run.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
            break
    out = run.stdout.read()
    run.wait(60)
    assert out.count('go on with --init_from=resume') == out.count('saving checkpoint') == 1
    assert checkpoint.read_checkpoint('out/ckpt.pt')['iter_num'] > 20
