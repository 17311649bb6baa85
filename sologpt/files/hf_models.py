"""
Models in Hugging Face's files, reading and writing: from a folder to GPTConfig's keys and our weights, and back.
"""

import json
import os
from collections.abc import Callable, Iterator, MutableMapping

import torch
import torch.nn.functional as F

from configurator import InputError
from sologpt.files.families import FAMILIES
from sologpt.files.family import ACTIVATIONS, EMBEDDINGS, LINEARS, Family, Tensors, stays_tied, take
from sologpt.files.safetensors_files import read_hf_folder, read_json, write_tensors
from sologpt.matmuls.elementwise import RMS_EPS

Tensor = torch.Tensor


class LazyTensors(MutableMapping):
    """name -> tensor, where a tensor may be a function that makes it whenever it is asked for."""

    def __init__(self):
        self.tensors: dict[str, Tensor | Callable[[], Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor() if callable(tensor) else tensor

    def __setitem__(self, name: str, tensor: Tensor | Callable[[], Tensor]) -> None:
        self.tensors[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_hf_model(source: str) -> tuple[dict, MutableMapping[str, Tensor], str, str]:
    """
    (GPTConfig's keys, name -> tensor, the name of the family, the folder) of a model in Hugging Face's format. A tensor
    is in the file's dtype, and is read when it is used.

    source: a folder or the name of a repository. Raises InputError if the model is of none of the families, or has a
    part that this project does not have.
    """
    settings, theirs, folder = read_hf_folder(source)
    name, config = _read_config(settings, source)
    family = FAMILIES[name]
    theirs = _with_full_names(family, theirs)
    if config['tied'] and 'lm_head.weight' in theirs:  # transformers ties them only if they are equal
        config['tied'] = torch.equal(theirs['lm_head.weight'], theirs[f'{family.modules["transformer.wte"][0]}.weight'])
    own = _from_theirs(family, config, theirs, source)
    return _with_our_activation(config), own, name, folder


def read_hf_config(folder: str) -> dict:
    """GPTConfig's keys of a folder with config.json, which needs no weights. Raises InputError."""
    return _with_our_activation(_read_config(read_json(os.path.join(folder, 'config.json')), folder)[1])


def _read_config(settings, source):
    """(the name of the family, GPTConfig's keys but with their name of the activation) of config.json's content."""
    name = settings.get('model_type')
    if name not in FAMILIES:
        raise InputError(f'{source}: config.json has model_type={name!r}; only {", ".join(FAMILIES)} can be loaded')
    return name, FAMILIES[name].read_config(settings, source)


def _with_our_activation(config):
    return config | {'activation': ACTIVATIONS.get(config['activation'], config['activation'])}


def _with_full_names(family, theirs):
    # A model that is saved without its head has no prefix. Old files have masks and frequencies, which follow from
    # the config.
    prefix = family.modules['transformer.wte'][0].split('.')[0] + '.'
    return {name if name.startswith((prefix, 'lm_head.')) else prefix + name: tensor for name, tensor in theirs.items()
            if not name.endswith(('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq'))}


def _from_theirs(family, config, theirs, source):
    """Our weights, name -> tensor. Raises InputError unless they are exactly what `theirs` holds."""
    own = LazyTensors()
    for ours, names in family.names(config['n_layer'], config['tied']):
        ends = ['weight']
        if ours not in EMBEDDINGS and (family.bias or family.bias is None and f'{names[0]}.bias' in theirs):
            ends.append('bias')
        for end in ends:
            parts = [take(theirs, f'{name}.{end}', source) for name in names]
            if family.transposed and ours.endswith(LINEARS):
                own[f'{ours}.{end}'] = parts[0].t() if end == 'weight' else parts[0]
            else:
                own[f'{ours}.{end}'] = parts[0] if len(parts) == 1 else lambda parts=parts: torch.cat(parts)
    if 'transformer.wpe.weight' in own:
        own['transformer.wpe.weight'] = own['transformer.wpe.weight'][family.first_position:]
    if config['tied']:
        own['lm_head.weight'] = own['transformer.wte.weight']
        theirs.pop('lm_head.weight', None)
    family.absorb(config, theirs, own, source)
    for left in theirs:
        raise InputError(f'{source}: the weight {left} is unexpected in the file')
    return own


# ---- writing ---------------------------------------------------------------------------------------------------------

def write_hf_config(folder: str, name: str, config, dtype: torch.dtype, eot: int | None) -> None:
    """
    Write config.json and generation_config.json of a model of the family `name` with weights in dtype.

    config: its GPTConfig. eot: the id that ends a text.
    """
    family = FAMILIES[name]
    ends = {'bos_token_id': eot, 'eos_token_id': eot}
    settings = {
        'architectures': [family.cls], 'model_type': name, **family.write_config(config),
        family.keys['vocab_size']: config.n_ids, **ends,
        'pad_token_id': None,  # the row of the table that would get no gradient
        'torch_dtype': str(dtype).removeprefix('torch.')}
    if name == 'gpt2':
        settings['n_ctx'] = config.block_size  # an older name, which some software still reads
    for file, content in (('generation_config.json', {} if eot is None else ends | {'pad_token_id': eot}),
                          ('config.json', settings)):
        with open(os.path.join(folder, file), 'w', encoding='utf-8') as f:
            json.dump(content, f, indent=2)


def write_hf_weights(folder: str, name: str, config, weights: Tensors, dtype: torch.dtype, rows: int) -> None:
    """Write model.safetensors in dtype. rows: of the table of embeddings. Raises InputError."""
    write_tensors(os.path.join(folder, 'model.safetensors'),
                  lambda weights: to_theirs(FAMILIES[name], config, weights, rows), weights, dtype)


def to_theirs(family: Family, config, weights: Tensors, rows: int) -> Iterator[tuple[str, Tensor]]:
    """
    Yields (name, tensor): the weights of a model as the family has them, as views if possible.

    Of the tables of ids the first `rows` are written. Absent gains are ones, and absent biases are zeros if the family
    always has some. A norm of the embedding becomes part of the table.
    """
    device = weights['transformer.wte.weight'].device
    for ours, theirs in family.names(config.n_layer, stays_tied(config)):
        weight, bias = (weights.get(f'{ours}.{end}') for end in ('weight', 'bias'))
        if weight is None:
            weight = torch.ones(config.n_embd, device=device)
        if ours in ('transformer.wte', 'lm_head'):
            weight = weight[:rows]
        if ours == 'transformer.wte' and config.embd_norm:
            weight = F.rms_norm(weight.float(), (config.n_embd,), eps=RMS_EPS)
        if ours == 'transformer.wpe' and family.first_position:
            weight = F.pad(weight, (0, 0, family.first_position, 0))
        if family.factor(ours, config) != 1:
            weight = weight * family.factor(ours, config)
        if bias is None and family.bias and ours not in EMBEDDINGS:
            bias = torch.zeros(len(weight), device=device)
        if family.transposed and ours.endswith(LINEARS):
            weight = weight.t()
        parts = config.parts_of('.'.join(ours.split('.')[3:])) if len(theirs) > 1 else None
        for end, tensor in (('weight', weight), ('bias', bias if family.bias is not False else None)):
            if tensor is not None:
                for name, part in zip(theirs, tensor.split(parts) if parts else [tensor], strict=True):
                    yield f'{name}.{end}', part
    for name, value in family.extras(config):
        yield name, torch.tensor(value, device=device)
