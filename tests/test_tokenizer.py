import base64
import json
import os
import pickle

import pytest
import tiktoken

from configurator import InputError
from sologpt.tokens import data_folder, tokenizer, tokenizer_kinds

MIXED = 'def f(x):\n\treturn "naïve — 日本語 Ελλάδα \U0001f600"\r\n'


def fake_gpt2(name):
    """A BPE in tiktoken's terms, with one merge: no download."""
    ranks = {bytes([i]): i for i in range(256)} | {b'de': 256}
    return tiktoken.Encoding(name, pat_str=r'\S+|\s+', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 257})


@pytest.mark.parametrize('make', [tokenizer.Bytes, lambda: tokenizer.Chars(sorted(set(MIXED))),
                                  lambda: tokenizer.Tiktoken('gpt2')])
def test_round_trip(make, monkeypatch):
    monkeypatch.setattr(tiktoken, 'get_encoding', fake_gpt2)
    made = make()
    t = tokenizer.tokenizer_from_dict(json.loads(json.dumps(made.to_dict())))  # as it travels
    ids = t.encode(MIXED)
    assert t.decode(ids) == MIXED
    assert ids == made.encode(MIXED) and max(ids) < t.vocab_size
    assert b''.join(t.to_bytes([i]) for i in ids).decode() == MIXED  # as it streams


def test_ids():
    assert tokenizer.Bytes().encode('aé') == [97, 0xc3, 0xa9]
    assert tokenizer.Chars('abc').encode('cab') == [2, 0, 1]


def test_tiktoken_special_token(monkeypatch):
    monkeypatch.setattr(tiktoken, 'get_encoding', fake_gpt2)
    t = tokenizer.Tiktoken('gpt2')
    assert t.encode('de<|endoftext|>') == [256, 257] and t.eot == 257 and t.vocab_size == 258


def test_the_end_of_text_of_gpt2_needs_no_download(monkeypatch):
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: fake_gpt2({'other': name}[name]))
    ends = [tokenizer.eot_of(described) for described in (
        data_folder.ASSUMED_META['tokenizer'], {'kind': 'tiktoken', 'name': 'other'}, {'kind': 'bytes'},
        {'kind': 'chars', 'chars': ['a']})]
    assert ends == [50256, 257, 0, None]


def test_unreachable_network_is_said(monkeypatch):
    def get(name):
        raise ConnectionError('no route')
    monkeypatch.setattr(tiktoken, 'get_encoding', get)
    with pytest.raises(InputError, match='TIKTOKEN_CACHE_DIR'):
        tokenizer.Tiktoken('gpt2')


def ranks_file(path, tokens):
    path.write_text(''.join(f'{base64.b64encode(token).decode()} {i}\n' for i, token in enumerate(tokens)))
    return str(path)


BYTES = [bytes([b]) for b in range(256)]


def test_a_file_of_ranks_is_all_that_is_needed(tmp_path, monkeypatch):
    path = ranks_file(tmp_path / 'mine.tiktoken', [*BYTES, b'de'])
    monkeypatch.setitem(tokenizer_kinds.RANK_FILES, 257, ('gpt2', r'\S+|\s+', {'<|endoftext|>': 257}))
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: 1 / 0)  # which would download
    t = tokenizer.tokenizer_by_name(path)
    os.remove(path)
    again = tokenizer.tokenizer_from_dict(json.loads(json.dumps(t.to_dict())))
    for one in (t, again):
        assert one.encode('de<|endoftext|>d') == [256, 257, 100] and one.eot == 257 and one.vocab_size == 258
        assert one.encode_ordinary('de<|end').tolist() == [256, *b'<|end']
    assert again.to_dict() == t.to_dict()
    assert tokenizer.tokenizers_agree(tokenizer.GPT2, t.to_dict())
    assert tokenizer.tokenizers_agree(t.to_dict(), tokenizer.GPT2)
    other = tokenizer.tokenizer_by_name(ranks_file(tmp_path / 'other.tiktoken', [*BYTES, b'ed']))
    assert not tokenizer.tokenizers_agree(other.to_dict(), t.to_dict())
    for tokens, message in ((BYTES, r'has 256 ranks: how its text .* 50,256 \(gpt2\), 100,256 \(cl100k_base\)'),):
        with pytest.raises(InputError, match=message):
            tokenizer.tokenizer_by_name(ranks_file(tmp_path / 'few.tiktoken', tokens))
    for damaged in ([*BYTES[:-1], b'de', b'ed'], [*BYTES, b'de', b'ed', b'dd'][1:]):
        with pytest.raises(InputError, match='damaged: a rank from 0 to 256 is missing, or one of'):
            tokenizer.tokenizer_by_name(ranks_file(tmp_path / 'damaged.tiktoken', damaged[:257]))
    (tmp_path / 'no.tiktoken').write_text('no ranks at all')
    for name, message in (('no.tiktoken', 'cannot be read as a file of ranks'), ('nothere.tiktoken', 'cannot be read'),
                          ('gpt9', '--tokenizer=gpt9 is not known: use bytes, chars, one of tiktoken')):
        with pytest.raises(InputError, match=message):
            tokenizer.tokenizer_by_name(str(tmp_path / name) if '.' in name else name)


@pytest.mark.parametrize('number', tokenizer_kinds.RANK_FILES)
def test_text_is_split_as_tiktoken_does(number):
    """And in Hugging Face's terms the same."""
    name, pattern, special = tokenizer_kinds.RANK_FILES[number]
    ranks = {token: i for i, token in enumerate([*BYTES, b' t', b'12', b'123', b'1234', b'\n\n', b'  ', b"'s", b"'S"])}
    t = tokenizer.Tiktoken(name, tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                                   special_tokens={'<|endoftext|>': len(ranks)}))
    text = MIXED + "It's IT'S 123456 a\n\n \t  b  \r\n\r\n  " + '12 34/\n /5 ' * 3 + ' '
    ids = t.encode(text)
    assert t.decode(ids) == text and t.encode_ordinary(text).tolist() == ids
    assert tokenizer.HuggingFace(json.dumps(t.to_json())).encode(text) == ids
    threes = {50256: '1234', 100256: '123', 199998: '123'}[number]  # digits that are kept together
    assert ranks[threes.encode()] in t.encode(' 1234') and len(special) in (1, 2, 5)


def test_unknown_character_is_named():
    with pytest.raises(InputError, match="'z'"):
        tokenizer.Chars('abc').encode('abz')


def test_whether_two_descriptions_agree():
    def as_json(t):
        return tokenizer.HuggingFace(json.dumps(t.to_json())).to_dict()

    def large(the, n):  # as many ids as GPT-2 has, or nearly
        content = tokenizer.Bytes().to_json()
        content['model']['vocab'] |= {f'{i}': i for i in range(256, n)} | {'Ġthe': the}
        del content['model']['vocab'][str(the)]
        return {'kind': 'json', 'json': json.dumps(content), 'eot': None}
    abc, acb = (tokenizer.Chars(chars) for chars in ('abc', 'acb'))
    gpt2 = tokenizer.GPT2
    for one, another, expected in (
            (None, gpt2, True), ({'kind': 'unknown', 'why': ''}, gpt2, True), (gpt2, gpt2, True),
            (abc.to_dict(), abc.to_dict(), True), (abc.to_dict(), acb.to_dict(), False),
            ({'kind': 'bytes'}, abc.to_dict(), False), (as_json(abc), abc.to_dict(), True),
            (abc.to_dict(), as_json(abc), True), (as_json(acb), abc.to_dict(), False),
            (as_json(acb), as_json(abc), False), (as_json(abc), gpt2, False), (gpt2, as_json(abc), False),
            (large(262, 50257), gpt2, True), (gpt2, large(262, 50257), True), (large(263, 50257), gpt2, False),
            (gpt2, large(262, 50256), False)):
        assert tokenizer.tokenizers_agree(one, another) is expected, (one, another)


@pytest.mark.parametrize('content, message', [
    ('{', 'damaged'), ('{"version": "9"}', 'damaged'),
    (tokenizer.Bytes().to_json() | {'decoder': {'type': 'Metaspace', 'replacement': '_', 'prepend_scheme': 'always',
                                                'split': True}}, 'its decoder Metaspace'),
    (tokenizer.Bytes().to_json() | {'decoder': None}, 'its decoder None'),
    (tokenizer.Chars('').to_json(), 'its model is WordLevel')])
def test_a_tokenizer_json_that_cannot_be_read(content, message):
    with pytest.raises(InputError, match=message):
        tokenizer.HuggingFace(content if isinstance(content, str) else json.dumps(content))


def test_nanogpt_meta(tmp_path):
    with open(tmp_path / 'meta.pkl', 'wb') as f:
        pickle.dump({'vocab_size': 3, 'itos': {0: 'a', 1: 'b', 2: 'ß'}, 'stoi': {'a': 0, 'b': 1, 'ß': 2}}, f)
    meta = data_folder.read_meta(tmp_path)
    assert tokenizer.tokenizer_from_dict(meta['tokenizer']).encode('ßa') == [2, 0] and meta['dtype'] == 'uint16'


def test_folder_without_meta_is_gpt2s(tmp_path):
    assert data_folder.read_meta(tmp_path)['vocab_size'] == 50257


class Evil:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def test_pickle_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open('meta.pkl', 'wb') as f:
        pickle.dump({'vocab_size': 3, 'itos': Evil()}, f)
    with pytest.raises(InputError, match='not a plain nanoGPT meta.pkl'):
        data_folder.read_meta('.')
    assert not os.path.exists('ran')


@pytest.mark.parametrize('content', ['{', '[]', '{"vocab_size": 3}',
                                     '{"vocab_size": 3, "tokenizer": {}, "dtype": "int8"}'])
def test_damaged_meta(tmp_path, content):
    (tmp_path / 'meta.json').write_text(content)
    with pytest.raises(InputError, match='damaged'):
        data_folder.read_meta(tmp_path)
