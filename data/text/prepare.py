"""
Your own text, in any language: one document per file, of which the last 10 % (by characters) are for validation.

  python data/text/prepare.py FILE... [--tokenizer=bytes|chars|gpt2|FILE.json] [--val=0.1] [--name=text]

Writes data/<name>; train on it with --dataset=<name>.
"""

import argparse
import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, '..', '..'))

from configurator import InputError, report_errors  # noqa: E402
from tokenizer import Bytes, Chars, HuggingFace, Tiktoken, write_data  # noqa: E402

report_errors()
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('files', nargs='+', metavar='FILE', help='UTF-8 text')
parser.add_argument('--tokenizer', default='bytes', help="bytes, chars, gpt2, or a tokenizer.json of Hugging Face's")
parser.add_argument('--val', type=float, default=0.1, help='the part of the text kept for validation')
parser.add_argument('--name', default='text', help='the folder in data/ to write')
args = parser.parse_args()
if not 0 < args.val < 1:
    raise InputError(f'--val={args.val} must be between 0 and 1')
if args.tokenizer not in ('bytes', 'chars', 'gpt2') and not args.tokenizer.endswith('.json'):
    raise InputError(f'--tokenizer={args.tokenizer} is not known: use bytes, chars, gpt2 or the path of a '
                     f'tokenizer.json')

texts = []
for path in args.files:
    try:
        with open(path, encoding='utf-8') as f:
            texts.append(f.read())
    except OSError as e:
        raise InputError(f'{path} cannot be read: {e.strerror}') from None
    except UnicodeDecodeError as e:
        raise InputError(f'{path} is not UTF-8 text (byte {e.start}): convert it first, as with iconv') from None
total = sum(map(len, texts))
if not total:
    raise InputError('the files are empty')

# cut where the training text ends, in the middle of a document if need be
splits, left = {'train': [], 'val': []}, int(total * (1 - args.val))
for text in texts:
    for split, part in (('train', text[:left]), ('val', text[left:])):
        if part:
            splits[split].append(part)
    left = max(0, left - len(text))
if args.tokenizer == 'chars':
    tokenizer = Chars(sorted(set().union(*texts)))
elif args.tokenizer.endswith('.json'):
    tokenizer = HuggingFace.from_file(args.tokenizer)
else:
    tokenizer = Bytes() if args.tokenizer == 'bytes' else Tiktoken('gpt2')
write_data(os.path.join(os.path.dirname(here), args.name), tokenizer, splits, source=', '.join(args.files))
