"""
What a folder in data/ holds: its token files, their dtype, and meta.json, which describes them.

    train.bin or train_000.bin, ...   raw little-endian uint16, or uint32 if the tokenizer has more than 65,536 ids
    val.bin or val_000.bin, ...       the same, for validation
    meta.json                         tokenizer, vocab_size, dtype, tokens (split -> number of finished ones), source
"""

import glob
import json
import os
import pickle
import re

import numpy as np

from configurator import InputError
from sologpt.tokens.tokenizer import GPT2, GPT2_VOCAB, Tokenizer, tokenizer_from_dict, tokenizers_agree

ASSUMED_META = {'tokenizer': GPT2, 'vocab_size': GPT2_VOCAB, 'dtype': 'uint16'}  # for a folder with no meta file


# ---- token files -----------------------------------------------------------------------------------------------------

def token_files(folder: str, split: str) -> list[str]:
    """The finished token files of a split: train.bin, or else its shards train_000.bin, train_001.bin, ..."""
    return sorted(glob.glob(os.path.join(glob.escape(str(folder)), f'{split}.bin'))
                  or glob.glob(os.path.join(glob.escape(str(folder)), f'{split}_[0-9]*.bin')))


def token_files_in_progress(folder: str, split: str) -> list[str]:
    """All token files of a split, finished or not (train_002.bin.partial)."""
    return sorted(path for path in glob.glob(os.path.join(glob.escape(folder), f'{split}*'))
                  if re.fullmatch(rf'{split}(_\d+)?\.bin(\.partial(\.tmp)?)?', os.path.basename(path)))


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of token files whose ids are below vocab_size: little-endian uint16 or uint32."""
    return np.dtype('<u2' if vocab_size <= 2 ** 16 else '<u4')


# ---- meta.json -------------------------------------------------------------------------------------------------------

def read_meta(folder: str) -> dict:
    """
    What a data folder says about itself: {'tokenizer': dict, 'vocab_size': int, 'dtype': 'uint16' or 'uint32', ...}.

    Reads meta.json, or nanoGPT's meta.pkl (no code in the pickle can run). For a folder with neither file it returns
    ASSUMED_META: nanoGPT takes such a folder to hold ids of GPT-2's BPE. Raises InputError for a damaged file.
    """
    path = os.path.join(folder, 'meta.json')
    if os.path.exists(path):
        try:
            with open(path, encoding='utf-8') as f:
                meta = json.load(f)
            return {**meta, 'vocab_size': int(meta['vocab_size']), 'tokenizer': dict(meta['tokenizer']),
                    'dtype': {'uint16': 'uint16', 'uint32': 'uint32'}[meta['dtype']]}
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f'{path} is damaged ({type(e).__name__}: {e}): prepare the data again') from None
    path = os.path.join(folder, 'meta.pkl')
    if os.path.exists(path):
        try:
            with open(path, 'rb') as f:
                meta = _PlainUnpickler(f).load()
            chars = [meta['itos'][i] for i in range(int(meta['vocab_size']))]
        except Exception as e:  # a damaged pickle can raise anything
            raise InputError(f'{path} is not a plain nanoGPT meta.pkl ({e}): prepare the data again') from None
        return {'tokenizer': {'kind': 'chars', 'chars': chars}, 'vocab_size': len(chars), 'dtype': 'uint16'}
    return ASSUMED_META


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it wants to run {module}.{name}')


def write_meta(folder: str, tokenizer: Tokenizer, tokens: dict[str, int], source: str) -> None:
    """Write meta.json. tokens: split -> number of tokens in its finished files. source: a line on what the text is."""
    write_json(os.path.join(folder, 'meta.json'), {
        'tokenizer': tokenizer.to_dict(), 'vocab_size': tokenizer.vocab_size,
        'dtype': token_dtype(tokenizer.vocab_size).name, 'tokens': tokens, 'source': source})


def write_json(path: str, content: object) -> None:
    """Write a JSON file so that at every moment the path holds either the old content or the new one, never a part."""
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        json.dump(content, f, ensure_ascii=False, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)


# ---- the tokenizer of a model ----------------------------------------------------------------------------------------

def tokenizer_of_model(saved: dict, dataset: str, vocab_size: int, source: str) -> Tokenizer:
    """
    The tokenizer of a model: that of data/<dataset>, if given, else the one its checkpoint names, else GPT-2's.

    saved: the checkpoint. dataset: the folder in data/, or ''. vocab_size: how many ids the model has. source: the
    model's name for errors. The tokenizer may have fewer ids; the rest is padding. Raises InputError if it has more.
    """
    described = saved.get('tokenizer')
    if dataset:
        folder = os.path.join('data', dataset)
        if not os.path.isdir(folder):
            raise InputError(f'there is no folder {folder}: set dataset to one whose tokenizer the model has')
        own = read_meta(folder)['tokenizer']
        if not tokenizers_agree(described, own):
            raise InputError(f'{source} was trained with another tokenizer than {folder} has: leave dataset out')
        described = own
    elif described is None and saved.get('config', {}).get('dataset'):  # all that nanoGPT's checkpoints name
        described = read_meta(os.path.join('data', saved['config']['dataset']))['tokenizer']
    described = described or GPT2
    tokenizer = tokenizer_from_dict(described)
    if tokenizer.vocab_size > vocab_size:
        raise InputError(f'{source} has {vocab_size} ids, the tokenizer {described["kind"]} has '
                         f'{tokenizer.vocab_size}: set dataset to the folder in data/ that the model was trained on')
    return tokenizer
