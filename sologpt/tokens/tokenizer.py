"""
Text to token ids and back: bytes, characters, tiktoken's encodings and rank files, Hugging Face's tokenizer.json.

A tokenizer is described by a dict of plain values, to_dict(). It lies in the meta.json of a data folder and in every
checkpoint, so that sampling needs nothing else. Not handled: SentencePiece models, and a tokenizer.json that is neither
a byte-level BPE nor WordLevel.
"""

import base64
import json
import re
from collections.abc import Iterable

import numpy as np

from configurator import InputError
from sologpt.tokens.tokenizer_json import (
    BYTE_CHARS,
    CHAR_BYTES,
    byte_level_json,
    chars_of_token,
    split_step,
    tokenizer_json,
)

GPT2 = {'kind': 'tiktoken', 'name': 'gpt2'}  # the tokenizer of files that name none, as in nanoGPT
GPT2_VOCAB, GPT2_EOT = 50257, 50256
END_OF_TEXT = '<|endoftext|>'


class Tokenizer:
    """What every tokenizer has. Ids are 0 .. vocab_size - 1."""
    vocab_size: int
    eot: int | None  # the id that ends a text

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt. The names of special tokens in it become those tokens. Raises InputError."""
        raise NotImplementedError

    def encode_ordinary(self, text: str) -> np.ndarray:
        """
        The ids of a document, an integer array of shape (length,). Names of special tokens in it, such as
        <|endoftext|>, are ordinary text. Several threads may call it at once. Raises InputError.
        """
        return np.array(self.encode(text), dtype=np.uint32)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The text as UTF-8. It may end or begin inside a character, because a token may be a part of one."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text, with U+FFFD where the bytes are not UTF-8."""
        return self.to_bytes(ids).decode('utf-8', errors='replace')

    def to_dict(self) -> dict:
        """A description in plain values, from which tokenizer_from_dict() makes the tokenizer again."""
        raise NotImplementedError

    def to_json(self) -> dict:
        """The content of a tokenizer.json that encodes and decodes in the same way."""
        raise NotImplementedError


class Bytes(Tokenizer):
    """UTF-8 bytes: any text in any language, nothing to learn or load. Byte 0, which text does not use, ends a text."""
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
        # Each id has one token, and that of byte 0 is the special one. A byte 0 in the text becomes it too, because
        # special tokens are searched for first.
        return byte_level_json({'\0': 0} | {BYTE_CHARS[i]: i for i in range(1, 256)}, [], {'\0': 0})


class Chars(Tokenizer):
    """One id per character (nanoGPT's shakespeare_char). chars: the characters in the order of their ids."""
    eot = None

    def __init__(self, chars: Iterable[str]):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self.ids = {c: i for i, c in enumerate(self.chars)}
        # by code point; the last entry stands for all code points beyond those of the characters
        self.id_of = np.full(max(map(ord, self.chars), default=0) + 2, -1)
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
        # an unknown character is an error there too, because <unk> is not in the vocabulary
        return tokenizer_json({'type': 'WordLevel', 'vocab': self.ids, 'unk_token': '<unk>'},
                              split_step(r'[\s\S]'), {'type': 'Fuse'}, {})


class Tiktoken(Tokenizer):
    """A byte-level BPE of tiktoken, by its name ('gpt2', 'cl100k_base', ...) or from its ranks."""

    def __init__(self, name: str, encoding=None):
        """encoding: a tiktoken.Encoding; None: tiktoken downloads the ranks once and keeps them. Raises InputError."""
        import tiktoken
        try:
            self.encoding = encoding or tiktoken.get_encoding(name)
        except ValueError:
            raise InputError(f'tiktoken has no encoding {name!r}; it has {tiktoken.list_encoding_names()}') from None
        except Exception as e:  # whatever its HTTP library raises
            raise InputError(f'tiktoken could not load {name!r} ({type(e).__name__}), a download that is needed once: '
                             f'connect to the network, name a file of its ranks (FILE.tiktoken), or set '
                             f'TIKTOKEN_CACHE_DIR to a folder that has it') from None
        self.name = name
        self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token
        # A regular expression's cache belongs to the first thread that matches it, and when that thread encodes, all
        # others wait for the same memory. Here this thread takes the cache. It is idle later, and several other threads
        # then encode 1.5 times as fast.
        self.encode_ordinary("I'll say 123 words, \n\n and  more.\t")

    @classmethod
    def from_file(cls, path: str) -> 'Tiktoken':
        """From a file of ranks in tiktoken's format: a line per token, with base64 and rank. Raises InputError."""
        try:
            with open(path, encoding='ascii') as f:
                ranks = f.read()
            read = _ranks(ranks)
        except (OSError, ValueError) as e:
            raise InputError(f'{path} cannot be read as a file of ranks: {e}') from None
        number = len(read)
        if number not in RANK_FILES:
            known = ', '.join(f'{n:,} ({name})' for n, (name, *_) in RANK_FILES.items())
            raise InputError(f'{path} has {number:,} ranks: how its text is split into words is known only for '
                             f'{known}; use a tokenizer.json, which says so itself')
        if sorted(read.values()) != list(range(number)) or not all(bytes([byte]) in read for byte in range(256)):
            raise InputError(f'{path} is damaged: a rank from 0 to {number - 1:,} is missing, or one of the 256 bytes')
        name, pattern, special = RANK_FILES[number]
        return cls.from_ranks(name, ranks, pattern, special)

    @classmethod
    def from_ranks(cls, name: str, ranks: str, pattern: str, special: dict[str, int]) -> 'Tiktoken':
        """ranks: the text of a rank file. pattern: how text is split into words. special: token -> id."""
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
        # tiktoken's documentation reads these attributes too, to extend an encoding
        ranks, special = self.encoding._mergeable_ranks, self.encoding._special_tokens
        # tiktoken joins any two neighbours that are a token together, and it begins with the lowest rank
        merges = [(rank, token[:i], token[i:]) for token, rank in ranks.items() for i in range(1, len(token))
                  if token[:i] in ranks and token[i:] in ranks]
        merges.sort(key=lambda merge: merge[0])
        merges = [f'{chars_of_token(left)} {chars_of_token(right)}' for _, left, right in merges]
        # `tokenizers` uses Oniguruma, where + after a counted repetition repeats it, and $ is the end of a line. So
        # make possessive repetitions plain, which does not change what these expressions match, and write \z for $.
        pattern = re.sub(r'([?+*]|\{[\d,]+\})\+', r'\1', self.encoding._pat_str).replace('$', r'\z')
        vocab = {chars_of_token(token): rank for token, rank in ranks.items()} | special
        return byte_level_json(vocab, merges, special, pattern)


class HuggingFace(Tokenizer):
    """A tokenizer.json with a byte-level BPE, or with words or characters that stand for themselves."""

    def __init__(self, text: str, eot: int | None = None):
        """text: the content of the file. eot: the id that ends a text. Raises InputError for other kinds."""
        import tokenizers
        try:
            content = json.loads(text)
            # these would put tokens around each text, cut it off or pad it
            content |= {'post_processor': None, 'truncation': None, 'padding': None}
            self.text, self.eot = json.dumps(content, ensure_ascii=False, separators=(',', ':')), eot
            self.backend, self.ordinary = (tokenizers.Tokenizer.from_str(self.text) for _ in range(2))
            self.ordinary.encode_special_tokens = True  # as ordinary text
            decoder, kind = (content.get('decoder') or {}).get('type'), content['model'].get('type')
        except Exception as e:  # tokenizers raises nothing more precise
            raise InputError(f'it is damaged or of another version: {str(e)[:100]}') from None
        if decoder not in ('ByteLevel', 'Fuse') or kind not in ('BPE', 'WordLevel') or not content['model']['vocab']:
            raise InputError(f'its model is {kind} and its decoder {decoder}: only byte-level BPE, like that of GPT-2, '
                             f'and WordLevel with Fuse can be read')
        ids = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size, self.bytes = max(ids.values()) + 1, {}
        for token, i in ids.items():
            in_bytes = all(c in CHAR_BYTES for c in token) and decoder == 'ByteLevel'
            self.bytes[i] = bytes(CHAR_BYTES[c] for c in token) if in_bytes else token.encode()

    @classmethod
    def from_file(cls, path: str, eot_token: str | None = END_OF_TEXT) -> 'HuggingFace':
        """eot_token: the token that ends a text; if the vocabulary does not have it, none does. Raises InputError."""
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


# number of ranks -> (name, how text is split into words, special tokens): tiktoken's tiktoken_ext/openai_public.py
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
    """bytes -> rank, from the text of a rank file."""
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in map(str.split, text.splitlines())}


def tokenizer_by_name(name: str) -> Tokenizer:
    """
    The tokenizer that a command line names: 'bytes', one of tiktoken's encodings, or the path of FILE.tiktoken or of a
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


# ---- descriptions ----------------------------------------------------------------------------------------------------

def no_tokenizer(source: str) -> dict:
    """The description for a model whose tokenizer is not at hand. source: the name of the model."""
    return {'kind': 'unknown', 'why': f'{source} has no tokenizer.json'}


def tokenizer_from_dict(described: dict) -> Tokenizer:
    """The tokenizer that to_dict() has described. Raises InputError."""
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


def eot_of(described: dict) -> int | None:
    """The id that ends a text, for a description by to_dict(). GPT-2's needs no download. Raises InputError."""
    return GPT2_EOT if described == GPT2 else tokenizer_from_dict(described).eot


def tokenizers_agree(described: dict | None, own: dict) -> bool:
    """
    Whether two descriptions may be of the same tokenizer, although one of them may come from a tokenizer.json.

    described: that of a model; None if it names none. own: that of a data folder.
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
    """(number of ids, token -> id as in a tokenizer.json). For GPT-2's, which may not be at hand, it has one token."""
    if described == GPT2:
        return GPT2_VOCAB, {'Ġthe': 262}
    tokenizer = tokenizer_from_dict(described)
    return tokenizer.vocab_size, tokenizer.to_json()['model']['vocab']
