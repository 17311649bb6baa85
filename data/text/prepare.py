"""
Your own text, in any language and of any size.

  python data/text/prepare.py book.txt                              # files: text, .jsonl, .parquet, and .gz, .zst
  python data/text/prepare.py articles/ 'notes/**/*.md' --tokenizer=chars --name=mine
  python data/text/prepare.py crawl.jsonl.zst --field=content --tokenizer=gpt2
  python data/text/prepare.py roneneldan/TinyStories --tokenizer=gpt2       # a dataset of Hugging Face's hub

Of a folder all .txt, .md, .jsonl and .parquet files are read, but for hidden ones. A file of text is a document, or
several with <|endoftext|> between them; each line of .jsonl, and each row of .parquet, is one. Of fewer than 100
documents the last tenth of each is for validation, otherwise a tenth of the documents, drawn by their text. A document
of more than 4M characters counts as several. Writes data/<name>; train on it with --dataset=<name>.
"""

import os
import re
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, '..', '..'))

from configurator import InputError, report_errors  # noqa: E402
from sologpt.tokens import corpus, sources  # noqa: E402

report_errors()
parser = corpus.arguments(__doc__, tokenizer='bytes')
parser.add_argument('files', nargs='+', metavar='FILE', help="file, folder, pattern, or the hub's owner/name[:config]")
parser.add_argument('--field', default='text', help='with the text, of .jsonl and .parquet (%(default)s)')
parser.add_argument('--val', type=corpus.share, default=0.1, help='the part kept for validation (%(default)s)')
parser.add_argument('--name', default='text', help='the folder in data/ to write (%(default)s)')
args = parser.parse_args()
folder = os.path.join(os.path.dirname(here), args.name)
if not re.fullmatch(r'\w[\w.-]*', args.name) or os.path.isfile(folder):
    raise InputError(f'--name={args.name} must be the name of a folder in data/')
if args.name != 'text' and os.path.exists(os.path.join(folder, 'prepare.py')):
    raise InputError(f'--name={args.name}: data/{args.name} is of another script; choose another name')
source = sources.find(args.files, args.field)
corpus.prepare(folder, source, corpus.named_tokenizer(args.tokenizer, source), corpus.by_number(source, args.val),
               args.tokens, args.shard_tokens, args.seed, args.restart)
