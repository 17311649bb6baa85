"""The README's commands, as a user types them."""

import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, options

import checkpoint
import tokenizer

PREPARING = ('configurator.py', 'tokenizer.py', 'sources.py', 'corpus.py')  # the modules of data/*/prepare.py


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
    # and on, from Hugging Face's files of it, on a text prepared by the tokenizer there
    run('export.py', '--to=hf', '--dest=hf')
    run('data/text/prepare.py', 'mine.txt', '--tokenizer=hf/tokenizer.json', '--name=again')
    again, first = (np.fromfile(project.folder / 'data' / name / 'val.bin', '<u2') for name in ('again', 'text'))
    assert np.array_equal(again, first)
    run('train.py', *options(TINY | dict(dataset='again', max_iters=1, block_size=32, init_from='hf', out_dir='more')))
    assert run('sample.py', '--out_dir=more', '--start=Ça', '--max_new_tokens=9').stdout.startswith('Ça')


def test_a_tokenizer_of_ones_own(project):
    for name in (*PREPARING, 'data/train_tokenizer.py', 'data/text/prepare.py'):
        os.makedirs(os.path.dirname(project.folder / name), exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), project.folder / name)
    text = 'Ça va très bien, 日本語も。\r\n\t x = 1\n' * 200
    (project.folder / 'mine.txt').write_bytes(text.encode())
    train_tokenizer = str(project.folder / 'data' / 'train_tokenizer.py')
    ran = project.run(train_tokenizer, 'mine.txt', '--vocab_size=300')
    assert re.fullmatch(r'tokenizer.json: \d+ ids, \d\.\d\d bytes of the text per token\n', ran.stdout), ran.stderr
    bpe = tokenizer.HuggingFace.from_file('tokenizer.json')
    assert bpe.decode(bpe.encode(text)) == text and len(bpe.encode(text)) < len(text.encode()) / 3
    assert bpe.decode(bpe.encode('Ελλάδα <|endoftext|>')) == 'Ελλάδα <|endoftext|>' and bpe.eot is not None
    ran = project.run(str(project.folder / 'data/text/prepare.py'), 'mine.txt', '--tokenizer=tokenizer.json')
    assert ran.returncode == 0, ran.stderr
    os.remove('tokenizer.json')  # it is in the data folder, and in the checkpoint
    project.train(dataset='text', block_size=8, max_iters=3)
    shutil.rmtree('data/text')
    assert project.sample(start='Ça va').startswith('Ça va')
    for argv, message in ((['nothere.txt'], 'there is no nothere.txt'),
                          (['mine.txt', '--vocab_size=9'], 'at least 257'),
                          (['mine.txt', '--dest=no/t.json'], 'cannot be written'),
                          (['mine.txt', '--dest=mine.txt'], 'mine.txt is there already')):
        ran = project.run(train_tokenizer, *argv)
        assert ran.returncode == 2 and message in ran.stderr and 'Traceback' not in ran.stderr


def test_prepared_text_is_split_by_characters(project):
    shutil.copytree(os.path.join(ROOT, 'data', 'text'), project.folder / 'data' / 'text')
    for name in PREPARING:
        shutil.copy(os.path.join(ROOT, name), project.folder)
    (project.folder / 'a.txt').write_text('a' * 80)
    (project.folder / 'b.txt').write_text('b' * 20)
    (project.folder / 'empty.txt').write_text('')
    script = str(project.folder / 'data' / 'text' / 'prepare.py')
    assert project.run(script, 'a.txt', 'b.txt', '--name=ab').returncode == 0
    data = project.folder / 'data' / 'ab'
    assert (data / 'train.bin').read_bytes() == b'a\0' * 72 + b'\0\0' + b'b\0' * 18  # 16 bits each
    assert (data / 'val.bin').read_bytes() == b'a\0' * 8 + b'\0\0' + b'b\0' * 2
    (project.folder / 'latin1.txt').write_bytes('é'.encode('latin-1'))
    (project.folder / 'damaged.json').write_text('{')
    for argv, message in ((['nothere.txt'], 'there is no nothere.txt'), (['latin1.txt'], 'is not UTF-8'),
                          (['empty.txt'], 'empty.txt has no text'), (['a.txt', '--val=2'], "--val: '2' must be"),
                          (['a.txt', '--tokens=lots'], "--tokens: 'lots' is no number of tokens"),
                          (['a.txt', '--tokenizer=gpt9'], '--tokenizer=gpt9 is not known'),
                          (['a.txt', '--tokenizer=nothere.json'], 'nothere.json cannot be read'),
                          (['a.txt', '--tokenizer=damaged.json'], 'damaged.json cannot be read')):
        ran = project.run(script, *argv, '--name=bad')
        assert ran.returncode == 2 and message in ran.stderr and 'Traceback' not in ran.stderr


def test_quickstart_prepares_its_data_and_prints_a_sample(project):
    shutil.rmtree(project.folder / 'data')
    os.makedirs(project.folder / 'data' / 'pystdlib')
    shutil.copy(os.path.join(ROOT, 'data', 'pystdlib', 'prepare.py'), project.folder / 'data' / 'pystdlib')
    for name in PREPARING:
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
