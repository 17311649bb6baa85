import base64
import contextlib
import io
import json
import os
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, options

from configurator import InputError, resolve
from model import GPT, GPTConfig
from sologpt.adapters.methods import METHODS
from sologpt.bench import (
    ablation,
    adapter_finetuning,
    adapter_rows,
    adapter_serving,
    data,
    export,
    formats,
    plan,
    process,
    sweep,
)
from sologpt.bench import adapters as adapters_suite
from sologpt.bench import matmul as matmul_suite
from sologpt.bench.rows import (
    LOSS_COLUMNS,
    Column,
    Comparison,
    choose_rows,
    cost_figures,
    final_losses,
    loss_figures,
    print_rows,
)
from sologpt.machine import clock
from sologpt.matmuls import recipes
from sologpt.matmuls.spec import parse_matmul
from sologpt.tokens import readers, tokenizer_kinds
from sologpt.training import runs

TRAIN = options({k: v for k, v in TINY.items() if k != 'out_dir'})

# nanoGPT as the race sees it: config files that are run, no key `seed`, and its console lines
PEER = '''
import sys
from types import SimpleNamespace
ms = []
torch = SimpleNamespace(manual_seed=lambda seed: ms.append((seed - 1336) * 100))
for arg in sys.argv[1:]:
    if not arg.startswith('--'):
        exec(open(arg).read())
torch.manual_seed(1337)
print('tokens per iteration will be: 64')
for i in range(50):
    if i in (0, 40):
        print(f'step {i}: train loss 9.0, val loss {9.0 if i == 0 else TARGET:.4f}')
    print(f'iter {i}: loss 2.0, time {ms[0] * (5 if i in (0, 40) else 1):.2f}ms, mfu 1.00%')
'''


def test_race_to_the_loss_that_nanogpt_prints(project, run_bench):
    project.train(seed=1, eval_interval=2, learning_rate=3e-3)
    project.train(seed=2, eval_interval=2, learning_rate=3e-3, out_dir='out2')
    evals = [runs.read_run(d, '').curve('iter')[1] for d in ('out', 'out2')]
    target = max(losses[2] for losses in evals)  # after 4 steps with either seed
    assert target < min(losses[1] for losses in evals)
    (project.folder / 'peer').mkdir()
    (project.folder / 'peer' / 'train.py').write_text(PEER.replace('TARGET', repr(target + 1e-4)))
    measured, out = run_bench('--suite=race', '--peer=peer', '--peer_args=--n_embd=64', '--runs=2',
                              *TRAIN, '--eval_interval=2', '--learning_rate=3e-3')
    first, second = measured['figures']['seeds']
    assert first['peer'] == {'iterations': 40, 'tokens': 2560, 'seconds': 4.0,
                             'val_loss_printed': round(target + 1e-4, 4)}
    assert second['peer']['seconds'] == 8.0  # another seed reached the peer
    for race in (first, second):
        assert race['here']['iterations'] == 4 and race['here']['tokens'] == 256 and race['here']['seconds'] > 0
        assert race['ratio']['iterations'] == 10 and race['ratio']['tokens'] == 10
        assert race['ratio']['seconds'] == race['peer']['seconds'] / race['here']['seconds']
        assert race['target_is'].startswith('as the peer printed it')
    assert measured['figures']['median_ratio']['iterations'] == 10
    assert 'the models differ in n_embd' in out and (project.folder / 'figures.png').exists()
    assert measured['command'].startswith('python bench.py --suite=race') and '--n_embd=32' in measured['command']


def test_race_on_the_same_tokens_where_the_peers_checkpoint_can_be_loaded(project, run_bench, monkeypatch):
    monkeypatch.setattr(process, 'run_script', lambda folder, script, args: (project._in_process(script, args)[1], 0.0))
    peer_args = ' '.join([*TRAIN, '--max_iters=4', '--learning_rate=0', '--min_lr=0', '--eval_iters=1'])
    measured, _ = run_bench('--suite=race', f'--peer={ROOT}', f'--peer_args={peer_args}', '--runs=1',
                            *TRAIN, '--seed=1')
    race, = measured['figures']['seeds']
    project.train(seed=1)  # the peer is this trainer, and has not learned: our own first evaluation, of more tokens
    assert race['target_val_loss'] == pytest.approx(runs.read_run('out', '').evals[0]['val_loss'], abs=1e-4)
    assert race['target_is'] == 'the same tokens' and race['target_val_loss'] != race['peer']['val_loss_printed']
    assert race['here']['iterations'] == 3
    peer_args = ' '.join([*TRAIN, '--max_iters=20'])
    measured, out = run_bench('--suite=race', f'--peer={ROOT}', f'--peer_args={peer_args}', '--runs=1',
                              *TRAIN, '--learning_rate=0', '--min_lr=0')
    assert measured['figures']['median_ratio'] is None and 'not reached' in out


def test_sweep_keeps_the_step_and_stops_at_its_end(project, run_bench):
    measured, out = run_bench('--suite=sweep', '--steps=3', *TRAIN, '--total_batch_size=64')
    figures = measured['figures']
    assert [row['batch_size'] for row in figures['rows']] == [1, 2, 4]
    for row in figures['rows']:
        assert row['batch_size'] * row['gradient_accumulation_steps'] * 16 == figures['tokens_per_step'] == 64
        assert row['tokens_per_s'] == pytest.approx(64 / row['ms_per_step'] * 1000)
        assert row['ms_per_micro_step'] == pytest.approx(row['ms_per_step'] / row['gradient_accumulation_steps'])
    best = next(row for row in figures['rows'] if f'--batch_size={row["batch_size"]} ' in figures['best'])
    assert best['tokens_per_s'] >= 0.98 * max(row['tokens_per_s'] for row in figures['rows'])
    assert f'best: {figures["best"]}' in out and (project.folder / 'figures.png').exists()


def test_sweep_stops_where_the_memory_ends(project, run_bench, monkeypatch):
    train = process.run_own

    def small(script, args):
        if '--batch_size=4' in args[len(TRAIN):]:
            raise InputError('train.py: out of GPU memory with batch_size=4')
        return train(script, args)
    monkeypatch.setattr(process, 'run_own', small)
    measured, out = run_bench('--suite=sweep', '--steps=1', *TRAIN, '--gradient_accumulation_steps=4')
    assert [row['batch_size'] for row in measured['figures']['rows']] == [1, 2] and 'out of GPU memory' in out
    rows = [{'memory_gb': 1e6}, {'memory_gb': 2e6}]  # four petabytes next
    assert sweep.next_would_not_fit(rows) and not sweep.next_would_not_fit(rows[:1])


def test_ablation_is_over_the_same_seeds(project, run_bench, monkeypatch):
    monkeypatch.setattr(ablation, 'REPLACED', {'the recipe': {}, 'no steps': {'learning_rate': 0, 'min_lr': 0}})
    measured, out = run_bench('--suite=ablation', '--runs=2', *TRAIN)
    for name, changes in ablation.REPLACED.items():
        expected = []
        for seed in (1, 2):
            project.train(seed=seed, **changes)
            expected.append(runs.read_run('out', '').evals[-1]['val_loss'])
        row = measured['figures'][name]
        assert row['val_loss'] == expected and row['mean'] == pytest.approx(sum(expected) / 2)
        assert row['spread'] == pytest.approx(abs(expected[0] - expected[1]) / 2 ** 0.5)
    recipe, none = measured['figures'].values()
    assert recipe['difference'] == 0 and none['difference'] == pytest.approx(none['mean'] - recipe['mean'])
    assert f'{none["difference"]:+.4f}' in out


def test_every_replacement_is_of_keys_that_train_has():
    keys = {k for changes in ablation.REPLACED.values() for k in changes}
    with open(f'{ROOT}/train.py', encoding='utf-8') as f:
        source = f.read()
    assert all(f'\n{key} = ' in source or f'\n{key}: ' in source for key in keys)


def test_matmul_of_every_recipe_at_every_width(project, run_bench):
    measured, out = run_bench('--suite=matmul', '--widths=128,64', '--tokens=32', '--device=cpu',
                              '--recipes=int8,ternary,strassen,mxfp8', '--dtype=bfloat16')
    figures = measured['figures']
    assert list(figures['rows']) == ['float32', 'bfloat16', 'mxfp8', 'int8', 'ternary', 'strassen 1', 'strassen 2']
    for name, rows in figures['rows'].items():
        assert [row['width'] for row in rows] == [64, 128] and name in out
        for row in rows:
            for base in ('float32', 'bfloat16'):
                beside = next(other for other in figures['rows'][base] if other['width'] == row['width'])
                assert row[f'ratio_to_{base}'] == pytest.approx(row['ms'] / beside['ms'])
            assert row['saved_ratio'] == row['saved_bytes_per_token'] / \
                next(other['saved_bytes_per_token'] for other in figures['rows']['bfloat16']
                     if other['width'] == row['width'])
    last = {name: rows[-1] for name, rows in figures['rows'].items()}
    assert last['int8']['path'] == 'native' and last['mxfp8']['path'] == 'emulated'
    for part in ('y', 'dx', 'dw'):
        error = {name: row[f'error_{part}'] for name, row in last.items()}
        assert error['float32'] < 1e-6 and 1e-3 < error['bfloat16'] < 5e-3
        assert error['bfloat16'] < error['strassen 1'] < error['strassen 2'] < 0.05
        assert error['bfloat16'] < error['int8'] < 0.04
    assert last['int8']['error_dx'] == pytest.approx(0.01, rel=0.3)  # without outliers 1 / 127 of three deviations
    assert last['ternary']['error_y'] == pytest.approx(0.51, abs=0.03)  # of Gaussian weights in three values
    # x in 32, 16 and 8 bits, and what is made of w, (128, 128), with 32 tokens
    assert last['float32']['saved_bytes_per_token'] == 4 * 128
    assert last['bfloat16']['saved_bytes_per_token'] == 2 * 128 + 2 * 128 * 128 / 32
    assert last['int8']['saved_bytes_per_token'] == 128 + 4 + (128 + 4) * 128 / 32
    assert set(figures['faster_from_width']) == set(last) - {'float32', 'bfloat16'}
    assert (project.folder / 'figures.png').exists()

    accumulators = figures['accumulators']
    assert accumulators['float32'] < 1e-5 and accumulators['bfloat16'] > 0.7  # which stops growing at 256
    one, three, six = (accumulators[f'float32 out of {n}'] for n in
                       ('1 bfloat16 product', '3 bfloat16 products', '6 bfloat16 products'))
    assert 1e-5 < one < 1e-3 and six <= three < 1e-6
    for errors in figures['strassen_errors'].values():
        assert all(1.5 < b / a < 6 for a, b in zip(errors, errors[1:], strict=False))  # with every level
    inference = figures['ternary_inference']
    assert inference['width'] == 128
    assert [row['bytes'] / 128 ** 2 for row in inference['rows'].values()] == [4, 2, 1, 0.25, 0.25]
    assert inference['rows']['ternary in 2 bits']['ms'].keys() == {'1', '64'}
    assert inference['rows']['ternary in bit planes']['ms'].keys() == {'1'}


def test_matmul_leaves_out_what_takes_too_long(run_bench, monkeypatch):
    monkeypatch.setattr(matmul_suite, 'TOO_LONG', 0)
    measured, out = run_bench('--suite=matmul', '--widths=16,32', '--tokens=16', '--recipes=mxfp4,int8', '--device=cpu')
    first, second = measured['figures']['rows']['mxfp4']
    assert first['ms'] > 0 and 'not measured' in second['skipped'] and second['skipped'] in out
    assert 'skipped' not in measured['figures']['rows']['int8'][1]
    assert measured['figures']['faster_from_width']['mxfp4'] is None


@pytest.mark.parametrize('ratios, width', [
    ((2, 0.9, 0.8), 200), ((0.9, 1.1, 0.8), 300), ((0.5, 0.5, 1.0), None), ((0.5, 0.5, None), None), ((0.9, 0.5), 100)])
def test_crossover_is_where_a_recipe_stays_faster(ratios, width):
    rows = [{'width': 100 * (i + 1)} | ({'skipped': ''} if ratio is None else {'ratio_to_bfloat16': ratio})
            for i, ratio in enumerate(ratios)]
    assert matmul_suite.crossover(rows) == width


def test_formats_are_over_the_same_seeds_and_go_on_after_a_failure(project, run_bench, monkeypatch):
    train, calls = process.run_own, []

    def fails_with_fp8(script, args):
        calls.append(args)
        if '--matmul=fp8' in args:
            raise InputError('loss is nan\n  in: train.py')
        return train(script, args)
    monkeypatch.setattr(process, 'run_own', fails_with_fp8)
    monkeypatch.setattr(clock, 'shortest_seconds', lambda *_, **__: 1.0)  # of a Linear, which every run measures
    measured, out = run_bench('--suite=formats', '--runs=2', '--recipes=fp8,mxfp4,mxfp4 backward only', *TRAIN)
    rows = measured['figures']
    assert list(rows) == ['float32', 'fp8', 'mxfp4', 'mxfp4 backward only']
    assert rows['fp8'] == {'failed': 'loss is nan'} and 'failed: loss is nan' in out
    assert len([args for args in calls if '--matmul=fp8' in args]) == 1  # not again with the other seed
    expected = []
    for seed in (1, 2):
        project.train(seed=seed, matmul='mxfp4')
        expected.append(runs.read_run('out', '').evals[-1]['val_loss'])
    row, base = rows['mxfp4'], rows['float32']
    assert row['val_loss'] == expected and row['mean'] == pytest.approx(sum(expected) / 2)
    assert row['spread'] == pytest.approx(abs(expected[0] - expected[1]) / 2 ** 0.5)
    assert row['difference'] == pytest.approx(row['mean'] - base['mean']) and base['difference'] == 0
    assert row['speed_ratio'] == pytest.approx(row['tokens_per_s'] / base['tokens_per_s']) and row['memory_gb'] > 0
    assert (base['path'], row['path']) == ('in float32', 'emulated')
    assert rows['mxfp4 backward only']['path'] == 'fwd in dtype, dgrad emulated, wgrad emulated'
    assert f'{row["difference"]:+.4f}' in out and (project.folder / 'figures.png').exists()


def test_every_recipe_has_its_rows_of_keys_that_train_has():
    linears, by_format = matmul_suite.make_rows(('float32',)), formats.make_rows(torch.device('cpu'))
    assert matmul_suite.make_rows((), 'fp8:fast_accum=False')['fp8'] == {'matmul': 'fp8:fast_accum=False'}
    for rows in (linears, by_format):
        for row in rows.values():
            parse_matmul(row.get('matmul', ''))
        assert {row['matmul'].partition(':')[0] for row in rows.values() if 'matmul' in row} == set(recipes.NAMES)
    for changes in by_format.values():
        resolve(f'{ROOT}/train.py', options(changes))


def test_a_comparison_goes_on_after_a_row_has_failed(capsys):
    def train(name, seed):
        if name == 'b' and seed == 2:
            raise InputError('loss is nan\n  in: train.py')
        steps = [{'iter': i, 'loss': 2.0, 'time_ms': 10.0 * seed, 'memory_gb': 1.0} for i in range(4)]
        loss = {'base': 3.0, 'a': 2.5, 'b': 0.0}[name] + seed
        return runs.Run(name, {'dtype': 'float32', 'tokens_per_iter': 100}, steps, [{'iter': 4, 'val_loss': loss}])

    def figures(of_row, of_base):
        losses = final_losses(of_row), final_losses(of_base)
        return loss_figures(*losses) | cost_figures(of_row, of_base)
    comparison = Comparison('base', train)
    comparison.train_all(['base', 'a', 'b'], range(1, 4))
    assert list(comparison.runs['b']) == [(1,)]  # not again with seed 3
    found = comparison.rows(['base', 'a', 'b'], figures)
    assert found['b'] == {'failed': 'loss is nan'}
    assert found['a'] == {
        'val_loss': [3.5, 4.5, 5.5], 'mean': 4.5, 'spread': 1.0, 'difference': -0.5, 'ms_per_step': 20.0,
        'tokens_per_s': 5000.0, 'speed_ratio': 1.0, 'memory_gb': 1.0, 'dtype': 'float32'}
    print_rows(found, [*LOSS_COLUMNS, Column('s', lambda row: f'{row["ms_per_step"] / 1000:g}')])
    head, base, a, b = capsys.readouterr().out.splitlines()[3:]
    assert head.split() == ['val', 'loss', 'spread', 'difference', 's'] and len(base) == len(a) == len(head)
    assert a.split() == ['a', '4.5000', '1.0000', '-0.5000', '0.02'] and b.split(maxsplit=1)[1] == 'failed: loss is nan'
    with pytest.raises(InputError, match='loss is nan'):  # there is nothing to compare with
        Comparison('b', train).train('b', 2)


def test_a_part_of_the_rows_is_chosen():
    of_all = {'base': {}, 'strassen 1': {'matmul': 'strassen:1'}, 'strassen 2': {'matmul': 'strassen:2'},
              'pruned': {'prune': 0.5}}
    assert choose_rows(of_all, '', ['base']) == of_all
    assert list(choose_rows(of_all, 'pruned', ['base'])) == ['base', 'pruned']
    assert list(choose_rows(of_all, 'strassen', [])) == ['strassen 1', 'strassen 2']
    assert list(choose_rows(of_all, 'strassen 2', [])) == ['strassen 2']


def test_without_matplotlib_the_figures_are_still_written(project, run_bench, monkeypatch):
    for name in [n for n in sys.modules if n.split('.')[0] == 'matplotlib'] + ['matplotlib']:
        monkeypatch.setitem(sys.modules, name, None)
    measured, out = run_bench('--suite=sweep', '--steps=1', *TRAIN)
    assert measured['figures']['rows'] and 'matplotlib is not installed' in out
    assert not (project.folder / 'figures.png').exists()


@pytest.mark.parametrize('options, expected', [
    (['--batch_size=4', '--block_size=16', '--gradient_accumulation_steps=3'], 192),
    (['--batch_size=2', '--block_size=16'], 2 * 16 * 40), (['--batch_size=auto', '--total_batch_size=64'], 64),
    (['--gradient_accumulation_steps=3', '--total_batch_size=64'], 64),
    (['--total_batch_size=64', '--gradient_accumulation_steps=3', '--batch_size=2', '--block_size=8'], 48)])
def test_the_tokens_of_a_step_follow_from_the_config(options, expected):
    assert sweep.tokens_of_step(*process.resolve_train(options))[0] == expected


@pytest.mark.parametrize('argv, message', [
    (['--suite=rase'], "suite='rase': use --suite= with"), (['--suite=race'], "peer='': give the folder"),
    (['--suite=race', f'--peer={ROOT}'], 'no config for this trainer'),
    (['--suite=race', f'--peer={ROOT}', '--dataset=nothere'], "dataset='nothere'"),
    (['--suite=sweep', '--steps=0'], 'steps=0'), (['--suite=sweep', '--n_layers=3', *TRAIN], "did you mean 'n_layer'"),
    (['--suite=speed', f'--peer={ROOT}', 'config/x.py'], 'takes no config'),
    (['--suite=speed', '--dest=nothere/x.json'], 'no such folder'),
    (['--suite=matmul', '--tokens=0'], 'tokens=0'), (['--suite=matmul', '--widths=0'], "widths='0' must be"),
    (['--suite=matmul', '--widths=64,wide'], "widths='64,wide' must be"),
    (['--suite=matmul', '--recipes=fp8,int9'], "'int9' is not known: use int8"),
    (['--suite=formats', '--recipes=float33', *TRAIN], "'float33' is not known: use float32"),
    (['--suite=formats', '--dataset=nothere'], 'no data in data/nothere'),
    (['--suite=gpu', f'--peer={ROOT}', '--device=cpu'], 'this suite is for a GPU'),
    (['--suite=gpu', f'--peer={ROOT}', '--small=True', '--n_layer=3'], 'n_layer: this suite sets')])
def test_bad_input(project, run_bench, argv, message):
    with pytest.raises(InputError, match=message):
        project._in_process('bench.py', ['--dest=figures.json', *argv])


FINETUNE = options({k: v for k, v in TINY.items() if k not in ('out_dir', 'n_layer', 'n_head', 'n_embd', 'block_size')}
                   | dict(init_from='base', block_size=12, adapter='lora', adapter_r=2))


def test_adapters_at_their_best_rates_beside_full_finetuning(project, run_bench, monkeypatch):
    project.train(out_dir='base', max_iters=30, eval_interval=30)
    monkeypatch.setattr(adapter_finetuning, 'RATES', {'full': (1e-3, 1e-2), 'lora': (1e-1, 3e-1), 'dora': (1e-2,)})
    monkeypatch.setattr(adapters_suite, 'SHAPE', adapters_suite.SHAPE | dict(n_layer=2, n_head=2, n_embd=32,
                                                                             vocab_size=256, block_size=96))
    monkeypatch.setattr(adapter_serving, 'DECODED', 3)
    train = process.run_own

    def own(script, args):
        if '--adapter=dora' in args:
            raise InputError('out of GPU memory\n  in: train.py')
        if '--learning_rate=0.3' in args:
            raise InputError('the loss or its gradient is not finite at iter 2: stopped')
        return train(script, args)
    monkeypatch.setattr(process, 'run_own', own)
    measured, out = run_bench('--suite=adapters', '--runs=2', '--steps=2', '--recipes=lora,dora', *FINETUNE)
    figures = measured['figures']

    rows = figures['finetuning']
    assert list(rows) == list(figures['step_124m']) == ['full', 'lora', 'dora']
    assert rows['dora'] == figures['step_124m']['dora'] == {'failed': 'out of GPU memory'}
    full, lora = rows['full'], rows['lora']
    # 0.3 diverged; every other rate, also those by which the list was widened, was trained at
    assert [rate for row in (full, lora) for rate, loss in
            zip(row['learning_rates'], row['val_loss_by_rate'], strict=True) if loss is None] == [0.3]
    assert len(full['learning_rates']) > 2 and len(lora['learning_rates']) > 2
    for row in (full, lora):
        known = {rate: loss for rate, loss in zip(row['learning_rates'], row['val_loss_by_rate'], strict=True) if loss}
        assert row['best_rate'] == min(known, key=known.get) and row['val_loss'][0] == min(known.values())
        assert row['best_at_end'] == (row['best_rate'] in (row['learning_rates'][0], row['learning_rates'][-1]))
        assert not row['best_at_end'] or len(row['learning_rates']) == 4  # widened twice
        assert row['mean'] == pytest.approx(sum(row['val_loss']) / 2)
        assert row['difference'] == pytest.approx(row['mean'] - full['mean'])
        assert row['speed_ratio'] == pytest.approx(full['ms_per_step'] / row['ms_per_step'])
    project.train(**dict(arg[2:].split('=') for arg in FINETUNE) | dict(seed=2, learning_rate=lora['best_rate'],
                                                                        out_dir='again'))
    assert lora['val_loss'][1] == min(e['val_loss'] for e in runs.read_run('again', '').evals[1:])
    assert lora['file_bytes'] == (project.folder / 'again' / 'adapter_model.safetensors').stat().st_size
    assert full['file_bytes'] == 4 * full['parameters'] and f'{lora["difference"]:+.4f}' in out
    assert (project.folder / 'figures.png').exists()

    # A and B beside each block's Linears, (96, 32), (32, 32), (128, 32), (32, 128)
    steps = figures['step_124m']
    for found, r in ((rows, 2), (steps, adapters_suite.RANK)):
        assert found['full']['share'] == 1 and found['lora']['trained'] == 2 * r * (128 + 64 + 160 + 160)
        assert found['lora']['share'] == found['lora']['trained'] / found['lora']['parameters']
        assert 16 * found['full']['trained'] == found['full']['training_bytes']
        assert found['lora']['training_bytes'] == 4 * found['lora']['parameters'] + 12 * found['lora']['trained']
    assert steps['lora']['speed_ratio'] == steps['full']['ms_per_step'] / steps['lora']['ms_per_step']
    # the base has as many positions more as there are virtual tokens
    assert steps['lora']['parameters'] - steps['lora']['trained'] == steps['full']['parameters'] + 16 * 32

    served = figures['serving']
    assert list(served['dtypes']) == ['float32'] and served['load_s'] > 0
    assert served['file_bytes'] == pytest.approx(4 * steps['lora']['trained'], rel=0.1)
    for what in ('T=1', 'T=64'):
        row = served['dtypes']['float32'][what]
        assert row['ratio'] == row['adapters_s'] / row['base_s'] > 0


def test_every_adapter_is_measured_by_keys_that_train_has():
    rows = adapter_rows.ROWS
    assert {row['adapter'] for row in rows.values()} == {'', *METHODS}
    assert rows.keys() == adapter_finetuning.RATES.keys()
    for row in rows.values():
        config, _ = resolve(f'{ROOT}/train.py', options(adapter_rows.RESET | row))
        assert config['adapter'] == row['adapter'] and config['base_format'] == row.get('base_format', 'float32')
    assert all(a < b for rates in adapter_finetuning.RATES.values() for a, b in zip(rates, rates[1:], strict=False))


def test_adapters_need_a_base(run_bench):
    with pytest.raises(InputError, match="init_from='scratch': name the base"):
        run_bench('--suite=adapters', *TRAIN)


def test_export(run_bench, monkeypatch):
    monkeypatch.setattr(export, 'SIZE', dict(n_layer=1, n_head=1, n_embd=8, block_size=16))
    monkeypatch.setattr(export, 'ROWS', [('gpt2', 'nanogpt', 'float32'), ('modern', 'hf', 'bfloat16')])
    measured, out = run_bench('--suite=export', '--runs=1')
    nano, hf = measured['figures']
    assert nano['weights'] == 4 * (50304 * 8 + 16 * 8 + 12 * 64 + 9 * 8 + 6 * 8)
    assert nano['written'] > 3 * nano['weights'] and hf['written'] > 2 * 50257 * 8 * 2  # with the moments; in 16 bits
    assert nano['seconds'] > 0 and 'modern' in out
    with pytest.raises(InputError, match='this suite trains nothing'):
        run_bench('--suite=export', '--n_layer=1')


def test_data(run_bench, monkeypatch, tmp_path):
    """With bytes in place of a BPE that would have to be downloaded."""
    for name, value in (('N_BATCHES', 40), ('N_STEPS', 2), ('SHARDS', 4),
                        ('STEPS', [('a step', 2, 16, 1.0), ('another', 1, 8, 1.0)]), ('BATCHES', [(2, 16)]),
                        ('SIZE', dict(arch='modern', n_layer=1, n_head=1, n_embd=8, vocab_size=32))):
        monkeypatch.setattr(data, name, value)
    ranks = ''.join(f'{base64.b64encode(bytes([b])).decode()} {b}\n' for b in range(256))
    (tmp_path / 'bytes.tiktoken').write_text(ranks)
    monkeypatch.setitem(tokenizer_kinds.RANK_FILES, 256, ('bytes', r'\S+|\s+', {'<|endoftext|>': 256}))
    files = [str(tmp_path / f'{i}.py') for i in range(20)]
    for i, path in enumerate(files):
        with open(path, 'w') as f:
            f.write(f'{i:03d}\n' * 250)  # 1,000 bytes
    monkeypatch.setattr(data.sources, 'installed_code', lambda: files)

    def run(function, *args):
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()) as out:
            getattr(data, function)(*args)
        return out.getvalue(), time.perf_counter() - start, 10 ** 6
    monkeypatch.setattr(data, '_run', run)
    monkeypatch.setattr(readers, 'LONGEST', 5000)  # or the one long text would be one document
    measured, out = run_bench('--suite=data', f'--tokenizer={tmp_path}/bytes.tiktoken', '--gigabytes=0.0005',
                              '--runs=1')
    both, parquet, text, *steps, sdpa, math = measured['figures']
    n = len([d for d in range(600) if sum(1003 + len(str(i)) for i in range(d)) < 5e5])  # '# {number}\n' before each
    assert parquet['bytes'] == text['bytes'] == sum(1003 + len(str(i)) for i in range(n))
    assert both['tokens'] == sum(1003 + len(str(i)) for i in range(0, n, 10))
    assert both['tokens_per_s'].keys() == {'prepare', 'tiktoken'}
    assert parquet['tokens'] == parquet['bytes'] + n - 2  # an end of text between documents, in either split
    assert text['tokens'] < text['bytes'] + n / 4
    assert all(13 <= row['files'] <= 16 for row in steps)
    assert all(row['ms'] > 0 and row['waited_ms'] > 0 and row['epochs'] > 0 for row in steps)
    assert [row['attention'] for row in (sdpa, math)] == ['sdpa', 'math'] and min(sdpa['ratio'], math['ratio']) > 0
    assert 'encode_ordinary_batch alone' in out and 'document_mask: 2 x 16 tokens by math attention' in out
    with pytest.raises(InputError, match='trains nothing'):
        run_bench('--suite=data', '--n_layer=1')


@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='no process groups')
def test_a_time_limit_leaves_nothing_running(tmp_path, request):
    """A process that starts another, which holds a lock, and then interrupts this one; and one without any time."""
    import fcntl
    lock, script = tmp_path / 'lock', tmp_path / 'script.py'
    holder = f'import fcntl, time; f = open({str(lock)!r}, "w"); fcntl.flock(f, fcntl.LOCK_EX); ' \
             f'print(1, flush=True); time.sleep(600)'
    script.write_text(f'''
import os, signal, subprocess, sys, time
subprocess.Popen([sys.executable, '-c', {holder!r}], stdout=subprocess.PIPE).stdout.readline()
os.kill(os.getppid(), signal.SIGINT)
time.sleep(600)
''')
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), process.time_limit(60):
        process.run_script(None, str(script), [])
    with open(lock, 'w') as f:
        for _ in range(500):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)
        else:
            raise AssertionError('the other process still runs')
    with pytest.raises(InputError, match='not done after 0 s'), process.time_limit(0):
        process.run_script(None, str(script), [])


def test_plan_without_data_or_weights(project, run_bench, monkeypatch):
    asked = ['--suite=plan', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=8',
             '--gradient_accumulation_steps=2', '--compile=False', '--adapter_r=4', '--dataset=tiny']
    monkeypatch.chdir(project.folder)
    measured, out = run_bench(*asked, '--memory=0.009')
    figures = measured['figures']
    full, lora, qlora = (figures['rows'][name]['steps'][0] for name in ('full', 'LoRA', 'QLoRA'))
    assert figures['model'] == {'n_layer': 2, 'n_embd': 32, 'vocab_size': 256} and full['batch_size'] == 8
    weights = 4 * (12 * 2 * 32 ** 2 + 32 * (256 + 32) + 5 * 32)
    assert full['weights'] == full['gradients'] == pytest.approx(weights / 1e9)
    assert full['optimizer'] == pytest.approx(2 * weights / 1e9, rel=0.01)
    assert qlora['weights'] < lora['weights'] < full['weights'] and lora['optimizer'] < 0.3 * full['optimizer']
    assert all(row['peak'] == pytest.approx(sum(row[key] for key in (
        'weights', 'gradients', 'optimizer', 'activations', 'logits, rest'))) for row in (full, lora, qlora))
    largest = figures['rows']['full']['largest']
    assert largest == 16 and 'the whole step fits in 0.009 GB: --batch_size=16\n' in out
    assert 1.05 * figures['rows']['full']['steps'][-1]['peak'] <= 0.009
    assert not any('measured' in row for row in (full, lora, qlora))
    measured, out = run_bench(*asked, '--memory=0.0001', '--check=True', '--device=cpu')
    for row in measured['figures']['rows'].values():
        assert row['steps'][0]['peak'] == pytest.approx(row['steps'][0]['measured'], rel=0.1)
    assert measured['figures']['rows']['full']['largest'] is None
    assert 'a single sequence does not fit in 0.0001 GB' in out


@pytest.mark.parametrize('name, millions', [
    ('SmolLM2-135M', 134.5), ('Qwen3-0.6B', 596.0), ('TinyLlama-1.1B', 1100.0), ('Llama-3.2-1B', 1235.8),
    ('SmolLM2-1.7B', 1711.4), ('Qwen2.5-3B', 3085.9), ('Llama-3.2-3B', 3212.7)])
def test_known_sizes_have_as_many_parameters(name, millions):
    default, _ = resolve(f'{ROOT}/train.py', [])
    model = GPT.skeleton(plan.model_config(default | dict(init_from=name)))
    assert model.n_params() / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_folder_with_nothing_but_a_config_is_planned(tmp_path):
    default, _ = resolve(f'{ROOT}/train.py', [])
    (tmp_path / 'config.json').write_text(json.dumps(dict(
        model_type='qwen2', hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=300, max_position_embeddings=128, tie_word_embeddings=True)))
    shape = plan.model_config(default | dict(init_from=str(tmp_path)))
    assert shape.parts_of('attn.c_attn') == [64, 32, 32] and shape.bias == 'qkv' and shape.tied
    (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="model_type='bert'; only gpt2, "):
        plan.model_config(default | dict(init_from=str(tmp_path)))


@pytest.mark.parametrize('keys', [
    dict(adapter='dora'), dict(matmul='int8', checkpoint_activations='selective'),
    dict(optimizer='muon', arch='modern'), dict(weights_dtype='bfloat16', dtype='bfloat16'),
    dict(optimizer_state='cpu', smear=True), dict(init_from='gpt2', block_size=64)])
def test_whatever_is_trained_is_planned(keys):
    default, _ = resolve(f'{ROOT}/train.py', [])
    shape = dict(n_layer=2, n_head=2, n_embd=32, block_size=64)
    found = plan.forecast(default | shape | dict(compile=False, dtype='bfloat16') | keys,
                          GPTConfig(**shape, vocab_size=300, arch=keys.get('arch', 'gpt2')))
    assert found.at(4).peak < found.at(8).peak < found.at(16).peak
    assert plan.model_config(default | keys).n_embd == 768
