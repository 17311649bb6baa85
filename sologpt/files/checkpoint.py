"""
Checkpoints: a run's out_dir/ckpt.pt is the newest one, out_dir/best.pt the one with the lowest validation loss.

A checkpoint is a dict of plain values and tensors. It is written to a temporary file, flushed to the disk and renamed,
so that a crash leaves the previous one whole. It is read with weights_only=True, so that nothing in a downloaded file
can run. The checkpoints of nanoGPT and of earlier versions load as well. A checkpoint has at least

    model       name -> tensor: the weights of a GPT, or those of an adapter if there is a key 'adapter'
    model_args  keys of GPTConfig, as GPTConfig.to_save() returns them
    iter_num    how many steps were taken
"""

import os
import pickle
import shutil
import warnings
from collections.abc import Mapping

import torch
import torch.nn as nn

from configurator import InputError
from sologpt.files.former_keys import translate
from sologpt.matmuls.spec import former_matmul

REQUIRED = {'model': dict, 'model_args': dict, 'iter_num': int}


# ---- saving ----------------------------------------------------------------------------------------------------------

def save_checkpoint(out_dir: str, checkpoint: dict, best: bool) -> None:
    """Write out_dir/ckpt.pt; if `best`, out_dir/best.pt becomes the same file. Raises InputError if it cannot."""
    path, best_path = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'best.pt')
    # A save that was killed may have left these. One may be best.pt by another name: it must not be written over.
    _remove(path + '.tmp', best_path + '.tmp')
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        if best:
            try:
                os.link(path + '.tmp', best_path + '.tmp')
            except OSError:  # a file system without hard links
                shutil.copyfile(path + '.tmp', best_path + '.tmp')
            os.replace(best_path + '.tmp', best_path)
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as e:  # torch's writer turns a full disk into a RuntimeError
        _remove(path + '.tmp', best_path + '.tmp')
        free = shutil.disk_usage(out_dir).free / 1e9
        raise InputError(f'could not write {path} ({free:.2f} GB free): {e}; the previous one is whole') from None


def _remove(*paths):
    for path in paths:
        if os.path.lexists(path):
            os.remove(path)


# ---- reading ---------------------------------------------------------------------------------------------------------

def find_checkpoint(source: str) -> str | None:
    """The path of the checkpoint that `source` names, or None. In an out_dir, best.pt comes before ckpt.pt."""
    for path in (source, os.path.join(source, 'best.pt'), os.path.join(source, 'ckpt.pt')):
        if os.path.isfile(path):
            return path
    return None


def read_checkpoint(path: str, mmap: bool = False) -> dict:
    """
    The checkpoint at `path`, on the CPU. Its 'config' has today's keys, and its 'matmul' is the text of a spec.

    mmap: a tensor is read from the file when it is used. Raises InputError if the file is missing, damaged or no
    checkpoint, or if it would run code when it is unpickled.
    """
    checkpoint = _load(path, mmap)
    for key, kind in REQUIRED.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise InputError(f'{path} is not a soloGPT or nanoGPT checkpoint: it has no {key!r}')
    # nanoGPT saves the names of a compiled model with a prefix, and old versions of it save the causal masks
    checkpoint['model'] = {name.removeprefix('_orig_mod.'): tensor for name, tensor in checkpoint['model'].items()
                           if not name.endswith('.attn.bias')}
    config = checkpoint.get('config', {})
    if 'matmul' in checkpoint:  # it differs from the config's once the run is past `until`
        checkpoint['matmul'] = former_matmul(config | {'matmul': checkpoint['matmul']})
    if 'config' in checkpoint:
        checkpoint['config'] = translate(config)
    return checkpoint


def _load(path, mmap):
    if not os.path.isfile(path):
        raise InputError(f'no checkpoint {path}: train first, or set out_dir to a folder that has one')
    try:
        with warnings.catch_warnings(action='ignore'):  # they guess what else a damaged file might be
            return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except Exception as e:  # torch does not document what it raises for a damaged file
        if isinstance(e, pickle.UnpicklingError) and 'GLOBAL' in str(e):
            raise InputError(f'{path} holds more than tensors and plain values, and loading it could run code: '
                             f'not loaded') from None
        raise InputError(f'{path} is damaged or no checkpoint ({type(e).__name__})') from None


# ---- weights ---------------------------------------------------------------------------------------------------------

def check_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Raises InputError, which names `source`, unless `weights` have the names and shapes of the model's."""
    own = model.state_dict()
    _check_names(own, weights, source)
    for name, tensor in own.items():
        _check_shape(name, tensor, weights[name], source)


def _check_names(own, weights, source):
    for name in sorted(own.keys() ^ weights.keys()):
        where = 'missing from' if name in own else 'unexpected in'
        raise InputError(f'{source}: the weight {name} is {where} the file: the file is of another architecture')


def _check_shape(name, own, given, source):
    if own.shape != given.shape:
        raise InputError(f'{source}: {name} has the shape {tuple(given.shape)}, this model needs {tuple(own.shape)}')


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str,
                 kept: tuple[torch.dtype, ...] = ()) -> None:
    """
    Give `model`, which may be on the meta device, copies of `weights`. Raises InputError, which names `source`, if they
    do not fit.

    kept: matrices and tables in these dtypes stay in them, all else becomes what the model has. No weight exists in a
    larger dtype than it ends in.
    """
    own, copies = model.state_dict(keep_vars=True), {}  # a parameter that has two names stays one
    _check_names(own, weights, source)
    for name, p in own.items():
        if id(p) not in copies:
            weight = weights[name]
            _check_shape(name, p, weight, source)
            dtype = weight.dtype if weight.dtype in kept and p.dim() >= 2 else p.dtype
            copies[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=dtype).copy_(weight))
    model.load_state_dict({name: copies[id(p)] for name, p in own.items()}, assign=True)
