"""
The small files that lie beside the weights of a model in Hugging Face's format: its settings, its tokenizer, its chat
template. They come along with the model as they are, byte for byte, so that other software reads back what it wrote.

In a checkpoint they are tensors of bytes: name -> (length,) uint8. A checkpoint has only tensors and plain values.
"""

import json
import os
import re

import numpy as np
import torch

from configurator import InputError

COMPANIONS = ('config.json', 'tokenizer_config.json', 'tokenizer.json', 'generation_config.json',
              'special_tokens_map.json', 'chat_template.jinja', 'chat_template.json', 'added_tokens.json',
              'vocab.json', 'merges.txt', 'tokenizer.model', 'tekken.json')
# transformers keeps further chat templates of a model in this folder
TEMPLATES, TEMPLATE_NAME = 'additional_chat_templates', re.compile(r'additional_chat_templates/[\w-][\w.-]*\.jinja')

Companions = dict[str, torch.Tensor]  # name -> (length,) uint8


def read_companions(folder: str) -> Companions:
    """The companions in a folder, those that there are. Raises InputError if one cannot be read."""
    templates = os.path.join(folder, TEMPLATES)
    more = [f'{TEMPLATES}/{name}' for name in sorted(os.listdir(templates))] if os.path.isdir(templates) else []
    paths = {name: os.path.join(folder, name) for name in (*COMPANIONS, *more) if _is_companion(name)}
    try:
        return {name: torch.from_numpy(np.fromfile(path, np.uint8)) for name, path in paths.items()
                if os.path.isfile(path)}
    except OSError as e:
        raise InputError(f'{folder}: {e}') from None


def write_companions(folder: str, companions: Companions) -> None:
    """Write the files into a folder. Raises InputError for a name that is no companion's, such as '../x'."""
    for name, content in companions.items():
        if not _is_companion(name):
            raise InputError(f'{name!r} is no file that comes along with a model: not written')
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as f:
            f.write(content.numpy())


def chat_template(companions: Companions) -> str | None:
    """
    The template that makes one text of the messages of a chat, in Jinja: chat_template.jinja, or else that in
    tokenizer_config.json, which of several is the one named default. None without one. Raises InputError.
    """
    name = 'tokenizer_config.json'
    try:
        if 'chat_template.jinja' in companions:
            name = 'chat_template.jinja'
            return _text(companions[name])
        template = json.loads(_text(companions[name])).get('chat_template') if name in companions else None
        if isinstance(template, list):
            template = {one['name']: one['template'] for one in template}.get('default')
        if not isinstance(template, str | None):
            raise TypeError('chat_template is no text')
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f'{name} of the model is damaged: {type(e).__name__}: {e}') from None
    return template


def read_settings(companions: Companions, name: str) -> dict:
    """The content of the JSON file `name`, or {} if it is not among them. Raises InputError if it is damaged."""
    try:
        return json.loads(_text(companions[name])) if name in companions else {}
    except ValueError as e:
        raise InputError(f'{name} of the model is damaged: {e}') from None


def with_dtype(companions: Companions, dtype: str) -> Companions:
    """The same for weights in dtype, which config.json names. It keeps its bytes if it names it already."""
    settings = read_settings(companions, 'config.json')
    key = 'dtype' if 'dtype' in settings else 'torch_dtype'
    if settings.get(key) == dtype:
        return companions
    text = json.dumps(settings | {key: dtype}, indent=2) + '\n'
    return companions | {'config.json': torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())}


def _text(content):
    return content.numpy().tobytes().decode('utf-8')


def _is_companion(name):
    return name in COMPANIONS or TEMPLATE_NAME.fullmatch(name) is not None
