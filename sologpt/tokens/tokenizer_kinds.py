"""
Kinds of tokenizers: bytes, characters, and tiktoken's encodings and rank files. A tokenizer.json is the matter of
tokenizer_hf.py.
"""

import base64
import re
from collections.abc import Iterable

import numpy as np

from configurator import InputError
from sologpt.tokens.tokenizer_json import (
    BYTE_CHARS,
    byte_level_json,
    chars_of_token,
    split_step,
    tokenizer_json,
)

END_OF_TEXT = '<|endoftext|>'


class Tokenizer:
    """What every tokenizer has. Ids are 0 .. vocab_size - 1."""
    vocab_size: int
    eot: int | None  # the id that ends a text; it stands between two documents
    bos: int | None = None  # the id that stands before every text

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end a text when a model draws them: `eot`, and those that the model's files name beside it."""
        return () if self.eot is None else (self.eot,)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without `bos`. Names of special tokens in it become those tokens. Raises InputError."""
        raise NotImplementedError

    def encode_prompt(self, text: str) -> list[int]:
        """
        The ids that a model continues: those of encode(), after `bos`. A text that names `bos` itself gets no second
        one. An empty text becomes `bos`, else `eot`, else no ids. Raises InputError.
        """
        ids = self.encode(text)
        if self.bos is not None:
            return ids if ids[:1] == [self.bos] else [self.bos, *ids]
        return ids or ([] if self.eot is None else [self.eot])

    def before_document(self, is_first: bool) -> list[int]:
        """The ids before a document in prepared data: `eot` of the document before, if there is one, then `bos`."""
        before = [] if is_first else [self.eot]
        if self.bos not in before:  # one id that does both stands there once
            before.append(self.bos)
        return [i for i in before if i is not None]

    def encode_ordinary(self, text: str) -> np.ndarray:
        """
        The ids of a document, an integer array of shape (length,). Names of special tokens in it, such as
        <|endoftext|>, are ordinary text. Several threads may call it at once. Raises InputError.
        """
        return np.array(self.encode(text), dtype=np.uint32)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """
        The text as UTF-8. It may end or begin inside a character, because a token may be a part of one. The bytes of
        ids in a row are those of each id in a row, so that a text can be decoded as it is drawn.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids from the beginning of a text, with U+FFFD where the bytes are not UTF-8."""
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
