"""
What a family of models is: one architecture of Hugging Face's transformers, as far as it is one of this project's.

A family says what config.json's keys mean, what the weights are called there, and how they are laid out. This is about
names and tensors only: it builds no model and does not need transformers. The families are in families.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from configurator import InputError

EMBEDDINGS = ('transformer.wte', 'transformer.wpe', 'lm_head')  # have no biases
LINEARS = ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')  # of a block
ACTIVATIONS = {'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_new', 'gelu_pytorch_tanh': 'gelu_new',
               'relu2': 'relu2', 'xielu': 'relu2'}  # theirs -> ours

Tensor = torch.Tensor
Tensors = dict[str, Tensor]  # by name


@dataclass(frozen=True)
class Family:
    """
    One architecture of transformers, as far as it is one of this project's. "Theirs" are its names and tensors, "ours"
    are GPT's. In names of modules, {} stands for the number of a block.
    """
    cls: str  # the class in transformers
    arch: str  # ours
    parts: dict  # key of GPTConfig -> the only value that the architecture has a place for
    keys: dict  # key of GPTConfig -> key of config.json
    modules: dict  # our module -> their modules: several if they are parts of ours, stacked along the rows
    constants: Callable  # (n_embd, n_head) -> more of config.json, which has to be so
    defaults: dict  # key of config.json -> what an absent key means, unless that is what `constants` says
    dropouts: tuple  # keys of config.json that are dropout probabilities
    bias: bool | None = True  # Linears and norms have biases; None: those that the model has
    transposed: bool = False  # the weights of the blocks' Linears are (in, out)
    first_position: int = 0  # the row of the table of positions that the first token takes
    activations: dict = field(default_factory=dict)  # our name -> their name, if they differ

    def names(self, n_layer: int, tied: bool) -> Iterator[tuple[str, list[str]]]:
        """Yields (our module, its names there) for all modules that have weights."""
        for ours, theirs in self.modules.items():
            if ours != 'lm_head' or not tied:
                for i in range(n_layer) if '{}' in ours else [0]:
                    yield ours.format(i), [name.format(i) for name in theirs]

    def linears(self, name: str) -> list[str]:
        """Their names of the Linear `name` of a block, such as transformer.h.0.mlp.c_fc."""
        _, _, i, part = name.split('.', 3)
        return [theirs.format(i) for theirs in self.modules[f'transformer.h.{{}}.{part}']]

    def factor(self, linear: str, config) -> float:
        """What the weights of a Linear are multiplied by when they become theirs."""
        return 1.0

    def extras(self, config) -> Iterator[tuple[str, list | float]]:
        """Yields (name, value) of the tensors that they have beyond the weights of modules."""
        return iter(())

    def read_config(self, settings: dict, source: str) -> dict:
        """
        GPTConfig's keys, but with their name of the activation. settings: the content of config.json. Raises
        InputError, which names `source` and the key, for what this project does not have.
        """
        given = {**settings}
        if 'rope_parameters' not in given and given.get('rope_scaling', '') is None:  # as before transformers 5
            given['rope_parameters'] = {'rope_type': 'default', 'rope_theta': given.get('rope_theta')}
        given = self.defaults | {key: value for key, value in given.items() if value is not None}
        config = {'arch': self.arch, **self.parts, 'embd_norm': False, 'bias': self.bias}
        for ours, key in self.keys.items():
            if key not in given:
                raise InputError(f'{source}: config.json has no {key}')
            kind = {'activation': str, 'tied': bool}.get(ours, int)
            if type(given[key]) is not kind or kind is int and given[key] < 1:
                raise InputError(f'{source}: config.json has {key}={given[key]!r}, which cannot be')
            config[ours] = given[key]
        activation = config['activation']
        if activation not in ACTIVATIONS:
            raise InputError(f"{source}: config.json has {self.keys['activation']}={activation!r}; only "
                             f'{", ".join(ACTIVATIONS)} can be loaded')
        for key, needed in self.constants(config['n_embd'], config['n_head']).items():
            if given.get(key, needed) != needed:
                raise InputError(f'{source}: config.json has {key}={given[key]!r}; only {needed!r} can be loaded')
        return config

    def write_config(self, config) -> dict:
        """The keys of config.json that describe a GPTConfig."""
        return {**{key: getattr(config, ours) for ours, key in self.keys.items()},
                self.keys['tied']: stays_tied(config),
                self.keys['activation']: self.activations.get(config.activation, config.activation),
                **self.constants(config.n_embd, config.n_head), **dict.fromkeys(self.dropouts, config.dropout)}

    def absorb(self, config: dict, theirs: Tensors, own: Tensors, source: str) -> None:
        """
        Make what only their architecture has part of our weights, `own`, and take it out of `theirs`.

        config: keys of GPTConfig, but with their name of the activation. Raises InputError if it cannot be.
        """


def stays_tied(config) -> bool:
    """Whether the head is the table there as well. It is not if the norm of the embedding became part of the table."""
    return config.tied and not config.embd_norm


def take(theirs: Tensors, name: str, source: str) -> Tensor:
    """Take a tensor out of `theirs`. Raises InputError, which names `source`, if it is not there."""
    if name not in theirs:
        raise InputError(f'{source}: the weight {name} is missing from the file')
    return theirs.pop(name)


def blocks(prefix: str, ln_1: str, c_attn: str, c_proj: str, ln_2: str, c_fc: str, mlp_c_proj: str) -> dict:
    """Our modules of a block -> their names, from their names within a block. Parts of ours are separated by spaces."""
    theirs = (('ln_1', ln_1), ('attn.c_attn', c_attn), ('attn.c_proj', c_proj), ('ln_2', ln_2), ('mlp.c_fc', c_fc),
              ('mlp.c_proj', mlp_c_proj))
    return {f'transformer.h.{{}}.{ours}': [f'{prefix}.{{}}.{name}' for name in names.split()] for ours, names in theirs}
