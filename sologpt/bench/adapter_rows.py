"""The rows of the adapters suite: each method of train.py's key `adapter`, and all weights."""

import os

import torch

from sologpt.adapters.methods import METHODS
from sologpt.adapters.methods.bottleneck import Bottleneck
from sologpt.adapters.peft_files import WEIGHTS
from sologpt.bench import process
from sologpt.bench.rows import Column, train_row
from sologpt.bench.timing import prepare_device
from sologpt.machine import choices
from sologpt.training.runs import Run

BASE, VIRTUAL_TOKENS = 'full', 16
ROWS = {  # name -> train.py's keys; the config decides about the others
    BASE: {'adapter': ''},
    'lora': {'adapter': 'lora'},
    'qlora': {'adapter': 'lora', 'base_format': 'nf4'},
    'dora': {'adapter': 'dora'},
    'vera': {'adapter': 'vera', 'adapter_r': None},
    'bottleneck': {'adapter': 'bottleneck', 'adapter_r': None, 'adapter_targets': ','.join(Bottleneck.default_targets)},
    'prompt': {'adapter': 'prompt', 'adapter_r': VIRTUAL_TOKENS},
    'prefix': {'adapter': 'prefix', 'adapter_r': VIRTUAL_TOKENS},
}
for name in METHODS:  # a method without rows of its own
    ROWS.setdefault(name, {'adapter': name, 'adapter_r': None})
RESET = {'adapter_from': '', 'base_format': 'float32', 'base': '', 'wandb_log': False}
SHAPE = dict(arch='gpt2', n_layer=12, n_head=12, n_embd=768, vocab_size=50304, block_size=1024)  # 124M parameters
RANK = 16  # of low-rank adapters at that shape


def find_machine(train_args: list[str], tokens: int | None = None,
                 width: int | None = None) -> tuple[dict, torch.device, str]:
    """
    (train.py's config, the device, the name of the dtype): the same dtype for all runs.

    tokens, width: of a micro-batch and of the model, by which 'auto' chooses the dtype; None: those of the config.
    Raises InputError.
    """
    config, _ = process.resolve_train(train_args)
    device = prepare_device(config)
    tokens, width = tokens or config['batch_size'] * config['block_size'], width or config['n_embd']
    return config, device, choices.find_dtype(config['dtype'], device, (tokens, width, 4 * width))[0]


def train_adapter(name: str, train_args: list[str], keys: dict) -> Run:
    """Train a row. Its header also has file_bytes, of the adapter's file or of all weights. Raises InputError."""
    def read_file_bytes(out_dir):
        path = os.path.join(out_dir, WEIGHTS)
        return {'file_bytes': os.path.getsize(path)} if os.path.exists(path) else {}
    run = train_row(name, train_args, RESET | ROWS[name] | keys, read_file_bytes)
    run.header.setdefault('file_bytes', 4 * run.header['parameters'])
    return run


def size_figures(run: Run) -> dict:
    """
    How many parameters there are and are trained, the share of the two, and training_bytes: those of the weights, the
    gradients and AdamW's moments.
    """
    header = run.header
    return {'trained': header['trained'], 'parameters': header['parameters'],
            'share': header['trained'] / header['parameters'], 'training_bytes': header.get('training_bytes')}


def megabytes(title: str, key: str) -> Column:
    """A column of a size in megabytes; it is empty where the size is not known."""
    return Column(title, lambda row: '' if row[key] is None else f'{row[key] / 1e6:,.2f}')
