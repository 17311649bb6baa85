import itertools
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from reference_formats import (
    BITS,
    ELEMENTS,
    GRIDS,
    INF,
    NAN,
    digits,
    each_element,
    gaussian,
    nearest,
    next_to,
    of_many_sizes,
    same,
    value,
    z_scores,
)

from sologpt.matmuls import block_formats
from sologpt.matmuls.block_formats import BlockFormat
from sologpt.matmuls.elements import E2M1, E4M3
from sologpt.matmuls.gemms import multiply
from sologpt.matmuls.products import plain_product
from sologpt.matmuls.recipes import RECIPES, Gemm

each_scaling = pytest.mark.parametrize('scaling', ['floor', 'rceil'])


def mx_block(block, name, scaling):
    """The elements' codes (None for NaN) and the scale's of one block (OCP, section 6.3)."""
    amax, largest = max(map(abs, block)), GRIDS[name][-1]
    if not all(map(math.isfinite, block)):
        return None, 255
    if amax == 0:
        exponent = -127
    elif scaling == 'floor':
        exponent = math.frexp(amax)[1] - math.frexp(largest)[1]
    else:
        exponent = math.frexp(amax)[1] - math.frexp(largest)[1] - 1
        while math.ldexp(largest, exponent) < amax:
            exponent += 1
    exponent = min(max(exponent, -127), 127)
    return [nearest(math.ldexp(x, -exponent), name) for x in block], exponent + 127


# MX.

def mx_parts(x, name, scaling):
    """By formats.py, of (blocks, 32): the elements' codes and the scales'."""
    elements, scale, outer = BlockFormat(ELEMENTS[name], (1, 32), scaling).split(x)
    assert outer is None
    return ELEMENTS[name].codes(elements).flatten(1), block_formats.e8m0(scale).flatten()


def assert_mx(x, name, scaling, expected):
    """expected: for each block of x the elements' codes, None for NaN, and the scale's code."""
    codes, scales = mx_parts(x, name, scaling)
    assert scales.tolist() == [scale for _, scale in expected]
    decoded = BlockFormat(ELEMENTS[name], (1, 32), scaling).encode(x).decode()
    for i, (wanted, scale) in enumerate(expected):
        if wanted is None:
            assert decoded[i].isnan().all()
            continue
        assert codes[i].tolist() == wanted, f'block {i}'
        numbers = [math.ldexp(value(code, name), scale - 127) for code in wanted]
        if max(map(abs, numbers)) < 2.0 ** 128:  # the largest may be rounded up to more than float32 has
            assert same(decoded[i], torch.tensor(numbers))


def golden():
    with open(os.path.join(os.path.dirname(__file__), 'golden_mx.json'), encoding='utf-8') as f:
        return json.load(f)


@each_element
@each_scaling
def test_mx_golden_vectors(name, scaling):
    """Committed: blocks as the bits of float32s, the codes they become. Their `source` says who made them."""
    blocks = golden()['blocks']
    x = torch.tensor([[int(bits, 16) for bits in block['float32'].split()] for block in blocks])
    x = x.to(torch.uint32).view(torch.float32)
    expected = [(codes and list(bytes.fromhex(codes)), scale) for scale, codes in (b[name][scaling] for b in blocks)]
    assert len(blocks) == 30
    assert_mx(x, name, scaling, expected)
    assert [mx_block(block, name, scaling) for block in x.tolist()] == expected


@each_element
@each_scaling
def test_mx_is_the_reference_at_all_sizes(name, scaling):
    x = of_many_sizes(120 * 32, 2, 4.0).view(120, 32) * torch.exp2(torch.linspace(-140, 110, 120))[:, None]
    assert x.abs().amax(1).max() > 2.0 ** 115 and (x[:3].abs() < 2.0 ** -126).all()
    assert_mx(x, name, scaling, [mx_block(block, name, scaling) for block in x.tolist()])


@each_element
def test_scales_next_to_powers_of_two(name):
    """Float32 logarithms err here. Every exponent, the mantissas with which a scale changes, and their neighbours."""
    mantissas = [1.0, GRIDS[name][-1] / 2.0 ** ELEMENTS[name].max_exponent]
    for exponent in range(-110, 127):
        amax = next_to([math.ldexp(m, exponent) for m in mantissas])[:6]
        for scaling in ('floor', 'rceil'):
            scale = block_formats.power_of_two(amax, ELEMENTS[name], scaling)
            assert block_formats.e8m0(scale).tolist() == [mx_block([a], name, scaling)[1] for a in amax.tolist()]


@each_element
def test_the_smallest_scales_are_rounded_up_too(name):
    """amax / the largest number is just above 2^-127, where float32s are subnormal and few: it must not be rounded."""
    amax = next_to([math.ldexp(GRIDS[name][-1], -127)])[1:2]
    scale = block_formats.power_of_two(amax, ELEMENTS[name], 'rceil')
    assert block_formats.e8m0(scale).item() == mx_block(amax.tolist(), name, 'rceil')[1] == 1


@each_element
@each_scaling
def test_mx_is_torchaos(name, scaling):
    pytest.importorskip('torchao')
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    theirs = {'e4m3': torch.float8_e4m3fn, 'e5m2': torch.float8_e5m2, 'e3m2': 'fp6_e3m2', 'e2m3': 'fp6_e2m3',
              'e2m1': torch.float4_e2m1fn_x2}
    x = of_many_sizes(200 * 32, 3, 2.0).view(200, 32) * torch.exp2(torch.linspace(-90, 90, 200))[:, None]
    x[0, :4], x[1] = torch.tensor([0.0, -0.0, 2.0 ** -149, -2.0 ** -149]), 0.0
    x[2, 5] = NAN
    scales, elements = to_mx(x, theirs[name], 32, ScaleCalculationMode(scaling))
    elements = elements.view(torch.uint8).flatten(1)
    if BITS[name] == 4:
        elements = elements.unpack(elements, 4)
    codes, ours = mx_parts(x, name, scaling)
    assert torch.equal(ours, scales.view(torch.uint8).flatten())
    numbers = ours != 255
    assert torch.equal(codes[numbers], elements[numbers]) and numbers.sum() == 199


# NVFP4.

@pytest.mark.parametrize('block', [(1, 16), (16, 16)])
def test_nvfp4_is_the_formula(block):
    x = gaussian(48, 64) * torch.exp2(4 * gaussian(48, 1, seed=1)) * torch.exp2(2 * gaussian(1, 64, seed=2))
    x[:16, :16] = 0
    tensor_scale = x.abs().max() / (448 * 6)
    expected, kept = torch.empty_like(x), []
    for i, j in itertools.product(range(0, 48, block[0]), range(0, 64, block[1])):
        part = x[i:i + block[0], j:j + block[1]]
        scale = (part.abs().max() / 6 / tensor_scale).to(torch.float8_e4m3fn).float()
        kept.append(scale.item())
        codes = [nearest(v, 'e2m1') for v in (part / (scale * tensor_scale)).nan_to_num(0).flatten().tolist()]
        expected[i:i + block[0], j:j + block[1]] = E2M1.decode(torch.tensor(codes)).view(part.shape) * scale
    assert max(kept) == 448 and min(kept) == 0
    format = BlockFormat(E2M1, block, 'e4m3')
    encoded = format.encode(x)
    torch.testing.assert_close(encoded.scale, tensor_scale, atol=0, rtol=0)
    assert torch.equal(encoded.values, expected)
    assert torch.equal(encoded.decode(), expected * tensor_scale)
    elements, scale, outer = format.split(x)
    assert scale.flatten().tolist() == kept and torch.equal(outer, tensor_scale)
    assert same(E2M1.round(elements), elements)  # on the grid, so that 4 bits hold it
    for power in (2.0 ** -70, 2.0 ** 70):  # a tensor's size is its scale's alone
        other = format.encode(x * power)
        assert torch.equal(other.values, expected) and torch.equal(other.scale, tensor_scale * power)


@pytest.mark.parametrize('format, error', [
    (BlockFormat(E2M1, (1, 16), 'e4m3'), 0.0954), (BlockFormat(E2M1, (16, 16), 'e4m3'), 0.1114),
    (BlockFormat(E2M1, (1, 32), 'floor'), 0.1151), (BlockFormat(E2M1, (1, 32), 'rceil'), 0.1151)])
def test_errors_on_gaussian_data(format, error):
    """A scale that is off by a factor, or a grid that is not used to its ends, costs more than the tolerance here."""
    x = gaussian(512, 512)
    assert ((format.encode(x).decode() - x).norm() / x.norm()).item() == pytest.approx(error, rel=0.01)


@each_element
def test_bfloat16_holds_elements_times_powers_of_two(name):
    """Exactly, for every element and scale, from the smallest normal number on."""
    scale = torch.exp2(torch.arange(-127, 128))
    values = ELEMENTS[name].grid[:, None] * scale
    normal = values.isfinite() & ((values >= 2.0 ** -126) | (values == 0))
    assert torch.equal(values.bfloat16().float()[normal], values[normal])
    assert normal[1:, :].sum() > 200 * (len(ELEMENTS[name].grid) - 1)


def test_bfloat16_holds_nvfp4():
    values = E2M1.grid[:, None] * E4M3.grid
    assert torch.equal(values.bfloat16().float(), values)
    assert digits(values) == BlockFormat(E2M1, (1, 16), 'e4m3').significant_bits == 6


@pytest.mark.parametrize('format', [BlockFormat(E4M3, (1, 32)), BlockFormat(E2M1, (16, 16), 'e4m3', stochastic=True)])
def test_a_transpose_is_rounded_in_the_order_of_memory(format, monkeypatch):
    split, contiguous = BlockFormat.split, []

    def split_and_look(format, x):
        contiguous.append(x.is_contiguous())
        return split(format, x)
    monkeypatch.setattr(BlockFormat, 'split', split_and_look)
    x, times = gaussian(64, 96), gaussian(1, 64, seed=1).exp()
    for scaled in (None, times):
        torch.manual_seed(0)
        found = format.encode(x.mT, scaled)
        torch.manual_seed(0)
        expected = format.mT.encode(x if scaled is None else x * scaled.mT).mT
        assert torch.equal(found.values, expected.values) and found.values.mT.is_contiguous()
    assert all(contiguous)


def test_values_in_bfloat16_are_the_same():
    x = gaussian(64, 96) * torch.exp2(20 * gaussian(64, 1, seed=1))
    for format in {format for recipe in RECIPES.values() for gemm in (recipe.fwd, recipe.dgrad, recipe.wgrad)
                   for format in (gemm.a, gemm.b) if isinstance(format, BlockFormat)}:
        torch.manual_seed(0)
        usual = format.encode(x)
        torch.manual_seed(0)
        short = replace(format, dtype=torch.bfloat16).encode(x)
        assert short.values.dtype == torch.bfloat16 and torch.equal(short.values.float(), usual.values), format
        assert short.scale is usual.scale is None or torch.equal(short.scale, usual.scale)


@pytest.mark.parametrize('bad', [NAN, INF, -INF])
def test_what_shares_a_scale_with_nan_or_infinity_is_nan(bad):
    x = gaussian(32, 64)
    x[3, 40] = bad
    for scaling in ('floor', 'rceil'):
        decoded = BlockFormat(E4M3, (1, 32), scaling).encode(x).decode()
        assert decoded[3, 32:].isnan().all() and decoded.isnan().sum() == 32
    assert BlockFormat(E2M1, (1, 16), 'e4m3').encode(x).decode().isnan().all()  # one scale is the tensor's


# Stochastic rounding.

UNBIASED = RECIPES['mxfp4'].dgrad.a


def test_stochastic_rounding_is_unbiased_only_if_nothing_is_cut():
    """Blocks of 4 instead of 32, for largest magnitudes throughout the range in which their scale is the same."""
    assert UNBIASED == BlockFormat(E2M1, (1, 32), 'floor', stochastic=True, prescale=0.75)
    largest = torch.tensor([4.1, 5.9, -6.1, 7.6, -7.97, 8.3, 11.0, 15.9])[:, None]
    x = torch.cat([largest, torch.rand(8, 3, generator=torch.Generator().manual_seed(0)) * 8 - 4], dim=1).view(1, 32)
    torch.manual_seed(0)
    draws = x.expand(100_000, 32)
    encoded = replace(UNBIASED, block=(1, 4)).encode(draws).decode()
    z = z_scores(encoded, x[0])
    assert z.abs().max() < 4 and 0.7 < z.std() < 1.4
    for i, v in enumerate((0.75 * x[0]).tolist()):
        levels = encoded[:1000, i].unique() * 0.75
        assert len(levels) == 2 and levels[0] < v < levels[1]  # its neighbours on the grid
    cut = replace(UNBIASED, block=(1, 4), prescale=1.0).encode(draws[:1000]).decode()[:, ::4]
    assert (cut[:, 2:5] == torch.tensor([-6.0, 6.0, -6.0])).all() and (cut[:, 7] == 12).all()
    steady = replace(UNBIASED, stochastic=False).encode(draws[:9]).decode()
    assert (steady == steady[0]).all()


@pytest.mark.parametrize('scaling', ['floor', 'e4m3'])
def test_prescaled_numbers_come_back(scaling):
    """The scale takes the factor back, whichever scale it is."""
    x = gaussian(16, 32)
    decoded = BlockFormat(E4M3, (1, 16), scaling, prescale=0.75).encode(x).decode()
    assert ((decoded - x).norm() / x.norm()) < 0.04


def test_stochastic_nvfp4_is_unbiased():
    x = gaussian(4, 32)
    torch.manual_seed(0)
    format = BlockFormat(E2M1, (1, 16), 'e4m3', stochastic=True)
    z = z_scores(format.encode(x.repeat(5000, 1)).decode().view(5000, 4, 32), x)
    # the scale is itself rounded: a block's largest element may be cut, at most by half a step of E4M3
    largest = torch.zeros_like(x, dtype=torch.bool).view(8, 16)
    largest.scatter_(1, x.view(8, 16).abs().argmax(1, keepdim=True), True)
    z = z[~largest.view(4, 32)]
    assert z.abs().max() < 4.5 and 0.8 < z.std() < 1.25


def dgrad_z_scores(rule, repetitions):
    g, w = gaussian(16, 32, seed=4), gaussian(32, 12, seed=5)
    torch.manual_seed(0)
    signs = torch.randint(0, 2, (repetitions, 32, 1)) * 2.0 - 1
    samples = torch.stack([multiply(rule, plain_product, g, w.mT, torch.float32, signs=s) for s in signs])
    return z_scores(samples, g.double() @ w.double())


def test_a_whole_dgrad_is_unbiased():
    z = dgrad_z_scores(RECIPES['mxfp4'].dgrad, 2000)
    assert 0.8 < z.std() < 1.2 and z.abs().max() < 4.5


def test_a_dgrad_without_the_prescale_is_biased():
    cut = replace(UNBIASED, prescale=1.0)
    assert dgrad_z_scores(Gemm(cut, cut, hadamard=32), 1500).std() > 2


# Blocks that do not fit, and transposes.

@pytest.mark.parametrize('format', [
    BlockFormat(E2M1, (1, 32)), BlockFormat(E4M3, (1, 32), 'floor'), BlockFormat(E2M1, (16, 16), 'e4m3'),
    BlockFormat(E4M3, (128, 128)), BlockFormat(E2M1, (1, 16), 'e4m3'),
    BlockFormat(E2M1, (1, 32), 'floor', prescale=0.75)], ids=str)
@pytest.mark.parametrize('shape', [(5, 33), (17, 16), (130, 129), (1, 1)])
def test_incomplete_blocks_count_as_whole(format, shape):
    x = gaussian(*shape)
    rows, columns = (-(-n // b) * b for n, b in zip(shape, format.block, strict=True))
    padded = torch.zeros(rows, columns)
    padded[:shape[0], :shape[1]] = x
    encoded, whole = format.encode(x), format.encode(padded)
    assert encoded.values.shape == shape and same(encoded.decode(), whole.decode()[:shape[0], :shape[1]])
    assert ((encoded.decode() - x).norm() / x.norm()) < 0.2
    transposed = format.mT.encode(x.mT).mT
    assert format.mT.block == format.block[::-1]
    assert same(transposed.values, encoded.values) and same(transposed.decode(), encoded.decode())


def test_a_blocks_scale_is_its_own():
    x = gaussian(32, 64)
    decoded = BlockFormat(E2M1, (16, 32)).encode(x).decode()
    for i, j in itertools.product((0, 16), (0, 32)):
        alone = x[i:i + 16, j:j + 32]
        assert torch.equal(decoded[i:i + 16, j:j + 32], BlockFormat(E2M1, (16, 32)).encode(alone).decode())
        amax = alone.abs().max()
        scale = 2.0 ** math.ceil(math.log2(amax / 6))
        assert torch.equal(decoded[i:i + 16, j:j + 32], E2M1.round(alone / scale) * scale)
