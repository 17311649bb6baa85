"""
OpenWebText, an open copy of what GPT-2 was trained on, streamed from Hugging Face's hub: 9 billion tokens, 18 GB.

  python data/openwebtext/prepare.py [--tokens=100M]

Stopped at any moment, the same command goes on. The first documents are for validation, whatever --tokens is.
"""

import glob
import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, '..', '..'))

from configurator import report_errors  # noqa: E402
from sologpt.tokens import corpus, sources  # noqa: E402

report_errors()
parser = corpus.arguments(__doc__, tokenizer='gpt2')
parser.add_argument('--val_tokens', type=corpus.count, default=5_000_000, help='to validate on (5M)')
parser.add_argument('--source', default='hf://datasets/Skylion007/openwebtext',
                    help='a folder with a copy of the dataset (the hub)')
args = parser.parse_args()
place = args.source if '://' in args.source else glob.escape(args.source)
source = sources.hub(f'{place}/plain_text/*.parquet', name='OpenWebText')
corpus.prepare(here, source, corpus.named_tokenizer(args.tokenizer, source), corpus.FirstTokens(args.val_tokens),
               args.tokens, args.shard_tokens, args.seed, args.restart, expected=9e9)
