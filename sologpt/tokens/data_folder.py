"""
What a folder in data/ says of itself: its token files, their dtype, their tokenizer.
"""

import glob
import json
import os
import pickle

from configurator import InputError
from sologpt.tokens.tokenizer import GPT2, GPT2_VOCAB, agree, from_dict

ASSUMED_META = {'tokenizer': GPT2, 'vocab_size': GPT2_VOCAB, 'dtype': 'uint16'}  # of a folder with neither meta file


def of_model(saved, dataset, config, source):
    """
    The tokenizer of a model: that of data/<dataset> if this is given, else what its checkpoint names, else GPT-2's. Ids
    that it has not become padding in the model's GPTConfig. saved: the checkpoint of `source`. Raises InputError.
    """
    described = saved.get('tokenizer')
    if dataset:
        data_dir = os.path.join('data', dataset)
        if not os.path.isdir(data_dir):
            raise InputError(f'there is no folder {data_dir}: set dataset to one whose tokenizer the model has')
        own = read_meta(data_dir)['tokenizer']
        if not agree(described, own):
            raise InputError(f'{source} was trained with another tokenizer than {data_dir} has: leave dataset out')
        described = own
    elif described is None and saved.get('config', {}).get('dataset'):  # all that nanoGPT's checkpoints name
        described = read_meta(os.path.join('data', saved['config']['dataset']))['tokenizer']
    described = described or GPT2
    tokenizer = from_dict(described)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f'{source} has {config.vocab_size} ids, the tokenizer {described["kind"]} '
                         f'{tokenizer.vocab_size}: set dataset to the folder in data/ that the model was trained on')
    config.n_ids = min(config.n_ids, tokenizer.vocab_size)
    return tokenizer


def read_meta(data_dir):
    """
    What a data folder says of itself: {'tokenizer': dict, 'vocab_size': int, 'dtype': 'uint16' or 'uint32', ...}.

    Reads meta.json, or nanoGPT's meta.pkl (without running anything in it); a folder with neither is taken for GPT-2's
    BPE, as nanoGPT does. Raises InputError.
    """
    path = os.path.join(data_dir, 'meta.json')
    if os.path.exists(path):
        try:
            with open(path, encoding='utf-8') as f:
                meta = json.load(f)
            return {**meta, 'vocab_size': int(meta['vocab_size']), 'tokenizer': dict(meta['tokenizer']),
                    'dtype': {'uint16': 'uint16', 'uint32': 'uint32'}[meta['dtype']]}
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f'{path} is damaged ({type(e).__name__}: {e}): prepare the data again') from None
    path = os.path.join(data_dir, 'meta.pkl')
    if os.path.exists(path):
        try:
            with open(path, 'rb') as f:
                meta = _PlainUnpickler(f).load()
            chars = [meta['itos'][i] for i in range(int(meta['vocab_size']))]
        except Exception as e:  # a damaged pickle can raise anything
            raise InputError(f'{path} is not a plain nanoGPT meta.pkl ({e}): prepare the data again') from None
        return {'tokenizer': {'kind': 'chars', 'chars': chars}, 'vocab_size': len(chars), 'dtype': 'uint16'}
    return ASSUMED_META


def paths_of(data_dir, split):
    """The token files of a split: train.bin, or else shards, train_000.bin, train_001.bin, ..."""
    return sorted(glob.glob(os.path.join(glob.escape(str(data_dir)), f'{split}.bin'))
                  or glob.glob(os.path.join(glob.escape(str(data_dir)), f'{split}_[0-9]*.bin')))


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it wants to run {module}.{name}')
