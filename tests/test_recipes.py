import math
import shutil

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from linears import STOCHASTIC, apart, linear, straight_through, tensors, through
from reference_formats import digits
from torch._dynamo.backends.common import aot_autograd

from sologpt.matmuls import recipes
from sologpt.matmuls.elementwise import rms_norm
from sologpt.matmuls.gemms import recipe_matmul
from sologpt.matmuls.products import plain_product
from sologpt.matmuls.recipes import NAMES, RECIPES, Gemm, Recipe
from sologpt.matmuls.sparse24 import Sparse24


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


@pytest.mark.parametrize('name', RECIPES)
def test_how_many_digits_the_operands_have(name):
    """By this a product is chosen: bfloat16 holds 8."""
    recipe, x = RECIPES[name], tensors(64, 96)[0].detach() ** 3
    operands = {format for gemm in (recipe.fwd, recipe.dgrad, recipe.wgrad) for format in (gemm.a, gemm.b) if format}
    for format in operands:
        most = digits(format.encode(x).values)
        assert most <= format.significant_bits
        assert (most > 8) == (format.significant_bits > 8), format


def test_int8_takes_the_scales_of_what_the_forward_rounded_into_the_gradient():
    """Three products of integers, out of four roundings: x and w are rounded once."""
    x, w, g = tensors()

    def rows(t):
        scale = t.abs().amax(1, keepdim=True) / 127
        return (t / scale).round(), scale
    (qx, sx), (qw, sw), g = rows(x.detach()), rows(w.detach()), g.double()
    (qd, sd), (qg, sg) = rows(g * sw.T), rows(g.T * sx.T)
    y, dx, dw = through(linear('int8').strategy.function.apply, x, w, g.float())
    torch.testing.assert_close(y, (qx @ qw.T) * sx * sw.T)
    torch.testing.assert_close(dx, ((qd @ qw.double()) * sd).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, ((qg @ qx.double()) * sg).float(), rtol=1e-5, atol=1e-5)
    assert max(apart(y, x @ w.T), apart(dx, g.float() @ w), apart(dw, g.float().T @ x)) < 0.015


def test_ternary_is_straight_through():
    x, w, g = tensors()

    def reference(x, w):
        scale = x.abs().amax(1, keepdim=True) / 127
        mean = w.abs().mean()
        return straight_through((x / scale).round() * scale, x) @ \
            straight_through((w / mean).round().clamp(-1, 1) * mean, w).T
    for mine, expected in zip(through(linear('ternary').strategy.function.apply, x, w, g), through(reference, x, w, g),
                              strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer = linear('ternary')
        assert torch.equal(layer(x), layer.strategy.function.apply(rms_norm.apply(x), layer.weight))


def test_sparse_weights_are_straight_through():
    x, w, g = tensors()
    mask = Sparse24().mask(w)
    assert mask.float().mean() == 0.5
    found = through(linear('sparse24').strategy.function.apply, x, w, g)
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
    _, _, dw = through(linear('fp4_dge').strategy.function.apply, x, w, g)  # its gradients are fp8's
    assert 0.01 < apart(dw, found[2]) < 0.1
    assert 0.5 < recipes.dge(torch.randn(512, 512)).mean() < 0.7


@pytest.mark.parametrize('name', NAMES)
def test_one_infinity_or_nan_is_not_lost(name):
    for bad in (math.inf, math.nan):
        x, w, g = tensors()
        for t in (x, w):
            with torch.no_grad():
                old, t[3, 5] = t[3, 5].clone(), bad
            y, _, _ = through(linear(name, rate=0.0).strategy.function.apply, x, w, g)
            assert not y.isfinite().all(), (bad, t.shape)
            with torch.no_grad():
                t[3, 5] = old
        g[3, 5] = bad
        _, dx, dw = through(linear(name, rate=0.0).strategy.function.apply, x, w, g)
        assert not dx.isfinite().all() and not dw.isfinite().all(), bad


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


@pytest.mark.parametrize('name', STOCHASTIC)
def test_compiled_code_draws_once_for_forward_and_backward(name):
    """torch's partitioner does that with what follows from no input. Noise that depends on a tensor stays its own."""
    drawn = []  # in the forward and in the backward together

    def keep_random(module, inputs):
        drawn.extend(node.target for node in module.graph.nodes
                     if torch.Tag.nondeterministic_seeded in getattr(node.target, 'tags', ()))
        return make_boxed_func(module.forward)
    backend = aot_autograd(fw_compiler=keep_random, bw_compiler=keep_random,
                           partition_fn=min_cut_rematerialization_partition)
    x, w, g = tensors(dtype=torch.bfloat16)
    torch.compile(linear(name, dtype='bfloat16'), backend=backend, fullgraph=True)(x).backward(g)
    assert drawn.count(torch.ops.sologpt.draw.default) == 1
    assert set(drawn) <= {torch.ops.sologpt.draw.default, torch.ops.aten.rand_like.default}


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
