"""
Shakespeare (1.1 MB), one token per character: 1,003,854 tokens to train on, 111,540 to validate, 65 characters.

  python data/shakespeare_char/prepare.py
"""

import argparse
import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(here, '..', '..'), os.path.join(here, '..')]

import tinyshakespeare  # noqa: E402

from configurator import report_errors  # noqa: E402
from sologpt.tokens.corpus import write  # noqa: E402
from sologpt.tokens.tokenizer import Chars  # noqa: E402

report_errors()
argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
splits = tinyshakespeare.splits(here)
write(here, Chars(sorted(set(splits['train'][0] + splits['val'][0]))), splits, tinyshakespeare.URL)
