"""
A tokenizer of your own text: byte-level BPE, as GPT-2's, which writes any text in any language.

  python data/train_tokenizer.py FILE... [--vocab_size=8192] [--dest=tokenizer.json]
  python data/text/prepare.py FILE... --tokenizer=tokenizer.json
"""

import argparse
import os
import sys

import tokenizers

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, '..'))

from configurator import InputError, report_errors  # noqa: E402
from sologpt.tokens.corpus import parts  # noqa: E402
from sologpt.tokens.sources import find  # noqa: E402
from sologpt.tokens.tokenizer import END_OF_TEXT, HuggingFace  # noqa: E402

report_errors()
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('files', nargs='+', metavar='FILE', help='text, .jsonl, .parquet; see data/text/prepare.py')
parser.add_argument('--field', default='text', help='with the text, of .jsonl and .parquet')
parser.add_argument('--vocab_size', type=int, default=8192, help='ids, 256 of which are bytes and one ends a text')
parser.add_argument('--dest', default='tokenizer.json')
args = parser.parse_args()
if args.vocab_size < 257:
    raise InputError(f'--vocab_size={args.vocab_size} must be at least 257: the bytes, and what ends a text')
if not args.dest.endswith('.json'):
    raise InputError(f'--dest={args.dest} must end in .json, by which a tokenizer is known')
if os.path.exists(args.dest):
    raise InputError(f'{args.dest} is there already: choose another --dest')
source = find(args.files, args.field)
sample = []  # the first texts, on which the tokenizer is tried
n_bytes = 0


def lines():
    global n_bytes
    for text in (part for document in source for part in parts(document)):
        if n_bytes < 10e6:
            sample.append(text)
            n_bytes += len(text.encode())
        yield from text.splitlines(keepends=True)


bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = tokenizers.decoders.ByteLevel()
bpe.train_from_iterator(lines(), tokenizers.trainers.BpeTrainer(
    vocab_size=args.vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
if not n_bytes:
    raise InputError(f'{source.name} has no text')
try:
    bpe.save(args.dest)
except Exception as e:  # it raises nothing more precise
    raise InputError(f'{args.dest} cannot be written: {e}') from None
tokenizer = HuggingFace.from_file(args.dest)
n_tokens = sum(len(tokenizer.encode(text)) for text in sample)
print(f'{args.dest}: {tokenizer.vocab_size:,} ids, {n_bytes / n_tokens:.2f} bytes of the text per token'
      + ('; the text has no more pairs to join' if tokenizer.vocab_size < args.vocab_size else ''))
