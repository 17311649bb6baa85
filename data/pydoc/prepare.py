"""
The chapters of Python's language reference that `help()` shows: English with code in it, a small text to finetune on.
Needs no network, unless the tokenizer does.

  python data/pydoc/prepare.py              # 40,000 characters to train on: as small as your own text may be
  python data/pydoc/prepare.py --size=0     # all of it
  python data/pydoc/prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M --name=pydoc_smollm2 --size=0

Every tenth chapter, in the order of their names, is for validation.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project

from configurator import InputError, configure
from sologpt.tokens.corpus import write_texts
from sologpt.tokens.tokenizer import tokenizer_by_name

size = 40000  # how many characters of the chapters to train on; 0: all
tokenizer = 'bytes'  # or an encoding of tiktoken, a FILE.tiktoken or tokenizer.json, or a model's folder or name
name: str | None = None  # the folder in data/ to write; None: this script's, which is for bytes
configure(globals())

if not re.fullmatch(r'\w[\w.-]*', name or 'pydoc') or name is None and tokenizer != 'bytes':
    raise InputError(f'--name={name} --tokenizer={tokenizer}: another tokenizer needs another folder in data/: give '
                     f'its name')
try:
    from pydoc_data.topics import topics
except ImportError:
    raise InputError('this Python comes without pydoc_data; use data/text/prepare.py with a text of your own') from None
chapters = [topics[name] for name in sorted(topics)]
train = '\0'.join(chapter for i, chapter in enumerate(chapters) if i % 10)[:size or None].split('\0')
version = '.'.join(map(str, sys.version_info[:3]))
folder = Path(__file__).parents[1] / name if name else Path(__file__).parent
write_texts(folder, tokenizer_by_name(tokenizer), {'train': train, 'val': chapters[::10]},
            source=f"language reference of Python {version}, {len(chapters)} chapters of pydoc's topics")
