"""
FineWeb-Edu, educational web pages in English. It is streamed from Hugging Face's hub, and only the tokens are kept.

  python data/fineweb_edu/prepare.py                      # sample-10BT: 10 billion tokens, 20 GB
  python data/fineweb_edu/prepare.py --tokens=100M        # the beginning; the same command with more tokens goes on

It can be stopped at any moment, and the same command goes on. The first documents are for validation, whatever --tokens
is.
"""

import glob
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project

from configurator import InputError, configure
from sologpt.tokens.corpus import Options, choose_tokenizer, prepare_corpus
from sologpt.tokens.sources import hub_source
from sologpt.tokens.splits import FirstTokens

name = 'sample-10BT'  # default (all), sample-10BT, sample-100BT, sample-350BT, or a crawl such as CC-MAIN-2024-10
source = 'hf://datasets/HuggingFaceFW/fineweb-edu'  # the dataset, or a folder with a copy of it
tokenizer = 'gpt2'  # bytes, chars, an encoding of tiktoken (gpt2), a FILE.tiktoken, tokenizer.json or model's folder
tokens: int | str | None = None  # how many tokens to train on, such as 100M; None: all there are
val_tokens: int | str = '10M'  # how many tokens to validate on
shard_tokens: int | str = '100M'  # how many tokens are in a file
seed = 1337  # of the order of documents
restart = False  # remove what has been prepared, and begin anew
configure(globals())

FILES = {'default': 'data/*', 'sample-10BT': 'sample/10BT', 'sample-100BT': 'sample/100BT',
         'sample-350BT': 'sample/350BT'}
TOKENS = {'default': 1.3e12, 'sample-10BT': 10e9, 'sample-100BT': 100e9, 'sample-350BT': 350e9}  # in GPT-2's BPE

options, split = Options(tokens, shard_tokens, seed, restart), FirstTokens(val_tokens)
if name not in FILES and not name.startswith('CC-MAIN-'):
    raise InputError(f'--name={name} is not known: use {", ".join(FILES)}, or a crawl such as CC-MAIN-2024-10')
folder = source if '://' in source else glob.escape(source)
documents = hub_source(f'{folder}/{FILES.get(name, f"data/{name}")}/*.parquet', name=f'FineWeb-Edu {name}')
prepare_corpus(Path(__file__).parent, documents, choose_tokenizer(tokenizer, documents), split, options,
               expected=TOKENS.get(name))
