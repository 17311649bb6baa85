"""
The source of every Python package that is installed here, and of the standard library: a large text without a network.

  python data/pycode/prepare.py                           # with torch installed, 50 million tokens or more
  python data/pycode/prepare.py --tokenizer=gpt2

Each file is a document. Copies of a file are left out, and a twentieth of the files are for validation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project

from configurator import configure
from sologpt.tokens.corpus import Options, choose_tokenizer, prepare_corpus
from sologpt.tokens.sources import Source, installed_code
from sologpt.tokens.splits import SomeDocuments

tokenizer = 'bytes'  # bytes, chars, an encoding of tiktoken (gpt2), a FILE.tiktoken, tokenizer.json or model's folder
val = 0.05  # the share of the files that is for validation
tokens: int | str | None = None  # how many tokens to train on, such as 100M; None: all there are. The same command with
# ... more tokens adds to them
shard_tokens: int | str = '100M'  # how many tokens are in a file
seed = 1337  # of the order of the files
restart = False  # remove what has been prepared, and begin anew
configure(globals())

options, split = Options(tokens, shard_tokens, seed, restart), SomeDocuments(val)
paths = installed_code()
version = '.'.join(map(str, sys.version_info[:3]))
source = Source(paths, name=f'packages of Python {version}, {len(paths):,} files')
prepare_corpus(Path(__file__).parent, source, choose_tokenizer(tokenizer, source), split, options)
