"""bench.py --suite=finetuning: a step here beside the same step in transformers with peft."""

import json

import numpy as np
import pytest
from conftest import ROOT, options, write_tokens

from configurator import InputError, resolve
from sologpt.bench import finetuning, process

pytest.importorskip('peft')


@pytest.fixture
def arguments(project, hf):
    ids = np.random.default_rng(0).integers(0, 33, 600)
    write_tokens(project.folder / 'data' / 'few', ids, ids, vocab_size=33)
    return options({'init_from': hf, 'dataset': 'few', 'batch_size': 8, 'block_size': 16, 'device': 'cpu'})


def test_every_way_trains_on_the_same_tokens_as_here(arguments, run_bench, capsys, monkeypatch):
    peers = [(name, how) for name, ways in finetuning.PEERS.items() for how in ways.values() if not how.get('nf4')]
    losses = []
    for _, how in peers:
        finetuning.train_peer(arguments, how, steps=2)
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found['ms_per_step'] > 0 and found['memory_gb'] >= 0
        losses.append(found['loss'])
    monkeypatch.setitem(finetuning.ROWS, 'full', finetuning.ROWS['full'] | {'compile': False})  # it takes a minute
    here = [finetuning.train_here(arguments, name, steps=2) for name in ('lora', 'full')]
    assert len(losses) == 5 and all(run['ms_per_step'] > 0 for run in here)
    assert losses == pytest.approx([losses[0]] * 5, rel=0.01)
    # here the last token of a sequence has a target too
    assert [run['loss'] for run in here] == pytest.approx([losses[0]] * 2, rel=0.05)


def test_the_peer_trains_what_is_trained_here(arguments, hf, project):
    device = finetuning.devices.find_device('cpu')
    for name, way in (('lora', 'bfloat16 adapter'), ('full', 'bfloat16 weights')):
        model = finetuning.build_peer(hf, device, **finetuning.PEERS[name][way])
        given = options(finetuning.SAME | finetuning.ROWS[name] | {'max_iters': 1, 'compile': False})
        built = project._in_process('train.py', [*arguments, *given])[0]['built']
        assert built.n_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_fastest_way_is_measured_and_a_failed_side_recorded(arguments, run_bench, monkeypatch):
    ways = {'float32 adapter': 30.0, 'bfloat16 adapter': 10.0, 'bfloat16 weights': 24.0}
    asked = []

    def run_peer(train_args, how, steps):
        name = next(way for row in finetuning.PEERS.values() for way, known in row.items() if known == how)
        asked.append((name, steps))
        if name not in ways:
            raise InputError(f'no {name}\n  in: it')
        return {'ms_per_step': ways[name], 'memory_gb': 4.0, 'loss': 2.0}
    monkeypatch.setattr(finetuning, 'run_peer', run_peer)
    monkeypatch.setattr(finetuning, 'train_here', lambda *args: {'ms_per_step': 8.0, 'memory_gb': 1.0, 'loss': 2.1})
    measured, out = run_bench('--suite=finetuning', '--runs=2', '--steps=3', *arguments)

    rows = measured['figures']['rows']
    assert list(rows) == list(finetuning.ROWS)
    assert {name: row.get('speed_ratio') for name, row in rows.items()} == {'lora': 1.25, 'qlora': None, 'full': 3.0}
    assert rows['lora']['memory_ratio'] == 0.25 and rows['lora']['peer_ways']['chosen'] == 'bfloat16 adapter'
    assert rows['qlora']['peer'] == {'failed': 'no bitsandbytes'} and rows['qlora']['here']['ms_per_step'] == 8
    assert rows['lora']['peer_ways']['tried']['float32 adapter, autocast'] == {
        'failed': 'no float32 adapter, autocast'}
    tried = sum(map(len, finetuning.PEERS.values()))
    assert [steps for _, steps in asked] == [finetuning.TRIAL_STEPS] * tried + [3] * 6
    assert 'qlora, peer  failed: no bitsandbytes' in out and '1.25' in out
    assert measured['figures']['block_size'] == 16 and 'peft' in measured['figures']['peer']


def test_the_peer_runs_as_a_process_in_the_current_folder(arguments, project, monkeypatch):
    called = []

    def run_python(command):
        called.append(command)
        return 'a warning\n{"loss": 1.0}\n', 0.0, 0
    monkeypatch.setattr(process, 'run_python', run_python)
    assert finetuning.run_peer(arguments, {'autocast': True}, 2) == {'loss': 1.0}
    assert f'os.chdir({str(project.folder)!r})' in called[0][1]
    compile(called[0][1], 'child', 'exec')


def test_rows_are_of_keys_that_train_has_and_a_base_is_needed(run_bench):
    assert finetuning.ROWS.keys() == finetuning.PEERS.keys()
    for row in finetuning.ROWS.values():
        resolve(f'{ROOT}/train.py', options(finetuning.SAME | row))
    with pytest.raises(InputError, match="init_from='scratch': give a folder"):
        run_bench('--suite=finetuning')
