"""
Building what a run trains: the model's origin, the adapter beside it, the formats of its weights and matmuls.

train.py, the memory plan and the benchmarks build by these same functions.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.adapters.adapter import Adapter, attach, model_class, put_adapter
from sologpt.adapters.base import take_base
from sologpt.adapters.config import AdapterConfig
from sologpt.adapters.peft_files import read_adapter
from sologpt.files import checkpoint
from sologpt.files.models import read_model
from sologpt.machine import devices, sharding
from sologpt.matmuls.held import hold_base, hold_block_linears_in, hold_matrices_in_bfloat16, kept_for_base
from sologpt.matmuls.recipe_linear import convert, sum_in_float32
from sologpt.matmuls.spec import parse_matmul
from sologpt.tokens import tokenizer
from sologpt.training.checks import check
from sologpt.training.data import Data
from sologpt.training.forecast import Forecast
from sologpt.training.machine import Machine
from sologpt.training.micro_batch import MemoryAdvice
from sologpt.training.optimizers import build_optimizer
from sologpt.training.out_dir import same_folder
from sologpt.training.resume import ARCHITECTURE, PARTS, Resumed
from sologpt.training.step import rows_of_matmuls


@dataclass
class Built:
    """What a run trains."""
    model: GPT
    adapter: Adapter | None
    config: dict  # the run's, completed with the model's own parts and the adapter's keys, as a checkpoint keeps it
    source: str  # where the weights are from
    carried: dict  # what its checkpoints take over from there: {'hf_files': Companions} or {}
    n_params: int  # of the whole model, adapter included, before it is shared among processes
    full_bytes: int  # of weights, gradients and AdamW's moments, if all weights were trained in float32
    n_trained: int
    matmul_how: str  # what computes the matmuls of the blocks, in words


def build_model(config: dict, given: list[str], data: Data, machine: Machine, run: Resumed) -> Built:
    """The model of a run, on its device, and its adapter. Opens the data's tokens. Raises InputError."""
    adapter = find_adapter(config, given, run)
    if adapter:
        config = config | adapter.config.to_keys() | {'base_format': adapter.base_format}
        check(config)
    source, model_config, weights, carried = find_weights(config, given, data, run, adapter)
    needs_mask = config['document_mask'] or adapter is not None and adapter.config.cls.needs_mask
    machine.choose_formats(config, model_config, run, needs_mask)
    model_config = replace(model_config, attn_backend=machine.attn_backend, dropout=config['dropout'],
                           checkpoint_activations=config['checkpoint_activations'],
                           document_eot=data.eot() if config['document_mask'] else None)
    if machine.device.type == 'cuda':
        model_config = with_loss_chunk(model_config, machine.memory)
    torch.manual_seed(config['seed'])
    cls = model_class(adapter and adapter.config)
    kept = kept_for_base(adapter.base_format if adapter else config['weights_dtype'])
    model = cls(model_config) if weights is None else cls.from_weights(model_config, weights, source, kept)
    if adapter:
        take_base(adapter, model, source)
    elif config['block_size'] < model.config.block_size and model.config.positions == 'learned':
        model.crop_block_size(config['block_size'])  # as nanoGPT does; the others would not be trained
    n_params = model.n_params()
    matmul_how = prepare_model(model, config, adapter, machine.dtype, machine.device)
    if spec := parse_matmul(config['matmul']):
        config = config | {'matmul': str(spec.resolved(model.config.n_layer))}  # no default may change what was done
    config = config | {'dataset': data.name} | {
        key: getattr(model.config, key) for key in ARCHITECTURE if key != 'block_size'}
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _check_room_for_virtual_tokens(model, config['block_size'], source)
    _place(model, config, adapter, machine)
    data.open_tokens(config['block_size'], model.config.vocab_size)
    if adapter and adapter.config.cls.begins_from_text and not adapter.tensors:
        _begin_virtual_tokens(model, data, machine)
    return Built(model, adapter, config, source, carried, n_params + (n_trained if adapter else 0), 16 * n_params,
                 n_trained, matmul_how)


# ---- where it begins -------------------------------------------------------------------------------------------------

def find_adapter(config: dict, given: list[str], run: Resumed) -> Adapter | None:
    """The adapter of a run: the resumed one, the one in adapter_from, or a new one. Raises InputError."""
    folder = config['adapter_from']
    if 'adapter' in run.saved:
        adapter = Adapter.from_saved(run.saved['adapter'], run.saved['model'])
        adapter.base = config['base'] or adapter.base
    elif folder:
        adapter = read_adapter(folder)
        if config['adapter'] not in ('', adapter.config.method):
            raise InputError(f'adapter={config["adapter"]}, but {folder} is a {adapter.config.method}: leave one of '
                             f'them out')
        if 'base_format' in given:
            adapter.base_format = config['base_format']
        for key, value in adapter.config.to_keys().items():
            if key in given and config[key] not in (None, '', value):
                raise InputError(f'{folder} has {key}={value}, but this run asks for {config[key]}: leave {key} out')
        adapter.base = config['init_from']
    elif config['adapter']:
        adapter = Adapter(AdapterConfig.from_keys(config), {}, config['init_from'], base_format=config['base_format'])
    else:
        return None
    if 'adapter_dropout' in given:
        adapter.config.dropout = config['adapter_dropout']
    path = checkpoint.find_checkpoint(adapter.base)
    if path and not config['eval_only'] and same_folder(config['out_dir'], os.path.dirname(path)):
        raise InputError(f'out_dir={config["out_dir"]} is where the base is, which the adapter needs: choose another '
                         f'out_dir')
    return adapter


def find_weights(config: dict, given: list[str], data: Data, run: Resumed,
                 adapter: Adapter | None) -> tuple[str, GPTConfig, Mapping | None, dict]:
    """
    (where the weights are from, the model's config, the weights by name, what checkpoints take over) that a run begins
    with. New weights are None. Raises InputError.
    """
    if run and not adapter:
        return run.path, GPTConfig.from_saved(run.saved['model_args']), run.saved['model'], _carried(run.saved)
    source = adapter.base if adapter else config['init_from']
    if source == 'scratch':
        return source, new_model_config(config, data.meta['vocab_size']), None, {}
    _check_origin(config, data, source)
    model_args, weights, saved = read_model(source)
    saved.pop('optimizer', None)  # it would keep the file open
    model_config = GPTConfig.from_saved(model_args)
    if not tokenizer.tokenizers_agree(saved.get('tokenizer'), data.meta['tokenizer']):
        raise InputError(f'{source} was trained with another tokenizer than that of {data.folder}')
    _check_latent_recipe(source, parse_matmul(saved.get('matmul', '')), parse_matmul(config['matmul']), adapter)
    for key in ARCHITECTURE:
        value = getattr(model_config, key)
        if key in given and key != 'block_size' and config[key] != value:
            raise InputError(f'{source} has {key}={value}, but this run asks for {config[key]}: give --{key}={value}')
    if config['block_size'] > model_config.block_size:
        raise InputError(f'block_size={config["block_size"]}, but {source} has {model_config.block_size} positions: '
                         f'give --block_size={model_config.block_size}')
    return source, model_config, weights, {} if adapter else _carried(saved)


def _carried(saved):
    return {key: saved[key] for key in ('hf_files',) if key in saved}


def _check_latent_recipe(source, of_weights, of_run, adapter):
    """Weights that are latent mean nothing without their recipe."""
    is_latent = of_weights and of_weights.recipe and of_weights.recipe.latent
    if is_latent and of_weights.name != (of_run and of_run.name):
        raise InputError(f'{source} was trained with matmul={of_weights.name}, which is part of the model: '
                         f'{"it can have no adapter" if adapter else f"give --matmul={of_weights.name}"}')


def _check_origin(config, data, source):
    out_dir, is_gpt2 = config['out_dir'], source.startswith('gpt2') and not os.path.isdir(source)
    if is_gpt2 and data.meta['vocab_size'] != tokenizer.GPT2_VOCAB:
        raise InputError(f"{source} needs tokens of GPT-2's tokenizer, {data.folder} has {data.meta['vocab_size']} "
                         f"ids: use another dataset, or prepare it with gpt2")
    if not (config['eval_only'] or checkpoint.find_checkpoint(source)) and same_folder(out_dir, source):
        raise InputError(f'out_dir={out_dir} is the folder of the model that the run begins from: choose another')


def new_model_config(config: dict, vocab_size: int) -> GPTConfig:
    """The GPTConfig of a new model for a tokenizer with so many ids."""
    keys = ('arch', 'n_layer', 'n_head', 'n_embd', 'block_size', *PARTS)
    # GPUs multiply whole tiles, so the table is padded; other vocabularies of arch=gpt2 are as in nanoGPT
    padded = config['arch'] != 'gpt2' or vocab_size == tokenizer.GPT2_VOCAB
    rows = math.ceil(vocab_size / 64) * 64 if padded else vocab_size
    return GPTConfig(**{key: config[key] for key in keys}, vocab_size=rows, n_ids=vocab_size)


def with_loss_chunk(config: GPTConfig, memory: float) -> GPTConfig:
    """
    The config with four times as many tokens in a piece of the loss if a GPU has 40 GB or more: the gradient of the
    head is read and written once for each piece. memory: bytes that the run may take.
    """
    return replace(config, loss_chunk=4 * config.loss_chunk) if memory >= 40e9 else config


# ---- what becomes of it ----------------------------------------------------------------------------------------------

def prepare_model(model: GPT, config: dict, adapter: Adapter | None, dtype: str, device: torch.device) -> str:
    """
    Make the model what a run trains: a base in its format, an adapter beside it, Linears that follow a recipe, weights
    in their dtype. Returns, in words, what computes the matmuls of its blocks.

    dtype: of the matmuls; device: where it will run. The model is still on the CPU, or has no data at all.
    """
    if adapter:
        hold_base(model, config['base_format'], dtype)
        if config['base_format'] == 'float32' and not config['matmul']:  # a recipe rounds float32 weights by itself
            hold_block_linears_in(model, dtype)
        if adapter.tensors:
            resumed = config['init_from'] == 'resume'
            put_adapter(model, adapter, config['out_dir'] if resumed else config['adapter_from'])
        else:
            attach(model, adapter.config)
        devices.give_back_memory()
    if config['weights_dtype'] == 'bfloat16':
        hold_matrices_in_bfloat16(model)
    if not config['matmul']:
        trained_in_float32 = not adapter and config['weights_dtype'] == 'float32'
        if trained_in_float32 and dtype != 'float32' and devices.is_nvidia(device) and not config['sharding']:
            sum_in_float32(model)
        return f'in {dtype}'
    return convert(model, parse_matmul(config['matmul']), dtype, rows_of_matmuls(config), device)


def _check_room_for_virtual_tokens(model, block_size, source):
    room = model.config.block_size - model.n_virtual
    if block_size > room:
        raise InputError(f'block_size={block_size} and {model.n_virtual} virtual tokens are more than the '
                         f'{model.config.block_size} positions of {source}: use --block_size={room}')


def _place(model, config, adapter, machine):
    """Move the model to the device: whole, or this process's share."""
    if config['sharding']:
        # a recipe rounds float32 weights, and some of an adapter's are not for matmuls
        gathered_in = None if config['matmul'] or adapter else devices.DTYPES[machine.dtype]
        sharding.shard(model, machine.device, gathered_in, machine.compile)
        return
    with MemoryAdvice(1, 1, machine.memory, None):
        model.to(machine.device)


def _begin_virtual_tokens(model, data, machine):
    """Prompt and prefix begin as the first tokens of the training text."""
    first = torch.from_numpy(data.train.read(0, 0.0).astype('int64')).to(machine.device)
    with machine.autocast():
        model.eval().begin_from(first[torch.arange(model.n_virtual) % len(first)][None])
    model.train()


def forecast_of(model: GPT, config: dict, dtype: str, compile: bool, gpu: bool) -> Forecast:
    """The Forecast of a run's step. gpu: whether it runs on one."""
    return Forecast(model, lambda model: build_optimizer(model, config, dtype), config['block_size'], dtype, compile,
                    config['optimizer_state'] == 'cpu', gpu)
