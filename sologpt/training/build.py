"""Building the model of a run."""

import math

from sologpt.tokens import tokenizer


def table_rows(vocab_size, arch):
    """Rows of the embedding table of a new model: GPUs multiply whole tiles."""
    padded = arch == 'modern' or vocab_size == tokenizer.GPT2_VOCAB  # others as in nanoGPT
    return math.ceil(vocab_size / 64) * 64 if padded else vocab_size
