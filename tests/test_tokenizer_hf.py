import codecs
import json
import re
from unittest import mock

import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from configurator import InputError
from model import GPT
from sologpt.tokens import tokenizer, tokenizer_files, tokenizer_hf
from sologpt.tokens.corpus import write_texts
from sologpt.tokens.data_folder import read_meta
from sologpt.tokens.tokenizer_hf import HuggingFace

with open(f'{ROOT}/README.md', encoding='utf-8') as readme:
    LINES = readme.read().splitlines(keepends=True)
SPECIAL = 'ends</s>not<s>'
TEXTS = ['', 'Hello', ' Hello', '   three spaces', 'a  b   c', '\n', '\r\n\tx\n\n', SPECIAL, '<0x0A>', '\u2581 \u2581x',
         'naïve — 日本語 Ελλάδα \U0001f600\U0001f468\u200d\U0001f469', '\x00\x7f\ufeff', 'the GPU trains model.py ' * 3]
NAMES = {'<unk>': 0, '<s>': 1, '</s>': 2}
STEPS = [decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()]
# kind -> (normalizer, pre-tokenizer, decoder): Llama 2's and Mistral 7B's; as transformers converts them; Gemma's
PIECES = {
    'prepend': (normalizers.Sequence([normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')]), None,
                decoders.Sequence([*STEPS, decoders.Strip(' ', 1, 0)])),
    'first': (None, pre_tokenizers.Metaspace(prepend_scheme='first', split=False),
              decoders.Sequence([*STEPS, decoders.Strip(' ', 1, 0)])),
    'metaspace': (None, pre_tokenizers.Metaspace(prepend_scheme='always', split=True), decoders.Metaspace()),
    'no prefix': (normalizers.Replace(' ', '\u2581'), None, decoders.Sequence(STEPS)),
}


def template(name, i):
    return processors.TemplateProcessing(single=f'{name} $A', pair=f'{name} $A {name}:1 $B:1',
                                         special_tokens=[(name, i)])


def pieces_bpe(kind):
    """SentencePiece's kind of BPE, trained on the README, with the bos 1."""
    normalizer, pre_tokenizer, decoder = PIECES[kind]
    bpe = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token='<unk>'))
    bpe.normalizer, bpe.decoder = normalizer, decoder
    bpe.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace()  # to train on words
    bpe.train_from_iterator(LINES, trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*NAMES, *(f'<0x{i:02X}>' for i in range(256))], show_progress=False))
    content = json.loads(bpe.to_str())
    content['added_tokens'] = [token for token in content['added_tokens'] if token['content'] in NAMES]
    content['pre_tokenizer'] = json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer else None
    bpe = tokenizers.Tokenizer.from_str(json.dumps(content))
    bpe.post_processor = template('<s>', 1)
    return bpe


def bytes_bpe(bos):
    """A byte-level BPE as Llama 3 has it, or without `bos` as Qwen. Special tokens come after the others."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(LINES, trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens(['<s>', '</s>', '<|eot|>'])
    level = processors.ByteLevel(trim_offsets=False)
    bpe.post_processor = processors.Sequence([level, template('<s>', bpe.token_to_id('<s>'))]) if bos else level
    return bpe


def write_folder(folder, bpe, settings=None, model_type='llama', **files):
    """A model's folder without weights. files: name -> content of a JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / 'tokenizer.json'))
    settings = {'bos_token': '<s>', 'eos_token': {'content': '</s>', '__type': 'AddedToken'}} | (settings or {})
    for name, content in (files | {'tokenizer_config': settings,
                                   'config': {'model_type': model_type} | files.get('config', {})}).items():
        (folder / f'{name}.json').write_text(json.dumps(content))
    return str(folder)


def read(folder):
    """The tokenizer of the folder, as it travels through a file."""
    return tokenizer.tokenizer_from_dict(json.loads(json.dumps(tokenizer_files.read_tokenizer(folder))))


MAKE = {**{kind: lambda kind=kind: pieces_bpe(kind) for kind in PIECES}, 'bytes and bos': lambda: bytes_bpe(True),
        'bytes': lambda: bytes_bpe(False)}
BOS = {**dict.fromkeys(PIECES, 1), 'bytes and bos': 500, 'bytes': None}


@pytest.mark.parametrize('kind, model_type, cls', [
    *((kind, 'llama', 'PreTrainedTokenizerFast') for kind in MAKE), ('first', 'llama', 'LlamaTokenizer'),
    ('bytes and bos', 'llama', 'LlamaTokenizer'), ('prepend', 'mistral', 'LlamaTokenizer'),
    ('prepend', 'mistral', None), ('bytes', 'qwen2', 'Qwen2Tokenizer'), ('bytes', 'llama', 'GPT2Tokenizer')])
def test_ids_and_text_are_those_of_transformers(tmp_path, kind, model_type, cls):
    if kind == 'bytes' and cls != 'PreTrainedTokenizerFast':
        settings = {'tokenizer_class': cls, 'bos_token': None, 'unk_token': None, 'pad_token': None}
    else:
        settings = {'tokenizer_class': cls} if cls else {}
    folder = write_folder(tmp_path, MAKE[kind](), settings, model_type)
    ours, theirs = read(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ordinary = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert (ours.eot, ours.bos) == (theirs.eos_token_id, BOS[kind]) and ours.ends == (ours.eot,)
    for text in TEXTS:
        ids = ours.encode(text)
        if text:
            assert ours.encode_prompt(text) == theirs(text)['input_ids'], text
        assert ids == theirs(text, add_special_tokens=False)['input_ids'], text
        plain = ours.encode_ordinary(text).tolist()
        assert plain == ordinary(text, add_special_tokens=False)['input_ids'], text
        assert ours.eot not in plain and ours.bos not in plain
        # the decoder Metaspace leaves bytes as they are written, and takes all spaces off a first token
        if kind != 'metaspace' or text.isascii() and text.isprintable() and not text.startswith('  '):
            assert ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize('kind', MAKE)
def test_a_text_is_decoded_piece_by_piece(tmp_path, kind):
    """What is drawn after a prompt goes on with it: the space before a word stays."""
    ours = read(write_folder(tmp_path, MAKE[kind]()))
    for text in TEXTS:
        ids = ours.encode(text)
        by_one = [ours.to_bytes([i]) for i in ids]
        assert b''.join(by_one) == ours.to_bytes(ids)
        decoder = codecs.getincrementaldecoder('utf-8')()
        streamed = ''.join(map(decoder.decode, by_one)) + decoder.decode(b'', final=True)
        # U+2581 is a space there. Metaspace does not tell a text from the same after a space, and Prepend puts a space
        # after each special token.
        inexact = {'first': text.startswith(' '), 'prepend': text == SPECIAL,
                   'metaspace': text.startswith(' ') or text == SPECIAL}
        if not inexact.get(kind) and not ('\u2581' in text and kind in PIECES):
            assert ours.decode(ids) == text
        assert streamed.removeprefix(' ' if kind in ('prepend', 'first', 'metaspace') else '') == ours.decode(ids)
    prompt, whole = ours.encode('the model'), ours.encode('the model is small')
    assert whole[:len(prompt)] == prompt and ours.to_bytes(whole[len(prompt):]) == b' is small'


def test_bytes_that_are_no_text_come_back_as_bytes():
    ours = HuggingFace(pieces_bpe('prepend').to_str())
    ids = [ours.vocabulary()[f'<0x{byte:02X}>'] for byte in range(256)]
    assert ours.to_bytes(ids) == bytes(range(256))
    assert ours.to_bytes(ours.encode('é\U0001f600')) == ' é\U0001f600'.encode()


@pytest.mark.parametrize('settings', [{}, {'add_bos_token': True}, {'add_bos_token': False}])
@pytest.mark.parametrize('cls', ['LlamaTokenizer', 'PreTrainedTokenizerFast'])
@pytest.mark.parametrize('has_post_processor', [True, False])
def test_bos_is_that_of_tokenizer_json_whatever_its_settings_say(tmp_path, settings, cls, has_post_processor):
    bpe = pieces_bpe('first')
    if not has_post_processor:
        bpe.post_processor = None
        bpe = tokenizers.Tokenizer.from_str(bpe.to_str())
    folder = write_folder(tmp_path, bpe, settings | {'tokenizer_class': cls})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), read(folder)
    assert ours.bos == (1 if has_post_processor else None)
    assert ours.encode_prompt('Hi') == theirs('Hi')['input_ids']


def test_a_prompt_begins_once():
    with_bos = HuggingFace(pieces_bpe('first').to_str(), eot=2, bos=1)
    assert with_bos.encode_prompt('') == [1] and with_bos.encode_prompt('<s>a') == with_bos.encode('<s>a')
    assert with_bos.encode('<s>a')[0] == 1 and with_bos.encode_prompt('a') == [1, *with_bos.encode('a')]
    without = HuggingFace(bytes_bpe(False).to_str(), eot=501)
    assert without.encode_prompt('') == [501] and without.encode_prompt('a') == without.encode('a')
    assert tokenizer.Chars('a').encode_prompt('') == []
    assert with_bos.before_document(is_first=True) == [1] and with_bos.before_document(is_first=False) == [2, 1]
    assert without.before_document(is_first=True) == [] and without.before_document(is_first=False) == [501]
    both = HuggingFace(pieces_bpe('first').to_str(), eot=2, bos=2)
    assert both.before_document(is_first=True) == both.before_document(is_first=False) == [2]


@pytest.mark.parametrize('files, ends', [
    ({}, [501]), ({'config': {'eos_token_id': 501}}, [501]), ({'config': {'eos_token_id': [502, 501]}}, [501, 502]),
    ({'config': {'eos_token_id': 7}, 'generation_config': {'eos_token_id': [502, 501]}}, [501, 502]),
    ({'config': {'eos_token_id': 502}, 'generation_config': {'eos_token_id': None}}, [501, 502]),
    ({'generation_config': {'eos_token_id': [501, 999]}}, [501])])
def test_ends_are_all_that_the_files_name(tmp_path, files, ends):
    folder = write_folder(tmp_path, bytes_bpe(False), **files)
    described = tokenizer_files.read_tokenizer(folder)
    ours = read(folder)
    assert ours.eot == 501 and list(ours.ends) == ends
    # a description has what it could not be without, so that those of former versions say the same
    assert described.keys() == {'kind', 'json', 'eot'} | ({'ends'} if len(ends) > 1 else set())
    assert ours.to_dict() == described and tokenizer.eot_of(described) == tokenizer.document_begin_of(described) == 501


def test_a_description_has_bos_only_if_there_is_one(tmp_path):
    described = tokenizer_files.read_tokenizer(write_folder(tmp_path, bytes_bpe(True)))
    assert described.keys() == {'kind', 'json', 'eot', 'bos'} and described['bos'] == 500
    assert tokenizer.eot_of(described) == 501 and tokenizer.document_begin_of(described) == 500
    assert '"post_processor":null' in described['json']
    for other in (tokenizer.Bytes(), tokenizer.Chars('ab')):
        assert tokenizer.document_begin_of(other.to_dict()) == other.eot and 'ends' not in other.to_dict()


def test_a_folder_names_a_tokenizer_that_agrees_with_its_file_alone(tmp_path):
    folder = write_folder(tmp_path / 'model', pieces_bpe('prepend'), generation_config={'eos_token_id': [2, 5]})
    of_folder, of_file = (tokenizer.tokenizer_by_name(name) for name in (folder, f'{folder}/tokenizer.json'))
    assert (of_folder.eot, of_folder.bos, of_folder.ends) == (2, 1, (2, 5))
    assert (of_file.eot, of_file.bos, of_file.ends) == (None, 1, ())
    assert tokenizer.tokenizers_agree(of_folder.to_dict(), of_file.to_dict())
    other = HuggingFace(pieces_bpe('no prefix').to_str())
    assert other.vocab_size == of_file.vocab_size
    assert not tokenizer.tokenizers_agree(of_folder.to_dict(), HuggingFace(bytes_bpe(True).to_str()).to_dict())
    (tmp_path / 'empty').mkdir()
    for name, message in (('empty', 'has no tokenizer.json'), ('nothere', "or of a model's folder")):
        with pytest.raises(InputError, match=f'--tokenizer=.*{name}.*{message}'):
            tokenizer.tokenizer_by_name(str(tmp_path / name))
    (tmp_path / 'model' / 'generation_config.json').write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(InputError, match='generation_config.json has eos_token_id=.*no ids'):
        tokenizer.tokenizer_by_name(folder)


def test_a_file_is_parsed_once(tmp_path, monkeypatch):
    folder, parsed = write_folder(tmp_path, bytes_bpe(True)), []
    tokenizer_hf._parse.cache_clear()
    from_str = tokenizers.Tokenizer.from_str

    class Counted:
        @staticmethod
        def from_str(text):
            parsed.append(text)
            return from_str(text)
    monkeypatch.setattr(tokenizers, 'Tokenizer', Counted)
    described = tokenizer_files.read_tokenizer(folder)
    ours = tokenizer.tokenizer_from_dict(json.loads(json.dumps(described)))
    assert ours.encode('a') and tokenizer.document_begin_of(described) == 500
    assert tokenizer.tokenizers_agree(described, described | {'eot': None})
    assert len(parsed) == 1
    ours.encode_ordinary('a')  # with the names of special tokens as ordinary text
    assert len(parsed) == 2


def test_documents_of_a_run_begin_at_bos_and_so_does_its_text(project, tmp_path):
    """Data, training with document_mask, the text at the end, and sample.py, which stops at any of the ends."""
    folder = write_folder(tmp_path / 'model', bytes_bpe(True), generation_config={'eos_token_id': [501, 502]})
    text = tokenizer.tokenizer_by_name(folder)
    write_texts('data/docs', text, {'train': ['the model'] * 40, 'val': ['the model'] * 9}, 'a test')
    assert read_meta('data/docs')['tokenizer'] == text.to_dict() == tokenizer_files.read_tokenizer(folder)
    one = text.encode('the model')

    def generate(self, ids, *args, ends, **options):
        assert ends == (501, 502)
        return torch.cat([ids, torch.tensor([[one[0], 502, 502]])], dim=1)
    with mock.patch.object(GPT, 'generate', generate):
        run, printed = project.train(dataset='docs', document_mask=True, sample_tokens=5, sample_start='the')
    begun = 'the' + text.to_bytes(one[:1]).decode()
    assert printed.splitlines()[-1] == begun
    assert run['model'].config.document_eot == text.bos == 500
    ids = run['data'].train.read(0, 0.0)
    assert ids[:len(one) + 3].tolist() == [500, *one, 501, 500]
    context = run['model'].context(torch.tensor(ids[None, :16].astype('int64')))
    assert context.begins[0].tolist() == [i == 500 for i in ids[:16]]
    assert run['final_sample'].start == [500, *text.encode('the')]

    drawn = []

    def stream(self, idx, max_new_tokens, temperature, top_k, top_p, ends, *rest):
        drawn.append((idx.tolist(), ends))
        for row in ([one[0], one[0]], [502, 1], [502, 501]):
            yield torch.tensor(row)
        yield torch.tensor([1, 1])  # which was begun before the ids of the row before were known
        raise AssertionError('all texts have ended')
    with mock.patch.object(GPT, 'stream', stream):
        said = project.sample(start='the', num_samples=2)
    assert drawn == [([[500, *text.encode('the')]] * 2, (501, 502))]
    assert said == f'{begun}\n---------------\n{begun}{text.decode([1])}\n---------------\n'


def without_bytes(content):
    vocab = content['model']['vocab']
    content['model']['vocab'] = {re.sub('<0x(0.)>', r'<\1>', token): i for token, i in vocab.items()}


@pytest.mark.parametrize('change, message', [
    (lambda content: content['model'].update(byte_fallback=False), 'its model is BPE and its decoder Replace, Byte'),
    (without_bytes, 'its model is BPE and its decoder Replace, ByteFallback, Fuse, Strip: only'),
    (lambda content: content['decoder']['decoders'][3].update(stop=1), 'its decoder Replace, Byte'),
    (lambda content: content['decoder']['decoders'][0].update(content='-'), 'its decoder Replace'),
    (lambda content: content['decoder']['decoders'].pop(1), 'its decoder Replace, Fuse, Strip'),
    (lambda content: content.update(model={'type': 'Unigram', 'unk_id': 0, 'vocab': [['<unk>', 0.0], ['a', -1.0]]}),
     'its model is Unigram')])
def test_a_tokenizer_that_would_lose_text_is_refused(tmp_path, change, message):
    content = json.loads(pieces_bpe('prepend').to_str())
    change(content)
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    with pytest.raises(InputError, match=f'tokenizer.json cannot be read: .*{message}'):
        HuggingFace.from_file(str(tmp_path / 'tokenizer.json'))
