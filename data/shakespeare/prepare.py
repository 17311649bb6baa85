"""
Shakespeare (1.1 MB) in GPT-2's BPE: 301,966 tokens to train on, 36,059 to validate. For finetuning GPT-2.

  python data/shakespeare/prepare.py
"""

import argparse
import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(here, '..', '..'), os.path.join(here, '..')]

import tinyshakespeare  # noqa: E402

from configurator import report_errors  # noqa: E402
from sologpt.tokens.corpus import write  # noqa: E402
from sologpt.tokens.tokenizer import Tiktoken  # noqa: E402

report_errors()
argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
splits = tinyshakespeare.splits(here)
write(here, Tiktoken('gpt2'), splits, tinyshakespeare.URL)
