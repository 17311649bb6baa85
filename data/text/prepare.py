"""
Your own text, in any language and of any size.

  python data/text/prepare.py book.txt                              # files: text, .jsonl, .parquet, and .gz, .zst
  python data/text/prepare.py articles/ 'notes/**/*.md' --tokenizer=chars --name=mine
  python data/text/prepare.py crawl.jsonl.zst --field=content --tokenizer=gpt2
  python data/text/prepare.py roneneldan/TinyStories --tokenizer=gpt2       # a dataset of Hugging Face's hub

In a folder, all .txt, .md, .jsonl and .parquet files are read, except hidden ones. A text file is one document, or
several with <|endoftext|> between them. Each line of .jsonl and each row of .parquet is one. A document of more than 4M
characters counts as several. With fewer than 100 documents, the last tenth of each is for validation; otherwise a tenth
of the documents. Writes data/<name>; train on it with --dataset=<name>.
"""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project

from configurator import InputError, configure
from sologpt.tokens.corpus import Options, choose_tokenizer, prepare_corpus
from sologpt.tokens.sources import find_source
from sologpt.tokens.splits import choose_split

name = 'text'  # the folder in data/ to write
field = 'text'  # the field with the text, in .jsonl and .parquet
tokenizer = 'bytes'  # bytes, chars, an encoding of tiktoken (gpt2), a FILE.tiktoken or tokenizer.json, or a model's
# ... folder or name
val = 0.1  # the share that is for validation
tokens: int | str | None = None  # how many tokens to train on, such as 100M; None: all there are. The same command with
# ... more tokens adds to them
shard_tokens: int | str = '100M'  # how many tokens are in a file
seed = 1337  # of the order of documents
restart = False  # remove what has been prepared, and begin anew
files = []
configure(globals(), files=files)

options = Options(tokens, shard_tokens, seed, restart)
folder = os.path.join(Path(__file__).parents[1], name)
if not files:
    raise InputError('name at least one file, folder or pattern, or a dataset of the hub (--help shows examples)')
if not re.fullmatch(r'\w[\w.-]*', name) or os.path.isfile(folder):
    raise InputError(f'--name={name} must be the name of a folder in data/')
if name != 'text' and os.path.exists(os.path.join(folder, 'prepare.py')):
    raise InputError(f'--name={name}: data/{name} is of another script; choose another name')
source = find_source(files, field)
split = choose_split(source, val)
prepare_corpus(folder, source, choose_tokenizer(tokenizer, source), split, options)
