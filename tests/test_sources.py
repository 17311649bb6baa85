import bz2
import gzip
import itertools
import json
import os
import random

import pyarrow
import pyarrow.parquet
import pytest

from configurator import InputError
from sologpt.tokens import readers, sources
from sologpt.tokens.sources import Source, find_source, hub_source

DOCUMENTS = ['Ça va\r\n', 'two\n\n', '日本語 \x00\u2028', 'x' * 300, ' \ttabs', '\U0001F600' * 5]


def parquet(path, documents, column='text', **options):
    os.makedirs(path.parent, exist_ok=True)
    table = pyarrow.table({'id': list(range(len(documents))), column: documents})
    pyarrow.parquet.write_table(table, path, **{'row_group_size': 2} | options)
    return str(path)


def zst(content):
    return pyarrow.compress(content, codec='zstd', asbytes=True)


def each_kind(folder):
    """The same documents in every form: name -> (path, compressor)."""
    text = '<|endoftext|>'.join(DOCUMENTS).encode()
    lines = ''.join(json.dumps({'n': 1, 'text': d}, ensure_ascii=i % 2 == 0) + '\n' * (1 + i % 2)
                    for i, d in enumerate(DOCUMENTS)).encode()
    for name, content in (('a.txt', text), ('a.jsonl', lines)):
        for suffix, compress in (('', bytes), ('.gz', gzip.compress), ('.zst', zst), ('.bz2', bz2.compress)):
            (folder / (name + suffix)).write_bytes(compress(content))
            yield str(folder / (name + suffix))
    yield parquet(folder / 'a.parquet', DOCUMENTS)


def test_every_kind_of_file_gives_the_same_documents_exactly(tmp_path):
    for path in each_kind(tmp_path):
        assert list(find_source([path])) == DOCUMENTS, path


def test_going_on_from_every_position(tmp_path):
    files = list(each_kind(tmp_path))
    source, whole = Source(files), DOCUMENTS * len(files)
    for n, _ in zip(range(1, len(whole)), source, strict=False):
        again = source.again()
        again.position = json.loads(json.dumps(source.where()))
        assert list(itertools.islice(again, 8)) == whole[n:n + 8], n


def test_a_long_text_is_cut_at_line_ends_and_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, 'LONGEST', 50)
    text = 'a line of text\n' * 9 + 'word ' * 30 + 'é' * 80 + '\n<|endoftext|>' + 'z' * 7
    (tmp_path / 'a.txt').write_text(text, encoding='utf-8')
    pieces = list(find_source([str(tmp_path / 'a.txt')]))
    assert ''.join(pieces) == text.replace('<|endoftext|>', '') and pieces[-1] == 'zzzzzzz'
    assert all(len(p.encode()) <= 50 for p in pieces) and pieces[0] == 'a line of text\n' * 3
    for n in range(len(pieces)):
        source = find_source([str(tmp_path / 'a.txt')])
        list(zip(range(n), source, strict=False))
        again = source.again()
        again.position = source.where()
        assert list(again) == pieces[n:]


def test_cuts_lose_nothing_wherever_one_goes_on(tmp_path, monkeypatch):
    """Of text without line ends and spaces, in which marks and characters lie across the cuts."""
    monkeypatch.setattr(readers, 'LONGEST', 40)
    rng = random.Random(1)
    for _ in range(60):
        text = ''.join(rng.choices(['a', '\u597d', '\U0001F600', '<|endoftext|>', 'bcdefgh' * 3], [9, 9, 5, 3, 2],
                                   k=rng.randint(1, 60)))
        (tmp_path / 'a.txt').write_text(text, encoding='utf-8')
        pieces = list(find_source([str(tmp_path / 'a.txt')]))
        assert ''.join(pieces) == text.replace('<|endoftext|>', '')
        assert all(len(p.encode()) <= 40 for p in pieces)
        assert len([p for p in pieces if p]) >= len([p for p in text.split('<|endoftext|>') if p])
        source = find_source([str(tmp_path / 'a.txt')])
        for n, _ in enumerate(source):
            again = source.again()
            again.position = source.where()
            assert list(again) == pieces[n + 1:]


def test_what_a_command_line_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.makedirs('d/inside')
    os.makedirs('d/.git')
    for name in ('d/b.txt', 'd/a.md', 'd/inside/c.jsonl.gz', 'd/left.out', 'd/code.py', 'd/.git/x.txt', 'd/.y.txt'):
        open(name, 'w').close()
    assert find_source(['d']).files == ['d/a.md', 'd/b.txt', 'd/inside/c.jsonl.gz']
    assert capsys.readouterr().out == 'd: 3 files, and 2 that are no .txt, .md, .jsonl or .parquet\n'
    found = find_source(['d/*.py', 'd/b.txt', 'd/b.txt', 'd/**/*.gz'])
    assert found.files == ['d/code.py', 'd/b.txt', 'd/inside/c.jsonl.gz']
    os.makedirs('empty')
    for names, message in ((['empty'], 'empty has no .txt'), (['no.txt'], 'there is no no.txt'),
                           (['x/*.txt'], 'there is no x/'), (['d/b.txt', 'owner/name'], 'there is no owner/name'),
                           (['d/insidee'], 'there is no d/insidee: name files')):
        with pytest.raises(InputError, match=message):
            find_source(names)


def lines(*records):
    return ''.join(r if isinstance(r, str) else json.dumps(r) + '\n' for r in records).encode()


def cut(content):
    return content[:len(content) * 2 // 3]


LONG = json.dumps({'text': ''.join(map(chr, range(32, 20000)))}).encode()


@pytest.mark.parametrize('name, content, message', [
    ('a.txt', 'déjà'.encode('latin-1'), r'a.txt is not UTF-8 text \(byte 1\): convert'),
    ('a.txt', b'good<|endoftext|>ok \xff', r'not UTF-8 text \(byte 20\)'),
    ('a.jsonl', lines({'text': 'a'}, '{"text": \n'), 'a.jsonl, line 2 is no JSON'),
    ('a.jsonl', lines({'text': 'a'}, '\n', {'body': 'b', 'id': 1}), "line 3 has no field 'text': it has body, id"),
    ('a.jsonl', lines({'text': 7}), "line 1: the field 'text' is a int"),
    ('a.jsonl', lines(['text']), 'line 1 is a list'),
    ('a.jsonl', b'[' * 200_000, 'line 1 is no JSON'),
    ('a.jsonl.gz', cut(gzip.compress(LONG)), 'damaged or cut off'),
    ('a.jsonl.zst', cut(zst(LONG)), 'damaged or cut off'),
    ('a.txt.gz', b'no gzip at all', 'damaged or cut off'),
    ('a.parquet', b'PAR1 and no more', 'damaged or cut off'),
    ('a.parquet', b'', 'damaged or cut off'),
])
def test_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as e:
        list(find_source([str(tmp_path / name)]))
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


def test_parquet_refused(tmp_path):
    with pytest.raises(InputError, match="a.parquet has no field 'text': it has id, body"):
        list(find_source([parquet(tmp_path / 'a.parquet', ['x'], column='body')]))
    assert list(find_source([parquet(tmp_path / 'b.parquet', ['x', None], column='body')], 'body')) == ['x', '']
    whole = parquet(tmp_path / 'c.parquet', DOCUMENTS * 50)
    with open(whole, 'rb') as f:
        content = f.read()
    for keep in (100, len(content) - 9, len(content) - 1):
        (tmp_path / 'cut.parquet').write_bytes(content[:keep])
        with pytest.raises(InputError, match='cut.parquet is damaged or cut off'):
            list(find_source([str(tmp_path / 'cut.parquet')]))
    damaged = bytearray(content)
    damaged[4:len(content) // 2] = bytes(len(content) // 2 - 4)
    (tmp_path / 'damaged.parquet').write_bytes(damaged)
    with pytest.raises(InputError, match='damaged.parquet is damaged'):
        list(find_source([str(tmp_path / 'damaged.parquet')]))


def test_odd_names_and_empty_parquet(tmp_path):
    folder = tmp_path / 'od [x] y'
    paths = [parquet(folder / 'a[1] b.parquet', ['one']), parquet(folder / 'e.parquet', pyarrow.array([], 'string')),
             str(folder / 'c.TXT.GZ')]
    with open(paths[2], 'wb') as f:
        f.write(gzip.compress(b'three'))
    assert list(find_source(paths)) == ['one', 'three']
    if hasattr(os, 'mkfifo'):
        os.mkfifo(tmp_path / 'pipe')
        with pytest.raises(InputError, match='pipe can be read only once'):
            find_source([str(tmp_path / 'pipe')])


def test_a_dataset_by_a_pattern(tmp_path):
    for i in range(3):
        parquet(tmp_path / 'sample' / f'{i}.parquet', [f'{i}{d}' for d in DOCUMENTS])
    source = hub_source(f'{tmp_path}/sample/*.parquet', name='mine')
    assert list(source) == [f'{i}{d}' for i in range(3) for d in DOCUMENTS] and source.name == 'mine'
    with pytest.raises(InputError, match='cannot be read: Unable to find|there is no .*/nothere/'):
        hub_source(f'{tmp_path}/nothere/*.parquet')


def test_a_dataset_of_json_files(tmp_path):
    """As a folder that `datasets` reads like a repository of the hub."""
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set' / 'train.jsonl').write_bytes(lines(*({'text': d, 'more': [1]} for d in DOCUMENTS)))
    source = hub_source(str(tmp_path / 'set'))
    assert list(source) == DOCUMENTS
    with pytest.raises(InputError, match="has no field 'body'"):
        list(hub_source(str(tmp_path / 'set'), field='body'))
    os.rename(tmp_path / 'set' / 'train.jsonl', tmp_path / 'set' / 'test.jsonl')
    with pytest.raises(InputError, match='has no split train in files, only test'):
        hub_source(str(tmp_path / 'set'))


def test_the_network_is_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, 'PAUSES', (0, 0))
    parquet(tmp_path / 'a.parquet', DOCUMENTS)
    failures, real = [ConnectionError('gone'), TimeoutError('slow')], readers.quiet_datasets().load_dataset_builder

    def load(*args, **kwargs):
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)
    monkeypatch.setattr(readers.quiet_datasets(), 'load_dataset_builder', load)
    source = hub_source(f'{tmp_path}/*.parquet', name='mine')
    assert capsys.readouterr().out.count('trying again in 0 s') == 2
    failures += [ConnectionError('gone')] * 3
    with pytest.raises(InputError, match=r'mine cannot be reached \(ConnectionError: gone\): check the network'):
        hub_source(f'{tmp_path}/*.parquet', name='mine')
    capsys.readouterr()

    class Fails(readers.Rows):  # before each document twice, and on the web
        def __init__(self, path, field, position):
            super().__init__(path.removeprefix('hf://'), field, position)

        def __iter__(self):
            documents = super().__iter__()
            while True:
                key = f'{source.where()}'
                if failures.count(key) < n_failures:
                    failures.append(key)
                    raise ConnectionError('reset')
                if (document := next(documents, None)) is None:
                    return
                yield document
    source.files, source.reader, n_failures = ['hf://' + path for path in source.files], Fails, 2
    failures.clear()
    assert list(source) == DOCUMENTS and len(failures) == 2 * len(DOCUMENTS) + 2
    assert capsys.readouterr().out.count('mine cannot be reached (ConnectionError: reset); trying') == len(failures)
    n_failures, source = 3, source.again()
    failures.clear()
    with pytest.raises(InputError, match=r'mine cannot be reached \(ConnectionError: reset\): check'):
        list(source)


def test_the_hub_without_a_network(monkeypatch, capsys):
    monkeypatch.setattr(sources, 'PAUSES', ())
    with pytest.raises(InputError, match='owner/name of the hub cannot be reached'):
        find_source(['owner/name'])
    assert capsys.readouterr().out.startswith('there is no file or folder owner/name here: looking for such a dataset')
