"""
The configuration of an adapter: its method, its size, and the Linears that it stands beside.
"""

import difflib
import math
import re
from dataclasses import dataclass, field

import torch.nn as nn

from configurator import InputError
from sologpt.adapters.method import Method
from sologpt.adapters.methods import METHODS
from sologpt.files.family import LINEARS
from sologpt.matmuls.nf4 import NF4Linear

NUMBER = (int, float)
KINDS = {  # AdapterConfig's fields -> (the types of a value, the types of what a value contains)
    'r': (int, int), 'lora_alpha': (NUMBER, NUMBER), 'use_rslora': (bool, bool), 'dropout': (NUMBER, NUMBER),
    'target_modules': ((list, str), str), 'exclude_modules': ((list, str, type(None)), str),
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
    target_modules: list | str | None = None  # ends of Linears' names, or a regular expression for whole names
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
        if self.target_modules is None:
            self.target_modules = list(self.cls.default_targets)
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

    def find_targets(self, model: nn.Module) -> list[str]:
        """The names of the Linears that the adapter stands beside. Raises InputError if it names others, or none."""
        # peft would match the tables and the head, too. An adapter of them could not be merged if they are one tensor
        names = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding, NF4Linear))]
        found = [name for name in names if self._matches(name)]
        outside = [name for name in found if not name.startswith('transformer.h.')]
        if outside:
            raise InputError(f'the adapter is for {", ".join(outside)}: only Linears of blocks can have one')
        if not isinstance(self.target_modules, str):
            for end in self.target_modules:
                if not any(_ends_with(name, end) for name in names):
                    raise InputError(f'the adapter is for {end!r}, which this model does not have: it has '
                                     f'{", ".join(LINEARS)}')
        if not found:
            raise InputError(f'the adapter is for {self.target_modules!r}, which matches no Linear of this model')
        return found

    def _matches(self, name):
        if _any_matches(self.exclude_modules, name) or not _any_matches(self.target_modules, name):
            return False
        if self.layers_to_transform is None or isinstance(self.target_modules, str):  # as in peft
            return True
        block = re.match(r'transformer\.h\.(\d+)\.', name)
        return bool(block) and int(block[1]) in self.layers_to_transform

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """(r, g) of the Linear `name`: B A x is multiplied by g."""
        r, alpha = (next((value for end, value in pattern.items() if re.match(rf'(.*\.)?({end})$', name)), default)
                    for pattern, default in ((self.rank_pattern, self.r), (self.alpha_pattern, self.lora_alpha)))
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)


def _ends_with(name, end):
    return name == end or name.endswith('.' + end)


def _any_matches(targets, name):
    if targets == 'all-linear':  # in peft's files
        targets = LINEARS
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(_ends_with(name, end) for end in targets or ())
