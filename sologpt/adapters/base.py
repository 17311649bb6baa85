"""
The base of an adapter: which model it is, and how it is loaded.
"""

import hashlib

import torch
import torch.nn as nn

from configurator import InputError
from model import GPT
from sologpt.adapters.adapter import Adapter, model_class
from sologpt.matmuls.held import hold_base, kept_for_base

PIECE = 2 ** 22  # numbers that are hashed at a time


def fingerprint(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of a model's weights: their names, shapes and values, in whatever dtype they are."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f'{name} {tuple(p.shape)} '.encode())
        for piece in p.detach().flatten().split(PIECE):  # a copy of a whole table in float32 would be large
            digest.update(piece.cpu().float().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_base(adapter: Adapter, found: str, source: str) -> None:
    """Raises InputError if the adapter was trained on another base. found: fingerprint() of the model at `source`."""
    if adapter.base_hash not in ('', found):
        raise InputError(f'the adapter was trained on another base than {source} (it was {adapter.base}, with the hash '
                         f'{adapter.base_hash[:12]}; this one has {found[:12]})')


def take_base(adapter: Adapter, model: nn.Module, source: str) -> None:
    """Note in the adapter that `model`, from `source`, is its base. Raises InputError if it was another one."""
    found = fingerprint(model)
    check_base(adapter, found, source)
    adapter.base, adapter.base_hash = source, found


def load_base(adapters: list[Adapter], source: str | None = None, or_merged: bool = False,
              **overrides) -> tuple[GPT, dict]:
    """
    (model, what else its checkpoint holds): the base of the adapters, held as it was when they were trained. Its
    fingerprint is in what else it holds, as 'merged_from'. An adapter that adds tokens has its own class of model.

    source: where the base lies; None: where the first adapter says. or_merged: the model may also be that base with
    adapters already merged into it. overrides: keys of GPTConfig that do not shape the weights. Raises InputError.
    """
    source = source or adapters[0].base
    if not source:
        raise InputError('the adapter does not say where its base is: give its name or folder as init_from')
    classes = [model_class(adapter.config) for adapter in adapters]
    cls = next((cls for cls in classes if cls is not GPT), GPT)
    base_format = adapters[0].base_format
    model, saved = cls.from_checkpoint(source, kept_for_base(base_format), **overrides)
    if or_merged and all(adapter.base_hash == saved.get('merged_from', '-') for adapter in adapters):
        for adapter in adapters:
            if adapter.config.cls.depends_on_base:
                raise InputError(f'{source} has been merged into already, and a {adapter.config.method} needs the rows '
                                 f'of its base')
        return model.float(), saved
    for adapter in adapters:
        if adapter.base_format != base_format:
            raise InputError(f'one adapter is for a base in {base_format}, another for one in '
                             f'{adapter.base_format}')
    found = fingerprint(model)
    for adapter in adapters:
        check_base(adapter, found, source)
        adapter.base, adapter.base_hash = source, found
    saved['merged_from'] = found
    hold_base(model, base_format, 'float32')
    return model, saved
