"""
Shakespeare (1.1 MB) in GPT-2's BPE: 301,966 tokens to train on, 36,059 to validate. For finetuning GPT-2.

  python data/shakespeare/prepare.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project
sys.path.insert(1, str(Path(__file__).parents[1]))  # data/

import tinyshakespeare

from configurator import configure
from sologpt.tokens.corpus import write_texts
from sologpt.tokens.tokenizer import Tiktoken

configure(globals())

here = Path(__file__).parent
write_texts(here, Tiktoken('gpt2'), tinyshakespeare.read_splits(here), tinyshakespeare.URL)
