"""
Text to token ids and back: bytes, characters, tiktoken's encodings and rank files, Hugging Face's tokenizer.json.

A tokenizer is described by a dict of plain values (`to_dict`), which lies in a data folder's meta.json and in every
checkpoint, so that sampling needs nothing else. Every tokenizer has

    vocab_size              ids are 0 .. vocab_size - 1
    eot                     the id that ends a text, or None
    encode(text) -> ids     raises InputError for text it cannot represent
    encode_ordinary(text)   the same as an array, of a document: a token's name in it, such as <|endoftext|>, is text
                            like any other; may be called by several threads at once
    to_bytes(ids) -> bytes  UTF-8, cut anywhere: one token may be part of a character
    decode(ids) -> text     with U+FFFD where the bytes are no text
    to_json() -> dict       the content of a tokenizer.json that encodes and decodes in the same way
"""

import base64
import json
import re

import numpy as np

from configurator import InputError

GPT2 = {'kind': 'tiktoken', 'name': 'gpt2'}  # what files that name no tokenizer are taken for, as nanoGPT does
GPT2_VOCAB, GPT2_EOT = 50257, 50256
END_OF_TEXT = '<|endoftext|>'


class Tokenizer:
    def encode_ordinary(self, text):
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids):
        return self.to_bytes(ids).decode('utf-8', errors='replace')


class Bytes(Tokenizer):
    """UTF-8 bytes: any text in any language, nothing to learn or load. Byte 0, absent from text, ends a document."""
    vocab_size, eot = 256, 0

    def encode(self, text):
        return list(text.encode('utf-8', errors='surrogateescape'))

    def encode_ordinary(self, text):
        return np.frombuffer(text.encode('utf-8'), dtype=np.uint8)

    def to_bytes(self, ids):
        return bytes(ids)

    def to_dict(self):
        return {'kind': 'bytes'}

    def to_json(self):
        # an id has one token: byte 0's is the special one, as which a text's own is taken before bytes are looked at
        return _byte_level({'\0': 0} | {BYTE_CHARS[i]: i for i in range(1, 256)}, [], {'\0': 0})


class Chars(Tokenizer):
    """One id per character of a text, in the characters' sorted order (nanoGPT's shakespeare_char)."""
    eot = None

    def __init__(self, chars):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self.ids = {c: i for i, c in enumerate(self.chars)}
        self.id_of = np.full(max(map(ord, self.chars), default=0) + 2, -1)  # by code point; the last is of no character
        self.id_of[[ord(c) for c in self.chars]] = range(self.vocab_size)

    def encode(self, text):
        return self.encode_ordinary(text).tolist()

    def encode_ordinary(self, text):
        codes = np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), dtype='<u4')
        ids = self.id_of[np.minimum(codes, len(self.id_of) - 1)]
        if len(ids) and ids.min() < 0:
            raise InputError(f'the character {text[ids.argmin()]!r} is not among the {self.vocab_size} that this '
                             f'tokenizer knows; leave it out, or use a bytes tokenizer')
        return ids

    def to_bytes(self, ids):
        return ''.join(self.chars[i] for i in ids).encode('utf-8')

    def to_dict(self):
        return {'kind': 'chars', 'chars': self.chars}

    def to_json(self):
        # an unknown character is an error there too, for the token that it would be is unknown itself
        return _tokenizer_json({'type': 'WordLevel', 'vocab': self.ids, 'unk_token': '<unk>'},
                               _split(r'[\s\S]'), {'type': 'Fuse'}, {})


class Tiktoken(Tokenizer):
    """A BPE of tiktoken: by its name for it ('gpt2', 'cl100k_base', ...), or given its ranks."""

    def __init__(self, name, encoding=None):
        """encoding: a tiktoken.Encoding; without one, tiktoken downloads the ranks once, then has them."""
        import tiktoken
        try:
            self.encoding = encoding or tiktoken.get_encoding(name)
        except ValueError:
            raise InputError(f'tiktoken has no encoding {name!r}; it has {tiktoken.list_encoding_names()}') from None
        except Exception as e:  # whatever its HTTP library raises
            raise InputError(f'tiktoken could not load {name!r} ({type(e).__name__}): it is downloaded once; connect '
                             f'to the network, name a file of its ranks (FILE.tiktoken), or point TIKTOKEN_CACHE_DIR '
                             f'at a folder that has it') from None
        self.name = name
        self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token
        # the caches of a regular expression belong to the first thread that matches it, and whenever that one does, all
        # others wait for its mark in memory: owned by this thread, which then is idle, several encode 1.5 times as fast
        self.encode_ordinary("I'll say 123 words, \n\n and  more.\t")

    @classmethod
    def from_file(cls, path):
        """A file of ranks, as tiktoken keeps it: a line per token, base64 and rank. Raises InputError."""
        try:
            with open(path, encoding='ascii') as f:
                ranks = f.read()
            read = _ranks(ranks)
        except (OSError, ValueError) as e:
            raise InputError(f'{path} cannot be read as a file of ranks: {e}') from None
        number = len(read)
        if number not in RANK_FILES:
            raise InputError(f'{path} has {number:,} ranks: how its text is split into words is known for '
                             + ', '.join(f'{n:,} ({name})' for n, (name, *_) in RANK_FILES.items())
                             + '; use a tokenizer.json, which says so itself')
        if sorted(read.values()) != list(range(number)) or not all(bytes([byte]) in read for byte in range(256)):
            raise InputError(f'{path} is damaged: it has not each rank from 0 to {number - 1:,}, or not every byte')
        name, pattern, special = RANK_FILES[number]
        return cls.from_ranks(name, ranks, pattern, special)

    @classmethod
    def from_ranks(cls, name, ranks, pattern, special):
        import tiktoken
        return cls(name, tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=_ranks(ranks),
                                           special_tokens=special))

    def encode(self, text):
        return self.encoding.encode(text, allowed_special={END_OF_TEXT})

    def encode_ordinary(self, text):
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def to_bytes(self, ids):
        return self.encoding.decode_bytes(ids)

    def to_dict(self):
        ranks = ''.join(f'{base64.b64encode(token).decode()} {rank}\n'
                        for token, rank in sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1]))
        return {'kind': 'tiktoken', 'name': self.name, 'pattern': self.encoding._pat_str,
                'special': dict(self.encoding._special_tokens), 'ranks': ranks}

    def to_json(self):
        # tiktoken's own names for what an encoding is made of, which its documentation uses as well
        ranks, special = self.encoding._mergeable_ranks, self.encoding._special_tokens
        # tiktoken joins any two neighbours that together are a token, of the lowest rank first
        merges = [(rank, token[:i], token[i:]) for token, rank in ranks.items() for i in range(1, len(token))
                  if token[:i] in ranks and token[i:] in ranks]
        merges = [f'{_chars(left)} {_chars(right)}' for _, left, right in sorted(merges, key=lambda merge: merge[0])]
        # the expression in the terms of Oniguruma: there a counted repetition followed by + is repeated itself, and $
        # is the end of a line. None of the possessive repetitions in these expressions changes what they match
        pattern = re.sub(r'([?+*]|\{[\d,]+\})\+', r'\1', self.encoding._pat_str).replace('$', r'\z')
        return _byte_level({_chars(token): rank for token, rank in ranks.items()} | special, merges, special, pattern)


class HuggingFace(Tokenizer):
    """A tokenizer.json: byte-level BPE, or tokens that stand for themselves. Raises InputError for others."""

    def __init__(self, text, eot=None):
        """text: the file's; eot: the id that ends a text."""
        import tokenizers
        try:
            content = json.loads(text)
            # what would put tokens before or after each text, cut it off or fill it up
            content |= {'post_processor': None, 'truncation': None, 'padding': None}
            self.text, self.eot = json.dumps(content, ensure_ascii=False, separators=(',', ':')), eot
            self.backend, self.ordinary = (tokenizers.Tokenizer.from_str(self.text) for _ in range(2))
            self.ordinary.encode_special_tokens = True  # as ordinary text
            decoder, kind = (content.get('decoder') or {}).get('type'), content['model'].get('type')
        except Exception as e:  # tokenizers raises nothing more precise
            raise InputError(f'it is damaged or of another version: {str(e)[:100]}') from None
        if decoder not in ('ByteLevel', 'Fuse') or kind not in ('BPE', 'WordLevel') or not content['model']['vocab']:
            raise InputError(f'its model is {kind} and its decoder {decoder}: known are byte-level BPE, as of GPT-2, '
                             f'and words (or characters) that stand for themselves, WordLevel and Fuse')
        ids = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size, self.bytes = max(ids.values()) + 1, {}
        for token, i in ids.items():
            in_bytes = all(c in CHAR_BYTES for c in token) and decoder == 'ByteLevel'
            self.bytes[i] = bytes(CHAR_BYTES[c] for c in token) if in_bytes else token.encode()

    @classmethod
    def from_file(cls, path, eot_token=END_OF_TEXT):
        """eot_token: the token that ends a text; none does if it is not in the vocabulary."""
        try:
            with open(path, encoding='utf-8') as f:
                tokenizer = cls(f.read())
        except (OSError, UnicodeDecodeError, InputError) as e:
            raise InputError(f'{path} cannot be read: {e}') from None
        tokenizer.eot = tokenizer.backend.token_to_id(eot_token or '')
        return tokenizer

    def encode(self, text):
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except Exception as e:  # it raises nothing more precise
            raise InputError(f'the tokenizer has no tokens for all of the text: {str(e)[:100]}') from None

    def encode_ordinary(self, text):
        try:
            return np.array(self.ordinary.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        except Exception as e:
            raise InputError(f'the tokenizer has no tokens for all of the text: {str(e)[:100]}') from None

    def to_bytes(self, ids):
        return b''.join(self.bytes.get(i, b'') for i in ids)

    def to_dict(self):
        return {'kind': 'json', 'json': self.text, 'eot': self.eot}

    def to_json(self):
        return json.loads(self.text)


# how text is split before its parts are encoded, and the special tokens, by the number of ranks (of tiktoken's
# tiktoken_ext/openai_public.py)
_WORD, _ENDING = r'[^\r\n\p{L}\p{N}]?', r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
RANK_FILES = {
    50256: ('gpt2', r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
            {END_OF_TEXT: 50256}),
    100256: ('cl100k_base', r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
                            r'| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s',
             {END_OF_TEXT: 100257, '<|fim_prefix|>': 100258, '<|fim_middle|>': 100259, '<|fim_suffix|>': 100260,
              '<|endofprompt|>': 100276}),
    199998: ('o200k_base', f'{_WORD}{_UPPER}*{_LOWER}+{_ENDING}|{_WORD}{_UPPER}+{_LOWER}*{_ENDING}'
                           r'|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+',
             {END_OF_TEXT: 199999, '<|endofprompt|>': 200018}),
}


def _ranks(text):
    """bytes -> rank, of a rank file's text."""
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in map(str.split, text.splitlines())}


def by_name(name):
    """
    The tokenizer that a command line names: bytes, one of tiktoken's encodings, or the path of FILE.tiktoken or of a
    tokenizer.json. Raises InputError.
    """
    import tiktoken
    if name == 'bytes':
        return Bytes()
    if name.endswith('.json'):
        return HuggingFace.from_file(name)
    if name.endswith('.tiktoken'):
        return Tiktoken.from_file(name)
    if name not in tiktoken.list_encoding_names():
        raise InputError(f'--tokenizer={name} is not known: use bytes, chars, one of tiktoken '
                         f'({", ".join(tiktoken.list_encoding_names())}), or the path of FILE.tiktoken or of a '
                         f'tokenizer.json')
    return Tiktoken(name)


# byte-level BPE writes each byte as a character that can be seen: itself, or one from 256 on
_SEEN = [*range(ord('!'), ord('~') + 1), *range(0xa1, 0xad), *range(0xae, 0x100)]
_UNSEEN = [byte for byte in range(256) if byte not in _SEEN]
CHAR_BYTES = {chr(byte): byte for byte in _SEEN} | {chr(256 + i): byte for i, byte in enumerate(_UNSEEN)}
BYTE_CHARS = {byte: char for char, byte in CHAR_BYTES.items()}


def _chars(token):
    return ''.join(BYTE_CHARS[byte] for byte in token)


def _byte_level(vocab, merges, special, pattern=None):
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
             'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
             'vocab': vocab, 'merges': merges}
    split = {'type': 'Sequence', 'pretokenizers': [_split(pattern), level]} if pattern else level
    return _tokenizer_json(model, split, level, special)


def _split(pattern):
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


def _tokenizer_json(model, pre_tokenizer, decoder, special):
    added = [{'id': i, 'content': token, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
              'special': True} for token, i in sorted(special.items(), key=lambda item: item[1])]
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': None,
            'pre_tokenizer': pre_tokenizer, 'post_processor': None, 'decoder': decoder, 'model': model}


def no_tokenizer(source):
    return {'kind': 'unknown', 'why': f'{source} has no tokenizer.json'}


def from_dict(described):
    """The tokenizer that to_dict() described."""
    kind = described.get('kind')
    if kind == 'bytes':
        return Bytes()
    if kind == 'chars':
        return Chars(described['chars'])
    if kind == 'tiktoken':
        if 'ranks' not in described:
            return Tiktoken(described['name'])
        return Tiktoken.from_ranks(*(described[key] for key in ('name', 'ranks', 'pattern', 'special')))
    if kind == 'json':
        return HuggingFace(described['json'], described['eot'])
    if kind == 'unknown':
        raise InputError(f'{described["why"]}: set dataset to a folder in data/ with the tokenizer that the model has')
    raise InputError(f'unknown tokenizer {kind!r}: known are bytes, chars, tiktoken and json')


def eot_of(described):
    """The id that ends a text, or None, of the tokenizer that to_dict() described; GPT-2's need not be at hand."""
    return GPT2_EOT if described == GPT2 else from_dict(described).eot


def agree(described, own):
    """
    Whether two descriptions, that of a model (None: it names none) and that of a data folder, may be of one tokenizer,
    of which one of them may have the tokenizer.json.
    """
    if described is None or described == own or described.get('kind') == 'unknown':
        return True
    kinds = {described.get('kind'), own['kind']}
    if kinds == {'tiktoken'}:
        return described['name'] == own['name'] and len({d['ranks'] for d in (described, own) if 'ranks' in d}) < 2
    if 'json' not in kinds:
        return False
    (n, some), (m, others) = (_vocabulary(one) for one in (described, own))
    return n == m and (some.items() <= others.items() or others.items() <= some.items())


def _vocabulary(described):
    """(number of ids, tokens as a tokenizer.json has them -> ids); of GPT-2's, which may not be at hand, one token."""
    if described == GPT2:  # by its name alone
        return GPT2_VOCAB, {'Ġthe': 262}
    tokenizer = from_dict(described)
    return tokenizer.vocab_size, tokenizer.to_json()['model']['vocab']
