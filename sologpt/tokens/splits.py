"""
Which documents, or which parts of them, are for validation.

A split has

    option              the key of the data scripts that sets its size, for error messages
    shuffle             whether the documents of a block are shuffled
    tokens              how many tokens go to the validation split; 0 means no limit
    divide(text)        [(name, part), ...]: the parts of a document, each for 'train' or 'val'. The name 'first' means
                        'val' while that split has room, and 'train' afterwards
    total_tokens(n)     about how many tokens both splits have together if train has n

What vars() returns of a split is compared when a preparation goes on: it must be the same then.
"""

import hashlib
import re

from configurator import InputError
from sologpt.tokens.readers import document_parts
from sologpt.tokens.sources import Source


class FirstTokens:
    """The first `tokens` tokens are for validation. A later document that equals one of theirs is left out."""
    option, shuffle = '--val_tokens', True

    def __init__(self, tokens: int | str):
        """tokens: a number, or text such as '10M'. Raises InputError."""
        self.tokens = parse_count(tokens, 'val_tokens')

    def divide(self, text: str) -> list[tuple[str, str]]:
        return [('first', text)]

    def total_tokens(self, n: int) -> int:
        return n + self.tokens


class SomeDocuments:
    """A share of the documents is for validation. The text decides which, so that equal texts are in the same split."""
    option, shuffle, tokens = '--val', True, 0

    def __init__(self, share: float):
        """share: between 0 and 1. Raises InputError."""
        if not 0 < share < 1:
            raise InputError(f'--val={share:g} must be between 0 and 1')
        self.share = share

    def divide(self, text: str) -> list[tuple[str, str]]:
        return [('val' if digest(text) < self.share * 2 ** 64 else 'train', text)]

    def total_tokens(self, n: int) -> int:
        return round(n / (1 - self.share))


class Endings(SomeDocuments):
    """The last part of each document is for validation. This suits a few long documents; their order is kept."""
    shuffle = False

    def divide(self, text: str) -> list[tuple[str, str]]:
        end = int(len(text) * (1 - self.share))
        return [('train', text[:end]), ('val', text[end:])]


def choose_split(source: Source, share: float, few: int = 100) -> SomeDocuments:
    """Endings if the source has fewer than `few` documents, otherwise SomeDocuments. Reads up to `few` documents."""
    split = SomeDocuments(share)
    documents = (part for document in source.again() for part in document_parts(document))
    n = sum(1 for _ in zip(range(few), documents, strict=False))
    return Endings(share) if n < few else split


def digest(text: str) -> int:
    """A 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')


def parse_count(value: int | str, key: str) -> int:
    """A number of tokens: '100M' -> 100000000. key: which key has this value. Raises InputError."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?)([kmbt]?)', str(value).lower())
    number = float(match[1]) * {'': 1, 'k': 1e3, 'm': 1e6, 'b': 1e9, 't': 1e12}[match[2]] if match else 0
    if number < 1 or number != int(number):
        raise InputError(f'--{key}={value} is no number of tokens: write 5000, 100M or 1.5B')
    return int(number)
