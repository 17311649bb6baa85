"""A model out of any file that holds one: its keys and weights, without building it."""

import os

from configurator import InputError
from sologpt.files.checkpoint import find_checkpoint, read_checkpoint
from sologpt.files.companions import read_companions
from sologpt.files.hf_models import read_hf_model
from sologpt.files.llama import LLAMAS
from sologpt.tokens import tokenizer, tokenizer_files


def read_model(source: str) -> tuple[dict, dict, dict]:
    """
    (GPTConfig's keys, name -> tensor, what else its checkpoint holds) of a model. A tensor is read from the file when
    it is used. Beside the weights, a model in Hugging Face's format has a tokenizer, and 'hf_files': its Companions.

    source: an out_dir, a checkpoint, a folder in Hugging Face's format, or a name that is downloaded. Raises
    InputError.
    """
    path = find_checkpoint(source) or source
    if not path.endswith('.pt'):
        model_args, weights, family, folder = read_hf_model(source)
        saved = _describe_tokenizer(source, folder, family, model_args['vocab_size'])
        if family in LLAMAS:  # they are written back with their own files
            saved['hf_files'] = read_companions(folder)
            model_args['n_ids'] = _n_ids(saved['tokenizer'], model_args['vocab_size'])
        return model_args, weights, saved
    saved = read_checkpoint(path, mmap=True)
    if 'adapter' in saved:
        raise InputError(f"{path} holds an adapter alone: give its base, and the adapter's folder as an adapter")
    return saved['model_args'], saved.pop('model'), saved


def _describe_tokenizer(source, folder, family, vocab_size):
    """{'tokenizer': as to_dict() describes it}, or {} if it is that of OpenAI's GPT-2."""
    described = tokenizer_files.read_tokenizer(folder)
    # a folder without a tokenizer has GPT-2's, if the model is OpenAI's GPT-2, or a local one with as many ids
    may_be_gpt2s = family == 'gpt2' and (os.path.isdir(source) or '/' not in source)
    if described is None and not (may_be_gpt2s and vocab_size >= tokenizer.GPT2_VOCAB):
        described = tokenizer_files.no_tokenizer(source)
    return {'tokenizer': described} if described else {}


def _n_ids(described, vocab_size):
    """How many ids text can have: the rows of the table after those of the tokenizer are never sampled."""
    if described['kind'] == 'unknown':
        return vocab_size
    return min(tokenizer.tokenizer_from_dict(described).vocab_size, vocab_size)
