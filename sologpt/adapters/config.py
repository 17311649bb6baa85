"""
The configuration of an adapter: its method, its size, and the Linears that it stands beside.
"""

import difflib
import math
import re
from dataclasses import dataclass, field

import torch.nn as nn

from configurator import InputError
from model import GPTConfig
from sologpt.adapters.method import Method
from sologpt.adapters.methods import METHODS
from sologpt.adapters.targets import NamedLinear, Target, named_linears, short_names

NUMBER = (int, float)
KINDS = {  # AdapterConfig's fields -> (the types of a value, the types of what a value contains)
    'r': (int, int), 'lora_alpha': (NUMBER, NUMBER), 'use_rslora': (bool, bool), 'dropout': (NUMBER, NUMBER),
    'target_modules': ((list, str, type(None)), str), 'exclude_modules': ((list, str, type(None)), str),
    'layers_to_transform': ((list, type(None)), int), 'rank_pattern': (dict, int), 'alpha_pattern': (dict, NUMBER),
    'projection_prng_key': (int, int), 'num_virtual_tokens': (int, int)}
# train.py's keys -> AdapterConfig's fields. adapter_r is the method's size_field
KEYS = {'adapter': 'method', 'adapter_targets': 'target_modules', 'adapter_dropout': 'dropout',
        'lora_alpha': 'lora_alpha', 'use_rslora': 'use_rslora'}


@dataclass
class AdapterConfig:
    """What the shapes and the meaning of an adapter's tensors follow from. The names are peft's where peft has them."""
    method: str  # a name in METHODS
    r: int | None = None  # the rank, or the width of a bottleneck; None: the method's default_r
    lora_alpha: float = 32.0
    use_rslora: bool = False
    dropout: float = 0.0  # of the input of A, or of VeRA's A0
    target_modules: list | str | None = None  # ends of Linears' names, or a regular expression for whole names, as
    # ... targets.py has them; None: the method's default_targets
    exclude_modules: list | str | None = None  # in the same form
    layers_to_transform: list | None = None  # numbers of blocks; None: all
    rank_pattern: dict = field(default_factory=dict)  # the end of a name, as a regular expression -> its rank
    alpha_pattern: dict = field(default_factory=dict)  # the end of a name, as a regular expression -> its alpha
    projection_prng_key: int = 0  # VeRA's A0 and B0 follow from it
    num_virtual_tokens: int = 16  # of prompt and prefix

    def __post_init__(self):
        if self.method not in METHODS:
            near = difflib.get_close_matches(str(self.method), METHODS, 1)
            raise InputError(f'adapter={self.method!r} is not known: use {near[0] + ", or another of " if near else ""}'
                             f'{", ".join(METHODS)}')
        if self.r is None:
            self.r = self.cls.default_r
        self._check_kinds()
        if self.r < 1 or self.num_virtual_tokens < 1 or any(r < 1 for r in self.rank_pattern.values()):
            raise InputError(f'an adapter with r={self.r}, num_virtual_tokens={self.num_virtual_tokens} and '
                             f'rank_pattern={self.rank_pattern}: each rank and number must be at least 1')
        if not 0 <= self.dropout < 1:
            raise InputError(f'adapter dropout {self.dropout} must be in [0, 1)')

    def _check_kinds(self):
        """Refuse values of the wrong type: a file may hold anything."""
        for name, (kind, inner) in KINDS.items():
            value = getattr(self, name)
            contained = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            if not isinstance(value, kind) or not all(isinstance(item, inner) for item in contained):
                raise InputError(f'an adapter cannot have {name}={value!r}')
        for expression in (self.target_modules, self.exclude_modules, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(expression if isinstance(expression, str) else '')
            except re.error as e:
                raise InputError(f'the adapter has {expression!r}, which is not a regular expression: {e}') from None

    @classmethod
    def from_keys(cls, keys: dict) -> 'AdapterConfig':
        """The AdapterConfig that train.py's keys describe. Raises InputError."""
        fields = {field: keys[key] for key, field in KEYS.items()}
        if re.fullmatch(r'[\w.,]+', fields['target_modules'] or ''):  # names, not a regular expression
            fields['target_modules'] = fields['target_modules'].split(',')
        if keys['adapter_r'] is not None and keys['adapter'] in METHODS:
            fields[METHODS[keys['adapter']].size_field] = keys['adapter_r']
        return cls(**fields)

    def to_keys(self) -> dict:
        """The keys of train.py that mean something to the method, with their values."""
        known = {'adapter': 'method', 'adapter_r': self.cls.size_field} | {
            key: field for key, field in KEYS.items() if field in self.cls.peft_fields}
        values = {key: getattr(self, field) for key, field in known.items()}
        return {key: ','.join(value) if isinstance(value, list) else value for key, value in values.items()}

    @property
    def cls(self) -> type[Method]:
        """The class of the method."""
        return METHODS[self.method]

    def describe(self) -> str:
        """The method and its size, such as 'lora, r=16' or 'prompt, 16 virtual tokens'."""
        size = getattr(self, self.cls.size_field)
        return f'{self.method}, {size} virtual tokens' if self.cls.adds_tokens else f'{self.method}, r={size}'

    def complete(self, model_config: GPTConfig) -> None:
        """Let target_modules say what it means for such a base, if it is None."""
        if self.target_modules is None and not self.cls.adds_tokens:
            self.target_modules = short_names(model_config, self.cls.default_targets)

    def find_targets(self, model: nn.Module) -> dict[str, list[Target]]:
        """
        Our names of the Linears that the adapter stands beside -> what it changes there, in the order of the rows.
        Raises InputError if the adapter names what the model does not have, or what can have no adapter.
        """
        self.complete(model.config)
        in_blocks = short_names(model.config)
        # peft would match the tables and the head, too. An adapter of them could not be merged if they are one tensor
        named = named_linears(model)
        found = [one for one in named if self._matches(one, in_blocks)]
        outside = [one.name for one in found if one.block is None]
        if outside:
            raise InputError(f'the adapter is for {", ".join(outside)}: only Linears of blocks can have one')
        if not isinstance(self.target_modules, str):
            for end in self.target_modules:
                if not any(_ends_with(one.name, end) for one in named):
                    raise InputError(f'the adapter is for {end!r}, which this model does not have: it has '
                                     f'{", ".join(in_blocks)}')
        if not found:
            raise InputError(f'the adapter is for {self.target_modules!r}, which matches no Linear of this model: it '
                             f'has {", ".join(in_blocks)}')
        targets = {}
        for one in found:
            targets.setdefault(one.linear, []).append(Target(one.name, one.rows, *self.rank_and_scale(one.name)))
        return targets

    def _matches(self, one: NamedLinear, in_blocks: list[str]) -> bool:
        targets, excluded = (in_blocks if ends == 'all-linear' else ends  # in peft's files
                             for ends in (self.target_modules, self.exclude_modules))
        if _any_matches(excluded, one.name) or not _any_matches(targets, one.name):
            return False
        if self.layers_to_transform is None or isinstance(self.target_modules, str):  # as in peft
            return True
        return one.block in self.layers_to_transform

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """(r, g) of the Linear that files call `name`: B A x is multiplied by g."""
        r, alpha = (next((value for end, value in pattern.items() if re.match(rf'(.*\.)?({end})$', name)), default)
                    for pattern, default in ((self.rank_pattern, self.r), (self.alpha_pattern, self.lora_alpha)))
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)


def _ends_with(name, end):
    return name == end or name.endswith('.' + end)


def _any_matches(targets, name):
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(_ends_with(name, end) for end in targets or ())
