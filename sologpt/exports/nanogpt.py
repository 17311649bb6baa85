"""
A model as a ckpt.pt of nanoGPT (https://github.com/karpathy/nanoGPT): its sample.py runs it, and its train.py resumes
from it.
"""

import os
import pickle

import torch
import torch.nn as nn

from configurator import InputError
from model import GPTConfig
from sologpt.exports.source import ExportedModel
from sologpt.files.checkpoint import save_checkpoint
from sologpt.files.families import FAMILIES
from sologpt.files.safetensors_files import cast_weights
from sologpt.machine.devices import DTYPES
from sologpt.tokens.tokenizer import Tokenizer

MODEL_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')  # of nanoGPT's GPTConfig


def write_nanogpt(exported: ExportedModel, folder: str, dest: str, dtype: str, dataset: str) -> str:
    """
    Write ckpt.pt, and meta.pkl if nanoGPT needs it for the tokenizer. Returns what they are, in words.

    dest: where `folder` will lie, after which nanoGPT's data folder is named if the checkpoint names none. dtype: of
    the weights. dataset: see find_tokenizer(). Raises InputError.
    """
    config = exported.config
    check_parts(config)
    text = exported.find_tokenizer(dataset)
    keys = {'dataset': os.path.basename(os.path.abspath(dest)), **exported.saved.get('config', {})}
    of_run = {} if exported.merged else exported.saved  # moments and steps do not belong to merged weights
    optimizer = optimizer_state(exported.weights, keys, of_run)
    save_checkpoint(folder, {
        'model': cast_weights(exported.weights, DTYPES[dtype]),
        'model_args': {key: getattr(config, key) for key in MODEL_ARGS},
        'optimizer': optimizer, 'iter_num': of_run.get('iter_num', 0),
        'best_val_loss': of_run.get('best_val_loss', 1e9), 'config': keys}, best=False)
    words = f"nanoGPT's ckpt.pt, {'with' if optimizer['state'] else 'without'} the moments of AdamW"
    described = text.to_dict()
    if described.get('name') == 'gpt2':
        return words
    if described['kind'] not in ('chars', 'bytes'):
        return f'{words}; its sample.py has no tokenizer of the kind {described["kind"]}'
    write_meta(folder, text)
    return f"{words}; its sample.py reads meta.pkl in nanoGPT's folder data/{keys['dataset']}: copy it there"


def check_parts(config: GPTConfig) -> None:
    """Raises InputError if the model has a part that nanoGPT does not have."""
    for key, value in {**FAMILIES['gpt2'].parts, 'activation': 'gelu', 'tied': True}.items():
        if getattr(config, key) != value:
            raise InputError(f'the model has {key}={getattr(config, key)!r}, nanoGPT only {value!r}: train with '
                             f'{"--arch=gpt2" if config.arch != "gpt2" else f"--{key}={value}"}')


def optimizer_state(weights: dict[str, torch.Tensor], keys: dict, of_run: dict) -> dict:
    """
    The state of AdamW with nanoGPT's parameter groups: matrices, which decay, and vectors, which do not.

    keys: the config of the run. of_run: its checkpoint, if these are still its weights. The moments are those of the
    run if its optimizer was AdamW, otherwise there are none.
    """
    named = {name: nn.Parameter(torch.empty_like(tensor, device='meta')) for name, tensor in weights.items()
             if name != 'lm_head.weight'}  # the second name of the embedding table
    decay = keys.get('weight_decay')
    optimizer = torch.optim.AdamW([
        {'params': [p for p in named.values() if p.dim() >= 2], 'weight_decay': 0.1 if decay is None else decay},
        {'params': [p for p in named.values() if p.dim() < 2], 'weight_decay': 0.0},
    ], lr=keys.get('learning_rate', 6e-4), betas=(keys.get('beta1', 0.9), keys.get('beta2', 0.95))).state_dict()
    if keys.get('optimizer', 'adamw') == 'adamw':
        optimizer['state'] = of_run.get('optimizer', {}).get('state', {})
    return optimizer


def write_meta(folder: str, text: Tokenizer) -> None:
    """Write meta.pkl, by which nanoGPT knows characters. It can print those of ASCII among the bytes."""
    chars = text.chars if text.to_dict()['kind'] == 'chars' else [chr(i) for i in range(128)]
    itos = dict(enumerate(chars)) | {i: '\ufffd' for i in range(len(chars), text.vocab_size)}
    with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
        pickle.dump({'vocab_size': text.vocab_size, 'itos': itos, 'stoi': {c: i for i, c in enumerate(chars)}}, f)
