"""The README's commands, as a user types them."""

import os
import re
import shutil

import pytest
import torch
from conftest import ROOT, TINY, options

import checkpoint


def test_own_text_from_preparation_to_sample(project):
    """data/text/prepare.py, train.py and sample.py in a copy of the project."""
    for name in os.listdir(ROOT):
        if name.endswith('.py'):
            shutil.copy(os.path.join(ROOT, name), project.folder)
    shutil.copytree(os.path.join(ROOT, 'data', 'text'), project.folder / 'data' / 'text')
    (project.folder / 'mine.txt').write_text('Ça va très bien, 日本語も。\n' * 300, encoding='utf-8')

    def run(*command):
        ran = project.run(*(str(project.folder / c) if c.endswith('.py') else c for c in command))
        assert ran.returncode == 0, ran.stderr
        return ran
    run('data/text/prepare.py', 'mine.txt', '--tokenizer=chars')
    run('train.py', *options(TINY | dict(dataset='text', max_iters=80, eval_interval=80, block_size=32)))
    sampled = run('sample.py', '--out_dir=out', '--num_samples=2', '--max_new_tokens=60', '--start=Ça va',
                  '--temperature=0')
    first, second, rest = sampled.stdout.split('---------------\n')
    assert first == second and first.startswith('Ça va') and rest == '' and len(first.strip('\n')) == 5 + 60
    assert re.search(r'120 tokens in [\d.]+ s: \d+ tok/s', sampled.stderr)


def test_prepared_text_is_split_by_characters(project):
    shutil.copytree(os.path.join(ROOT, 'data', 'text'), project.folder / 'data' / 'text')
    for name in ('tokenizer.py', 'configurator.py'):
        shutil.copy(os.path.join(ROOT, name), project.folder)
    (project.folder / 'a.txt').write_text('a' * 80)
    (project.folder / 'b.txt').write_text('b' * 20)
    script = str(project.folder / 'data' / 'text' / 'prepare.py')
    assert project.run(script, 'a.txt', 'b.txt', '--name=ab').returncode == 0
    data = project.folder / 'data' / 'ab'
    assert (data / 'train.bin').read_bytes() == b'a\0' * 80 + b'\0\0' + b'b\0' * 10
    assert (data / 'val.bin').read_bytes() == b'b\0' * 10
    (project.folder / 'latin1.txt').write_bytes('é'.encode('latin-1'))
    for argv, message in ((['nothere.txt'], 'nothere.txt cannot be read'), (['latin1.txt'], 'is not UTF-8'),
                          (['a.txt', '--val=2'], '--val=2.0 must be'),
                          (['a.txt', '--tokenizer=gpt9'], 'invalid choice')):
        ran = project.run(script, *argv)
        assert ran.returncode == 2 and message in ran.stderr and 'Traceback' not in ran.stderr


def test_quickstart_prepares_its_data_and_prints_a_sample(project):
    shutil.rmtree(project.folder / 'data')
    os.makedirs(project.folder / 'data' / 'pystdlib')
    shutil.copy(os.path.join(ROOT, 'data', 'pystdlib', 'prepare.py'), project.folder / 'data' / 'pystdlib')
    for name in ('tokenizer.py', 'configurator.py'):
        shutil.copy(os.path.join(ROOT, name), project.folder)
    small = ('--max_iters=2', '--eval_iters=1', '--sample_tokens=30', '--n_embd=64', '--n_head=2', '--n_layer=1')
    ran = project.run('train.py', os.path.join(ROOT, 'config', 'quickstart.py'), *small)
    assert ran.returncode == 0, ran.stderr
    assert 'preparing data/pystdlib' in ran.stdout and (project.folder / 'data/pystdlib/meta.json').exists()
    assert len(ran.stdout.split('a sample')[1]) > 60
    sampled = project.run('sample.py', '--out_dir=out-quickstart', '--num_samples=1', '--max_new_tokens=20')
    assert sampled.returncode == 0, sampled.stderr


@pytest.mark.parametrize('name', sorted(f for f in os.listdir(os.path.join(ROOT, 'config')) if f.endswith('.py')))
def test_every_config_is_accepted(project, name):
    """All keys exist and have the right types: the first thing that can then be wrong is the data."""
    from configurator import InputError
    with pytest.raises(InputError, match='no data in data/nothere'):
        project._in_process('train.py', [os.path.join(ROOT, 'config', name), '--dataset=nothere', '--device=cpu',
                                         '--compile=False', '--dtype=float32', '--out_dir=out', '--prepare_data=False'])


def test_bad_input_is_one_line_and_status_2(project):
    for command, message in ((('train.py', '--n_embed=3'), "error: command line: there is no config key 'n_embed'"),
                             (('train.py', 'config/quikstart.py'), "error: no config file 'config/quikstart.py'"),
                             (('sample.py', '--out_dir=nothere'), 'error: no checkpoint nothere/ckpt.pt')):
        ran = project.run(*command)
        assert ran.returncode == 2 and ran.stderr.startswith(message) and len(ran.stderr.splitlines()) <= 2


@pytest.fixture
def trained(project):
    project.train(max_iters=30)
    return project


def test_sampling(trained):
    a, b = trained.sample(start='ab', seed=1), trained.sample(start='ab', seed=1)
    assert a == b != trained.sample(start='ab', seed=2)
    assert a.startswith('ab') and a.endswith('\n---------------\n')
    (trained.folder / 'prompt.txt').write_text('xyz')
    assert trained.sample(start='FILE:prompt.txt').startswith('xyz')
    assert trained.sample(num_samples=3).count('---------------\n') == 3


def test_sampling_prefers_the_best_checkpoint(trained):
    saved = checkpoint.load('out/best.pt')
    ruined = saved | {'model': {k: torch.zeros_like(v) for k, v in saved['model'].items()}}
    checkpoint.save('out', ruined, best=False)
    with_best = trained.sample(temperature=0, start='a')
    os.remove('out/best.pt')
    assert with_best != trained.sample(temperature=0, start='a')


@pytest.mark.parametrize('overrides, message', [
    (dict(start='FILE:nothere.txt'), 'nothere.txt'), (dict(num_samples=0), 'num_samples=0'),
    (dict(top_p=1.5), 'top_p=1.5'), (dict(temperature=-1), 'temperature=-1'), (dict(window_step=17), 'window_step=17'),
    (dict(dataset='nothere'), 'no folder data/nothere'),
])
def test_sampling_refuses(trained, overrides, message):
    from configurator import InputError
    with pytest.raises(InputError, match=message):
        trained.sample(**overrides)
