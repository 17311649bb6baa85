"""
Adapters in files: adapter_config.json and adapter_model.safetensors, as Hugging Face's peft writes and reads them
(https://github.com/huggingface/peft), so that an adapter goes from here into a model of transformers and back.

peft has no bottleneck adapters: theirs are in the same form, with a type of their own. The reader is strict: what a
file asks for and this project has not is refused by name, and so is a tensor that is missing or left over. The header
of the tensors' file also says of which base the adapter is (a hash of its weights) and in what format it was held.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import InputError
from model import GPT
from sologpt.adapters.adapters import AdapterConfig, LoRA, VeRA, attach, parts
from sologpt.files import checkpoint
from sologpt.files.hf_files import LINEARS
from sologpt.matmuls.elementwise import RMS_EPS
from sologpt.matmuls.held import hold_base

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'  # peft's, before the names of a model's modules

# peft_type -> AdapterConfig's fields, each with peft's key
FIELDS = {
    'LORA': {'r': 'r', 'lora_alpha': 'lora_alpha', 'use_rslora': 'use_rslora', 'dropout': 'lora_dropout',
             'target_modules': 'target_modules', 'exclude_modules': 'exclude_modules',
             'layers_to_transform': 'layers_to_transform', 'rank_pattern': 'rank_pattern',
             'alpha_pattern': 'alpha_pattern'},
    'VERA': {'r': 'r', 'dropout': 'vera_dropout', 'target_modules': 'target_modules',
             'layers_to_transform': 'layers_to_transform', 'projection_prng_key': 'projection_prng_key'},
    'BOTTLENECK': {'r': 'r', 'target_modules': 'target_modules', 'layers_to_transform': 'layers_to_transform'},
    'PROMPT_TUNING': {'num_virtual_tokens': 'num_virtual_tokens'},
    'PREFIX_TUNING': {'num_virtual_tokens': 'num_virtual_tokens'},
}
TYPES = {'lora': 'LORA', 'dora': 'LORA', 'vera': 'VERA', 'bottleneck': 'BOTTLENECK', 'prompt': 'PROMPT_TUNING',
         'prefix': 'PREFIX_TUNING'}
# train.py's keys -> AdapterConfig's fields
KEYS = {'adapter': 'method', 'adapter_r': 'r', 'adapter_targets': 'target_modules', 'adapter_dropout': 'dropout',
        'lora_alpha': 'lora_alpha', 'use_rslora': 'use_rslora', 'num_virtual_tokens': 'num_virtual_tokens'}
# keys with the values that they may have. An initialisation that has changed the base is not among them
ALLOWED = {'task_type': (None, 'CAUSAL_LM'), 'bias': ('none',), 'num_transformer_submodules': (None, 1),
           'init_lora_weights': (True, False, 'gaussian', 'eva', 'orthogonal'), 'use_dora': (True, False),
           'layers_pattern': (None, '', [], 'h', ['h'])}
# keys that say where the adapter is from, how it began, or belong to another that is empty
WITHOUT_EFFECT = {
    'peft_type', 'base_model_name_or_path', 'auto_mapping', 'peft_version', 'revision', 'inference_mode',
    'fan_in_fan_out', 'megatron_core', 'qalora_group_size', 'd_initial', 'init_weights', 'save_projection',
    'prompt_tuning_init', 'prompt_tuning_init_text', 'tokenizer_name_or_path', 'tokenizer_kwargs',
    'encoder_hidden_size', 'token_dim', 'num_layers', 'num_attention_heads'}


@dataclass
class Adapter:
    config: AdapterConfig
    tensors: dict  # name, as in peft's files -> tensor
    base: str = ''  # where its base lies
    base_hash: str = ''  # fingerprint() of it; '': unknown, of a file of peft's
    base_format: str = 'float32'
    heads: int | None = None  # that the base has to have, if known

    def to_save(self):
        """All but the tensors, as plain values."""
        return {'config': asdict(self.config), 'base': self.base, 'base_hash': self.base_hash,
                'base_format': self.base_format}

    @classmethod
    def from_saved(cls, saved, tensors):
        return cls(**saved | {'config': AdapterConfig(**saved['config'])}, tensors=tensors)


def from_keys(keys):
    """The AdapterConfig that train.py's keys describe."""
    fields = {field: keys[key] for key, field in KEYS.items()}
    if re.fullmatch(r'[\w.,]+', fields['target_modules'] or ''):  # names, and no regular expression
        fields['target_modules'] = fields['target_modules'].split(',')
    return AdapterConfig(**fields)


def to_keys(config):
    """The other way: those of the keys that mean something to the method."""
    known = ('method', *FIELDS[TYPES[config.method]])
    values = {key: getattr(config, field) for key, field in KEYS.items() if field in known}
    return {key: ','.join(value) if isinstance(value, list) else value for key, value in values.items()}


def fingerprint(model):
    """SHA-256 of a model's weights: their names, shapes and values."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f'{name} {tuple(p.shape)} '.encode())
        digest.update(p.detach().cpu().float().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_base(adapter, found, source):
    """found: fingerprint() of the model at `source`. Raises InputError if the adapter is of another one."""
    if adapter.base_hash not in ('', found):
        raise InputError(f'the adapter was trained on another base than {source} (it was {adapter.base}, with the hash '
                         f'{adapter.base_hash[:12]}; this one has {found[:12]})')


def load_base(adapters, source=None, or_merged=False):
    """
    (model, what else its checkpoint holds): the base of the adapters, in the format in which it was held when they were
    trained, with the hash of its weights as 'merged_from'. source: where it lies; None: where the first of them says.
    or_merged: it may also be what others were merged into before. Raises InputError.
    """
    source = source or adapters[0].base
    if not source:
        raise InputError('the adapter does not say where its base is: give its name or folder as init_from')
    model, saved = GPT.from_checkpoint(source)
    if or_merged and all(adapter.base_hash == saved.get('merged_from', '-') for adapter in adapters):
        if any(adapter.config.method == 'dora' for adapter in adapters):
            raise InputError(f'{source} has been merged into already, and a dora needs the rows of its base')
        return model, saved
    found = fingerprint(model)
    for adapter in adapters:
        check_base(adapter, found, source)
        adapter.base, adapter.base_hash = source, found
        if adapter.base_format != adapters[0].base_format:
            raise InputError(f'of the adapters one is of a base in {adapters[0].base_format}, another of one in '
                             f'{adapter.base_format}')
    saved['merged_from'] = found
    hold_base(model, adapters[0].base_format, 'float32')
    return model, saved


def tensors_of(model):
    """The tensors of the model's adapter by their names in files. They are the model's own, not copies."""
    if model.n_virtual:
        return {'prompt_embeddings': model.virtual.detach()}
    tensors = {}
    for name, part in parts(model):
        for parameter, end in part.files.items():
            tensors[f'{PREFIX}{name}.{end}'] = getattr(part, parameter).detach()
        if isinstance(part, VeRA):
            tensors |= {'base_model.vera_A': part.projection.A, 'base_model.vera_B': part.projection.B}
    return tensors


def put_to(model, adapter, source):
    """Freeze the model, on the CPU, and put the adapter to it. Raises InputError where it does not fit `source`."""
    if adapter.heads not in (None, model.config.n_head):
        raise InputError(f'{source} is for {adapter.heads} heads, the model has {model.config.n_head}')
    attach(model, adapter.config)
    expected = tensors_of(model)
    given = dict(adapter.tensors)
    if adapter.config.method == 'vera' and 'base_model.vera_A' not in given:  # save_projection=False
        given |= {name: tensor for name, tensor in expected.items() if name.startswith('base_model.vera_')}
    for name in sorted(expected.keys() ^ given.keys()):
        where = 'missing from' if name in expected else 'unexpected in'
        raise InputError(f'{source}: {name} is {where} {WEIGHTS}')
    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            raise InputError(f'{source}: {name} has the shape {tuple(given[name].shape)}, this model needs '
                             f'{tuple(tensor.shape)}')

    def take(module, parameter, name):
        # a copy, which is the model's alone; and not into what is there, which may lie on no device (low_rank)
        setattr(module, parameter, nn.Parameter(given[name].to(torch.float32, copy=True)))
    if model.n_virtual:
        take(model, 'virtual', 'prompt_embeddings')
    for name, part in parts(model):
        for parameter, end in part.files.items():
            take(part, parameter, f'{PREFIX}{name}.{end}')
        if isinstance(part, VeRA):
            part.projection.A, part.projection.B = (given[f'base_model.vera_{half}'].float() for half in 'AB')


def low_rank(model_config, adapter, source):
    """The adapter as name of a Linear -> (A, B), its change of that weight being B A. Raises InputError."""
    skeleton = GPT.skeleton(model_config)
    put_to(skeleton, adapter, source)
    if skeleton.n_virtual:
        raise InputError(f'{source}: virtual tokens change no weights: they cannot be stacked, nor share a batch')
    return {name: part.low_rank() for name, part in parts(skeleton)}


def stack(model_config, adapters, weights, sources):
    """
    One LoRA adapter whose change is the sum of the adapters' changes times the weights, exactly: their ranks add up.
    Raises InputError where one of them is no product of two small matrices.
    """
    stacked = {}
    for adapter, weight, source in zip(adapters, weights, sources, strict=True):
        for name, (A, B) in low_rank(model_config, adapter, source).items():
            As, Bs = stacked.setdefault(name, ([], []))
            As.append(A)
            Bs.append(weight * B)
    stacked = {name: (torch.cat(As), torch.cat(Bs, dim=1)) for name, (As, Bs) in stacked.items()}
    ranks = {name: len(A) for name, (A, _) in stacked.items()}
    r = max(ranks.values())
    all_of_them = len(ranks) == len(LINEARS) * model_config.n_layer
    other = {name: rank for name, rank in ranks.items() if rank != r}
    config = AdapterConfig('lora', r=r, lora_alpha=float(r), target_modules=None if all_of_them else list(ranks),
                           rank_pattern=other, alpha_pattern={name: float(rank) for name, rank in other.items()})
    ends = ('lora_A.weight', 'lora_B.weight')
    tensors = {f'{PREFIX}{name}.{end}': matrix for name, pair in stacked.items()
               for end, matrix in zip(ends, pair, strict=True)}
    return replace(adapters[0], config=config, tensors=tensors)


def for_family(model_config, adapter, family, source):
    """
    The adapter for its base as hf_files writes it. Low-rank ones are cut where the base's Linears are, and all parts
    have one rank and alpha = r, which all software understands. Raises InputError where it cannot be.
    """
    method = adapter.config.method
    if method == 'bottleneck':
        raise InputError(f'{source} is a bottleneck, which peft has not')
    if family.transposed:  # the names are the same
        return adapter
    if method == 'prompt' and model_config.embd_norm:  # which has become part of the table
        virtual = adapter.tensors['prompt_embeddings'].float()
        return replace(adapter, tensors={'prompt_embeddings': F.rms_norm(virtual, virtual.shape[1:], eps=RMS_EPS)})
    if method in ('prompt', 'prefix'):
        return adapter
    skeleton = GPT.skeleton(model_config)
    put_to(skeleton, adapter, source)
    low_rank = {name: LoRA.low_rank(part) if method == 'dora' else part.low_rank() for name, part in parts(skeleton)}
    r, tensors, targets = max(len(A) for A, _ in low_rank.values()), {}, []
    for name, (A, B) in low_rank.items():
        theirs, factor, pad = family.linears(name), family.factor(name, model_config), r - len(A)
        targets += theirs
        for target, rows in zip(theirs, torch.arange(len(B)).chunk(len(theirs)), strict=True):
            tensors |= {f'{PREFIX}{target}.lora_A.weight': F.pad(A, (0, 0, 0, pad)),
                        f'{PREFIX}{target}.lora_B.weight': F.pad(B[rows] * factor, (0, pad))}
            if method == 'dora':
                m = skeleton.get_submodule(name).m.detach()
                tensors[f'{PREFIX}{target}.lora_magnitude_vector'] = m[rows] * factor
    kinds = sorted({target.rsplit('.', 1)[1] for target in targets})
    everywhere = len(targets) == len(kinds) * model_config.n_layer
    config = AdapterConfig('dora' if method == 'dora' else 'lora', r=r, lora_alpha=float(r),
                           target_modules=kinds if everywhere else targets)
    return replace(adapter, config=config, tensors=tensors)


def write(folder, adapter, model_config, fan_in_fan_out=None):
    """
    Write the adapter's two files into `folder`. model_config: its base's. fan_in_fan_out: whether its base in
    transformers holds the transpose of a Linear; None: as GPT-2's does, if that is the architecture. Raises InputError.
    """
    config = adapter.config
    kind = TYPES[config.method]
    settings = {'peft_type': kind, 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': adapter.base,
                'inference_mode': True, **{key: getattr(config, field) for field, key in FIELDS[kind].items()}}
    if kind in ('LORA', 'VERA'):
        settings |= {'bias': 'none',
                     'fan_in_fan_out': model_config.arch == 'gpt2' if fan_in_fan_out is None else fan_in_fan_out}
    if kind == 'LORA':
        settings['use_dora'] = config.method == 'dora'
    if kind == 'VERA':
        settings['save_projection'] = True
    if config.method in ('prompt', 'prefix'):
        settings |= {'token_dim': model_config.n_embd, 'num_layers': model_config.n_layer,
                     'num_attention_heads': model_config.n_head, 'num_transformer_submodules': 1}
    if config.method == 'prefix':
        settings |= {'prefix_projection': False, 'encoder_hidden_size': model_config.n_embd}
    metadata = {'base_hash': adapter.base_hash, 'base_format': adapter.base_format}
    paths = {name: os.path.join(folder, name) for name in (CONFIG, WEIGHTS)}
    try:
        os.makedirs(folder, exist_ok=True)
        with open(paths[CONFIG] + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(settings, f, indent=2)
        checkpoint.save_tensors(paths[WEIGHTS], dict.items, adapter.tensors, torch.float32, metadata)
        os.replace(paths[CONFIG] + '.tmp', paths[CONFIG])
    except OSError as e:
        raise InputError(f'could not write an adapter to {folder}: {e}') from None


def read(folder):
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
    config = _config(settings, os.path.join(folder, CONFIG))
    return Adapter(config, tensors, str(settings.get('base_model_name_or_path') or ''), metadata.get('base_hash', ''),
                   metadata.get('base_format', 'float32'), settings.get('num_attention_heads'))


def _config(settings, source):
    kind = settings.get('peft_type') if isinstance(settings, dict) else None
    if kind not in FIELDS:
        raise InputError(f'{source}: peft_type={kind!r} is not known here: known are {", ".join(FIELDS)}')
    known = {key: field for field, key in FIELDS[kind].items()}
    for key, value in settings.items():
        if key in ALLOWED:
            if value not in ALLOWED[key]:
                raise InputError(f'{source} has {key}={value!r}: known here are '
                                 f'{", ".join(map(repr, ALLOWED[key]))}')
        elif value and key not in known and key not in WITHOUT_EFFECT:
            raise InputError(f'{source} has {key}={value!r}, which this project has not')
    if 'target_modules' in known and not settings.get('target_modules'):
        raise InputError(f'{source} has no target_modules: it has to say which Linears the adapter is for')
    if kind == 'LORA' and settings.get('lora_alpha') is None:
        raise InputError(f'{source} has no lora_alpha: the scale is not known')
    fields = {field: settings[key] for key, field in known.items() if settings.get(key) is not None}
    if isinstance(fields.get('layers_to_transform'), int):
        fields['layers_to_transform'] = [fields['layers_to_transform']]
    method = 'dora' if settings.get('use_dora') else next(name for name, type in TYPES.items() if type == kind)
    try:
        return AdapterConfig(method, **fields)
    except TypeError as e:
        raise InputError(f'{source}: {e}') from None
