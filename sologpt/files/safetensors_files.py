"""
Folders in Hugging Face's format, on the disk or on the hub: config.json, and weights in safetensors
(https://github.com/huggingface/safetensors). Which model a folder holds is the matter of families.py.

The weights of a model lie in one file, or in several with an index that says which tensor is in which file.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable

import torch

from configurator import InputError
from sologpt.files.companions import COMPANIONS

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DTYPE_NAMES = {torch.float32: 'F32', torch.bfloat16: 'BF16', torch.float16: 'F16'}  # in the header of a file

Tensor = torch.Tensor
Tensors = dict[str, Tensor]  # by name


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_hf_folder(source: str) -> tuple[dict, Tensors, str]:
    """
    (the content of config.json, name -> tensor, the folder) of a model in Hugging Face's format.

    source: a folder, or a name such as 'gpt2-medium' or 'openai-community/gpt2', which is downloaded through
    huggingface_hub. A tensor is read from the file when it is used. Raises InputError.
    """
    find = _find_in_folder(source) if os.path.isdir(source) else _find_on_hub(source)
    config = read_json(find('config.json'))
    single = find(WEIGHTS, optional=True)
    if single:
        return config, _read_tensors(single), os.path.dirname(single)
    index = find(INDEX)
    files, tensors = read_json(index).get('weight_map'), {}
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f'{index} is damaged: its weight_map does not say which tensor is in which file')
    for file in sorted(set(files.values())):
        tensors |= _read_tensors(find(file))
    for name in sorted(tensors.keys() ^ files.keys()):
        raise InputError(f'{source}: {name} is only in one of {INDEX} and the files')
    return config, tensors, os.path.dirname(index)


def read_json(path: str) -> dict:
    """The object in a file of JSON. Raises InputError."""
    try:
        with open(path, encoding='utf-8') as f:
            content = json.load(f)
    except ValueError as e:
        raise InputError(f'{path} is damaged: {e}') from None
    if not isinstance(content, dict):
        raise InputError(f'{path} is damaged: it is no object')
    return content


def _read_tensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except SafetensorError as e:
        with open(path, 'rb') as f:
            is_pointer = f.read(40).startswith(b'version https://git-lfs')
        raise InputError(f'{path} is a pointer of git-lfs: git lfs pull fetches what it points to' if is_pointer else
                         f'{path} is damaged: {e}') from None


def _find_in_folder(folder):
    """find(name): the path of a file in the folder. If `optional`, the path or None. Raises InputError."""
    def find(name, optional=False):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
        if optional:
            return None
        missing = f'{WEIGHTS} nor {INDEX}' if name == INDEX else name
        raise InputError(f'{folder} is not a model in Hugging Face format: it has no {missing}')
    return find


def _find_on_hub(name):
    """The same of a repository: find() downloads the file, unless it lies in the cache."""
    if '/' not in name and not name.startswith('gpt2'):
        raise InputError(f'there is no folder or checkpoint {name!r}: train that model first, or name another')
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    repository = name if '/' in name else f'openai-community/{name}'

    def find(file, optional=False):
        try:
            return hf_hub_download(repository, file)
        except Exception as e:  # errors of huggingface_hub, and of the HTTP library under it
            is_absent = isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError)
            if optional and is_absent:
                return None
            raise InputError(f'{name!r} is no local folder, and downloading {file} of {repository} failed '
                             f'({type(e).__name__}): connect to the network, or give a folder with config.json and '
                             f'{WEIGHTS}') from None
    if repository != f'openai-community/{name}':  # tiktoken has the tokenizer of the others
        with contextlib.suppress(InputError):  # whoever needs a file that cannot be reached will miss it
            for file in COMPANIONS:
                find(file, optional=True)
    return find


# ---- writing ---------------------------------------------------------------------------------------------------------

def write_tensors(path: str, convert: Callable[[Tensors], Iterable[tuple[str, Tensor]]], weights: Tensors,
                  dtype: torch.dtype, metadata: dict[str, str] | None = None) -> None:
    """
    Write the (name, tensor) pairs that convert(weights) yields to a safetensors file, in dtype.

    The library's own writer needs all tensors in memory at once. Here one exists at a time: convert() is called on
    tensors without values for the header, and once more for the values. metadata: more for the header. Raises
    InputError.
    """
    header, end = {'__metadata__': {'format': 'pt', **(metadata or {})}}, 0
    for name, tensor in convert({name: tensor.to('meta') for name, tensor in weights.items()}):
        begin, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {'dtype': DTYPE_NAMES[dtype], 'shape': list(tensor.shape), 'data_offsets': [begin, end]}
    head = json.dumps(header).encode()
    head += b' ' * (-len(head) % 8)
    try:
        with open(path + '.tmp', 'wb') as f:
            f.write(len(head).to_bytes(8, 'little') + head)
            for name, tensor in convert(weights):
                f.write(cast_weight(name, tensor, dtype).view(-1).view(torch.uint8).numpy())
        os.replace(path + '.tmp', path)
    except OSError as e:
        raise InputError(f'could not write {path}: {e.strerror}') from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + '.tmp')


def cast_weight(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in dtype, contiguous, on the CPU. Raises InputError if it has numbers too large for the dtype."""
    tensor = tensor.detach().to(dtype).cpu().contiguous()
    if dtype == torch.float16 and not tensor.isfinite().all():
        raise InputError(f'{name} has numbers beyond 65504, the largest in float16: use bfloat16')
    return tensor


def cast_weights(weights: Tensors, dtype: torch.dtype) -> Tensors:
    """Each of the weights as cast_weight() returns it."""
    return {name: cast_weight(name, tensor, dtype) for name, tensor in weights.items()}
