"""
Text to token ids and back: bytes, characters, tiktoken's encodings; and text to the token files that training reads.

A tokenizer is described by a small dict of plain values (`to_dict`), which lies in a data folder's meta.json and in
every checkpoint, so that sampling needs nothing else. Every tokenizer has

    vocab_size              ids are 0 .. vocab_size - 1
    eot                     the id that ends a text, or None
    encode(text) -> ids     raises InputError for text it cannot represent
    to_bytes(ids) -> bytes  UTF-8, cut anywhere: one token may be part of a character
    decode(ids) -> text     with U+FFFD where the bytes are no text
"""

import json
import os
import pickle

import numpy as np

from configurator import InputError

GPT2 = {'kind': 'tiktoken', 'name': 'gpt2'}  # what files that name no tokenizer are taken for, as nanoGPT does
GPT2_VOCAB = 50257
ASSUMED_META = {'tokenizer': GPT2, 'vocab_size': GPT2_VOCAB, 'dtype': 'uint16'}  # of a folder with neither meta file


class Tokenizer:
    def decode(self, ids):
        return self.to_bytes(ids).decode('utf-8', errors='replace')


class Bytes(Tokenizer):
    """UTF-8 bytes: any text in any language, nothing to learn or load. Byte 0, absent from text, ends a document."""
    vocab_size, eot = 256, 0

    def encode(self, text):
        return list(text.encode('utf-8', errors='surrogateescape'))

    def to_bytes(self, ids):
        return bytes(ids)

    def to_dict(self):
        return {'kind': 'bytes'}


class Chars(Tokenizer):
    """One id per character of a text, in the characters' sorted order (nanoGPT's shakespeare_char)."""
    eot = None

    def __init__(self, chars):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self.ids = {c: i for i, c in enumerate(self.chars)}

    def encode(self, text):
        try:
            return [self.ids[c] for c in text]
        except KeyError as e:
            raise InputError(f'the character {e.args[0]!r} is not among the {self.vocab_size} that this tokenizer '
                             f'knows; leave it out, or use a bytes tokenizer') from None

    def to_bytes(self, ids):
        return ''.join(self.chars[i] for i in ids).encode('utf-8')

    def to_dict(self):
        return {'kind': 'chars', 'chars': self.chars}


class Tiktoken(Tokenizer):
    """A BPE by tiktoken's name for it ('gpt2', 'cl100k_base', ...); downloads its ranks once, then caches them."""

    def __init__(self, name):
        import tiktoken
        try:
            self.encoding = tiktoken.get_encoding(name)
        except ValueError:
            raise InputError(f'tiktoken has no encoding {name!r}; it has {tiktoken.list_encoding_names()}') from None
        except Exception as e:  # whatever its HTTP library raises
            raise InputError(f'tiktoken could not load {name!r} ({type(e).__name__}): it is downloaded once; connect '
                             f'to the network, or point TIKTOKEN_CACHE_DIR at a folder that has it') from None
        self.name = name
        self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token

    def encode(self, text):
        return self.encoding.encode(text, allowed_special={'<|endoftext|>'})

    def to_bytes(self, ids):
        return self.encoding.decode_bytes(ids)

    def to_dict(self):
        return {'kind': 'tiktoken', 'name': self.name}


def from_dict(described):
    """The tokenizer that to_dict() described."""
    kind = described.get('kind')
    if kind == 'bytes':
        return Bytes()
    if kind == 'chars':
        return Chars(described['chars'])
    if kind == 'tiktoken':
        return Tiktoken(described['name'])
    raise InputError(f'unknown tokenizer {kind!r}: known are bytes, chars and tiktoken')


def read_meta(data_dir):
    """
    What a data folder says of itself: {'tokenizer': dict, 'vocab_size': int, 'dtype': 'uint16' or 'uint32', ...}.

    Reads meta.json, or nanoGPT's meta.pkl (without running anything in it); a folder with neither is taken for GPT-2's
    BPE, as nanoGPT does. Raises InputError.
    """
    path = os.path.join(data_dir, 'meta.json')
    if os.path.exists(path):
        try:
            with open(path, encoding='utf-8') as f:
                meta = json.load(f)
            return {**meta, 'vocab_size': int(meta['vocab_size']), 'tokenizer': dict(meta['tokenizer']),
                    'dtype': {'uint16': 'uint16', 'uint32': 'uint32'}[meta['dtype']]}
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f'{path} is damaged ({type(e).__name__}: {e}): prepare the data again') from None
    path = os.path.join(data_dir, 'meta.pkl')
    if os.path.exists(path):
        try:
            with open(path, 'rb') as f:
                meta = _PlainUnpickler(f).load()
            chars = [meta['itos'][i] for i in range(int(meta['vocab_size']))]
        except Exception as e:  # a damaged pickle can raise anything
            raise InputError(f'{path} is not a plain nanoGPT meta.pkl ({e}): prepare the data again') from None
        return {'tokenizer': {'kind': 'chars', 'chars': chars}, 'vocab_size': len(chars), 'dtype': 'uint16'}
    return ASSUMED_META


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it wants to run {module}.{name}')


def write_data(data_dir, tokenizer, splits, source):
    """
    Write train.bin, val.bin and meta.json, all or none of them.

    splits: name -> iterable of texts, each of which is one document, followed by the tokenizer's end of text (if it
    has one and there are several documents). source: a line saying what the text is.
    """
    os.makedirs(data_dir, exist_ok=True)
    dtype = 'uint16' if tokenizer.vocab_size <= 2 ** 16 else 'uint32'
    counts = {}
    paths = [os.path.join(data_dir, name) for name in (*(f'{split}.bin' for split in splits), 'meta.json')]
    try:
        for path, (split, texts) in zip(paths, splits.items(), strict=False):
            counts[split] = 0
            with open(path + '.tmp', 'wb') as f:
                for i, text in enumerate(texts):
                    ids = tokenizer.encode(text)
                    if i and tokenizer.eot is not None:
                        ids.insert(0, tokenizer.eot)
                    np.array(ids, dtype='<u2' if dtype == 'uint16' else '<u4').tofile(f)
                    counts[split] += len(ids)
        with open(paths[-1] + '.tmp', 'w', encoding='utf-8') as f:
            json.dump({'tokenizer': tokenizer.to_dict(), 'vocab_size': tokenizer.vocab_size, 'dtype': dtype,
                       'tokens': counts, 'source': source}, f, ensure_ascii=False, indent=1)
        for path in paths:
            os.replace(path + '.tmp', path)
    finally:
        for path in paths:
            if os.path.exists(path + '.tmp'):
                os.remove(path + '.tmp')
    for split, n in counts.items():
        print(f'{os.path.join(data_dir, split)}.bin: {n:,} tokens')
