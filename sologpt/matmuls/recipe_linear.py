"""
The Linear that follows a recipe, and what multiplies for it on this device.

    convert(model, spec, ...)  the Linears of the blocks become RecipeLinears of the same parameters
    sum_in_float32(model)      the same without a recipe: ordinary matmuls, as a GPU computes them best
    restore(model)             they multiply as ordinary Linears again; modules and parameters stay
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from configurator import InputError
from sologpt.machine import choices, clock, devices
from sologpt.machine.devices import matmul_dtype
from sologpt.matmuls.block_dropout import BY_MASKING, BY_SKIPPING, block_matmul
from sologpt.matmuls.block_formats import BlockFormat
from sologpt.matmuls.elements import E5M2, Int
from sologpt.matmuls.elementwise import rms_norm
from sologpt.matmuls.formats import Format, is_float8
from sologpt.matmuls.gemms import recipe_matmul
from sologpt.matmuls.ordinary import OrdinaryMatmul, by_parts
from sologpt.matmuls.products import bfloat16_product, fp8_product, int8_product, plain_product, strassen_product
from sologpt.matmuls.recipes import GEMMS, Gemm, Recipe
from sologpt.matmuls.spec import MatmulSpec


@dataclass(frozen=True)
class Strategy:
    """How a RecipeLinear multiplies."""
    function: type[torch.autograd.Function]  # of x, (tokens, in), and w, (out, in)
    how: str  # in words: what computes it here
    normalised: bool = False  # x is normalised first
    in_training_only: bool = False  # in evaluation it is an ordinary Linear


class RecipeLinear(nn.Linear):
    """
    A Linear whose matmuls follow a strategy; with None it is an ordinary Linear. Its parameters are those of the Linear
    that it is built from. The strategy may change at any time: compiled code notices.
    """

    def __init__(self, linear: nn.Linear, strategy: Strategy | None):
        super().__init__(linear.in_features, linear.out_features, bias=False, device='meta')
        self.weight, self.bias, self.strategy = linear.weight, linear.bias, strategy
        self.train(linear.training)

    def reset_parameters(self) -> None:
        """Nothing to do: the parameters come from another Linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)."""
        strategy = self.strategy
        if strategy is None or strategy.in_training_only and not self.training:
            return super().forward(x)
        if strategy.normalised:
            x = rms_norm.apply(x)
        dtype = matmul_dtype(x)
        y = strategy.function.apply(x.to(dtype).flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(dtype)


def find_strategy(spec: MatmulSpec, device: torch.device, dtype: str, dims: tuple[int, ...], tokens: int) -> Strategy:
    """
    The strategy by which `device` follows the spec.

    dtype: the run's, a name. dims: the widths of the Linears. tokens: rows of x. Raises InputError if the device cannot
    compute it at all.
    """
    if spec.name == 'block_dropout':
        # a small matmul of 16-bit numbers takes no less time than a large one
        skips = device.type == 'cpu' and dtype == 'float32'
        function = block_matmul(BY_SKIPPING if skips else BY_MASKING, spec.rate, spec.size)
        how = 'skips dropped blocks' if skips else 'multiplies dropped blocks as zeros'
        return Strategy(function, how, in_training_only=True)
    if spec.name == 'strassen':
        product = functools.partial(strassen_product, levels=spec.levels)
        function = recipe_matmul(Recipe(Gemm(), Gemm(), Gemm()), [product] * 3)
        return Strategy(function, f'{spec.levels} level{"s" * (spec.levels > 1)}, in dtype')
    recipe = spec.recipe
    formats = [format for gemm in GEMMS for format in (getattr(recipe, gemm).a, getattr(recipe, gemm).b)]
    if any(is_float8(format) for format in formats) and not choices.has_float8(device):
        raise InputError(f'matmul={spec.name}: torch {torch.__version__} has no 8-bit floats on '
                         f'{devices.device_name(device)}')
    recipe = replace(recipe, **{gemm: Gemm() for gemm in set(GEMMS) - set(spec.gemms)})
    products, paths = zip(*(find_product(getattr(recipe, gemm), device, dims, tokens, spec.fast_accum and gemm == 'fwd')
                            for gemm in GEMMS), strict=True)
    recipe = replace(recipe, **{gemm: _encoded_in_bfloat16(getattr(recipe, gemm))
                                for gemm, product in zip(GEMMS, products, strict=True) if product is bfloat16_product})
    how = ', '.join(f'{gemm} {path}' for gemm, path in zip(GEMMS, paths, strict=True))
    how = paths[0] if len(set(paths)) == 1 else how
    how = f'2:4 masks, multiplied densely {how}' if spec.name == 'sparse24' else how
    return Strategy(recipe_matmul(recipe, products), how, normalised=recipe.normalised)


def find_product(gemm: Gemm, device: torch.device, dims: tuple[int, ...], tokens: int,
                 fast: bool) -> tuple[Callable, str]:
    """
    (the product for operands that `gemm` encodes, 'native', 'emulated' or 'in dtype').

    fast: whether fp8 may sum at less than float32's precision. A format that hardware multiplies gets its row here.
    """
    if gemm.a is None or gemm.b is None:
        return plain_product, 'in dtype'
    nvidia = devices.is_nvidia(device)
    if all(isinstance(format, Format) and isinstance(format.element, Int) for format in (gemm.a, gemm.b)):
        if nvidia or device.type == 'cpu' and choices.cpu_has_int8():
            return int8_product, 'native'
    if is_float8(gemm.a) and is_float8(gemm.b) and gemm.a.shared == gemm.b.shared != 'column':
        fits = all(n % 16 == 0 for n in (*dims, tokens)) and not gemm.a.element == gemm.b.element == E5M2
        if nvidia and torch.cuda.get_device_capability(device) >= (8, 9) and fits:
            return functools.partial(fp8_product, fast=fast), 'native'
    exact_in_bfloat16 = max(gemm.a.significant_bits, gemm.b.significant_bits) <= 8
    if nvidia and exact_in_bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0):
        return bfloat16_product, 'emulated'
    return plain_product, 'emulated'


def _encoded_in_bfloat16(gemm: Gemm) -> Gemm:
    """The gemm whose block formats encode in bfloat16, so that nothing has to be cast for the matmul."""
    return replace(gemm, **{name: replace(format, dtype=torch.bfloat16)
                            for name, format in (('a', gemm.a), ('b', gemm.b)) if isinstance(format, BlockFormat)})


def block_linears(model: nn.Module, keep_last: int = 0) -> list[nn.Linear]:
    """The Linears of a model's blocks, without those of the last keep_last blocks."""
    return [layer for _, layer in _named_linears(model, keep_last)]


def _named_linears(model: nn.Module, keep_last: int) -> list[tuple[str, nn.Linear]]:
    blocks = list(model.transformer.h.named_children())
    return [(f'transformer.h.{i}.{name}', layer) for i, block in blocks[:len(blocks) - keep_last]
            for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]


def convert(model: nn.Module, spec: MatmulSpec, dtype: str, tokens: int, device: torch.device) -> str:
    """
    Let the Linears of a model's blocks follow the spec on `device`; returns, in words, what computes it.

    Each becomes a RecipeLinear of the same parameters, so that this comes before a model is sharded or replicated.
    dtype: the run's, a name. tokens: of a micro-batch. Raises InputError.
    """
    n_layer = model.config.n_layer
    keep_last = spec.resolved(n_layer).keep_last
    widths = {width for layer in block_linears(model) for width in layer.weight.shape}
    strategy = find_strategy(spec, device, dtype, tuple(widths), tokens)
    for name, layer in _named_linears(model, keep_last):
        model.set_submodule(name, RecipeLinear(layer, strategy))
    kept = f', all but {keep_last} of {n_layer} blocks' if keep_last else ''
    return f'{spec.name}{kept}, {strategy.how}'


def sum_in_float32(model: nn.Module) -> None:
    """Let the Linears of a model's blocks, which are trained in 16 bits on an NVIDIA GPU, use OrdinaryMatmul."""
    for name, layer in _named_linears(model, 0):
        model.set_submodule(name, RecipeLinear(layer, Strategy(OrdinaryMatmul, 'in dtype')))
    for block in model.transformer.h:
        block.attn.project = by_parts


def restore(model: nn.Module) -> None:
    """Let the Linears of a converted model multiply as ordinary ones. Modules and parameters stay as they are."""
    for layer in block_linears(model):
        if isinstance(layer, RecipeLinear):
            layer.strategy = None


def relative_time(spec: MatmulSpec, device: torch.device, dtype: str, rows: int, n_in: int, n_out: int,
                  compile: bool = False) -> float:
    """Seconds of a Linear's forward and backward by the spec, over those in dtype, for at most 2048 rows."""
    runs, rows = [], min(rows, 2048)
    for follows in (False, True):
        layer = nn.Linear(n_in, n_out, bias=False, device=device)
        if follows:
            layer = RecipeLinear(layer, find_strategy(spec, device, dtype, (n_in, n_out), rows))
        linear = torch.compile(layer) if compile else layer  # an nn.Linear's own compile() does nothing
        x = torch.randn(rows, n_in, device=device, requires_grad=True)

        def run(linear=linear, x=x, w=layer.weight):
            with devices.autocast(device, dtype):
                y = linear(x)
            torch.autograd.grad(y, (x, w), y.detach())
        runs.append(run)
    ordinary, followed = zip(*([clock.shortest_seconds(run, device, budget=0.06) for run in runs] for _ in range(2)),
                             strict=True)  # in turns: another program may take the machine for a moment
    return min(followed) / min(ordinary)
