"""
What export.py takes for a model of GPT-2's smallest size: seconds of the whole process, and its most memory beyond that
of one that has only imported what it needs; of a run's checkpoint, with AdamW's moments in it. Medians.
"""

import os
import statistics
import tempfile

import torch

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.bench.process import ROOT, flags, python
from sologpt.files import checkpoint
from sologpt.tokens import tokenizer

ROWS = [('gpt2', 'hf', 'float32'), ('gpt2', 'hf', 'bfloat16'), ('gpt2', 'opt', 'float32'),
        ('gpt2', 'nanogpt', 'float32'), ('gpt2', 'torch', 'float32'), ('gpt2', 'onnx', 'float32'),
        ('modern', 'hf', 'float32'), ('modern', 'hf', 'bfloat16'), ('modern', 'torch', 'float32'),
        ('modern', 'onnx', 'float32')]


SIZE = {}  # GPTConfig's keys: its defaults are GPT-2's


def measure(config, train_args, picture):
    """The figures as plain values. Raises InputError."""
    if train_args:
        raise InputError(f'{" ".join(train_args)}: this suite trains nothing')
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in ('gpt2', 'modern'):  # in processes of their own: what this one has used counts for all it starts
            where = os.path.join(folder, arch)
            python(['-c', f'from sologpt.bench import export; export.write({where!r}, {arch!r}, {SIZE})'])
        _, bare, rest = python(['-c', 'from sologpt.adapters import adapter_files'])
        print(f'{"":>8} {"to":>8} {"dtype":>9} {"s":>6} {"memory":>9} {"/ weights":>9} {"written":>9}')
        for arch, to, dtype in ROWS:
            runs = []
            for number in range(config['runs']):
                dest = os.path.join(folder, f'{arch}-{to}-{dtype}-{number}')
                options = {'to': to, 'dtype': dtype, 'out_dir': os.path.join(folder, arch), 'dest': dest}
                runs.append(python([os.path.join(ROOT, 'export.py'), *flags(options)])[1:])
                written = sum(os.path.getsize(os.path.join(dest, name)) for name in os.listdir(dest))
            seconds, peak = (statistics.median(values) for values in zip(*runs, strict=True))
            weights = 4 * _model(arch, SIZE).n_params()
            figures.append({'arch': arch, 'to': to, 'dtype': dtype, 'seconds': seconds, 'bare_seconds': bare,
                            'memory': peak - rest, 'weights': weights, 'written': written})
            print(f'{arch:>8} {to:>8} {dtype:>9} {seconds:>6.2f} {(peak - rest) / 1e6:>6.0f} MB '
                  f'{(peak - rest) / weights:>9.2f} {written / 1e6:>6.0f} MB')
    return figures


def _model(arch, size):
    return GPT.skeleton(GPTConfig(arch=arch, bias=arch == 'gpt2', **size))


def write(out_dir, arch, size):
    """A checkpoint as a run leaves it, with random weights."""
    model = _model(arch, size)
    weights = {name: torch.randn(p.shape) * 0.02 for name, p in model.named_parameters()}
    if model.config.tied:
        weights['transformer.wte.weight'] = weights['lm_head.weight'] = next(iter(weights.values()))
    moments = {i: {'step': torch.ones(()), 'exp_avg': torch.randn(p.shape), 'exp_avg_sq': torch.rand(p.shape)}
               for i, p in enumerate(model.parameters())}
    os.makedirs(out_dir)
    # characters, as many as GPT-2 has ids, for its own tokenizer would have to be downloaded
    chars = tokenizer.Chars([chr(0x10000 + i) for i in range(tokenizer.GPT2_VOCAB)])
    checkpoint.save(out_dir, {'model': weights, 'model_args': model.config.to_save(), 'iter_num': 1,
                              'optimizer': {'state': moments, 'param_groups': []}, 'tokenizer': chars.to_dict(),
                              'config': {'optimizer': 'adamw'}}, best=False)
