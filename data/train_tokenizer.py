"""
A tokenizer from your own text: byte-level BPE like that of GPT-2, which can write any text in any language.

  python data/train_tokenizer.py book.txt articles/ --vocab_size=8192 --dest=tokenizer.json
  python data/text/prepare.py book.txt articles/ --tokenizer=tokenizer.json

The text is named as for data/text/prepare.py.
"""

import os
import sys
from pathlib import Path

import tokenizers

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project

from configurator import InputError, configure
from sologpt.tokens.readers import document_parts
from sologpt.tokens.sources import find_source
from sologpt.tokens.tokenizer_hf import HuggingFace
from sologpt.tokens.tokenizer_kinds import END_OF_TEXT

vocab_size = 8192  # how many ids: 256 are bytes, and one ends a text
dest = 'tokenizer.json'  # the file to write
field = 'text'  # the field with the text, in .jsonl and .parquet
files = []
configure(globals(), files=files)


class Sample:
    """The lines of a source's documents. It keeps the first texts, of about 10 MB, to try the tokenizer on."""

    def __init__(self, source):
        self.source, self.texts, self.n_bytes = source, [], 0

    def __iter__(self):
        for text in (part for document in self.source for part in document_parts(document)):
            if self.n_bytes < 10e6:
                self.texts.append(text)
                self.n_bytes += len(text.encode())
            yield from text.splitlines(keepends=True)


def train_bpe(lines, vocab_size):
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(lines, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return bpe


if not files:
    raise InputError('name at least one file, folder or pattern (--help shows examples)')
if vocab_size < 257:
    raise InputError(f'--vocab_size={vocab_size} must be at least 257: the bytes, and what ends a text')
if not dest.endswith('.json'):
    raise InputError(f'--dest={dest} must end in .json: a tokenizer is known by that')
if os.path.exists(dest):
    raise InputError(f'{dest} is there already: choose another --dest')
sample = Sample(find_source(files, field))
bpe = train_bpe(iter(sample), vocab_size)
if not sample.n_bytes:
    raise InputError(f'{sample.source.name} has no text')
try:
    bpe.save(dest)
except Exception as e:  # it raises nothing more precise
    raise InputError(f'{dest} cannot be written: {e}') from None
trained = HuggingFace.from_file(dest)
n_tokens = sum(len(trained.encode(text)) for text in sample.texts)
print(f'{dest}: {trained.vocab_size:,} ids, {sample.n_bytes / n_tokens:.2f} bytes of the text per token'
      + ('; the text has no more pairs to join' if trained.vocab_size < vocab_size else ''))
