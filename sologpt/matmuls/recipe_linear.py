"""
Linears that follow a recipe, and what multiplies for them on this device.
"""

import difflib
import functools
import math
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import InputError
from sologpt.machine import choices, clock, devices
from sologpt.machine.devices import matmul_dtype
from sologpt.matmuls.elementwise import rms_norm
from sologpt.matmuls.formats import (
    E5M2,
    Float,
    Format,
    Int,
)
from sologpt.matmuls.gemms import block_matmul, recipe_matmul
from sologpt.matmuls.products import (
    by_masking,
    by_skipping,
    fp8_product,
    int8_product,
    plain_product,
    strassen_product,
)
from sologpt.matmuls.recipes import GEMMS, NAMES, RECIPES, Gemm, Recipe


class Linear(nn.Linear):
    """An nn.Linear whose class, and `function`, convert() has set."""

    def forward(self, x):
        dtype = matmul_dtype(x)
        y = self.function.apply(x.to(dtype).flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(dtype)


class NormalisedLinear(Linear):
    def forward(self, x):
        return super().forward(rms_norm.apply(x))


class DropoutLinear(Linear):
    def forward(self, x):
        return super().forward(x) if self.training else F.linear(x, self.weight, self.bias)


def find(name, device, dtype, dims, tokens, gemms='fwd,dgrad,wgrad', rate=0.1, block=128, levels=1, fast_accum=True):
    """
    (class, function, how) for Linears: the class to give them, its `function`, and in words what computes it.

    dtype: the run's, a name; dims: the widths of the Linears; tokens: of a micro-batch. Raises InputError.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        raise InputError(f'matmul={name!r} is not known: use {near[0] + ", or another of " if near else ""}'
                         f'{", ".join(NAMES)}')
    chosen = gemms.split(',')
    if not set(chosen) <= set(GEMMS):
        raise InputError(f'matmul_gemms={gemms!r} must be some of {",".join(GEMMS)}')
    recipe = RECIPES.get(name)
    if set(chosen) != set(GEMMS) and (recipe is None or recipe.latent or recipe.estimator):
        raise InputError(f'matmul_gemms={gemms}: the three matmuls of {name} belong together; leave it out')
    if not 0 <= rate < 1 or block < 1:
        raise InputError(f'block_dropout={rate} must be in [0, 1), and block_dropout_size={block} at least 1')
    if levels < 1:
        raise InputError(f'strassen_levels={levels} must be at least 1')

    if name == 'block_dropout':
        # of 16-bit numbers small matmuls are no faster than one large
        skips = device.type == 'cpu' and dtype == 'float32'
        return (DropoutLinear, block_matmul(by_skipping if skips else by_masking, rate, block),
                'skips dropped blocks' if skips else 'multiplies dropped blocks as zeros')
    if name == 'strassen':
        product = functools.partial(strassen_product, levels=levels)
        whole = Recipe(Gemm(), Gemm(), Gemm())
        return Linear, recipe_matmul(whole, [product] * 3), f'{levels} level{"s" * (levels > 1)}, in dtype'
    formats = [format for gemm in GEMMS for format in (getattr(recipe, gemm).a, getattr(recipe, gemm).b)]
    if any(_is_float8(format) for format in formats) and not choices.has_float8(device):
        raise InputError(f'matmul={name}: torch {torch.__version__} has no 8-bit floats on '
                         f'{devices.device_name(device)}')
    recipe = replace(recipe, **{gemm: Gemm() for gemm in set(GEMMS) - set(chosen)})
    products, paths = zip(*(find_product(getattr(recipe, gemm), device, dims, tokens, fast_accum and gemm == 'fwd')
                            for gemm in GEMMS), strict=True)
    how = ', '.join(f'{gemm} {path}' for gemm, path in zip(GEMMS, paths, strict=True))
    how = paths[0] if len(set(paths)) == 1 else how
    how = f'2:4 masks, multiplied densely {how}' if name == 'sparse24' else how
    return NormalisedLinear if recipe.normalised else Linear, recipe_matmul(recipe, products), how


def find_product(rule, device, dims, tokens, fast):
    """(the product for operands so encoded, 'native', 'emulated', or 'in dtype' where an operand is)."""
    if rule.a is None or rule.b is None:
        return plain_product, 'in dtype'
    nvidia = device.type == 'cuda' and not torch.version.hip
    if all(isinstance(format, Format) and isinstance(format.element, Int) for format in (rule.a, rule.b)):
        if nvidia or device.type == 'cpu' and choices.cpu_has_int8():
            return int8_product, 'native'
    if _is_float8(rule.a) and _is_float8(rule.b) and rule.a.shared == rule.b.shared != 'column':
        fits = all(n % 16 == 0 for n in (*dims, tokens)) and not rule.a.element == rule.b.element == E5M2
        if nvidia and torch.cuda.get_device_capability(device) >= (8, 9) and fits:
            return functools.partial(fp8_product, fast=fast), 'native'
    return plain_product, 'emulated'


def _is_float8(format):
    return isinstance(format, Format) and format.kept and isinstance(format.element, Float)


def layers(model, keep_last=0):
    """The Linears of a model's blocks, but for the last keep_last blocks."""
    blocks = model.transformer.h[:len(model.transformer.h) - keep_last]
    return [layer for layer in blocks.modules() if isinstance(layer, nn.Linear)]


def convert(model, name, dtype, tokens, keep_last=None, **options):
    """
    Let the Linears of a model's blocks follow recipe `name`; their parameters stay. Returns, in words, what computes
    it. keep_last: how many of the last blocks stay in dtype; None: as many as the recipe says.
    options: find()'s. Raises InputError.
    """
    n_layer, n_embd = model.config.n_layer, model.config.n_embd
    device = model.lm_head.weight.device
    cls, function, how = find(name, device, dtype, (n_embd, 3 * n_embd, 4 * n_embd), tokens, **options)
    if keep_last is None:
        keep_last = min(n_layer - 1, math.ceil(RECIPES[name].keep_last * n_layer)) if name in RECIPES else 0
    if not 0 <= keep_last < n_layer:
        raise InputError(f'matmul_keep_last={keep_last}: it must be from 0 to {n_layer - 1}, so that {name} has blocks '
                         f'left')
    for layer in layers(model, keep_last):
        layer.__class__, layer.function = cls, function
    kept = f', all but {keep_last} of {n_layer} blocks' if keep_last else ''
    return f'{name}{kept}, {how}'


def restore(model):
    """Undo convert(): ordinary Linears, with the parameters as they are."""
    for layer in layers(model):
        layer.__class__ = nn.Linear


def relative_time(name, device, dtype, rows, n_in, n_out, compile=False, **options):
    """Seconds of a Linear's forward and backward by the recipe, over those in dtype, for at most 2048 rows."""
    runs, rows = [], min(rows, 2048)
    for convert_it in (False, True):
        layer = nn.Linear(n_in, n_out, bias=False, device=device)
        if convert_it:
            layer.__class__, layer.function, _ = find(name, device, dtype, (n_in, n_out), rows, **options)
        linear = torch.compile(layer) if compile else layer  # an nn.Linear's own compile() does nothing
        x = torch.randn(rows, n_in, device=device, requires_grad=True)

        def run(linear=linear, x=x, w=layer.weight):
            with devices.autocast(device, dtype):
                y = linear(x)
            torch.autograd.grad(y, (x, w), y.detach())
        runs.append(run)
    ordinary, followed = zip(*([clock.shortest_seconds(run, device, budget=0.06) for run in runs] for _ in range(2)),
                             strict=True)  # in turn, for another program may take the machine for a moment
    return min(followed) / min(ordinary)
