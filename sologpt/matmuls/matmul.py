"""
Linear layers whose three matmuls follow a recipe.

Each of the three multiplies a[M, K] by b[N, K]^T and rounds its operands along K, the dimension that is summed:

  fwd     y  = x w^T          x: (tokens, in), w: (out, in)
  dgrad   dx = g w            a = g: (tokens, out), b = w^T
  wgrad   dw = g^T x          a = g^T, b = x^T

A recipe names the format of either operand of each (RECIPES); formats.py says what a format does. A new recipe is a
row in the table. The weights stay parameters of an nn.Linear: convert() only changes the layers' class.
"""

import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import InputError
from sologpt.machine import hardware
from sologpt.machine.hardware import matmul_dtype
from sologpt.matmuls.elementwise import rms_norm
from sologpt.matmuls.formats import (
    BYTE,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    TRIT,
    BlockFormat,
    Encoded,
    Float,
    Format,
    Int,
    Sparse24,
    pack,
)
from sologpt.matmuls.products import (
    by_masking,
    by_skipping,
    cast,
    fp8_product,
    int8_product,
    int8_sums,
    plain_product,
    scaled,
    strassen_product,
)


@dataclass(frozen=True)
class Gemm:
    """The formats of a and b; None leaves an operand as it is, in the run's dtype."""
    a: object = None
    b: object = None
    hadamard: int = 0  # K is turned by a random rotation, block by block of that size, which spreads outliers

    def __post_init__(self):
        assert getattr(self.a, 'shared', None) != 'column', 'a scale of a along K has nowhere to go; b may have one'


@dataclass(frozen=True)
class Recipe:
    fwd: Gemm
    dgrad: Gemm
    wgrad: Gemm
    estimator: Callable | None = None  # of w: what the weights' gradient is multiplied by, element by element
    latent: bool = False  # the model's weights are what `fwd` makes of the parameters: sampling has to do it too
    normalised: bool = False  # the Linear's input is normalised first
    keep_last: float = 0.0  # the share of the last blocks that stays in the run's dtype
    until: float = 1.0  # the share of the run in which it holds


def dge(w, power=5.0, most=3.0):
    """
    The differentiable gradient estimator of FP4 weights with a scale per row (https://arxiv.org/abs/2501.17116): the
    derivative of a power curve through the steps of the rounding, at most 3.
    """
    w = w.float()
    u = w.abs() * (E2M1.max / w.abs().amax(-1, keepdim=True).clamp(min=1e-12))
    grid = E2M1.grid.to(w.device)
    above = torch.searchsorted(grid, u.contiguous(), right=True).clamp(max=len(grid) - 1)
    lo, hi = grid[above - 1], grid[above]
    return ((2 * (u - lo) / (hi - lo) - 1).abs().pow(1 / power - 1) / power).clamp(max=most)


def all_three(format):
    """A recipe that rounds every operand alike, along the dimension that is summed."""
    return Recipe(*[Gemm(format, format)] * 3)


def per(shared, element, **options):
    return Format(element, shared, **options)


def mx(element, **options):
    return BlockFormat(element, (1, 32), **options)


def nvfp4(block, **options):
    return BlockFormat(E2M1, block, 'e4m3', **options)


def fp8_block(rows, columns):
    return BlockFormat(E4M3, (rows, columns))


# unbiased: stochastic, and multiplied by 3/4 so that OCP's scale cuts nothing (https://arxiv.org/abs/2502.20586)
MXFP4_UNBIASED = mx(E2M1, scaling='floor', stochastic=True, prescale=0.75)
FP4_KEEPING_OUTLIERS = per('row', E2M1, outliers=0.99)
TERNARY = per('tensor', TRIT, mean=True)

RECIPES = {
    # the operands of y = x w^T, of dx = g w, of dw = g^T x
    'fp8': Recipe(Gemm(per('tensor', E4M3), per('tensor', E4M3)),
                  Gemm(per('tensor', E5M2), per('tensor', E4M3)),
                  Gemm(per('tensor', E5M2), per('tensor', E4M3))),
    'fp8_row': all_three(per('row', E4M3)),
    'fp8_block': Recipe(Gemm(fp8_block(1, 128), fp8_block(128, 128)),
                        Gemm(fp8_block(1, 128), fp8_block(128, 128)),
                        Gemm(fp8_block(1, 128), fp8_block(1, 128))),
    'mxfp8': all_three(mx(E4M3)),
    'mxfp6_e2m3': all_three(mx(E2M3)),
    'mxfp6_e3m2': all_three(mx(E3M2)),
    'mxfp4': Recipe(Gemm(mx(E2M1), mx(E2M1)),
                    Gemm(MXFP4_UNBIASED, MXFP4_UNBIASED, hadamard=32),
                    Gemm(MXFP4_UNBIASED, MXFP4_UNBIASED, hadamard=32)),
    'nvfp4': Recipe(Gemm(nvfp4((1, 16)), nvfp4((16, 16))),
                    Gemm(nvfp4((1, 16), stochastic=True), nvfp4((16, 16))),
                    Gemm(nvfp4((1, 16), stochastic=True), nvfp4((1, 16)), hadamard=16), keep_last=0.15),
    'fp4_dge': Recipe(Gemm(FP4_KEEPING_OUTLIERS, per('row', E2M1)),
                      Gemm(per('tensor', E5M2), per('column', E2M1)),
                      Gemm(per('tensor', E5M2), FP4_KEEPING_OUTLIERS.mT), estimator=dge),
    'int8': Recipe(Gemm(per('row', BYTE), per('row', BYTE)),
                   Gemm(per('row', BYTE), per('column', BYTE)),
                   Gemm(per('row', BYTE), per('column', BYTE))),
    'ternary': Recipe(Gemm(per('row', BYTE), TERNARY),
                      Gemm(None, TERNARY),
                      Gemm(None, per('column', BYTE)), latent=True, normalised=True),
    'sparse24': Recipe(Gemm(None, Sparse24()), Gemm(None, Sparse24()), Gemm(None, None), latent=True, until=0.7),
}


def recipe_matmul(recipe, products):
    """
    The autograd.Function of x, (tokens, in), and w, (out, in), whose matmuls follow the recipe by these three products.
    An operand's encoding serves the backward too where its transpose is what is asked for there.
    """
    fwd, dgrad, wgrad = recipe.fwd, recipe.dgrad, recipe.wgrad
    keep_x = fwd.a is not None and fwd.a.kept and wgrad.b == fwd.a.mT and not (fwd.hadamard or wgrad.hadamard)
    keep_w = fwd.b is not None and fwd.b.kept and dgrad.b == fwd.b.mT and not (fwd.hadamard or dgrad.hadamard)
    keep_x = keep_x and getattr(fwd.b, 'shared', None) != 'column'  # whose scale x would have to take over
    turns = max(rule.hadamard for rule in (fwd, dgrad, wgrad))

    class RecipeMatmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            with torch.autocast(x.device.type, enabled=False):
                a = fwd.a.encode(x) if keep_x else Encoded(x, None)
                b = fwd.b.encode(w) if keep_w else Encoded(w, None)
                # drawn here and kept: torch.compile may draw anew what is drawn in the backward, for either operand
                signs = torch.randint(0, 2, (turns, 1), device=x.device) * 2.0 - 1 if turns else None
                ctx.save_for_backward(*a, *b, signs, w if recipe.estimator else None)
                ctx.dtypes = x.dtype, w.dtype
                return gemm(fwd, products[0], a if keep_x else x, b if keep_w else w, x.dtype, signs=signs)

        @staticmethod
        def backward(ctx, g):
            x, x_scale, w, w_scale, signs, weight = ctx.saved_tensors
            x_dtype, w_dtype = ctx.dtypes
            dx = dw = None
            with torch.autocast(g.device.type, enabled=False):
                if ctx.needs_input_grad[0]:
                    b = Encoded(w, w_scale).mT if keep_w else w.mT
                    dx = gemm(dgrad, products[1], g, b, x_dtype, signs=signs)
                if ctx.needs_input_grad[1]:
                    b = Encoded(x, x_scale).mT if keep_x else x.mT
                    dw = gemm(wgrad, products[2], g.mT, b, x_dtype, w_dtype, signs)
                    if recipe.estimator:
                        dw = cast(dw * recipe.estimator(weight), w_dtype)
            return dx, dw

    return RecipeMatmul


def gemm(rule, product, a, b, dtype, out=None, signs=None):
    """
    a b^T by the rule, in dtype `out` (None: dtype). a: (M, K), b: (N, K), either of them possibly encoded already.
    dtype: the one that operands without a format are multiplied in; signs: of the rotation, random ones.
    """
    if rule.hadamard:
        a, b = (rotate(t, signs[:rule.hadamard]) for t in (a, b))
    if not isinstance(b, Encoded):
        b = encode(rule.b, b)
    times = None
    if isinstance(rule.b, Format) and rule.b.shared == 'column':
        # a scale along K cannot leave the sum: it goes over to a, before a is rounded
        b, times = Encoded(b.values, None), b.scale
    if not isinstance(a, Encoded):
        a = encode(rule.a, a, times)
    work = dtype if rule.a is None or rule.b is None else torch.float32
    return product(a, b, work, out or dtype)


def encode(format, x, times=None):
    if format is None:
        return Encoded(x if times is None else x * times, None)
    return format.encode(x, times)


def rotate(t, signs):
    """t, (rows, K), of which every len(signs) elements along K are turned by the orthogonal matrix diag(signs) H."""
    size = len(signs)
    turn = signs * HADAMARD[:size, :size].to(t.device)  # of ones, which TF32 does not round
    return (F.pad(t.float(), (0, -t.size(1) % size)).unflatten(1, (-1, size)) @ turn).flatten(1) / size ** 0.5


def _hadamard(size):
    """Sylvester's matrix of ones and minus ones; its upper left corners are the smaller ones."""
    return functools.reduce(torch.kron, [torch.tensor([[1.0, 1.0], [1.0, -1.0]])] * int(math.log2(size)))


HADAMARD = _hadamard(64)


# Block dropout: blocks of a Linear's input are dropped, and what they would have been multiplied with is not computed.

def block_matmul(multiply, rate, block):
    """
    The autograd.Function of x, (tokens, in), and w, (out, in): dropout of whole blocks of x, of `block` tokens by
    `block` dimensions, and the matmul (SparseDrop, https://arxiv.org/abs/2411.01238). multiply: by_skipping or
    by_masking.
    """
    class BlockMatmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            with torch.autocast(x.device.type, enabled=False):
                size = [math.ceil(n / block) for n in x.shape]
                keep = torch.rand(size, device=x.device) >= rate
                ctx.save_for_backward(x, w, keep)
                return multiply.fwd(x, w.to(x.dtype), keep, block) / (1 - rate)

        @staticmethod
        def backward(ctx, g):
            x, w, keep = ctx.saved_tensors
            with torch.autocast(g.device.type, enabled=False):
                g = g / (1 - rate)
                return (multiply.dgrad(g, w.to(g.dtype), keep, block),
                        multiply.wgrad(g, x, keep, block).to(w.dtype) if ctx.needs_input_grad[1] else None)

    return BlockMatmul


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


NAMES = (*RECIPES, 'strassen', 'block_dropout')
GEMMS = ('fwd', 'dgrad', 'wgrad')


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
    if any(_is_float8(format) for format in formats) and not hardware.has_float8(device):
        raise InputError(f'matmul={name}: torch {torch.__version__} has no 8-bit floats on '
                         f'{hardware.device_name(device)}')
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
        if nvidia or device.type == 'cpu' and hardware.cpu_has_int8():
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
            with hardware.autocast(device, dtype):
                y = linear(x)
            torch.autograd.grad(y, (x, w), y.detach())
        runs.append(run)
    ordinary, followed = zip(*([hardware.shortest_seconds(run, device, budget=0.06) for run in runs] for _ in range(2)),
                             strict=True)  # in turn, for another program may take the machine for a moment
    return min(followed) / min(ordinary)


def hold_in_bfloat16(model):
    """The model's matrices and tables in half the memory; vectors stay float32."""
    for p in model.parameters():
        if p.dim() >= 2:
            p.data = p.data.bfloat16()


def hold_for_matmuls(model, dtype):
    """
    Hold the weights of Linears in the dtype (a name) of matmuls, to which autocast would round them in every step. The
    embedding table stays as it is: a head that is tied to it gets weights of its own.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            for name, p in layer.named_parameters(recurse=False):
                setattr(layer, name, nn.Parameter(p.detach().to(hardware.DTYPES[dtype]), requires_grad=False))


# Inference with ternary weights.

class PackedTernary(nn.Module):
    """
    A ternary Linear for inference, with weights of 2 bits: the training forward's results, exactly. It saves memory,
    not time: to unpack them takes longer than to multiply.
    """

    def __init__(self, linear):
        super().__init__()
        values, scale = TERNARY.encode(linear.weight.detach())
        self.out_features, self.in_features = values.shape
        values = F.pad(values, (0, -values.size(1) % 4))
        self.register_buffer('packed', pack(TRIT.codes(values), TRIT.bits))
        self.register_buffer('scale', scale)
        self.bias = linear.bias

    def forward(self, x):
        dtype = matmul_dtype(x)
        a = per('row', BYTE).encode(rms_norm.apply(x).to(dtype).flatten(0, -2))
        padded = F.pad(a.values, (0, -self.in_features % 4))
        total = 0
        for i in range(4):  # every fourth weight: two bits of each byte, in two's complement
            weights = ((self.packed >> 2 * i & 3) ^ 2).view(torch.int8) - 2
            total = total + int8_sums(padded[:, i::4].contiguous(), weights)
        y = scaled(total, a, Encoded(self.packed, self.scale), dtype).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(dtype)


def pack_ternary(model):
    """Put a PackedTernary in the place of every ternary Linear. Returns the bytes of (all of them, of bfloat16)."""
    packed, before = 0, 0
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, NormalisedLinear):
                    setattr(part, name, PackedTernary(layer))
                    packed += getattr(part, name).packed.numel()
                    before += 2 * layer.weight.numel()
    return packed, before
