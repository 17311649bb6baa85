"""
Checkpoints: the only code that opens one. A checkpoint is a dict of plain types and tensors, written to a temporary
file, flushed to disk and renamed, so that a crash leaves the old one whole; it loads with weights_only=True, so that
nothing in a downloaded file can run. nanoGPT's ckpt.pt files load as they are. Of other software's it opens folders in
Hugging Face's format (config.json and safetensors), without transformers; hf_files.py knows what is in them.

out_dir/ckpt.pt is the newest, out_dir/best.pt the one with the lowest validation loss.
"""

import contextlib
import json
import os
import pickle
import shutil
import warnings

import torch
import torch.nn as nn

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


def check_weights(model, weights, source):
    """Raises InputError unless `weights` (name -> tensor) have the names and shapes of the model's."""
    own = model.state_dict()
    for name in sorted(own.keys() ^ weights.keys()):
        where = 'missing from' if name in own else 'unexpected in'
        raise InputError(f'{source}: the weight {name} is {where} the file: it is of another architecture')
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise InputError(f'{source}: {name} has the shape {tuple(weights[name].shape)}, this model needs '
                             f'{tuple(tensor.shape)}')


def load_weights(model, weights, source):
    """Give `model`, which may lie on the meta device, copies of `weights`. Raises InputError if they do not fit."""
    check_weights(model, weights, source)
    copies = {}  # a parameter with two names stays one
    for name, p in model.state_dict(keep_vars=True).items():
        if id(p) not in copies:
            copies[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype).copy_(weights[name]))
    model.load_state_dict({name: copies[id(p)] for name, p in model.state_dict(keep_vars=True).items()}, assign=True)


WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'  # the latter says which file has which tensor
DTYPES = {torch.float32: 'F32', torch.bfloat16: 'BF16', torch.float16: 'F16'}  # safetensors' names


def load_hf(source):
    """
    (config.json's content, name -> tensor, the folder) of a model in Hugging Face's format, in one safetensors file or
    several: a folder, or a name such as 'gpt2-medium' or 'openai-community/gpt2' that is downloaded through
    huggingface_hub. The tensors are read from the files when they are used. Raises InputError.
    """
    get = _local(source) if os.path.isdir(source) else _hub(source)
    config = _json(get('config.json'))
    single = get(WEIGHTS, optional=True)
    if single:
        return config, _tensors(single), os.path.dirname(single)
    index = get(INDEX)
    files, tensors = _json(index).get('weight_map'), {}
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f'{index} is damaged: its weight_map does not say which tensor is in which file')
    for file in sorted(set(files.values())):
        tensors |= _tensors(get(file))
    for name in sorted(tensors.keys() ^ files.keys()):
        raise InputError(f'{source}: {name} is only in one of {INDEX} and the files')
    return config, tensors, os.path.dirname(index)


def _json(path):
    try:
        with open(path, encoding='utf-8') as f:
            content = json.load(f)
    except ValueError as e:
        raise InputError(f'{path} is damaged: {e}') from None
    if not isinstance(content, dict):
        raise InputError(f'{path} is damaged: it is no object')
    return content


def _tensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except SafetensorError as e:
        with open(path, 'rb') as f:
            pointer = f.read(40).startswith(b'version https://git-lfs')
        raise InputError(f'{path} is a pointer of git-lfs: git lfs pull fetches what it points to' if pointer else
                         f'{path} is damaged: {e}') from None


def _local(folder):
    def get(name, optional=False):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            if optional:
                return None
            raise InputError(f'{folder} is not a model in Hugging Face format: it has no '
                             f'{f"{WEIGHTS} nor {INDEX}" if name == INDEX else name}')
        return path
    return get


def _hub(name):
    if '/' not in name and not name.startswith('gpt2'):
        raise InputError(f'there is no folder or checkpoint {name!r}')
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    repository = name if '/' in name else f'openai-community/{name}'

    def get(file, optional=False):
        try:
            return hf_hub_download(repository, file)
        except Exception as e:  # huggingface_hub's errors, and those of the HTTP library under it
            if optional and isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError):
                return None
            raise InputError(f'{name!r} is no local folder, and downloading {file} of {repository} failed '
                             f'({type(e).__name__}): connect to the network, or give a folder with config.json and '
                             f'{WEIGHTS}') from None
    if repository != f'openai-community/{name}':  # whose tokenizer tiktoken has as well
        for file in ('tokenizer.json', 'tokenizer_config.json'):
            with contextlib.suppress(InputError):  # it is missed when it is needed
                get(file, optional=True)
    return get


def cast(name, tensor, dtype):
    """The tensor in dtype, contiguous. Raises InputError for numbers too large for it."""
    tensor = tensor.detach().to(dtype).cpu().contiguous()
    if dtype == torch.float16 and not tensor.isfinite().all():
        raise InputError(f'{name} has numbers beyond 65504, the largest in float16: use bfloat16')
    return tensor


def save_tensors(path, convert, weights, dtype, metadata=None):
    """
    Write the (name, tensor) pairs that convert(weights) yields to a safetensors file (https://github.com/huggingface/
    safetensors), in dtype. The library's own writer needs all of them in memory; here it is one at a time: convert is
    asked once without values, for the header, and then again. metadata: more for the header, strings by name. Raises
    InputError.
    """
    header, end = {'__metadata__': {'format': 'pt', **(metadata or {})}}, 0
    for name, tensor in convert({name: tensor.to('meta') for name, tensor in weights.items()}):
        begin, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {'dtype': DTYPES[dtype], 'shape': list(tensor.shape), 'data_offsets': [begin, end]}
    head = json.dumps(header).encode()
    head += b' ' * (-len(head) % 8)
    try:
        with open(path + '.tmp', 'wb') as f:
            f.write(len(head).to_bytes(8, 'little') + head)
            for name, tensor in convert(weights):
                f.write(cast(name, tensor, dtype).view(-1).view(torch.uint8).numpy())
        os.replace(path + '.tmp', path)
    except OSError as e:
        raise InputError(f'could not write {path}: {e.strerror}') from None
    finally:
        _remove(path + '.tmp')
