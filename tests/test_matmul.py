import math
import shutil

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.machine import choices, devices
from sologpt.matmuls import gemms, held, products, recipe_linear, recipes, ternary
from sologpt.matmuls.elementwise import rms_norm
from sologpt.matmuls.formats import BYTE, Format, Sparse24
from sologpt.matmuls.gemms import gemm, recipe_matmul
from sologpt.matmuls.products import plain_product
from sologpt.matmuls.recipe_linear import find
from sologpt.matmuls.recipes import NAMES, RECIPES, Gemm, Recipe

CPU = torch.device('cpu')
STOCHASTIC = ('mxfp4', 'nvfp4', 'block_dropout')


def tensors(tokens=32, n_in=64, n_out=128, dtype=torch.float32):
    torch.manual_seed(0)
    x, w, g = torch.randn(tokens, n_in), torch.randn(n_out, n_in) / n_in ** 0.5, torch.randn(tokens, n_out)
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), g.to(dtype)


def through(function, x, w, g):
    """(y, dx, dw)"""
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    y = function(x, w)
    y.backward(g.to(y.dtype))
    return y.detach(), x.grad, w.grad


def apart(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def linear(name, n_in=64, n_out=128, dtype='float32', tokens=32, **options):
    torch.manual_seed(0)
    layer = nn.Linear(n_in, n_out, bias=False)
    layer.__class__, layer.function, _ = find(name, CPU, dtype, (n_in, n_out), tokens, **options)
    return layer


# The contract.

def test_a_recipe_without_formats_is_a_matmul():
    x, w, _ = tensors(5, 6, 7, torch.float64)
    for product in (plain_product, products.strassen_product):
        function = recipe_matmul(Recipe(Gemm(), Gemm(), Gemm()), [product] * 3)
        assert torch.autograd.gradcheck(function.apply, (x, w))


@pytest.mark.parametrize('name', ['fp8', 'fp8_row', 'fp8_block', 'mxfp8', 'mxfp6_e2m3', 'mxfp6_e3m2'])
def test_each_operand_is_rounded_along_what_is_summed(name):
    x, w, g = tensors(96, 160, 256)
    recipe = RECIPES[name]

    def rounded(format, t):
        return format.encode(t.detach()).decode()
    y, dx, dw = through(recipe_matmul(recipe, [plain_product] * 3).apply, x, w, g)
    torch.testing.assert_close(y, rounded(recipe.fwd.a, x) @ rounded(recipe.fwd.b, w).T)
    torch.testing.assert_close(dx, rounded(recipe.dgrad.a, g) @ rounded(recipe.dgrad.b, w.T).T)
    torch.testing.assert_close(dw, rounded(recipe.wgrad.a, g.T) @ rounded(recipe.wgrad.b, x.T).T, rtol=1e-5, atol=1e-4)
    assert 0.01 < apart(y, x @ w.T) < 0.08


def test_int8_takes_the_scales_of_what_the_forward_rounded_into_the_gradient():
    """Three products of integers, out of four roundings: x and w are rounded once."""
    x, w, g = tensors()

    def rows(t):
        scale = t.abs().amax(1, keepdim=True) / 127
        return (t / scale).round(), scale
    (qx, sx), (qw, sw), g = rows(x.detach()), rows(w.detach()), g.double()
    (qd, sd), (qg, sg) = rows(g * sw.T), rows(g.T * sx.T)
    y, dx, dw = through(linear('int8').function.apply, x, w, g.float())
    torch.testing.assert_close(y, (qx @ qw.T) * sx * sw.T)
    torch.testing.assert_close(dx, ((qd @ qw.double()) * sd).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, ((qg @ qx.double()) * sg).float(), rtol=1e-5, atol=1e-5)
    assert max(apart(y, x @ w.T), apart(dx, g.float() @ w), apart(dw, g.float().T @ x)) < 0.015


def straight_through(rounded, t):
    return t + (rounded - t).detach()


def test_ternary_is_straight_through():
    x, w, g = tensors()

    def reference(x, w):
        scale = x.abs().amax(1, keepdim=True) / 127
        mean = w.abs().mean()
        return straight_through((x / scale).round() * scale, x) @ \
            straight_through((w / mean).round().clamp(-1, 1) * mean, w).T
    for mine, expected in zip(through(linear('ternary').function.apply, x, w, g), through(reference, x, w, g),
                              strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer = linear('ternary')
        assert torch.equal(layer(x), layer.function.apply(rms_norm.apply(x), layer.weight))


def test_sparse_weights_are_straight_through():
    x, w, g = tensors()
    mask = Sparse24().mask(w)
    assert mask.float().mean() == 0.5
    found = through(linear('sparse24').function.apply, x, w, g)
    expected = through(lambda x, w: x @ straight_through(w * mask, w).T, x, w, g)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right)


def test_fp4_gradients_pass_the_estimator():
    x, w, g = tensors()
    recipe = RECIPES['fp4_dge']

    class Estimated(torch.autograd.Function):
        """The paper's derivative, written as it stands there, around the rounding."""
        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return recipe.fwd.b.encode(w).decode()

        @staticmethod
        def backward(ctx, grad):
            w, = ctx.saved_tensors
            steps, factors = [0, 0.5, 1, 1.5, 2, 3, 4, 6], []
            for row in w:
                for v in (row.abs() * 6 / row.abs().max()).tolist():
                    i = max(i for i in range(7) if steps[i] <= v)
                    t = 2 * (v - steps[i]) / (steps[i + 1] - steps[i]) - 1
                    factors.append(min(abs(t) ** (1 / 5 - 1) / 5 if t else math.inf, 3.0))
            return grad * torch.tensor(factors).view_as(w)

    exact = Recipe(recipe.fwd, Gemm(None, recipe.dgrad.b), Gemm(None, recipe.wgrad.b), estimator=recipe.estimator)
    found = through(recipe_matmul(exact, [plain_product] * 3).apply, x, w, g)
    expected = through(lambda x, w: straight_through(recipe.fwd.a.encode(x.detach()).decode(), x)
                       @ Estimated.apply(w).T, x, w, g)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    _, _, dw = through(linear('fp4_dge').function.apply, x, w, g)  # its gradients are fp8's
    assert 0.01 < apart(dw, found[2]) < 0.1
    assert 0.5 < recipes.dge(torch.randn(512, 512)).mean() < 0.7


def test_scales_along_the_sum_go_over_to_the_other_operand():
    a, b = torch.randn(8, 16), torch.randn(4, 16)
    rule = Gemm(None, Format(BYTE, 'column'))
    exact = a @ rule.b.encode(b).decode().T
    torch.testing.assert_close(gemm(rule, plain_product, a, b, torch.float32), exact)


def test_a_random_rotation_leaves_the_product():
    a, b = torch.randn(8, 100), torch.randn(4, 100)
    signs = torch.randint(0, 2, (32, 1)) * 2.0 - 1
    turned = gemm(Gemm(hadamard=32), plain_product, a, b, torch.float32, signs=signs)
    torch.testing.assert_close(turned, a @ b.T, rtol=1e-4, atol=1e-5)
    spike = torch.zeros(1, 32).index_fill(1, torch.tensor(3), 1.0)
    assert gemms.rotate(spike, signs).abs().allclose(torch.tensor(32 ** -0.5))


@pytest.mark.parametrize('name', NAMES)
def test_one_infinity_or_nan_is_not_lost(name):
    for bad in (math.inf, math.nan):
        x, w, g = tensors()
        for t in (x, w):
            with torch.no_grad():
                old, t[3, 5] = t[3, 5].clone(), bad
            y, _, _ = through(linear(name, rate=0.0).function.apply, x, w, g)
            assert not y.isfinite().all(), (bad, t.shape)
            with torch.no_grad():
                t[3, 5] = old
        g[3, 5] = bad
        _, dx, dw = through(linear(name, rate=0.0).function.apply, x, w, g)
        assert not dx.isfinite().all() and not dw.isfinite().all(), bad


# What hardware computes, and what is computed in its place.

def test_the_operands_of_the_backward_are_kept_as_they_were_rounded():
    def kept(name):
        x, w, _ = tensors(64, 64, 64)
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: storages.update({t.data_ptr(): t}) or t, lambda t: t):
            linear(name, 64, 64).function.apply(x, w)
        return [t for t in storages.values() if t.numel() == 64 * 64]
    assert {t.dtype for t in kept('int8')} == {torch.int8}
    assert {t.dtype for t in kept('fp8')} == {torch.float8_e4m3fn}
    assert {t.dtype for t in kept('mxfp8')} == {torch.float32}  # rounded along another dimension then


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('weights', [torch.float32, torch.bfloat16])
def test_every_recipe_takes_16_bits(dtype, weights):
    """Of activations by autocast, and of weights: much the same gradients, in the weights' dtype."""
    x, _, g = tensors()
    for name in NAMES:
        found = []
        for w_dtype, enabled in ((torch.float32, False), (weights, True)):
            layer = linear(name, dtype=dtype)
            layer.weight.data = layer.weight.data.bfloat16().to(w_dtype)
            torch.manual_seed(0)
            with torch.autocast('cpu', getattr(torch, dtype), enabled=enabled):
                y = layer(x)
            y.backward(g.to(y.dtype))
            found.append((y, layer.weight.grad))
        (y, dw), (y16, dw16) = found
        assert y16.dtype == getattr(torch, dtype) and dw16.dtype == weights, name
        loose = 0.5 if name in STOCHASTIC[:2] else 0.15
        assert apart(y16, y) < 0.15 and apart(dw16, dw) < loose, name


def test_nvfp4_is_unbiased_where_it_rounds_at_random():
    x, w, g = tensors(64, 64, 64)
    torch.manual_seed(0)
    recipe, n = RECIPES['nvfp4'], 60
    function = recipe_matmul(recipe, [plain_product] * 3).apply
    y, dx, dw = (sum(t) / n for t in zip(*(through(function, x, w, g) for _ in range(n)), strict=True))
    rounded = recipe.dgrad.b.encode(w.detach()).decode()
    assert apart(y, recipe.fwd.a.encode(x.detach()).decode() @ rounded.T) < 1e-6
    assert apart(dx, g @ rounded) < 0.03 and apart(dw, g.T @ x) < 0.04  # of one: 0.15
    assert apart(through(function, x, w, g)[2], g.T @ x) > 0.1


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
def test_inductor_turns_both_operands_by_the_same_random_matrix():
    """It may draw anew in the backward, for one of them: then the mean gradient is zero."""
    layer = linear('mxfp4')
    x, w, g = tensors()
    compiled, grads = torch.compile(layer, fullgraph=True), []
    for _ in range(12):
        layer.weight.grad = None
        compiled(x).backward(g)
        grads.append(layer.weight.grad)
    assert apart(sum(grads) / len(grads), g.T @ x) < 0.15


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', NAMES)
def test_compiles_whole(name, dtype):
    """Compiled by torch's own passes for autograd, which a Function can be wrong under; what is random, in the mean."""
    layer = linear(name, tokens=32)
    x, w, g = tensors(dtype=dtype)
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    n = 24 if name in STOCHASTIC else 1

    def mean(layer):
        torch.manual_seed(1)
        results = []
        for _ in range(n):
            layer.weight.grad = None
            x.grad = None
            y = layer(x)
            y.backward(g)
            results.append((y.detach().float(), x.grad.float(), layer.weight.grad))
        return [sum(r) / n for r in zip(*results, strict=True)]
    layer.weight.data = w.detach().float()
    for eager, whole in zip(mean(layer), mean(compiled), strict=True):
        assert apart(whole, eager) < (0.25 if n > 1 else 0.02)


# Block dropout.

@pytest.mark.parametrize('multiply', [products.by_skipping, products.by_masking])
def test_block_dropout_is_a_masked_matmul(multiply):
    x, w, g = tensors(70, 100, 90)
    function = gemms.block_matmul(multiply, 0.4, 32).apply
    torch.manual_seed(5)
    found = through(function, x, w, g)
    torch.manual_seed(5)
    keep = torch.rand(3, 4) >= 0.4
    assert 0 < keep.sum() < 12
    mask = keep.repeat_interleave(32, 0).repeat_interleave(32, 1)[:70, :100] / 0.6
    for mine, right in zip(found, through(lambda x, w: (x * mask) @ w.T, x, w, g), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_block_dropout_does_not_read_what_it_drops():
    x, w, g = tensors(64, 128, 64)
    torch.manual_seed(5)
    kept = (torch.rand(2, 4) >= 0.5).repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert kept.any() and not kept.all()
    x = torch.where(kept, x.detach(), math.nan)
    for multiply, reads in ((products.by_skipping, False), (products.by_masking, True)):
        torch.manual_seed(5)
        y, _, dw = through(gemms.block_matmul(multiply, 0.5, 32).apply, x, w, g)
        assert y.isnan().any() == dw.isnan().any() == reads


def test_block_dropout_drops_in_training_alone():
    x, _, _ = tensors()
    layer = linear('block_dropout', rate=0.5, block=16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), F.linear(x, layer.weight))


# Ternary inference.

@pytest.mark.parametrize('n_in', [64, 50])
def test_packed_weights_give_the_training_forward(n_in):
    layer = linear('ternary', n_in, 24)
    packed = ternary.PackedTernary(layer)
    assert packed.packed.numel() == 24 * math.ceil(n_in / 4)
    x = torch.randn(2, 3, n_in)
    assert torch.equal(packed(x), layer(x))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(packed(x), layer(x))


# A model.

def small(arch='gpt2', n_layer=4):
    torch.manual_seed(0)
    return GPT(GPTConfig(arch=arch, n_layer=n_layer, n_head=2, n_embd=32, block_size=8, vocab_size=11))


def test_the_parameters_stay_what_and_where_they_are():
    model = small()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    keys, ids = model.state_dict().keys(), torch.randint(0, 11, (2, 8))
    plain = model(ids, ids)[1]
    assert recipe_linear.convert(model, 'int8', 'float32', 16).startswith('int8, ')
    assert model.state_dict().keys() == keys
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    changed = {name for name, m in model.named_modules() if isinstance(m, recipe_linear.Linear)}
    assert len(changed) == 16 and 'lm_head' not in changed
    low = model(ids, ids)[1]
    assert low != plain and abs(low - plain) < 0.05
    recipe_linear.restore(model)
    assert torch.equal(model(ids, ids)[1], plain)


def test_a_compiled_model_goes_back_to_its_dtype():
    model, ids = small(), torch.randint(0, 11, (2, 8))
    plain = model(ids, ids)[1]
    recipe_linear.convert(model, 'sparse24', 'float32', 16)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    assert compiled(ids, ids)[1] == model(ids, ids)[1] != plain
    recipe_linear.restore(model)
    assert compiled(ids, ids)[1] == plain


def test_the_last_blocks_stay_in_high_precision():
    def converted(name, keep_last=None):
        model = small()
        how = recipe_linear.convert(model, name, 'float32', 16, keep_last)
        return [isinstance(block.mlp.c_fc, recipe_linear.Linear) for block in model.transformer.h], how
    assert converted('nvfp4') == ([True] * 3 + [False], 'nvfp4, all but 1 of 4 blocks, emulated')
    assert converted('int8', 3)[0] == [True] + [False] * 3
    with pytest.raises(InputError, match='matmul_keep_last=4'):
        converted('int8', 4)


def paths(device='cpu', dims=(64, 128), tokens=32):
    return {name: find(name, torch.device(device), 'bfloat16', dims, tokens)[2] for name in ('fp8', 'fp8_row', 'int8')}


def test_native_is_what_the_hardware_has(monkeypatch):
    """Of a GPU by what torch says of it, for want of one."""
    monkeypatch.setattr(choices, 'cpu_has_int8', lambda: False)
    assert paths() == {'fp8': 'emulated', 'fp8_row': 'emulated', 'int8': 'emulated'}
    for capability, native in ((8, 0), {'int8'}), ((8, 9), {'int8', 'fp8', 'fp8_row'}):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device, capability=capability: capability)
        monkeypatch.setattr(devices, 'device_name', lambda device: 'a GPU')
        if capability == (8, 0) and torch.__version__ < '2.13':
            with pytest.raises(InputError, match='no 8-bit floats on a GPU'):
                paths('cuda')
            continue
        assert {name for name, path in paths('cuda').items() if path == 'native'} == native
        assert paths('cuda', tokens=24)['fp8'] == paths('cuda', dims=(72, 64))['fp8_row'] == 'emulated'
    monkeypatch.setattr(torch.version, 'hip', '6.0')
    assert set(paths('cuda').values()) == {'emulated'}
    with pytest.raises(InputError, match='no 8-bit floats'):
        find('fp8', torch.device('mps'), 'float32', (64,), 32)


@pytest.mark.parametrize('name', ['fp8', 'fp8_row'])
def test_fp8_operands_lie_as_tensor_cores_take_them(name, monkeypatch):
    calls = []

    def scaled_mm(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.stride(1) == 1 and b.stride(0) == 1 and scale_a.is_contiguous() and scale_b.is_contiguous()
        assert not a.dtype == b.dtype == torch.float8_e5m2 and all(n % 16 == 0 for n in (*a.shape, *b.shape))
        assert scale_a.shape == (() if name == 'fp8' else (len(a), 1)) and scale_a.dtype == torch.float32
        assert scale_b.shape == (() if name == 'fp8' else (1, b.size(1)))
        assert out_dtype == torch.bfloat16 or name == 'fp8'
        calls.append(use_fast_accum)
        return (a.float() * scale_a @ (b.float() * scale_b)).to(out_dtype)
    monkeypatch.setattr(torch, '_scaled_mm', scaled_mm)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    x, w, g = tensors(dtype=torch.bfloat16)
    _, function, _ = find(name, torch.device('cuda'), 'bfloat16', (64, 128), 32)
    expected = through(linear(name).function.apply, x, w, g)
    for mine, right in zip(through(function.apply, x, w, g), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=0.02, atol=0.02)
    assert calls == [True, False, False]  # in the forward alone


@pytest.mark.parametrize('name, options, message', [
    ('int9', {}, "matmul='int9' is not known: use int8"),
    ('int8', {'gemms': 'fwd,grad'}, 'matmul_gemms='),
    ('ternary', {'gemms': 'fwd'}, 'belong together'),
    ('strassen', {'gemms': 'fwd'}, 'belong together'),
    ('strassen', {'levels': 0}, 'strassen_levels=0'),
    ('block_dropout', {'rate': 1.0}, 'block_dropout=1.0'),
])
def test_what_cannot_be_is_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        recipe_linear.convert(small(), name, 'float32', 16, **options)


def test_which_matmuls_follow_the_recipe():
    x, w, g = tensors()
    exact = x @ w.T, g @ w, g.T @ x
    for chosen in ('fwd', 'dgrad', 'wgrad', 'dgrad,wgrad'):
        found = through(linear('int8', gemms=chosen).function.apply, x, w, g)
        followed = [apart(mine, right) > 1e-4 for mine, right in zip(found, exact, strict=True)]
        assert followed == [gemm in chosen.split(',') for gemm in recipes.GEMMS], chosen


def test_bfloat16_weights_are_half_the_memory_and_nearly_the_same_model():
    for arch in ('gpt2', 'modern'):
        model, ids = small(arch), torch.randint(0, 11, (2, 8))
        plain = model.hidden(ids)
        size = sum(p.numel() * p.itemsize for p in model.parameters())
        held.hold_in_bfloat16(model)
        assert sum(p.numel() * p.itemsize for p in model.parameters()) < 0.55 * size
        with torch.autocast('cpu', torch.bfloat16):
            hidden = model.hidden(ids)
        assert apart(hidden, plain) < 0.02
