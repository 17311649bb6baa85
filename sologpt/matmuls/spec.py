"""
The text that names a recipe and its options, as train.py's key `matmul` has it: NAME[:OPTION,OPTION,...].

    int8                       the three matmuls of every Linear in the blocks, in int8
    mxfp4:gemms=dgrad+wgrad    only the two matmuls of the backward
    nvfp4:keep_last=2          the Linears of the last two blocks stay in the run's dtype
    sparse24:until=0.5         from half of the steps on, all of them are in the run's dtype
    strassen:2                 the same as strassen:levels=2
    block_dropout:0.1,size=64  the same as block_dropout:rate=0.1,size=64
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from configurator import InputError
from sologpt.matmuls.formats import is_float8
from sologpt.matmuls.recipes import GEMMS, NAMES, RECIPES, Recipe

FIRST_OPTION = {'strassen': 'levels', 'block_dropout': 'rate'}  # the one that may be given as a bare value


@dataclass(frozen=True)
class MatmulSpec:
    """
    A recipe by name, and its options. None means that the recipe's default applies: see resolved().

    gemms: which of a Linear's three matmuls follow the recipe. keep_last: how many of the last blocks stay in the run's
    dtype. until: the share of the run's steps after which all is in the run's dtype. rate, size: the share of blocks
    that block_dropout drops, and the tokens and dimensions of such a block. levels: Strassen's. fast_accum: on Hopper,
    fp8's forward sums in about 14 bits.

    Raises InputError for what does not exist or cannot be.
    """
    name: str
    gemms: tuple[str, ...] = GEMMS
    keep_last: int | None = None
    until: float | None = None
    rate: float = 0.1
    size: int = 128
    levels: int = 1
    fast_accum: bool = True

    def __post_init__(self):
        if self.name not in NAMES:
            near = difflib.get_close_matches(self.name, NAMES, 1)
            raise InputError(f'matmul={self.name!r} is not known: use {near[0] + ", or another of " if near else ""}'
                             f'{", ".join(NAMES)}')
        if not self.gemms or not set(self.gemms) <= set(GEMMS):
            raise InputError(f'matmul={self.name}: gemms={"+".join(self.gemms)} must be some of {"+".join(GEMMS)}')
        object.__setattr__(self, 'gemms', tuple(gemm for gemm in GEMMS if gemm in self.gemms))
        for option, (is_in_range, words) in _RANGES.items():
            value = getattr(self, option)
            if value is not None and not is_in_range(value):
                raise InputError(f'matmul={self.name}: {option}={value} must be {words}')
        self._check_what_belongs_together()

    def _check_what_belongs_together(self):
        recipe = self.recipe
        if self.gemms != GEMMS and not _has_separate_gemms(self.name):
            raise InputError(f'matmul={self.name}: gemms={"+".join(self.gemms)}, but the three matmuls of {self.name} '
                             f'belong together: leave gemms out')
        if recipe is not None and recipe.normalised and self.until not in (None, 1.0):
            raise InputError(f'matmul={self.name}: until={self.until}, but {self.name} weights are the model, there is '
                             f'no other to go back to: leave until out')

    @property
    def recipe(self) -> Recipe | None:
        """The row of RECIPES; None: strassen and block_dropout, which round nothing, are not in it."""
        return RECIPES.get(self.name)

    def resolved(self, n_layer: int) -> 'MatmulSpec':
        """
        The spec with the recipe's defaults in place of None, for a model of n_layer blocks: what a checkpoint has to
        hold. Raises InputError if no block is left that could follow the recipe.
        """
        keep_last, until = self.keep_last, self.until
        if keep_last is None:
            keep_last = min(n_layer - 1, math.ceil(self.recipe.keep_last * n_layer)) if self.recipe else 0
        if until is None:
            until = self.recipe.until if self.recipe else 1.0
        if keep_last >= n_layer:
            raise InputError(f'matmul={self.name}: keep_last={keep_last} must be from 0 to {n_layer - 1}, so that '
                             f'{self.name} has blocks left')
        return replace(self, keep_last=keep_last, until=until)

    def __str__(self) -> str:
        """The shortest text that parse_matmul() reads as this spec."""
        changed = [field.name for field in dataclasses.fields(self)[1:] if getattr(self, field.name) != field.default]
        texts = [f'{option}={_text(getattr(self, option))}' for option in changed]
        first = FIRST_OPTION.get(self.name)
        if first in changed:
            texts.remove(f'{first}={_text(getattr(self, first))}')
            texts.insert(0, _text(getattr(self, first)))
        return ':'.join(filter(None, (self.name, ','.join(texts))))


_RANGES = {
    'keep_last': (lambda v: v >= 0, 'at least 0'), 'until': (lambda v: 0 <= v <= 1, 'from 0 to 1'),
    'rate': (lambda v: 0 <= v < 1, 'at least 0 and below 1'), 'size': (lambda v: v >= 1, 'at least 1'),
    'levels': (lambda v: v >= 1, 'at least 1')}


def _has_separate_gemms(name: str) -> bool:
    """Whether each of the three matmuls may follow the recipe `name` without the others."""
    return name in RECIPES and not RECIPES[name].latent and not RECIPES[name].estimator


def options_of(name: str) -> tuple[str, ...]:
    """The options that the recipe `name` takes."""
    own = {'strassen': ('levels',), 'block_dropout': ('rate', 'size')}.get(name, ())
    if name in RECIPES and is_float8(RECIPES[name].fwd.a) and is_float8(RECIPES[name].fwd.b):
        own = ('fast_accum',)
    return *own, *('gemms',) * _has_separate_gemms(name), 'keep_last', 'until'


def parse_matmul(text: str) -> MatmulSpec | None:
    """The spec that a text such as 'mxfp4:gemms=dgrad+wgrad' stands for; '' gives None. Raises InputError."""
    if not text:
        return None
    name, colon, rest = text.partition(':')
    MatmulSpec(name)  # an unknown name is refused before its options are
    takes, found = options_of(name), {}
    for i, part in enumerate(rest.split(',') if colon else ()):
        option, equals, value = (piece.strip() for piece in part.partition('='))
        if i == 0 and not equals and name in FIRST_OPTION:
            option, value = FIRST_OPTION[name], option
        elif not equals:
            raise InputError(f'matmul={text!r}: {part!r} must be OPTION=VALUE; {name} takes {", ".join(takes)}')
        if option not in (*takes, 'gemms'):  # MatmulSpec says why a recipe takes no gemms
            raise InputError(f'matmul={text!r}: {name} has no option {option!r}; it takes {", ".join(takes)}')
        if option in found:
            raise InputError(f'matmul={text!r} gives {option} twice: leave one out')
        read, kind = _READ[option]
        try:
            found[option] = read(value)
        except (ValueError, KeyError):
            raise InputError(f'matmul={text!r}: {option}={value!r} must be {kind}') from None
    return MatmulSpec(name, **found)


def former_matmul(config: dict[str, Any]) -> str:
    """
    The spec of a config, as a text. Configs of earlier versions have a key of its own for each option; of those only
    what the recipe takes is carried over.
    """
    name = config.get('matmul') or ''
    if name not in NAMES or not any(key in config for key in _FORMER_KEYS.values()):
        return name
    given = {option: config[key] for option, key in _FORMER_KEYS.items()
             if option in (*options_of(name), 'gemms') and config.get(key) is not None}
    if 'gemms' in given:
        given['gemms'] = tuple(given['gemms'].split(','))
    return str(MatmulSpec(name, **given))


_FORMER_KEYS = {'gemms': 'matmul_gemms', 'keep_last': 'matmul_keep_last', 'until': 'matmul_until',
                'rate': 'block_dropout', 'size': 'block_dropout_size', 'levels': 'strassen_levels',
                'fast_accum': 'fp8_fast_accum'}


def _text(value: Any) -> str:
    return '+'.join(value) if isinstance(value, tuple) else str(value)


def _read_gemms(text: str) -> tuple[str, ...]:
    return tuple(text.split('+'))


def _read_bool(text: str) -> bool:
    return {'true': True, 'false': False}[text.lower()]


# option -> (how its text is read, what it has to be)
_READ: dict[str, tuple[Callable[[str], Any], str]] = {
    'gemms': (_read_gemms, 'names with + between them'), 'keep_last': (int, 'a whole number'),
    'until': (float, 'a number'), 'rate': (float, 'a number'), 'size': (int, 'a whole number'),
    'levels': (int, 'a whole number'), 'fast_accum': (_read_bool, 'True or False')}
