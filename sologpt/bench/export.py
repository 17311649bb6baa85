"""
What export.py takes for a model of GPT-2's smallest size, from a run's checkpoint with AdamW's moments in it.

Seconds are those of the whole process. Memory is its most, beyond that of a process that has only imported what
export.py needs. Both are medians over runs.
"""

import os
import statistics
import tempfile

import torch

from model import GPT, GPTConfig
from sologpt.bench.process import ROOT, flags, refuse_training, run_python
from sologpt.files.checkpoint import save_checkpoint
from sologpt.tokens import tokenizer

ROWS = [('gpt2', 'hf', 'float32'), ('gpt2', 'hf', 'bfloat16'), ('gpt2', 'opt', 'float32'),
        ('gpt2', 'nanogpt', 'float32'), ('gpt2', 'torch', 'float32'), ('gpt2', 'onnx', 'float32'),
        ('modern', 'hf', 'float32'), ('modern', 'hf', 'bfloat16'), ('modern', 'torch', 'float32'),
        ('modern', 'onnx', 'float32')]  # arch; export.py's keys `to` and `dtype`
SIZE = {}  # GPTConfig's keys: its defaults are GPT-2's


def measure(config: dict, train_args: list[str], picture: str) -> list[dict]:
    """The figures of each row. Raises InputError."""
    refuse_training(train_args)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in ('gpt2', 'modern'):  # in processes of their own: what this one has used counts for all it starts
            where = os.path.join(folder, arch)
            run_python(['-c', f'from sologpt.bench import export; export.write({where!r}, {arch!r}, {SIZE})'])
        _, bare, rest = run_python(['-c', 'from sologpt.adapters import peft_files'])
        print(f'{"":>8} {"to":>8} {"dtype":>9} {"s":>6} {"memory":>9} {"/ weights":>9} {"written":>9}')
        for arch, to, dtype in ROWS:
            runs = []
            for number in range(config['runs']):
                dest = os.path.join(folder, f'{arch}-{to}-{dtype}-{number}')
                options = {'to': to, 'dtype': dtype, 'out_dir': os.path.join(folder, arch), 'dest': dest}
                runs.append(run_python([os.path.join(ROOT, 'export.py'), *flags(options)])[1:])
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


def write(out_dir: str, arch: str, size: dict) -> None:
    """Write a checkpoint as a run leaves it, with random weights."""
    model = _model(arch, size)
    weights = {name: torch.randn(p.shape) * 0.02 for name, p in model.named_parameters()}
    if model.config.tied:
        weights['transformer.wte.weight'] = weights['lm_head.weight'] = next(iter(weights.values()))
    moments = {i: {'step': torch.ones(()), 'exp_avg': torch.randn(p.shape), 'exp_avg_sq': torch.rand(p.shape)}
               for i, p in enumerate(model.parameters())}
    os.makedirs(out_dir)
    # as many characters as GPT-2 has ids, because its own tokenizer would have to be downloaded
    chars = tokenizer.Chars([chr(0x10000 + i) for i in range(tokenizer.GPT2_VOCAB)])
    save_checkpoint(out_dir, {'model': weights, 'model_args': model.config.to_save(), 'iter_num': 1,
                              'optimizer': {'state': moments, 'param_groups': []}, 'tokenizer': chars.to_dict(),
                              'config': {'optimizer': 'adamw'}}, best=False)
