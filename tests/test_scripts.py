"""The README's commands, as a user types them."""

import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, options
from test_sources import parquet

from sologpt.files.checkpoint import read_checkpoint, save_checkpoint
from sologpt.tokens import data_folder, tokenizer


def copy_code(folder):
    """The scripts and the package, for what writes beside itself."""
    for name in os.listdir(ROOT):
        if name.endswith('.py'):
            shutil.copy(os.path.join(ROOT, name), folder)
    shutil.copytree(os.path.join(ROOT, 'sologpt'), folder / 'sologpt', ignore=shutil.ignore_patterns('__pycache__'))


def test_own_text_from_preparation_to_sample(project):
    """data/text/prepare.py, train.py and sample.py in a copy of the project."""
    copy_code(project.folder)
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
    copy_code(project.folder)
    for name in ('data/train_tokenizer.py', 'data/text/prepare.py'):
        os.makedirs(os.path.dirname(project.folder / name), exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), project.folder / name)
    text = 'Ça va très bien, 日本語も。\r\n\t x = 1\n' * 200
    (project.folder / 'mine.txt').write_bytes(text.encode())
    train_tokenizer = str(project.folder / 'data' / 'train_tokenizer.py')
    ran = project.run(train_tokenizer, 'mine.txt', '--vocab_size=300')
    assert re.fullmatch(r'tokenizer.json: \d+ ids, \d\.\d\d bytes of the text per token; the text has no '
                        r'more pairs to join\n', ran.stdout), ran.stderr
    bpe = tokenizer.HuggingFace.from_file('tokenizer.json')
    assert bpe.decode(bpe.encode(text)) == text and len(bpe.encode(text)) < len(text.encode()) / 3
    assert bpe.decode(bpe.encode('Ελλάδα <|endoftext|>')) == 'Ελλάδα <|endoftext|>' and bpe.eot is not None
    ran = project.run(str(project.folder / 'data/text/prepare.py'), 'mine.txt', '--tokenizer=tokenizer.json')
    assert ran.returncode == 0, ran.stderr
    os.remove('tokenizer.json')  # it is in the data folder, and in the checkpoint
    project.train(dataset='text', block_size=8, max_iters=3)
    shutil.rmtree('data/text')
    shutil.copy('mine.txt', 'taken.json')
    assert project.sample(start='Ça va').startswith('Ça va')
    for argv, message in ((['nothere.txt'], 'there is no nothere.txt'),
                          (['mine.txt', '--vocab_size=9'], 'at least 257'),
                          (['mine.txt', '--dest=no/t.json'], 'cannot be written'),
                          (['mine.txt', '--dest=mine.txt'], '--dest=mine.txt must end in .json'),
                          (['mine.txt', '--dest=taken.json'], 'taken.json is there already')):
        ran = project.run(train_tokenizer, *argv)
        assert ran.returncode == 2 and message in ran.stderr and 'Traceback' not in ran.stderr


SCRIPTS_OF_DATA = sorted(os.path.relpath(path, ROOT) for pattern in ('data/*.py', 'data/*/prepare.py')
                         for path in glob.glob(os.path.join(ROOT, pattern)) if 'tinyshakespeare' not in path)


@pytest.mark.parametrize('script', SCRIPTS_OF_DATA)
def test_the_command_line_of_data_scripts(project, script):
    """It is that of train.py: --help lists every key, and an unknown one is refused."""
    from configurator import InputError, resolve
    ran, (config, _) = project.run(script, '--help'), resolve(os.path.join(ROOT, script), [])
    assert ran.returncode == 0 and all(f'{key} = ' in ran.stdout for key in config), ran.stderr
    with pytest.raises(InputError, match="no config key 'nothing'"):
        resolve(os.path.join(ROOT, script), ['--nothing=1'])
    assert len(SCRIPTS_OF_DATA) >= 10


def test_a_dataset_is_a_folder_with_a_prepare_py(project):
    """A copy of data/pydoc under another name, run from elsewhere."""
    copy_code(project.folder)
    os.makedirs(project.folder / 'data' / 'mine')
    shutil.copy(os.path.join(ROOT, 'data', 'pydoc', 'prepare.py'), project.folder / 'data' / 'mine')
    os.makedirs('elsewhere')
    ran = subprocess.run([sys.executable, '../data/mine/prepare.py', '--size=1000'], cwd='elsewhere',
                         capture_output=True, text=True)
    assert ran.returncode == 0 and '../data/mine/train.bin: 1,000 tokens' in ran.stdout, ran.stderr
    meta = data_folder.read_meta('data/mine')
    assert meta['tokens']['train'] == 1000 and meta['source'].startswith('language reference of Python 3.')


def test_prepared_text_is_split_by_characters(project):
    shutil.copytree(os.path.join(ROOT, 'data', 'text'), project.folder / 'data' / 'text')
    copy_code(project.folder)
    (project.folder / 'a.txt').write_text('a' * 80)
    (project.folder / 'b.txt').write_text('b' * 20)
    (project.folder / 'empty.txt').write_text('')
    script = str(project.folder / 'data' / 'text' / 'prepare.py')
    assert project.run(script, 'a.txt', 'b.txt', '--name=ab').returncode == 0
    data = project.folder / 'data' / 'ab'
    assert (data / 'train.bin').read_bytes() == b'a\0' * 72 + b'\0\0' + b'b\0' * 18  # 16 bits each
    assert (data / 'val.bin').read_bytes() == b'a\0' * 8 + b'\0\0' + b'b\0' * 2
    (project.folder / 'b.txt').write_text('b' * 40)
    ran = project.run(script, 'a.txt', 'b.txt', '--name=ab')
    assert ran.returncode == 2 and 'b.txt has changed since data/ab was prepared: --restart' in ran.stderr
    assert project.run(script, '--restart', 'a.txt', 'b.txt', '--name=ab').returncode == 0
    assert (data / 'val.bin').read_bytes() == b'a\0' * 8 + b'\0\0' + b'b\0' * 4
    (project.folder / 'latin1.txt').write_bytes('é'.encode('latin-1'))
    (project.folder / 'damaged.json').write_text('{')
    for argv, message in ((['nothere.txt'], 'there is no nothere.txt'), (['latin1.txt'], 'is not UTF-8'),
                          (['empty.txt'], 'empty.txt has no text for train and val'),
                          ([], 'name at least one file'), (['a.txt', '--seed=-1'], '--seed=-1 must be 0, 1, 2'),
                          (['a.txt', '--tokens'], 'write --tokens=VALUE'),
                          (['a.txt', '--val=2'], "--val=2 must be between 0 and 1"),
                          (['a.txt', '--tokens=lots'], "--tokens=lots is no number of tokens"),
                          (['a.txt', '--name=a/b'], '--name=a/b must be the name of a folder in data/'),
                          (['a.txt', '--name=tiny'], 'data/tiny has data that this script did not prepare'),
                          (['a.txt', '--tokenizer=gpt9'], '--tokenizer=gpt9 is not known'),
                          (['a.txt', '--tokenizer=nothere.json'], 'nothere.json cannot be read'),
                          (['a.txt', '--tokenizer=damaged.json'], 'damaged.json cannot be read')):
        ran = project.run(script, '--name=bad', *argv)
        assert ran.returncode == 2 and message in ran.stderr and 'Traceback' not in ran.stderr


def copy_preparations(project, *names):
    copy_code(project.folder)
    for name in names:
        shutil.copytree(os.path.join(ROOT, 'data', name), project.folder / 'data' / name,
                        ignore=shutil.ignore_patterns('*.bin*', '*.json'))


def test_web_text_from_parquet_to_training(project):
    """FineWeb-Edu and OpenWebText, of copies in a folder, which are read in the way that the hub is."""
    copy_preparations(project, 'fineweb_edu', 'openwebtext')
    documents = [f'{i} is a number, and so is {i + 1}. ' * (1 + i % 9) for i in range(200)]
    for i, place in enumerate(('edu/sample/10BT/000', 'edu/sample/10BT/001', 'edu/data/CC-MAIN-2024-10/000',
                               'owt/plain_text/train-0')):
        parquet(project.folder / f'{place}_00000.parquet', documents[i * 50:i * 50 + 50])
    prepare = str(project.folder / 'data' / 'fineweb_edu' / 'prepare.py')
    options = ('--source=edu', '--tokenizer=bytes', '--val_tokens=500', '--shard_tokens=1k')
    for more, tokens in (('--tokens=1500', 1500), ('--tokens=2k', 2000), ('--tokens=2k', 2000)):
        ran = project.run(prepare, *options, more)
        assert ran.returncode == 0, ran.stderr
        assert f'{tokens:,}' in ran.stdout.replace('.bin', '') and '500 tokens' in ran.stdout
    assert sorted(os.listdir(project.folder / 'data' / 'fineweb_edu')) == [
        'meta.json', 'prepare.py', 'progress.json', 'progress.lock', 'train_000.bin', 'train_001.bin', 'val.bin']
    _, out = project.train(dataset='fineweb_edu', document_mask=True)
    assert '2,000 + 500 tokens' in out
    ran = project.run(str(project.folder / 'data' / 'openwebtext' / 'prepare.py'), '--source=owt', '--tokenizer=bytes',
                      '--val_tokens=500')
    assert ran.returncode == 0 and 'data/openwebtext/train.bin: ' in ran.stdout, ran.stderr
    for argv, message in (((*options, '--name=sample-9BT'), '--name=sample-9BT is not known: use default, sample-10BT'),
                          ((*options, '--seed=3'), 'data/fineweb_edu was prepared with other --seed'),
                          (('--source=nothere', '--tokenizer=bytes'), 'sample-10BT: there is no nothere/sample/10BT'),
                          ((*options, '--name=CC-MAIN-2024-10'), 'other files')):
        ran = project.run(prepare, *argv)
        assert ran.returncode == 2 and message in ran.stderr and len(ran.stderr.splitlines()) == 1, ran.stderr


def test_installed_code(project, monkeypatch):
    """Every file once, and no text in both splits; then what describe.py says of it."""
    copy_preparations(project, 'pycode')
    shutil.copy(os.path.join(ROOT, 'data', 'describe.py'), project.folder / 'data')
    files = {f'pkg/{i % 7}/m{i}.py': f'x = {i}\n' * (i + 1) for i in range(150)}
    for name, text in files.items():
        os.makedirs(os.path.dirname(project.folder / name), exist_ok=True)
        (project.folder / name).write_text(text)
    for name, content in (('copy.py', files['pkg/3/m3.py'].encode()), ('latin.py', 'é'.encode('latin-1')),
                          ('data.txt', b'no code'), ('empty.py', b'')):
        (project.folder / 'pkg' / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(project.folder / 'pkg'))
    prepare = os.path.relpath(project.folder / 'data/pycode/prepare.py', ROOT)
    _, out = project._in_process(prepare, ['--val=0.2'])
    splits = {split: bytes(np.fromfile(f'data/pycode/{split}.bin', '<u2').astype(np.uint8)).decode().split('\0')
              for split in ('train', 'val')}
    assert sorted(splits['train'] + splits['val']) == sorted(files.values()) and len(splits['val']) > 10
    meta = data_folder.read_meta('data/pycode')
    assert meta['source'].startswith('packages of Python 3.') and meta['source'].endswith(', 151 files')

    def describe():
        ran = project.run(str(project.folder / 'data/describe.py'), 'data/pycode', '--excerpt=9')
        assert ran.returncode == 0, ran.stderr
        return ran.stdout
    out = describe()
    n = sum(map(len, splits['train']))
    assert f'{n + len(splits["train"]) - 1:,} tokens' in out and f'{len(splits["train"])} documents' in out
    assert 'tokenizer bytes, 256 ids in uint16' in out and '0 of them (0 tokens) are documents of val' in out
    shares = [float(s) for s in re.findall(r'([\d.]+)% of the tokens', out)]
    assert abs(sum(shares) - 200) < 1
    assert out.count(f'sha256 {hashlib.sha256(open("data/pycode/val.bin", "rb").read()).hexdigest()}') == 1
    assert out.endswith(f'{splits["train"][0][:9]}\n') and splits['val'][0][:9] in out
    # documents of val in train, one of which spans two shards
    again = '\0'.join(splits['val'][:3]).encode()
    for i, part in enumerate((again[:9], again[9:])):
        np.frombuffer(part, np.uint8).astype('<u2').tofile(f'data/pycode/train_00{i}.bin')
    os.remove('data/pycode/train.bin')
    out = describe()
    assert f'3 of them ({len(again) - 2:,} tokens) are documents of val as well' in out
    assert f'meta.json says {n + len(splits["train"]) - 1 - len(again):+,} tokens' in out
    np.full(5, 300, '<u2').tofile('data/pycode/val.bin')
    assert '5 TOKENS ARE BEYOND THE VOCABULARY' in describe()
    np.zeros(5, '<u2').tofile('data/pycode/val.bin')  # ends of documents alone
    assert 'val: 5 tokens' in describe()
    os.remove('data/pycode/val.bin')
    assert 'val: no files' in describe()
    (project.folder / 'data/pycode/progress.json').write_text('{"tokens": {"train": 7}}')
    assert 'its preparation is not finished: 7 tokens so far' in describe()
    (project.folder / 'data/pycode/progress.json').write_text('{')
    for folder, message in (('nothere', 'there is no folder nothere'), ('pkg', 'pkg has no token files'),
                            ('data/pycode', 'progress.json is damaged')):
        ran = project.run(str(project.folder / 'data/describe.py'), folder)
        assert ran.returncode == 2 and message in ran.stderr and 'Traceback' not in ran.stderr


def test_quickstart_prepares_its_data_and_prints_a_sample(project):
    shutil.rmtree(project.folder / 'data')
    os.makedirs(project.folder / 'data' / 'pystdlib')
    shutil.copy(os.path.join(ROOT, 'data', 'pystdlib', 'prepare.py'), project.folder / 'data' / 'pystdlib')
    copy_code(project.folder)
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
    saved = read_checkpoint('out/best.pt')
    ruined = saved | {'model': {k: torch.zeros_like(v) for k, v in saved['model'].items()}}
    save_checkpoint('out', ruined, best=False)
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
