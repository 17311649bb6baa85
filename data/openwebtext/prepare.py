"""
OpenWebText, an open copy of the text that GPT-2 was trained on: 9 billion tokens, 18 GB. It is streamed from Hugging
Face's hub, and only the tokens are kept.

  python data/openwebtext/prepare.py
  python data/openwebtext/prepare.py --tokens=100M        # the beginning; the same command with more tokens goes on

It can be stopped at any moment, and the same command goes on. The first documents are for validation, whatever --tokens
is.
"""

import glob
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project

from configurator import configure
from sologpt.tokens.corpus import Options, choose_tokenizer, prepare_corpus
from sologpt.tokens.sources import hub_source
from sologpt.tokens.splits import FirstTokens

source = 'hf://datasets/Skylion007/openwebtext'  # the dataset, or a folder with a copy of it
tokenizer = 'gpt2'  # bytes, chars, an encoding of tiktoken (gpt2), a FILE.tiktoken, tokenizer.json or model's folder
tokens: int | str | None = None  # how many tokens to train on, such as 100M; None: all there are
val_tokens: int | str = '5M'  # how many tokens to validate on
shard_tokens: int | str = '100M'  # how many tokens are in a file
seed = 1337  # of the order of documents
restart = False  # remove what has been prepared, and begin anew
configure(globals())

options, split = Options(tokens, shard_tokens, seed, restart), FirstTokens(val_tokens)
folder = source if '://' in source else glob.escape(source)
documents = hub_source(f'{folder}/plain_text/*.parquet', name='OpenWebText')
prepare_corpus(Path(__file__).parent, documents, choose_tokenizer(tokenizer, documents), split, options, expected=9e9)
