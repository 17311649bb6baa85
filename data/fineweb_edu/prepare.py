"""
FineWeb-Edu, educational web pages in English, streamed from Hugging Face's hub: nothing is kept but the tokens.

  python data/fineweb_edu/prepare.py                      # sample-10BT: 10 billion tokens, 20 GB
  python data/fineweb_edu/prepare.py --tokens=100M        # a beginning of it: the same command with more goes on

Stopped at any moment, the same command goes on. The first documents are for validation, whatever --tokens is.
"""

import glob
import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, '..', '..'))

from configurator import InputError, report_errors  # noqa: E402
from sologpt.tokens import corpus, sources  # noqa: E402

FILES = {'default': 'data/*', 'sample-10BT': 'sample/10BT', 'sample-100BT': 'sample/100BT',
         'sample-350BT': 'sample/350BT'}
TOKENS = {'default': 1.3e12, 'sample-10BT': 10e9, 'sample-100BT': 100e9, 'sample-350BT': 350e9}  # in GPT-2's BPE

report_errors()
parser = corpus.arguments(__doc__, tokenizer='gpt2')
parser.add_argument('--name', default='sample-10BT', help=f'{", ".join(FILES)}, or a crawl such as CC-MAIN-2024-10 '
                                                          f'(%(default)s)')
parser.add_argument('--val_tokens', type=corpus.count, default=10_000_000, help='to validate on (10M)')
parser.add_argument('--source', default='hf://datasets/HuggingFaceFW/fineweb-edu',
                    help='a folder with a copy of the dataset (the hub)')
args = parser.parse_args()
if args.name not in FILES and not args.name.startswith('CC-MAIN-'):
    raise InputError(f'--name={args.name} is not known: use {", ".join(FILES)}, or a crawl such as CC-MAIN-2024-10')
place = args.source if '://' in args.source else glob.escape(args.source)
source = sources.hub(f'{place}/{FILES.get(args.name, f"data/{args.name}")}/*.parquet',
                     name=f'FineWeb-Edu {args.name}')
corpus.prepare(here, source, corpus.named_tokenizer(args.tokenizer, source), corpus.FirstTokens(args.val_tokens),
               args.tokens, args.shard_tokens, args.seed, args.restart, expected=TOKENS.get(args.name))
