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
from tokenizer import END_OF_TEXT, HuggingFace  # noqa: E402

report_errors()
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('files', nargs='+', metavar='FILE', help='UTF-8 text')
parser.add_argument('--vocab_size', type=int, default=8192, help='ids, 256 of which are bytes and one ends a text')
parser.add_argument('--dest', default='tokenizer.json')
args = parser.parse_args()
if args.vocab_size < 257:
    raise InputError(f'--vocab_size={args.vocab_size} must be at least 257: the bytes, and what ends a text')
if os.path.exists(args.dest):
    raise InputError(f'{args.dest} is there already: choose another --dest')
texts = []
for path in args.files:
    try:
        with open(path, encoding='utf-8') as f:
            texts.append(f.read())
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f'{path} cannot be read as UTF-8 text: {e}') from None
if not any(texts):
    raise InputError('the files are empty')

bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = tokenizers.decoders.ByteLevel()
lines = (line for text in texts for line in text.splitlines(keepends=True))
bpe.train_from_iterator(lines, tokenizers.trainers.BpeTrainer(
    vocab_size=args.vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
try:
    bpe.save(args.dest)
except Exception as e:  # it raises nothing more precise
    raise InputError(f'{args.dest} cannot be written: {e}') from None
tokenizer = HuggingFace.from_file(args.dest)
n_bytes, n_tokens = (sum(map(len, encoded)) for encoded in (
    (text.encode() for text in texts), (tokenizer.encode(text) for text in texts)))
print(f'{args.dest}: {tokenizer.vocab_size:,} ids, {n_bytes / n_tokens:.2f} bytes of the text per token')
