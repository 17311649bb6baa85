import bisect
import itertools
import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from sologpt.matmuls import formats
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
    Format,
    Int,
    Sparse24,
)
from sologpt.matmuls.gemms import gemm
from sologpt.matmuls.products import plain_product
from sologpt.matmuls.recipes import RECIPES, Gemm

ELEMENTS = {'e4m3': E4M3, 'e5m2': E5M2, 'e3m2': E3M2, 'e2m3': E2M3, 'e2m1': E2M1}
each_element = pytest.mark.parametrize('name', ELEMENTS)
each_scaling = pytest.mark.parametrize('scaling', ['floor', 'rceil'])
INF, NAN = math.inf, math.nan


# The reference: number by number, in Python's floats, which hold every quantity here exactly.

def ocp_grid(exponent, mantissa):
    """The magnitudes of the codes, in order (OCP Microscaling Formats 1.0)."""
    bias = 2 ** (exponent - 1) - 1
    fields = itertools.product(range(2 ** exponent), range(2 ** mantissa))
    return [math.ldexp(m, 1 - bias - mantissa) if e == 0 else math.ldexp(2 ** mantissa + m, e - bias - mantissa)
            for e, m in fields]


# E4M3's last code is NaN, E5M2's last four infinity and NaN
GRIDS = {'e4m3': ocp_grid(4, 3)[:-1], 'e5m2': ocp_grid(5, 2)[:-4],
         'e3m2': ocp_grid(3, 2), 'e2m3': ocp_grid(2, 3), 'e2m1': ocp_grid(2, 1)}
BITS = {'e4m3': 8, 'e5m2': 8, 'e3m2': 6, 'e2m3': 6, 'e2m1': 4}


def nearest(x, name):
    """The code of the number nearest to x, the even one of two, at most the largest."""
    grid, size = GRIDS[name], abs(x)
    place = bisect.bisect_right(grid, size) - 1
    if place < len(grid) - 1:
        middle = (grid[place] + grid[place + 1]) / 2
        place += size > middle or size == middle and place % 2
    return place + (math.copysign(1, x) < 0) * 2 ** (BITS[name] - 1)


def value(code, name):
    half = 2 ** (BITS[name] - 1)
    return math.copysign(GRIDS[name][code % half], -1 if code >= half else 1)


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


def same(a, b):
    """Bit by bit, but for NaN's bits: -0 is not 0."""
    a, b = a.float(), b.float()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()) \
        and torch.equal(a.nan_to_num(0), b.nan_to_num(0)) and torch.equal(a.isinf(), b.isinf())


def bfloat16s():
    """All that are finite, as float32."""
    x = torch.arange(-2 ** 15, 2 ** 15).to(torch.int16).view(torch.bfloat16).float()
    return x[x.isfinite()]


def of_many_sizes(n, seed, spread=8.0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=rng) * torch.exp2(spread * torch.randn(n, generator=rng))


def next_to(values):
    """The values, the float32s next to them, and their negatives."""
    x = torch.tensor(values)
    x = torch.cat([x, x.nextafter(torch.tensor(INF)), x.nextafter(torch.tensor(-INF))])
    return torch.cat([x, -x])


def critical(name):
    """The numbers, the middles between them, what is next to either, and what is beyond."""
    grid = GRIDS[name]
    return next_to(grid + [(a + b) / 2 for a, b in itertools.pairwise(grid)] + [1.01 * grid[-1], 3e38, 1e-40])


# Floating-point elements.

@pytest.mark.parametrize('name', ['e4m3', 'e5m2'])
def test_eight_bits_round_as_torch_casts(name):
    element = ELEMENTS[name]
    x = torch.cat([bfloat16s(), critical(name), of_many_sizes(20_000, 0), torch.tensor([NAN])])
    cast = x.clamp(-element.max, element.max).to(element.dtype)
    assert same(element.round(x), cast)
    numbers = ~x.isnan()
    assert torch.equal(element.codes(element.round(x[numbers])), cast[numbers].view(torch.uint8))


@each_element
def test_rounds_to_the_nearest_and_from_the_middle_to_the_even(name):
    element = ELEMENTS[name]
    x = torch.cat([critical(name), of_many_sizes(3000, 1, 3.0), bfloat16s()[::16]])
    codes = [nearest(v, name) for v in x.tolist()]
    rounded = element.round(x)
    assert same(rounded, torch.tensor([value(code, name) for code in codes]))
    assert element.codes(rounded).tolist() == codes
    assert same(element.round(rounded), rounded)
    assert element.round(torch.tensor([NAN, INF])).isnan().all()  # never a number


def test_grids_are_ocps():
    """By its tables: the largest number, the smallest normal and subnormal ones, how many there are."""
    found = {name: (e.bits, e.max, e.max_exponent, 2.0 ** e.min_exponent, e.grid[1].item(), len(e.grid))
             for name, e in ELEMENTS.items()}
    assert found == {'e4m3': (8, 448.0, 8, 2.0 ** -6, 2.0 ** -9, 127),
                     'e5m2': (8, 57344.0, 15, 2.0 ** -14, 2.0 ** -16, 124),
                     'e3m2': (6, 28.0, 4, 0.25, 0.0625, 32), 'e2m3': (6, 7.5, 2, 1.0, 0.125, 32),
                     'e2m1': (4, 6.0, 2, 1.0, 0.5, 8)}
    assert E2M1.grid.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@each_element
def test_every_code_is_its_numbers(name):
    element, grid = ELEMENTS[name], GRIDS[name]
    half = 2 ** (BITS[name] - 1)
    codes = torch.tensor([*range(len(grid)), *range(half, half + len(grid))], dtype=torch.uint8)
    values = element.decode(codes)
    assert same(values, torch.tensor(grid + [-v for v in grid]))  # half is the code of -0
    assert torch.equal(element.codes(values), codes)


@pytest.mark.parametrize('element', [BYTE, TRIT, Int(7, 4)])
def test_integers(element):
    x = torch.tensor([-1e9, -1.5, -0.5, 0.4, 0.5, 1.5, 2.5, 1e9])
    expected = [max(-element.max, min(element.max, round(v))) for v in x.tolist()]
    assert element.round(x).tolist() == expected
    codes = element.codes(element.round(x))
    assert codes.tolist() == [v % 2 ** element.bits for v in expected]
    assert element.decode(codes).tolist() == expected


# Packing.

@pytest.mark.parametrize('bits, codes, packed', [
    (2, [3, 2, 1, 0], [0b00_01_10_11]),
    (4, [0x3, 0xA], [0xA3]),
    (6, [0b000001, 0b100000, 0b111111, 0b010101], [0b00_000001, 0b1111_1000, 0b010101_11]),
    (8, [7, 200], [7, 200])])
def test_the_first_code_is_in_the_low_bits(bits, codes, packed):
    result = formats.pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert result.dtype == torch.uint8 and result.tolist() == packed
    codes = torch.randint(0, 2 ** bits, (3, 5, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = formats.pack(codes, bits)
    assert packed.shape == (3, 5, 3 * bits)
    assert torch.equal(formats.unpack(packed, bits), codes)
    # as an integer: the i-th code's weight is 2^(bits * i)
    number = int.from_bytes(bytes(packed[1, 2].tolist()), 'little')
    assert number == sum(code << bits * i for i, code in enumerate(codes[1, 2].tolist()))


# MX.

def mx_parts(x, name, scaling):
    """By formats.py, of (blocks, 32): the elements' codes and the scales'."""
    elements, scale, outer = BlockFormat(ELEMENTS[name], (1, 32), scaling).split(x)
    assert outer is None
    return ELEMENTS[name].codes(elements).flatten(1), formats.e8m0(scale).flatten()


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
            scale = formats.power_of_two(amax, ELEMENTS[name], scaling)
            assert formats.e8m0(scale).tolist() == [mx_block([a], name, scaling)[1] for a in amax.tolist()]


@each_element
def test_the_smallest_scales_are_rounded_up_too(name):
    """amax / the largest number is just above 2^-127, where float32s are subnormal and few: it must not be rounded."""
    amax = next_to([math.ldexp(GRIDS[name][-1], -127)])[1:2]
    scale = formats.power_of_two(amax, ELEMENTS[name], 'rceil')
    assert formats.e8m0(scale).item() == mx_block(amax.tolist(), name, 'rceil')[1] == 1


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
        elements = formats.unpack(elements, 4)
    codes, ours = mx_parts(x, name, scaling)
    assert torch.equal(ours, scales.view(torch.uint8).flatten())
    numbers = ours != 255
    assert torch.equal(codes[numbers], elements[numbers]) and numbers.sum() == 199


# NVFP4.

def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize('bad', [NAN, INF, -INF])
def test_what_shares_a_scale_with_nan_or_infinity_is_nan(bad):
    x = gaussian(32, 64)
    x[3, 40] = bad
    for scaling in ('floor', 'rceil'):
        decoded = BlockFormat(E4M3, (1, 32), scaling).encode(x).decode()
        assert decoded[3, 32:].isnan().all() and decoded.isnan().sum() == 32
    assert BlockFormat(E2M1, (1, 16), 'e4m3').encode(x).decode().isnan().all()  # one scale is the tensor's


# Stochastic rounding.

def z_scores(samples, exact):
    """Of the means: about a standard normal distribution if the samples' mean is `exact`."""
    samples = samples.double()
    deviation = samples.std(0).clamp(min=1e-12)
    return (samples.mean(0) - exact.double()) / (deviation / len(samples) ** 0.5)


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
    samples = torch.stack([gemm(rule, plain_product, g, w.mT, torch.float32, signs=s) for s in signs])
    return z_scores(samples, g.double() @ w.double())


def test_a_whole_dgrad_is_unbiased():
    z = dgrad_z_scores(RECIPES['mxfp4'].dgrad, 2000)
    assert 0.8 < z.std() < 1.2 and z.abs().max() < 4.5


def test_a_dgrad_without_the_prescale_is_biased():
    cut = replace(UNBIASED, prescale=1.0)
    assert dgrad_z_scores(Gemm(cut, cut, hadamard=32), 1500).std() > 2


def test_bfloat16_stochastically():
    x = torch.cat([of_many_sizes(200, 6), torch.tensor([1.0 + 2.0 ** -9, -1.0 - 2.0 ** -8 * 0.9, 1e-39])])
    torch.manual_seed(0)
    draws = formats.to_bfloat16_stochastically(x.expand(20_000, -1))
    assert draws.dtype == torch.bfloat16
    z = z_scores(draws, x)
    assert z.abs().max() < 4.5 and 0.85 < z.std() < 1.15
    towards_zero = (x.view(torch.int32) & -65536).view(torch.float32)
    away = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert torch.equal(draws.float().amin(0), torch.minimum(towards_zero, away))
    assert torch.equal(draws.float().amax(0), torch.maximum(towards_zero, away))
    assert ((draws == towards_zero) | (draws == away)).all()


def test_bfloat16s_stay_what_they_are():
    torch.manual_seed(0)
    x = torch.cat([bfloat16s(), torch.tensor([INF, -INF, NAN, -NAN])])
    for _ in range(3):
        assert same(formats.to_bfloat16_stochastically(x), x)
    # added to a NaN, the noise may carry into the sign, or leave no mantissa
    odd = torch.tensor([0x7FFFFFFF, 0x7F800001, -1]).to(torch.int32).view(torch.float32)
    assert formats.to_bfloat16_stochastically(odd).isnan().all()


# One scale for a tensor, for rows, for columns.

def bytes_of_rows(x):
    """The plain formula."""
    size = x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return (x * (127 / size)).round().to(torch.int8), size / 127


ROWS, COLUMNS = Format(BYTE, 'row'), Format(BYTE, 'column')


def test_int8_rows_and_columns():
    x = gaussian(37, 24) * torch.exp2(6 * gaussian(37, 1, seed=1))
    x[5] = 0
    x[6, :3] = torch.tensor([254.0, 1.0, 3.0])  # ties, to even: codes 127, 0 (of 0.5), 2 (of 1.5)
    x[6, 3:] = 0
    codes, scale = bytes_of_rows(x)
    assert codes[6, :3].tolist() == [127, 0, 2]
    # a view whose rows are columns of another in memory, and one that is contiguous nowhere
    spread = torch.zeros(74, 48)
    spread[::2, ::2] = x
    for view in (x, x.mT.contiguous().mT, spread[::2, ::2]):
        encoded = ROWS.encode(view)
        assert encoded.values.dtype == torch.int8
        assert torch.equal(encoded.values, codes) and torch.equal(encoded.scale, scale)
        encoded = COLUMNS.encode(view.mT).mT
        assert torch.equal(encoded.values, codes) and torch.equal(encoded.scale, scale)
    assert (encoded.decode() - x).abs().le(encoded.scale * 0.5001).all() and encoded.scale.shape == (37, 1)
    assert ROWS.mT == COLUMNS and COLUMNS.mT == ROWS and Format(E4M3).mT == Format(E4M3)
    half = ROWS.encode(x.bfloat16())
    assert torch.equal(half.values, bytes_of_rows(x.bfloat16().float())[0])


each_layout = pytest.mark.parametrize('transposed', [False, True])
each_format = pytest.mark.parametrize('format', [
    ROWS, COLUMNS, Format(E4M3), Format(E2M1, 'row'), Format(E4M3, 'column'), Format(TRIT, mean=True),
    Format(E2M1, 'row', outliers=0.9), BlockFormat(E2M1, (1, 32)), BlockFormat(E2M1, (1, 16), 'e4m3')], ids=str)


@each_format
@each_layout
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_what_is_encoded_stays_as_it_was(format, transposed, dtype):
    """Where nothing has to be converted, a view is what would be written to: of the weights, say."""
    x = gaussian(20, 32).to(dtype)
    if transposed:
        x = x.mT.contiguous().mT
    before = x.clone()
    format.encode(x)
    format.encode(x, gaussian(1, 32).exp())
    assert torch.equal(x, before)


@each_format
@each_layout
def test_times_is_multiplied_first(format, transposed):
    x, times = gaussian(20, 32).bfloat16(), gaussian(1, 32, seed=1).exp()
    if transposed:
        x = x.mT.contiguous().mT
    folded, first = format.encode(x, times), format.encode(x * times)
    assert torch.equal(folded.values.float(), first.values.float())
    assert folded.scale is first.scale is None or torch.equal(folded.scale, first.scale)
    assert not torch.equal(folded.decode(), format.encode(x).decode())


@pytest.mark.parametrize('format', [ROWS, COLUMNS])
def test_pieces_are_the_whole(format, monkeypatch):
    x, times = gaussian(37, 24), gaussian(1, 24, seed=1).exp()
    views = [x, x.mT.contiguous().mT]
    whole = [format.encode(view, t) for view in views for t in (None, times)]
    monkeypatch.setattr(formats, 'CACHED', 100)
    assert len(formats.row_pieces(x)) == 10
    pieces = [format.encode(view, t) for view in views for t in (None, times)]
    for a, b in zip(whole, pieces, strict=True):
        assert torch.equal(a.values, b.values) and torch.equal(a.scale, b.scale)
    monkeypatch.setattr(formats, 'CACHED', 1)  # a row is larger
    assert len(formats.row_pieces(x)) == 37


@pytest.mark.parametrize('bad', [NAN, INF, -INF])
@pytest.mark.parametrize('element', [BYTE, E4M3, E2M1])
def test_nan_and_infinity_spoil_their_row_alone(bad, element):
    x = gaussian(5, 16)
    good = Format(element, 'row').encode(x).decode()
    x[2, 3] = bad
    for view in (x, x.mT.contiguous().mT):
        decoded = Format(element, 'row').encode(view).decode()
        assert not decoded[2].isfinite().any()
        others = [0, 1, 3, 4]
        assert torch.equal(decoded[others], good[others])
        assert not Format(element, 'column').encode(view.mT).decode()[:, 2].isfinite().any()
        assert not Format(element).encode(view).decode().isfinite().any()


@pytest.mark.parametrize('element', [E4M3, E5M2])
@pytest.mark.parametrize('shared, amax', [('tensor', lambda x: x.abs().max()),
                                          ('row', lambda x: x.abs().amax(1, keepdim=True)),
                                          ('column', lambda x: x.abs().amax(0, keepdim=True))])
def test_fp8_brings_the_largest_to_the_largest(element, shared, amax):
    x = gaussian(16, 24) * torch.exp2(3 * gaussian(16, 1, seed=1))
    encoded = Format(element, shared).encode(x)
    size = amax(x)
    assert encoded.values.dtype == element.dtype
    assert torch.equal(encoded.values.float(), (x * (element.max / size)).clamp(-element.max, element.max)
                       .to(element.dtype).float())
    torch.testing.assert_close(encoded.scale, size / element.max, rtol=1e-6, atol=0)
    assert torch.equal(amax(encoded.values.float()), torch.full_like(size, element.max))
    assert (Format(element, shared).encode(torch.zeros(4, 4)).decode() == 0).all()


def test_ternary_is_rounded_by_the_mean():
    w = gaussian(16, 24) * 0.02
    mean = w.abs().mean()
    encoded = Format(TRIT, mean=True).encode(w)
    assert encoded.values.dtype == torch.int8
    assert torch.equal(encoded.values.float(), (w / mean).round().clamp(-1, 1))
    assert set(encoded.values.flatten().tolist()) == {-1, 0, 1}
    torch.testing.assert_close(encoded.scale, mean, rtol=1e-6, atol=0)
    tiny = Format(TRIT, mean=True).encode(torch.full((2, 2), 1e-6))  # the mean is 1e-5 at least
    assert (tiny.values == 0).all() and tiny.scale == pytest.approx(1e-5)


@pytest.mark.parametrize('shared', ['row', 'column'])
def test_outliers_stay_what_they_are(shared):
    x = gaussian(40, 50)
    x[3, 7], x[9, 9] = 80.0, -100.0
    bound = x.abs().flatten().sort().values[1979]  # the 0.99 quantile of 2000
    outliers = x.abs() > bound
    assert outliers.sum() == 20
    decoded = Format(E2M1, shared, outliers=0.99).encode(x).decode()
    torch.testing.assert_close(decoded[outliers], x[outliers], rtol=1e-6, atol=0)
    plain = Format(E2M1, shared).encode(x.clamp(-bound, bound)).decode()
    assert torch.equal(decoded[~outliers], plain[~outliers])  # the others' scale does not know of them


def test_the_quantile_is_torchs():
    x = gaussian(1000, seed=7)
    for q in (0.0, 0.001, 0.5, 0.99, 0.9901, 1.0):
        # torch's ranks are spread over n - 1 intervals: the value at or next to its own
        low, high = (torch.quantile(x, max(0.0, min(1.0, q + d))) for d in (-0.0011, 0.0011))
        assert low <= formats._quantile(x, q) <= high and (x == formats._quantile(x, q)).any()


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


def test_encoded_is_values_times_scale():
    values, scale = gaussian(3, 4), gaussian(3, 1)
    for s in (None, scale, scale[0, 0]):
        encoded = Encoded(values, s)
        assert torch.equal(encoded.decode(), values if s is None else values * s)
        assert torch.equal(encoded.mT.decode(), encoded.decode().mT)


# 2:4 sparsity.

def blocks_of_4(x):
    return [x[i:i + 4, j:j + 4] for i in range(0, x.shape[0], 4) for j in range(0, x.shape[1], 4)]


def test_sparse24_keeps_the_most_that_can_be_kept():
    x = gaussian(32, 48)
    mask = Sparse24().mask(x)
    assert mask.dtype == torch.bool
    for pairs in (mask.unflatten(1, (-1, 4)).sum(-1), mask.unflatten(0, (-1, 4)).sum(1)):
        assert (pairs == 2).all()
    assert torch.equal(Sparse24().mask(x.mT), mask.mT)
    assert torch.equal(Sparse24().mT.encode(x.mT).mT.values, Sparse24().encode(x).values)
    # all ways to choose 2 of 4 in every row, those with 2 in every column
    rows = [np.array(r) for r in itertools.product((0, 1), repeat=4) if sum(r) == 2]
    patterns = [p for p in map(np.array, itertools.product(rows, repeat=4)) if (p.sum(0) == 2).all()]
    assert len(patterns) == 90
    most = np.array([max((block * p).sum() for p in patterns) for block in blocks_of_4(x.abs().double().numpy())])
    kept = np.array([block.sum() for block in blocks_of_4((x.abs().double() * mask).numpy())])
    np.testing.assert_allclose(kept, most, rtol=1e-6)
    assert kept.sum() / x.abs().sum() == pytest.approx(0.703, abs=0.02)


def test_sparse24_leaves_what_it_keeps():
    x, times = gaussian(8, 12), torch.arange(1.0, 13.0)[None]
    for encoded, kept in ((Sparse24().encode(x), x), (Sparse24().encode(x, times), x * times)):
        mask = Sparse24().mask(kept)
        assert torch.equal(encoded.values[mask], kept[mask]) and (encoded.values[~mask] == 0).all()
        assert encoded.scale is None


@pytest.mark.parametrize('shape', [(6, 9), (3, 3), (1, 5), (2, 2)])
def test_sparse24_of_incomplete_blocks(shape):
    x = gaussian(*shape)
    padded = torch.zeros(-(-shape[0] // 4) * 4, -(-shape[1] // 4) * 4)
    padded[:shape[0], :shape[1]] = x
    mask = Sparse24().mask(x)
    assert mask.shape == shape and torch.equal(mask, Sparse24().mask(padded)[:shape[0], :shape[1]])
    for t in (mask, mask.mT):  # 2 of a whole row of a block, at most 2 of a part
        parts = torch.zeros(4 * len(t), 4 * t.size(1))
        parts[:len(t), :t.size(1)] = t
        assert parts.unflatten(1, (-1, 4)).sum(-1).max() <= 2
    if shape == (2, 2):  # 2 may stay in every row and column
        assert mask.all()
