"""A model out of any file that holds one: its keys and weights, without building it."""

import os

from configurator import InputError
from sologpt.files import checkpoint, hf_files
from sologpt.tokens import tokenizer, tokenizer_files


def read_model(source: str) -> tuple[dict, dict, dict]:
    """
    (GPTConfig's keys, name -> tensor, what else its checkpoint holds) of a model. A tensor is read from the file when
    it is used.

    source: an out_dir, a checkpoint, a folder in Hugging Face's format, or a name that is downloaded. Raises
    InputError.
    """
    path = checkpoint.find(source) or source
    if not path.endswith('.pt'):
        model_args, weights, family, folder = hf_files.read(source)
        described = tokenizer_files.read_folder(folder)
        # a folder without a tokenizer has GPT-2's, if it is OpenAI's GPT-2, or a local one with as many ids
        may_be_gpt2s = family == 'gpt2' and (os.path.isdir(source) or '/' not in source)
        if described is None and not (may_be_gpt2s and model_args['vocab_size'] >= tokenizer.GPT2_VOCAB):
            described = tokenizer.no_tokenizer(source)
        return model_args, weights, {'tokenizer': described} if described else {}
    saved = checkpoint.load(path, mmap=True)
    if 'adapter' in saved:
        raise InputError(f"{path} holds an adapter alone: give its base, and the adapter's folder as an adapter")
    return saved['model_args'], saved.pop('model'), saved
