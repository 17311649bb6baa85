import pytest
import torch
from linears import linear, tensors, through

from sologpt.matmuls import gemms, products
from sologpt.matmuls.elements import BYTE, E5M2
from sologpt.matmuls.formats import Format
from sologpt.matmuls.gemms import multiply, recipe_matmul
from sologpt.matmuls.products import plain_product
from sologpt.matmuls.recipes import RECIPES, Gemm, Recipe


def test_a_recipe_without_formats_is_a_matmul():
    x, w, _ = tensors(5, 6, 7, torch.float64)
    for product in (plain_product, products.strassen_product):
        function = recipe_matmul(Recipe(Gemm(), Gemm(), Gemm()), [product] * 3)
        assert torch.autograd.gradcheck(function.apply, (x, w))


def test_scales_along_the_sum_go_over_to_the_other_operand():
    a, b = torch.randn(8, 16), torch.randn(4, 16)
    rule = Gemm(None, Format(BYTE, 'column'))
    exact = a @ rule.b.encode(b).decode().T
    torch.testing.assert_close(multiply(rule, plain_product, a, b, torch.float32), exact)


def test_a_random_rotation_leaves_the_product():
    a, b = torch.randn(8, 100), torch.randn(4, 100)
    signs = torch.randint(0, 2, (32, 1)) * 2.0 - 1
    turned = multiply(Gemm(hadamard=32), plain_product, a, b, torch.float32, signs=signs)
    torch.testing.assert_close(turned, a @ b.T, rtol=1e-4, atol=1e-5)
    spike = torch.zeros(1, 32).index_fill(1, torch.tensor(3), 1.0)
    assert gemms.rotate(spike, signs).abs().allclose(torch.tensor(32 ** -0.5))


def test_the_operands_of_the_backward_are_kept_as_they_were_rounded():
    def kept(name):
        x, w, _ = tensors(64, 64, 64)
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: storages.update({t.data_ptr(): t}) or t, lambda t: t):
            linear(name, 64, 64).strategy.function.apply(x, w)
        return [t for t in storages.values() if t.numel() == 64 * 64]
    assert {t.dtype for t in kept('int8')} == {torch.int8}
    assert {t.dtype for t in kept('fp8')} == {torch.float8_e4m3fn}
    assert {t.dtype for t in kept('mxfp8')} == {torch.float32}  # rounded along another dimension then


@pytest.mark.parametrize('name, times', [('fp8', 1), ('fp4_dge', 2)])  # fp4_dge: two operands' scales go into it
def test_the_gradient_is_encoded_once_where_one_scale_serves_both_matmuls(name, times, monkeypatch):
    encode, encoded = Format.encode, []

    def encode_and_count(format, *args):
        encoded.append(format.element)
        return encode(format, *args)
    x, w, g = tensors()
    recipe = RECIPES[name]
    monkeypatch.setattr(Format, 'encode', encode_and_count)
    _, dx, dw = through(recipe_matmul(recipe, [plain_product] * 3).apply, x, w, g)
    assert encoded.count(E5M2) == times  # in these recipes nothing but gradients is in E5M2
    x, w = x.detach(), w.detach()
    assert torch.equal(dx, multiply(recipe.dgrad, plain_product, g, w.T, torch.float32))
    estimate = recipe.estimator(w) if recipe.estimator else 1
    assert torch.equal(dw, multiply(recipe.wgrad, plain_product, g.T, x.T, torch.float32) * estimate)
