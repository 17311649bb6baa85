"""
The source of every Python package that is installed here, and of the standard library: a large text without a network.

  python data/pycode/prepare.py [--tokenizer=gpt2]        # with torch installed, 50 million tokens and more as bytes

A file is a document; copies of a file are left out, and a twentieth of the files are for validation.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, '..', '..'))

from configurator import report_errors  # noqa: E402
from sologpt.tokens import corpus  # noqa: E402
from sologpt.tokens.sources import Source, installed_code  # noqa: E402

report_errors()
parser = corpus.arguments(__doc__, tokenizer='bytes')
parser.add_argument('--val', type=corpus.share, default=0.05, help='the part of the files kept for validation '
                                                                   '(%(default)s)')
args = parser.parse_args()
paths = installed_code()
version = '.'.join(map(str, sys.version_info[:3]))
source = Source(paths, name=f'packages of Python {version}, {len(paths):,} files')
corpus.prepare(here, source, corpus.named_tokenizer(args.tokenizer, source), corpus.SomeDocuments(args.val),
               args.tokens, args.shard_tokens, args.seed, args.restart)
