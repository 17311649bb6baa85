"""
The chapters of Python's language reference that `help()` shows, as bytes: English with code in it, a small text to
finetune on. Needs no network.

  python data/pydoc/prepare.py              # as much of it as a text of one's own may have: 40,000 characters
  python data/pydoc/prepare.py --size=0     # all

Every tenth chapter, by name, is for validation.
"""

import argparse
import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, '..', '..'))

from configurator import InputError, report_errors  # noqa: E402
from sologpt.tokens.corpus import write  # noqa: E402
from sologpt.tokens.tokenizer import Bytes  # noqa: E402

report_errors()
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--size', type=int, default=40000, help='of the training text, in characters; 0: all there is')
size = parser.parse_args().size
try:
    from pydoc_data.topics import topics
except ImportError:
    raise InputError('this Python comes without pydoc_data; use data/text/prepare.py with a text of your own') from None

chapters = [topics[name] for name in sorted(topics)]
val = chapters[::10]
train = '\0'.join(chapter for i, chapter in enumerate(chapters) if i % 10)
version = '.'.join(map(str, sys.version_info[:3]))
write(here, Bytes(), {'train': [train[:size or None]], 'val': val},
           source=f"language reference of Python {version}, {len(chapters)} chapters of pydoc's topics")
