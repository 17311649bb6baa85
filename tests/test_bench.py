import json

import pytest
from conftest import ROOT, TINY, options

import bench.ablation
import bench.sweep
import runlog
from bench import process
from configurator import InputError

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


@pytest.fixture
def run_bench(project, monkeypatch):
    """bench.py in this process, its scripts too; returns (the figures, what it printed)."""
    monkeypatch.setattr(process, 'own', lambda script, args: project._in_process(script, args)[1])

    def run(*argv):
        _, out = project._in_process('bench.py', [*argv, '--dest=figures.json'])
        return json.loads((project.folder / 'figures.json').read_text()), out
    return run


def test_race_to_the_loss_that_nanogpt_prints(project, run_bench):
    project.train(seed=1, eval_interval=2, learning_rate=3e-3)
    project.train(seed=2, eval_interval=2, learning_rate=3e-3, out_dir='out2')
    evals = [runlog.read_run(d, '').curve('iter')[1] for d in ('out', 'out2')]
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
    monkeypatch.setattr(process, 'run', lambda folder, script, args: (project._in_process(script, args)[1], 0.0))
    peer_args = ' '.join([*TRAIN, '--max_iters=4', '--learning_rate=0', '--min_lr=0', '--eval_iters=1'])
    measured, _ = run_bench('--suite=race', f'--peer={ROOT}', f'--peer_args={peer_args}', '--runs=1',
                            *TRAIN, '--seed=1')
    race, = measured['figures']['seeds']
    project.train(seed=1)  # the peer is this trainer, and has not learned: our own first evaluation, of more tokens
    assert race['target_val_loss'] == pytest.approx(runlog.read_run('out', '').evals[0]['val_loss'], abs=1e-4)
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
    train = process.own

    def small(script, args):
        if '--batch_size=4' in args[len(TRAIN):]:
            raise InputError('train.py: out of GPU memory with batch_size=4')
        return train(script, args)
    monkeypatch.setattr(process, 'own', small)
    measured, out = run_bench('--suite=sweep', '--steps=1', *TRAIN, '--gradient_accumulation_steps=4')
    assert [row['batch_size'] for row in measured['figures']['rows']] == [1, 2] and 'out of GPU memory' in out
    rows = [{'memory_gb': 1e6}, {'memory_gb': 2e6}]  # four petabytes next
    assert bench.sweep._next_would_not_fit(rows) and not bench.sweep._next_would_not_fit(rows[:1])


def test_ablation_is_over_the_same_seeds(project, run_bench, monkeypatch):
    monkeypatch.setattr(bench.ablation, 'REPLACED', {'the recipe': {}, 'no steps': {'learning_rate': 0, 'min_lr': 0}})
    measured, out = run_bench('--suite=ablation', '--runs=2', *TRAIN)
    for name, changes in bench.ablation.REPLACED.items():
        expected = []
        for seed in (1, 2):
            project.train(seed=seed, **changes)
            expected.append(runlog.read_run('out', '').evals[-1]['val_loss'])
        row = measured['figures'][name]
        assert row['val_loss'] == expected and row['mean'] == pytest.approx(sum(expected) / 2)
        assert row['spread'] == pytest.approx(abs(expected[0] - expected[1]) / 2 ** 0.5)
    recipe, none = measured['figures'].values()
    assert recipe['difference'] == 0 and none['difference'] == pytest.approx(none['mean'] - recipe['mean'])
    assert f'{none["difference"]:+.4f}' in out


def test_every_replacement_is_of_keys_that_train_has():
    keys = {k for changes in bench.ablation.REPLACED.values() for k in changes}
    with open(f'{ROOT}/train.py', encoding='utf-8') as f:
        source = f.read()
    assert all(f'\n{key} = ' in source or f'\n{key}: ' in source for key in keys)


@pytest.mark.parametrize('argv, message', [
    (['--suite=rase'], "suite='rase': use"), (['--suite=race'], "peer='': give the folder"),
    (['--suite=race', f'--peer={ROOT}'], 'no config for this trainer'),
    (['--suite=race', f'--peer={ROOT}', '--dataset=nothere'], "dataset='nothere'"),
    (['--suite=sweep', '--steps=0'], 'steps=0'), (['--suite=sweep', '--n_layers=3', *TRAIN], "did you mean 'n_layer'"),
    (['--suite=speed', f'--peer={ROOT}', 'config/x.py'], 'takes no config'),
    (['--suite=speed', '--dest=nothere/x.json'], 'no such folder')])
def test_bad_input(project, run_bench, argv, message):
    with pytest.raises(InputError, match=message):
        project._in_process('bench.py', ['--dest=figures.json', *argv])
