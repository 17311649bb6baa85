import collections
import errno
import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiktoken
import torch
from conftest import ROOT
from test_sources import parquet

from configurator import InputError
from sologpt.tokens import blocks, corpus, data_folder, readers, sources, splits, tokenizer
from sologpt.tokens.loader import Tokens, TrainBatches
from sologpt.tokens.splits import Endings, FirstTokens, SomeDocuments

CPU = torch.device('cpu')
RNG = random.Random(7)
WORDS = ['the', ' cat', 'é', '日本', '\n', ' 1', '.', '\r\n', ' \t', '\U0001F600', 'x' * 20]
DOCUMENTS = [f'{i}:' + ''.join(RNG.choices(WORDS, k=RNG.randint(1, 60))) for i in range(300)]
SPECIAL = 'ends<|endoftext|>not'


def small_bpe():
    ranks = {bytes([b]): b for b in range(256)} | {b'th': 256, b'the': 257, b' c': 258, b'at': 259}
    return tokenizer.Tiktoken('small', tiktoken.Encoding('small', pat_str=r'\s?\S+|\s', mergeable_ranks=ranks,
                                                         special_tokens={'<|endoftext|>': 300}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The documents in three files of parquet, and small blocks, tasks and shards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(blocks, 'BLOCK', 9000)
    monkeypatch.setattr(blocks, 'TASK', 1000)
    for i in range(3):
        parquet(tmp_path / 'src' / f'{i}.parquet', DOCUMENTS[i * 100:i * 100 + 100], row_group_size=30)
    return tmp_path


def prepare(dest='data', split=None, source=None, **options):
    source = source or sources.hub_source('src/*.parquet', name='three files')
    t, expected = options.pop('tokenizer', None) or small_bpe(), options.pop('expected', None)
    corpus.prepare_corpus(dest, source, t, split or FirstTokens(500),
                          corpus.Options(**{'shard_tokens': 1000} | options), expected)
    return content(dest)


def content(dest):
    return {name: (open(os.path.join(dest, name), 'rb').read()) for name in sorted(os.listdir(dest))
            if '.bin' in name}


def tokens(files, split):
    return np.concatenate([np.frombuffer(files[name], '<u2') for name in sorted(files) if name.startswith(split)])


def texts(files, split, t):
    ids = tokens(files, split)
    return [t.decode(part[part != t.eot].tolist()) for part in np.split(ids, np.flatnonzero(ids == t.eot))]


def test_what_is_written(folder):
    files = prepare()
    t = small_bpe()
    # the same, in a few lines: blocks, each shuffled; their documents with an end of text between
    ids, block, number = [], [], 0
    for i, document in enumerate(DOCUMENTS):
        block.append(document)
        if sum(map(len, block)) + 100 * len(block) >= blocks.BLOCK or i == len(DOCUMENTS) - 1:
            order = np.random.default_rng((1337, number)).permutation(len(block))
            ids += [t.encode(block[j]) for j in order]
            block, number = [], number + 1
    assert number > 3
    val, train = [], []
    for document in ids:
        if len(val) < 500:
            val += ([300] if val else []) + document
        else:
            train += ([300] if train else []) + document
    assert tokens(files, 'val').tolist() == val[:500] and tokens(files, 'train').tolist() == train
    sizes = {name: len(f) // 2 for name, f in files.items()}
    last = len(train) // 1000
    assert sizes == {f'train_{i:03d}.bin': 1000 for i in range(last)} | {
        f'train_{last:03d}.bin': len(train) % 1000, 'val.bin': 500}
    meta = data_folder.read_meta('data')
    assert meta['tokens'] == {'train': len(train), 'val': 500} and meta['source'] == 'three files'
    again = tokenizer.tokenizer_from_dict(meta['tokenizer'])
    assert meta['vocab_size'] == 301 and again.encode('the cat') == t.encode('the cat')
    loaded = Tokens('data', 'train', meta, block_size=16)
    assert loaded.n_tokens == len(train) and loaded.n_windows > len(train) // 16 - 2 * last - 2


def with_bos(bos):
    return tokenizer.HuggingFace(json.dumps(small_bpe().to_json()), eot=300, bos=bos)


@pytest.mark.parametrize('bos', [299, 300])
def test_bos_stands_before_each_document_and_after_the_end_of_the_one_before(folder, bos):
    """Beside that, the files are those of a tokenizer without it."""
    plain, found = (prepare(dest, SomeDocuments(0.2), tokenizer=with_bos(b)) for dest, b in (('a', None), ('b', bos)))
    before = [300, bos] if bos != 300 else [300]
    for split in ('train', 'val'):
        ids = tokens(plain, split)
        first, *others = (part[part != 300].tolist() for part in np.split(ids, np.flatnonzero(ids == 300)))
        assert others and tokens(found, split).tolist() == [bos, *first, *(
            i for document in others for i in (*before, *document))]
    corpus.write_texts('few', with_bos(bos), {'train': ['a', 'the'], 'val': ['b']}, 'two')
    files = content('few')
    assert tokens(files, 'train').tolist() == [bos, 97, *before, 257] and tokens(files, 'val').tolist() == [bos, 98]


def crash_at(n, monkeypatch, *functions):
    """The n-th of these calls raises what is returned, and all after it, as if the process were gone."""
    calls = itertools.count()

    class Gone(BaseException):
        pass

    def crashing(real):
        def call(*args, **kwargs):
            if next(calls) >= n:
                raise Gone
            return real(*args, **kwargs)
        return call
    for module, name in functions:
        monkeypatch.setattr(module, name, crashing(getattr(module, name)))
    return Gone


def test_stopped_anywhere_it_ends_with_the_same_bytes(folder, monkeypatch):
    source = sources.hub_source('src/[01].parquet')
    whole = prepare(source=source.again(), shard_tokens=3000)
    crashes = 0
    for n in itertools.count(step=3):
        dest = f'crash{n}'
        for again in range(3):  # and once more on the way, and once more
            with monkeypatch.context() as patch:
                gone = crash_at(n + 5 * again, patch, (os, 'fsync'), (os, 'replace'), (os, 'remove'),
                                (blocks, 'encode_documents'))
                try:
                    prepare(dest, source=source.again(), shard_tokens=3000)
                    break
                except gone:
                    crashes += 1
        ready = data_folder.read_meta(dest) if os.path.exists(f'{dest}/meta.json') else {'tokens': {'val': 0}}
        if ready['tokens']['val']:  # then what there is can be trained on
            assert Tokens(dest, 'val', ready, 16).n_tokens == 500
        if ready['tokens'].get('train'):
            assert Tokens(dest, 'train', ready, 16).n_tokens == ready['tokens']['train']
        assert prepare(dest, source=source.again(), shard_tokens=3000) == whole, n
        with open(f'{dest}/meta.json', 'rb') as meta, open('data/meta.json', 'rb') as expected:
            assert meta.read() == expected.read()
        with open(f'{dest}/progress.json') as progress:
            assert 'done' in json.load(progress)
        if not again and n > 20:
            break
    assert crashes > 40


def test_killed_20_times(folder):
    """A process of its own, killed at any moment; the same call goes on."""
    with open('documents.jsonl', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps({'text': d}) + '\n' for d in DOCUMENTS * 3)
    script = ('import sys, time; from sologpt.tokens import blocks, corpus, sources, splits, tokenizer\n'
              'blocks.BLOCK = 3000; blocks.TASK = 500\n'
              'encode = tokenizer.Bytes.encode_ordinary\n'
              'tokenizer.Bytes.encode_ordinary = lambda self, text: (time.sleep(0.002), encode(self, text))[1]\n'
              'print("begun", flush=True)\n'
              'corpus.prepare_corpus(sys.argv[1], sources.find_source(["documents.jsonl"]), tokenizer.Bytes(), '
              'splits.SomeDocuments(0.1), corpus.Options(shard_tokens=2000))')
    command = [sys.executable, '-c', script]
    environment = os.environ | {'PYTHONPATH': ROOT}
    start = time.perf_counter()
    subprocess.run([*command, 'whole'], env=environment, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    rng, kills, written = random.Random(3), 0, [0]
    while kills < 20:
        child = subprocess.Popen([*command, 'killed'], env=environment, stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(rng.random() * seconds / 5)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        kills += child.returncode == -signal.SIGKILL
        if child.returncode == 0:
            break
        if os.path.exists('killed/progress.json'):
            with open('killed/progress.json') as f:
                written.append(sum(json.load(f)['tokens'].values()))
    assert kills > 5 and len(set(written)) > 2 and written == sorted(written), (kills, written)
    subprocess.run([*command, 'killed'], env=environment, check=True, capture_output=True)
    assert content('killed') == content('whole') and len(content('whole')) > 10


def test_more_tokens_later_are_the_same_as_at_once(folder, capsys):
    for n, shards in ((1, 1), (1000, 1), (1001, 2), (2500, 3)):
        files = prepare(tokens=n)
        assert len(tokens(files, 'train')) == n and len(files) == shards + 1
        assert files == prepare(f'once{n}', tokens=n)
    assert prepare(tokens=1200) == files and 'is prepared: 2,500 + 500' in capsys.readouterr().out
    assert prepare() == prepare('all') != files
    assert 'no more text' not in capsys.readouterr().out
    prepare('more', tokens=10 ** 9)
    assert 'three files has no more text than this' in capsys.readouterr().out


def test_a_training_run_beside_a_preparation_that_goes_on(folder):
    """What is published stays where it is, with what it has; only more is added."""
    for more in ({'tokens': 1500}, {'tokens': 12000}, {}):
        prepare(**more)
        loaded = Tokens('data', 'train', data_folder.read_meta('data'), 16)
        batches, steps = TrainBatches(loaded, 4, 1, seed=1), range(loaded.n_windows // 4)
        before = [batches.get(step, 0, CPU)[0] for step in steps]
        prepare(**({} if 'tokens' not in more else {'tokens': more['tokens'] + 5000}))
        assert all(torch.equal(x, batches.get(step, 0, CPU)[0]) for step, x in zip(steps, before, strict=True))


@pytest.mark.parametrize('n', range(1, 40, 3))
def test_what_was_finished_can_be_trained_on_while_more_is_added(folder, monkeypatch, n):
    prepare(tokens=1500)
    with monkeypatch.context() as patch:
        gone = crash_at(n, patch, (os, 'fsync'), (os, 'replace'), (os, 'remove'), (blocks, 'encode_documents'))
        with pytest.raises(gone):
            prepare(tokens=20000)
    assert Tokens('data', 'train', data_folder.read_meta('data'), 16).n_tokens >= 1500
    assert Tokens('data', 'val', data_folder.read_meta('data'), 16).n_tokens == 500


def test_documents_of_the_validation_are_not_trained_on(folder):
    for i in range(3):  # every document twice, in other files
        parquet(folder / 'src' / f'{i}.parquet', DOCUMENTS[i * 100:i * 100 + 100] + DOCUMENTS[:300 - i * 100])
    files, t = prepare(), small_bpe()
    val = texts(files, 'val', t)[:-1]  # the last one is cut off
    train = collections.Counter(texts(files, 'train', t))
    assert len(val) > 2 and not set(val) & train.keys()
    cut = next(d for d in DOCUMENTS if d.startswith(texts(files, 'val', t)[-1]))
    assert train.keys() == set(DOCUMENTS) - {*val, cut}


def test_some_documents_for_validation(folder):
    files, t = prepare(split=SomeDocuments(0.2)), small_bpe()
    val, train = (collections.Counter(texts(files, split, t)) for split in ('val', 'train'))
    assert val + train == collections.Counter(DOCUMENTS) and not val.keys() & train.keys()
    assert 40 < len(val) < 80
    other = prepare('other', split=SomeDocuments(0.2), seed=2)
    assert set(texts(other, 'val', t)) == val.keys() and texts(other, 'train', t) != texts(files, 'train', t)
    fewer = prepare('fewer', split=SomeDocuments(0.1))
    assert set(texts(fewer, 'val', t)) < val.keys()


def test_endings_for_validation_in_order(folder):
    for i in range(3):
        parquet(folder / 'src' / f'{i}.parquet', [c * 40 for c in 'abcdefgh'[i * 2:i * 2 + 2]])
    files = prepare(split=splits.choose_split(sources.hub_source('src/*.parquet'), 0.1), tokenizer=tokenizer.Bytes())
    train, val = (tokens(files, split).astype(np.uint8).tobytes().decode() for split in ('train', 'val'))
    assert train == '\0'.join(c * 36 for c in 'abcdef') and val == '\0'.join(c * 4 for c in 'abcdef')
    assert list(files) == ['train.bin', 'val.bin']  # one file is named as nanoGPT has it


def test_how_many_documents_decide(folder):
    assert type(splits.choose_split(sources.hub_source('src/0.parquet'), 0.1)) is SomeDocuments
    parquet(folder / 'src' / '0.parquet', DOCUMENTS[:99])
    assert type(splits.choose_split(sources.hub_source('src/0.parquet'), 0.1)) is Endings


MIXED = ['Ça\r\n', '日本語 ' * 3, '\U0001F600 \x00\x0b', SPECIAL, ' \n\n ', '\ufeff', 'a' * 50]


@pytest.mark.parametrize('make', [
    tokenizer.Bytes, small_bpe, lambda: tokenizer.Chars(sorted(set(''.join(MIXED)))),
    lambda: tokenizer.HuggingFace(json.dumps(small_bpe().to_json()), eot=300)])
def test_any_text_comes_back_exactly(folder, make):
    parquet(folder / 'src' / '0.parquet', MIXED)
    t = make()
    for text in MIXED:
        assert t.to_bytes(t.encode_ordinary(text).tolist()).decode() == text
        assert t.eot not in t.encode_ordinary(text) or t.eot == 0
    files = prepare(source=sources.hub_source('src/0.parquet'), split=SomeDocuments(0.5), tokenizer=t)
    decoded = [t.to_bytes(tokens(files, split).tolist()).decode() for split in ('train', 'val')]
    assert sum(map(len, decoded)) == sum(map(len, MIXED)) + (
        0 if t.eot is None else (len(MIXED) - 2) * (1 if t.eot == 0 else len('<|endoftext|>')))
    assert all(any(text in d for d in decoded) for text in MIXED)


def test_text_that_utf8_cannot_write_and_long_text(folder, monkeypatch):
    with open('half.jsonl', 'w') as f:
        f.write('{"text": "a\\ud83d b \\ud83d\\ude00"}\n{"text": ""}\n' + json.dumps({'text': 'one two\n' * 9}))
    monkeypatch.setattr(readers, 'LONGEST', 30)
    files = prepare(source=sources.find_source(['half.jsonl']), split=Endings(0.01), tokenizer=tokenizer.Bytes())
    whole = tokens(files, 'train').astype(np.uint8).tobytes().decode().split('\0')
    assert whole[0] == 'a\ufffd b ' and [len(w) for w in whole[1:]] == [24 - 1, 24 - 1, 24 - 1]


def test_large_vocabularies_take_4_bytes(folder):
    t = tokenizer.Chars([chr(0x20000 + i) for i in range(66000)])
    parquet(folder / 'src' / '0.parquet', [t.chars[-1] * 10, t.chars[0] * 10])
    files = prepare(source=sources.hub_source('src/0.parquet'), split=Endings(0.5), tokenizer=t)
    assert data_folder.read_meta('data')['dtype'] == 'uint32'
    assert np.frombuffer(files['val.bin'], '<u4').tolist() == [65999] * 5 + [0] * 5


class Wrong(tokenizer.Bytes):
    def encode_ordinary(self, text):
        return np.array([256 if '299:' in text else 7])


def test_an_id_that_cannot_be(folder):
    """What was finished before it stays."""
    with pytest.raises(InputError, match='gave the id 256, but has only 256 ids'):
        prepare(tokenizer=Wrong(), split=FirstTokens(10), shard_tokens=20)
    kept = content('data')
    assert {'train_000.bin', 'train_001.bin', 'val.bin'} < kept.keys()
    meta = data_folder.read_meta('data')
    assert Tokens('data', 'train', meta, 8).n_tokens == meta['tokens']['train'] > 100


def test_a_full_disk(folder, monkeypatch):
    whole, real, calls = prepare('whole'), os.fsync, itertools.count()

    def fsync(descriptor):
        if next(calls) == 30:
            raise OSError(errno.ENOSPC, 'No space left on device')
        real(descriptor)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fsync)
        with pytest.raises(InputError, match=r'data cannot be written \(No space .*\): what is finished is kept'):
            prepare()
    kept = content('data')
    assert kept['train_000.bin'] == whole['train_000.bin']
    assert prepare() == whole
    usage = collections.namedtuple('usage', 'total used free')(10 ** 10, 10 ** 10 - 4000, 4000)
    monkeypatch.setattr(corpus.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(InputError, match=r'bigger needs 0 MB more, but the disk has 0: make room'):
        prepare('bigger', tokens=10 ** 6, expected=10 ** 9)
    assert not content('bigger')


def test_the_network_fails_for_good(folder, monkeypatch):
    """What has been prepared until then stays, and the same call goes on."""
    whole = prepare('whole')
    monkeypatch.setattr(sources, 'PAUSES', (0, 0))

    class Fails(readers.Rows):
        left = 130

        def __init__(self, path, field, position):
            super().__init__(path.removeprefix('hf://'), field, position)

        def __iter__(self):
            for row in super().__iter__():
                if not Fails.left:
                    raise ConnectionError('connection reset')
                Fails.left -= 1
                yield row

    def remote():
        source = sources.hub_source('src/*.parquet', name='three files')
        return sources.Source(['hf://' + path for path in source.files], reader=Fails, name=source.name)
    with pytest.raises(InputError, match='three files cannot be reached .* run the same command again'):
        prepare(source=remote())
    kept = content('data')
    assert whole['train_000.bin'] == kept['train_000.bin']
    Fails.left = 300 - 30  # all but what had been written: the first block is not read again
    assert prepare(source=remote()) == whole


def test_files_of_the_hub_stay_those_of_the_beginning(folder, monkeypatch):
    def remote(revision):
        source = sources.hub_source('src/*.parquet', name='three files')
        source.files = [f'hf://{revision}/{path}' for path in source.files]
        source.remote, source.reader = True, Pinned
        return source
    opened = []

    class Pinned(readers.Rows):
        def __init__(self, path, field, position):
            opened.append(path.split('/')[2])
            super().__init__(path.split('/', 3)[3], field, position)
    whole = prepare('whole')
    prepare(source=remote(f'@{"a" * 40}'), tokens=1000)
    assert prepare(source=remote(f'@{"b" * 40}')) == whole and set(opened) == {'@' + 'a' * 40}
    other = remote('@' + 'b' * 40)
    other.files = other.files[:2]
    with pytest.raises(InputError, match='other files'):
        prepare(source=other)


def test_refused(folder, monkeypatch):
    prepare(tokens=15000)
    before = content('data')
    for change, message in (
            (dict(seed=2), 'data was prepared with other --seed: give the same, or --restart'),
            (dict(shard_tokens=999), 'other --shard_tokens'), (dict(split=FirstTokens(501)), 'other --val_tokens'),
            (dict(tokenizer=tokenizer.Bytes(), split=SomeDocuments(0.1)), 'other --tokenizer and --val'),
            (dict(source=sources.hub_source('src/0.parquet')), 'other files')):
        with pytest.raises(InputError, match=message):
            prepare(**change)
    assert content('data') == before
    parquet(folder / 'src' / '2.parquet', ['not read so far'])
    prepare(tokens=15001)
    parquet(folder / 'src' / '0.parquet', DOCUMENTS[:99])
    with pytest.raises(InputError, match='three files has changed since data was prepared: --restart'):
        prepare()
    assert len(tokens(prepare(restart=True, tokens=15000), 'train')) == 15000
    os.truncate('data/train_000.bin', 100)
    with pytest.raises(InputError, match='train_000.bin is not as progress.json says'):
        prepare()
    prepare(restart=True, tokens=15000)
    os.truncate('data/train_000.bin', 100)
    with pytest.raises(InputError, match='data no longer has the 15,000 tokens of train that were prepared'):
        prepare(tokens=15000)
    with open('data/progress.json', 'w') as f:
        f.write('{')
    with pytest.raises(InputError, match='progress.json is damaged'):
        prepare()
    os.remove('data/progress.json')
    before = content('data')
    with pytest.raises(InputError, match='data has data that this script did not prepare'):
        prepare()
    assert content('data') == before
    parquet(folder / 'src' / 'empty.parquet', ['', None])
    with pytest.raises(InputError, match='none has no text for train and val: give more'):
        prepare('none', source=sources.hub_source('src/empty.parquet', name='none'))
    with pytest.raises(InputError, match='has no text for val: give more, or another --val, with --restart'):
        prepare('val', split=SomeDocuments(1e-9))
    with pytest.raises(InputError, match='has no text for train: give more, or another --val_tokens, with --restart'):
        prepare('train', split=FirstTokens(10 ** 6))
    with open('bad.jsonl', 'w') as f:
        f.write('{')
    with pytest.raises(InputError, match='bad.jsonl, line 1 is no JSON'):
        prepare('bad', source=sources.find_source(['bad.jsonl']))
    prepare('bad')  # of other files, for nothing had been prepared


def test_going_on_by_another_path(folder, capsys):
    prepare(tokens=20000, source=sources.find_source(['src/0.parquet', 'src/1.parquet', 'src/2.parquet']))
    capsys.readouterr()
    again = sources.find_source(['./src/0.parquet', f'{os.getcwd()}/src/1.parquet', 'src/0.parquet',
                                 'src/../src/2.parquet'])
    assert len(again.files) == 3
    prepare(source=again)
    assert 'data: going on after ' in capsys.readouterr().out


def test_a_file_that_is_gone(folder):
    for i in range(3):
        with open(f'{i}.txt', 'w') as f:
            f.write('<|endoftext|>'.join(DOCUMENTS[i * 100:i * 100 + 100]))
    files = ['0.txt', '1.txt', '2.txt']
    prepare(tokens=15000, source=sources.Source(files))
    os.remove('0.txt')
    with pytest.raises(InputError, match='0.txt cannot be read: No such file'):
        prepare(source=sources.Source(files))


def test_characters_of_text_that_utf8_cannot_write(folder):
    with open('half.jsonl', 'w') as f:
        f.write('{"text": "a\\ud83d b"}\n' * 20)
    source = sources.find_source(['half.jsonl'])
    t = corpus.choose_tokenizer('chars', source)
    assert t.chars == sorted('a\ufffd b')
    files = prepare(source=source, tokenizer=t, split=Endings(0.5))
    assert t.decode(tokens(files, 'train').tolist()) == 'a\ufffd' * 20


def test_one_preparation_at_a_time(folder):
    import filelock
    os.makedirs('data')
    with filelock.FileLock('data/progress.lock'):
        script = ('from sologpt.tokens import corpus, sources, splits, tokenizer\n'
                  'corpus.prepare_corpus("data", sources.find_source(["src/0.parquet"]), '
                  'tokenizer.Bytes(), splits.SomeDocuments(0.1))')
        ran = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                             env=os.environ | {'PYTHONPATH': ROOT})
    assert 'InputError: data is being prepared by another process' in ran.stderr


def test_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus.write_texts('d', tokenizer.Bytes(), {'train': ['ab', 'c'], 'val': ['d']}, 'here')
    meta = data_folder.read_meta('d')
    assert np.fromfile('d/train.bin', '<u2').tolist() == [97, 98, 0, 99]  # documents parted by end of text
    assert meta['tokens'] == {'train': 4, 'val': 1} and meta['vocab_size'] == 256 and meta['source'] == 'here'
    before = content('d')
    with pytest.raises(InputError):
        corpus.write_texts('d', tokenizer.Chars('cd'), {'train': ['cc'], 'val': ['x']}, 'new')
    assert before == content('d') and data_folder.read_meta('d') == meta


@pytest.mark.parametrize('text, number', [('5000', 5000), ('100M', 10 ** 8), ('1.5B', 1_500_000_000), ('2k', 2000),
                                          ('1T', 10 ** 12), ('2m', 2_000_000)])
def test_count(text, number):
    assert splits.parse_count(text, 'tokens') == number


@pytest.mark.parametrize('text', ['0', '-1', '1.5', '10x', '', 'all', '1e6'])
def test_no_count(text):
    with pytest.raises(InputError, match=f'--tokens={re.escape(text)} is no number .* write 5000, 100M or 1.5B'):
        splits.parse_count(text, 'tokens')


def test_options_are_checked():
    options = corpus.Options('2k', '1.5M', 0, True)
    assert (options.tokens, options.shard_tokens) == (2000, 1_500_000) and corpus.Options().tokens is None
    for make, message in ((lambda: corpus.Options(seed=-1), '--seed=-1 must be'),
                          (lambda: corpus.Options(shard_tokens='x'), '--shard_tokens=x is no number'),
                          (lambda: FirstTokens(0), '--val_tokens=0 is no number'),
                          (lambda: SomeDocuments(1.0), '--val=1 must be between 0 and 1'),
                          (lambda: Endings(0.0), '--val=0 must be between')):
        with pytest.raises(InputError, match=message):
            make()


def test_digest_is_of_the_text_alone():
    assert splits.digest('é') == int.from_bytes(hashlib.blake2b('é'.encode(), digest_size=8).digest(), 'little')
