"""
Adapters in files: adapter_config.json and adapter_model.safetensors, as Hugging Face's peft writes and reads them
(https://github.com/huggingface/peft). So an adapter goes from here into a model of transformers and back.

The reader is strict: it refuses by name what a file asks for and this project does not have. put_adapter() refuses a
tensor that is missing or left over. Bottleneck adapters, which peft does not have, are written in the same form with a
type of their own. The header of the tensors' file also holds the hash of the base's weights, and the format in which
the base was held.
"""

import json
import os

import torch

from configurator import InputError
from model import GPTConfig
from sologpt.adapters.adapter import Adapter
from sologpt.adapters.config import AdapterConfig
from sologpt.adapters.method import Method
from sologpt.adapters.methods import METHODS
from sologpt.files.safetensors_files import write_tensors

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
# keys of all methods -> the values that they may have
ALLOWED = {'task_type': (None, 'CAUSAL_LM'), 'bias': ('none',),
           'layers_pattern': (None, '', [], 'h', ['h'], 'layers', ['layers'])}
# keys of all methods that change nothing here: they say where the adapter is from, or how it is held
IGNORED = ('peft_type', 'base_model_name_or_path', 'auto_mapping', 'peft_version', 'revision', 'inference_mode',
           'fan_in_fan_out')


def write_adapter(folder: str, adapter: Adapter, model_config: GPTConfig, fan_in_fan_out: bool | None = None) -> None:
    """
    Write the adapter's two files into `folder`. model_config: its base's. fan_in_fan_out: whether the base holds the
    transpose of a Linear's weight in transformers; None: as GPT-2 does, if that is the architecture. Raises InputError.
    """
    config = adapter.config
    config.complete(model_config)
    transposed = model_config.arch == 'gpt2' if fan_in_fan_out is None else fan_in_fan_out
    settings = {'peft_type': config.cls.peft_type, 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': adapter.base,
                'inference_mode': True,
                **{key: getattr(config, field) for field, key in config.cls.peft_fields.items()},
                **config.cls.peft_settings(model_config, transposed)}
    metadata = {'base_hash': adapter.base_hash, 'base_format': adapter.base_format}
    paths = {name: os.path.join(folder, name) for name in (CONFIG, WEIGHTS)}
    try:
        os.makedirs(folder, exist_ok=True)
        with open(paths[CONFIG] + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(settings, f, indent=2)
        write_tensors(paths[WEIGHTS], dict.items, adapter.tensors, torch.float32, metadata)
        os.replace(paths[CONFIG] + '.tmp', paths[CONFIG])
    except OSError as e:
        raise InputError(f'could not write an adapter to {folder}: {e}') from None


def read_adapter(folder: str) -> Adapter:
    """The Adapter in `folder`. Raises InputError."""
    from safetensors import SafetensorError, safe_open
    if not os.path.isdir(folder):
        raise InputError(f'there is no folder {folder!r} with an adapter')
    for name in (CONFIG, WEIGHTS):
        if not os.path.isfile(os.path.join(folder, name)):
            raise InputError(f'{folder} is no adapter: it has no {name}')
    try:
        with open(os.path.join(folder, CONFIG), encoding='utf-8') as f:
            settings = json.load(f)
        with safe_open(os.path.join(folder, WEIGHTS), 'pt') as f:
            tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except (ValueError, SafetensorError) as e:
        raise InputError(f'{folder}: the adapter is damaged: {str(e)[:100]}') from None
    config = _config_of(settings, os.path.join(folder, CONFIG))
    return Adapter(config, tensors, str(settings.get('base_model_name_or_path') or ''), metadata.get('base_hash', ''),
                   metadata.get('base_format', 'float32'), settings.get('num_attention_heads'))


def _config_of(settings, source):
    """The AdapterConfig that the content of adapter_config.json describes. Raises InputError."""
    cls = _method_of(settings, source)
    _check_settings(settings, cls, source)
    fields = {field: settings[key] for field, key in cls.peft_fields.items() if settings.get(key) is not None}
    if 'target_modules' in cls.peft_fields and not fields.get('target_modules'):
        raise InputError(f'{source} has no target_modules: it has to say which Linears the adapter is for')
    if 'lora_alpha' in cls.peft_fields and 'lora_alpha' not in fields:
        raise InputError(f'{source} has no lora_alpha: the scale is not known')
    if isinstance(fields.get('layers_to_transform'), int):
        fields['layers_to_transform'] = [fields['layers_to_transform']]
    return AdapterConfig(cls.name, **fields)


def _method_of(settings, source) -> type[Method]:
    kind = settings.get('peft_type') if isinstance(settings, dict) else None
    methods = [cls for cls in METHODS.values() if cls.peft_type == kind]
    if not methods:
        known = dict.fromkeys(cls.peft_type for cls in METHODS.values())
        raise InputError(f'{source}: peft_type={kind!r} is not known here: known are {", ".join(known)}')
    return next((cls for cls in methods
                 if all(bool(settings.get(key)) == value for key, value in cls.peft_marks.items())), methods[0])


def _check_settings(settings, cls, source):
    """Refuse keys that would change what the adapter computes, and that the method does not have here."""
    allowed, known = ALLOWED | cls.peft_allowed, {*IGNORED, *cls.peft_ignored, *cls.peft_fields.values()}
    for key, value in settings.items():
        if key in allowed:
            if value not in allowed[key]:
                raise InputError(f'{source} has {key}={value!r}: known here are {", ".join(map(repr, allowed[key]))}')
        elif value and key not in known:
            raise InputError(f'{source} has {key}={value!r}, which this project does not have')
