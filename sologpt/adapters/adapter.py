"""
An adapter: a small trained part beside a frozen model.

A run builds a model and its adapter in this order:

    model_args, weights, saved = read_model(source)
    gpt = GPTConfig.from_saved(model_args, attn_backend=..., dropout=..., ...)
    model = model_class(adapter.config).from_weights(gpt, weights, source)
    take_base(adapter, model, source)                       # base.py: is it the adapter's base?
    hold_base(model, adapter.base_format, dtype)            # held.py: float32, bfloat16 or NF4 (QLoRA)
    attach(model, adapter.config)                           # a new adapter, or, of one that has tensors:
    put_adapter(model, adapter, folder)
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn as nn

from configurator import InputError
from model import GPT
from sologpt.adapters.config import AdapterConfig
from sologpt.adapters.method import BesideLinear
from sologpt.matmuls.held import decode_base
from sologpt.matmuls.nf4 import decoded_linear

Tensor = torch.Tensor


@dataclass
class Adapter:
    """An adapter as files hold it, and what it says of its base."""
    config: AdapterConfig
    tensors: dict[str, Tensor]  # by their names in peft's files; {}: it begins untrained
    base: str = ''  # where its base lies
    base_hash: str = ''  # the base's fingerprint(); '': unknown, as in peft's files
    base_format: str = 'float32'  # how the base was held when the adapter was trained
    heads: int | None = None  # what the method's heads() of the base must be, if known

    def to_save(self) -> dict:
        """All but the tensors, as plain values for a checkpoint."""
        return {'config': asdict(self.config), 'base': self.base, 'base_hash': self.base_hash,
                'base_format': self.base_format}

    @classmethod
    def from_saved(cls, saved: dict, tensors: dict[str, Tensor]) -> 'Adapter':
        """The adapter of a checkpoint: saved is what to_save() returned. Raises InputError."""
        return cls(**saved | {'config': AdapterConfig(**saved['config'])}, tensors=tensors)


def model_class(config: AdapterConfig | None) -> type[GPT]:
    """The class of a model that is to have this adapter, or none: GPT, or the method's own if it adds tokens."""
    return config.cls if config and config.cls.adds_tokens else GPT


def attach(model: GPT, config: AdapterConfig) -> None:
    """
    Freeze the model, a model_class(config) on the CPU, and put an untrained adapter to it. If the config does not say
    which Linears have one, it does so afterwards. Raises InputError if the adapter does not fit the model.
    """
    model.requires_grad_(False)
    if not config.cls.adds_tokens:
        targets = config.find_targets(model)
        linears = {name: model.get_submodule(name) for name in targets}
        beside = config.cls.beside(linears, targets, config.dropout, config.projection_prng_key)
        for name, part in beside.items():
            model.set_submodule(name, part)
        return
    n, block_size = config.num_virtual_tokens, model.config.block_size
    if not isinstance(model, config.cls):
        raise TypeError(f'a {type(model).__name__} has no place for virtual tokens: build the model as a '
                        f'{config.cls.__name__}, which model_class() returns')
    if n >= block_size:
        raise InputError(f'{n} virtual tokens leave no room in block_size={block_size}: use a smaller adapter_r')
    model.virtual = config.cls.new_virtual(model.config, n)


def parts(model: nn.Module) -> list[tuple[str, BesideLinear]]:
    """[(name of the Linear, what stands in its place), ...]"""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, BesideLinear)]


def low_rank_Bs(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that LoRA+ (https://arxiv.org/abs/2402.12354) trains at a higher rate: LoRA's matrices B."""
    return [B for _, part in parts(model) for name in part.lora_plus for B in getattr(part, name)]


def _places(model):
    """Names in files -> (module, attribute) of the model's adapter."""
    if model.n_virtual:
        return model.file_tensors()
    return {name: place for _, part in parts(model) for name, place in part.file_tensors().items()}


def tensors_of(model: GPT) -> dict[str, Tensor]:
    """The tensors of the model's adapter by their names in files. They are the model's own, not copies."""
    return {name: getattr(module, attribute).detach() for name, (module, attribute) in _places(model).items()}


def put_adapter(model: GPT, adapter: Adapter, source: str) -> None:
    """
    Freeze the model, a model_class(adapter.config) on the CPU, and put the adapter's tensors to it, as copies in
    float32. Raises InputError, which names `source`, if they do not fit.
    """
    heads = adapter.config.cls.heads(model.config)
    if adapter.heads not in (None, heads):
        raise InputError(f'{source} is for {adapter.heads} heads, the model has {heads}')
    attach(model, adapter.config)
    places, given = _places(model), dict(adapter.tensors)
    expected = tensors_of(model)
    made_again = {name: getattr(*place) for name, place in places.items()
                  if not isinstance(getattr(*place), nn.Parameter)}  # they follow from the config
    if not made_again.keys() & given.keys():
        given |= made_again
    for name in sorted(expected.keys() ^ given.keys()):
        where = 'missing from' if name in expected else 'unexpected in'
        raise InputError(f'{source}: {name} is {where} the adapter')
    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            raise InputError(f'{source}: {name} has the shape {tuple(given[name].shape)}, this model needs '
                             f'{tuple(tensor.shape)}')
    for name, (module, attribute) in places.items():
        # not into the tensor that is there: in a skeleton it has no data
        tensor = given[name].to(torch.float32, copy=True)
        setattr(module, attribute, tensor if name in made_again else nn.Parameter(tensor))


@torch.no_grad()
def merge(model: GPT, weight: float = 1.0) -> None:
    """
    Add `weight` times the adapter's change to the weights, in float32, and remove the adapter. The result is a plain
    model in the base's dtype, or in float32 if the base was in NF4. Raises InputError if the method cannot be merged.
    """
    if model.n_virtual:
        raise InputError('virtual tokens are no part of the weights: prompt and prefix cannot be merged')
    for name, part in parts(model):
        part.base = decoded_linear(part.base)
        part.base.weight.copy_(part.base.weight.float() + weight * part.delta())
        model.set_submodule(name, part.base)
    decode_base(model)
    model.requires_grad_(True)
