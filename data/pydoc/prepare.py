"""
The chapters of Python's language reference that `help()` shows, as bytes: English with code in it, a small text to
finetune on. Needs no network.

  python data/pydoc/prepare.py              # 40,000 characters to train on: as small as your own text may be
  python data/pydoc/prepare.py --size=0     # all of it

Every tenth chapter, in the order of their names, is for validation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project

from configurator import InputError, configure
from sologpt.tokens.corpus import write_texts
from sologpt.tokens.tokenizer import Bytes

size = 40000  # how many characters of the chapters to train on; 0: all
configure(globals())

try:
    from pydoc_data.topics import topics
except ImportError:
    raise InputError('this Python comes without pydoc_data; use data/text/prepare.py with a text of your own') from None
chapters = [topics[name] for name in sorted(topics)]
train = '\0'.join(chapter for i, chapter in enumerate(chapters) if i % 10)  # byte 0 ends a text
version = '.'.join(map(str, sys.version_info[:3]))
write_texts(Path(__file__).parent, Bytes(), {'train': [train[:size or None]], 'val': chapters[::10]},
            source=f"language reference of Python {version}, {len(chapters)} chapters of pydoc's topics")
