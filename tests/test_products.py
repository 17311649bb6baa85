import shutil

import pytest
import torch
from linears import apart, tensors, through
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sologpt.matmuls import products
from sologpt.matmuls.elements import E4M3
from sologpt.matmuls.formats import Encoded, Format
from sologpt.matmuls.gemms import multiply, recipe_matmul
from sologpt.matmuls.products import plain_product
from sologpt.matmuls.recipes import RECIPES


def test_integer_products_are_what_emulation_gives():
    x, w, g = tensors(256, 256, 256)
    native, emulated = (recipe_matmul(RECIPES['int8'], [product] * 3).apply
                        for product in (products.int8_product, plain_product))
    for mine, right in zip(through(native, x, w, g), through(emulated, x, w, g), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
def test_compiled_int8_matrices_lie_as_tensor_cores_read_them(monkeypatch):
    """cuBLASLt multiplies int8 if A is in row-major order and B in column-major order. Inductor turns A of wgrad."""
    monkeypatch.setattr(products, 'int8_sums', products.int8_sums_on_gpu)
    g, x, strides = torch.randn(64, 48), torch.randn(64, 80), []

    def weight_gradient(g, x):
        return multiply(RECIPES['int8'].wgrad, products.int8_product, g.mT, x.mT, torch.float32)
    compiled = torch.compile(weight_gradient, fullgraph=True)
    torch.testing.assert_close(compiled(g, x), weight_gradient(g, x), rtol=1e-6, atol=1e-6)

    def int_mm(a, b, by=torch._int_mm):
        strides.append((a.stride(), b.stride()))
        return by(a, b)
    monkeypatch.setattr(torch, '_int_mm', int_mm)
    compiled(g, x)
    assert strides == [((64, 1), (1, 64))]


@pytest.mark.parametrize('M, K, N', [(1, 64, 48), (16, 12, 20), (33, 64, 48)])
def test_int8_matrices_of_any_size_on_a_gpu(monkeypatch, M, K, N):
    shapes = []

    def int8_mm(a, b, by=products.int8_mm):
        shapes.append((*a.shape, b.size(1)))
        return by(a, b)
    monkeypatch.setattr(products, 'int8_mm', int8_mm)
    x, w = torch.randint(-128, 128, (M, K), dtype=torch.int8), torch.randint(-128, 128, (N, K), dtype=torch.int8)
    assert torch.equal(products.int8_sums_on_gpu(x, w).long(), x.long() @ w.long().T)
    (rows, *others), = shapes
    assert rows > 16 and all(n % 8 == 0 for n in others)


@pytest.mark.parametrize('shared', ['tensor', 'row'])
def test_fp8_products_are_what_emulation_gives(shared):
    """torch._scaled_mm, which a GPU computes by tensor cores, takes the same operands on a CPU."""
    format = Format(E4M3, shared)
    a, b = format.encode(torch.randn(32, 64)), format.encode(torch.randn(48, 64))
    dtype = torch.float32 if shared == 'tensor' else torch.bfloat16  # rows have bfloat16 results on a GPU
    emulated = plain_product(a, b, torch.float32, torch.float32)
    try:
        native = products.fp8_product(a, b, torch.float32, torch.float32)
    except RuntimeError as e:
        assert torch.__version__ < '2.12' and 'only supports per-tensor scaling for CPU' in str(e)
        pytest.skip('torch 2.11 has no scales by row on a CPU')
    torch.testing.assert_close(native, emulated.to(dtype).float(), rtol=2e-7 if shared == 'tensor' else 1e-2, atol=1e-5)


def test_products_in_bfloat16_leave_their_sums_in_float32():
    """Of what torch would return: without a GPU it does not compute this."""
    with FakeTensorMode():
        a, b = (Encoded(torch.empty(rows, 64, device='cuda'), None) for rows in (32, 48))
        y = products.bfloat16_product(a, b, torch.float32, torch.float32)
    assert (y.shape, y.dtype) == ((32, 48), torch.float32)


def test_strassen_is_exact_on_integers():
    for M, K, N in ((64, 64, 64), (33, 17, 50), (7, 129, 5)):
        a, b = torch.randint(-9, 9, (M, K)).float(), torch.randint(-9, 9, (N, K)).float()
        for levels in (1, 2, 3):
            found = products.strassen_product(Encoded(a, None), Encoded(b, None), torch.float32, torch.float32, levels)
            assert torch.equal(found, a @ b.T), (M, K, N, levels)


def test_each_level_of_strassen_costs_accuracy_and_saves_products():
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    exact = a.double() @ b.double().T
    errors = [apart(products._strassen(a, b, levels), exact) for levels in range(4)]
    assert all(1.5 < after / before < 4 for before, after in zip(errors, errors[1:], strict=False))
    with FlopCounterMode(display=False) as counter:
        products._strassen(a, b, 2)
    assert counter.get_total_flops() == 2 * 256 ** 3 * (7 / 8) ** 2
