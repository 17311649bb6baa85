"""
Shakespeare (1.1 MB), one token per character: 1,003,854 tokens to train on, 111,540 to validate, 65 characters.

  python data/shakespeare_char/prepare.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project
sys.path.insert(1, str(Path(__file__).parents[1]))  # data/

import tinyshakespeare

from configurator import configure
from sologpt.tokens.corpus import write_texts
from sologpt.tokens.tokenizer import Chars

configure(globals())

here = Path(__file__).parent
splits = tinyshakespeare.read_splits(here)
write_texts(here, Chars(sorted(set(splits['train'][0] + splits['val'][0]))), splits, tinyshakespeare.URL)
