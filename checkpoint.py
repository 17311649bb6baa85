"""
Checkpoints: the only code that opens one. A checkpoint is a dict of plain types and tensors, written to a temporary
file, flushed to disk and renamed, so that a crash leaves the old one whole; it loads with weights_only=True, so that
nothing in a downloaded file can run. nanoGPT's ckpt.pt files load as they are, and so do GPT-2 weights in Hugging
Face's format (config.json + model.safetensors), without transformers.

out_dir/ckpt.pt is the newest, out_dir/best.pt the one with the lowest validation loss.
"""

import json
import os
import pickle
import shutil
import warnings

import torch

from configurator import InputError


def save(out_dir, checkpoint, best):
    """Write out_dir/ckpt.pt; if `best`, out_dir/best.pt is the same file. Raises InputError if it cannot."""
    path, best_path = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'best.pt')
    _remove(path + '.tmp', best_path + '.tmp')  # of a save that was killed; one may be best.pt's own file
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


def set_aside(out_dir):
    """Keep what an earlier run left in out_dir as *.old, so that a new one cannot destroy it. Returns the names."""
    names = ('ckpt.pt', 'best.pt', 'log.jsonl', 'adapter_config.json', 'adapter_model.safetensors')
    found = [name for name in names if os.path.exists(os.path.join(out_dir, name))]
    for name in found:
        os.replace(os.path.join(out_dir, name), os.path.join(out_dir, name + '.old'))
    return found


def check_writable(out_dir):
    """Make out_dir and see that files can be written there: before the run, not at its first checkpoint."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        probe = os.path.join(out_dir, '.writable')
        with open(probe, 'w'):
            pass
        os.remove(probe)
    except OSError as e:
        raise InputError(f'out_dir={out_dir!r} cannot be written: {e.strerror}') from None


def find(source):
    """The checkpoint that `source` names: a file, or a run's out_dir, of which best.pt comes first; or None."""
    for path in (source, os.path.join(source, 'best.pt'), os.path.join(source, 'ckpt.pt')):
        if os.path.isfile(path):
            return path
    return None


def load(path, mmap=False):
    """
    The checkpoint at `path`, on the CPU: at least 'model', 'model_args' and 'iter_num'. mmap: a tensor is read from the
    file when it is used.

    Raises InputError for a file that is missing, cut off, not a checkpoint, or that would run code when unpickled.
    """
    if not os.path.isfile(path):
        raise InputError(f'no checkpoint {path}: train first, or set out_dir to a folder that has one')
    try:
        with warnings.catch_warnings(action='ignore'):  # about what else a damaged file might be
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except Exception as e:  # what torch raises for a damaged file is not documented
        if isinstance(e, pickle.UnpicklingError) and 'GLOBAL' in str(e):
            raise InputError(f'{path} holds more than tensors and plain values, and loading it could run code: '
                             f'not loaded') from None
        raise InputError(f'{path} is damaged or no checkpoint ({type(e).__name__})') from None
    for key, kind in (('model', dict), ('model_args', dict), ('iter_num', int)):
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise InputError(f'{path} is not a soloGPT or nanoGPT checkpoint: it has no {key!r}')
    # nanoGPT saves a compiled model's names with a prefix, and with old versions of torch the causal masks
    checkpoint['model'] = {k.removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()
                           if not k.endswith('.attn.bias')}
    return checkpoint


def load_weights(model, weights, source):
    """Copy `weights` (name -> tensor) into `model`; every name and shape must agree. Raises InputError."""
    own = model.state_dict()
    for name in sorted(own.keys() ^ weights.keys()):
        where = 'missing from' if name in own else 'unexpected in'
        raise InputError(f'{source}: the weight {name} is {where} the file: it is of another architecture')
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise InputError(f'{source}: {name} has the shape {tuple(weights[name].shape)}, this model needs '
                             f'{tuple(tensor.shape)}')
    model.load_state_dict(weights)


def load_hf(source):
    """
    (config dict, name -> tensor) of a model in Hugging Face's format: a folder, or a name such as 'gpt2-medium' or
    'openai-community/gpt2' that is downloaded through huggingface_hub. Raises InputError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    if os.path.isdir(source):
        paths = {name: os.path.join(source, name) for name in ('config.json', 'model.safetensors')}
        for path in paths.values():
            if not os.path.isfile(path):
                raise InputError(f'{source} is not a model in Hugging Face format: it has no {os.path.basename(path)}')
    else:
        paths = _download(source)
    try:
        with open(paths['config.json'], encoding='utf-8') as f:
            config = json.load(f)
        if not isinstance(config, dict):
            raise ValueError('config.json is no object')
        return config, load_file(paths['model.safetensors'])
    except (ValueError, SafetensorError) as e:
        raise InputError(f'{source}: damaged or not in Hugging Face format: {str(e)[:100]}') from None


def _download(name):
    from huggingface_hub import hf_hub_download
    repository = name if '/' in name else f'openai-community/{name}'
    try:
        return {file: hf_hub_download(repository, file) for file in ('config.json', 'model.safetensors')}
    except Exception as e:  # huggingface_hub's errors, and those of the HTTP library under it
        raise InputError(f'{name!r} is no local folder, and downloading {repository} failed ({type(e).__name__}): '
                         f'connect to the network, or give a folder with config.json and model.safetensors') from None
