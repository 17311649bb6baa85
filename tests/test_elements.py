import pytest
import torch
from reference_formats import (
    BITS,
    ELEMENTS,
    GRIDS,
    INF,
    NAN,
    bfloat16s,
    critical,
    digits,
    each_element,
    nearest,
    of_many_sizes,
    same,
    value,
    z_scores,
)

from sologpt.matmuls import elements
from sologpt.matmuls.elements import BYTE, E2M1, TRIT, Int

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


def test_how_many_digits_the_numbers_have():
    for element in ELEMENTS.values():
        assert digits(element.grid) == element.significant_bits
    for element in (BYTE, TRIT, Int(7, 4)):
        assert digits(torch.arange(element.max + 1)) == element.significant_bits
    assert (ELEMENTS['e4m3'].significant_bits, E2M1.significant_bits, BYTE.significant_bits) == (4, 2, 7)


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
    result = elements.pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert result.dtype == torch.uint8 and result.tolist() == packed
    codes = torch.randint(0, 2 ** bits, (3, 5, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = elements.pack(codes, bits)
    assert packed.shape == (3, 5, 3 * bits)
    assert torch.equal(elements.unpack(packed, bits), codes)
    # as an integer: the i-th code's weight is 2^(bits * i)
    number = int.from_bytes(bytes(packed[1, 2].tolist()), 'little')
    assert number == sum(code << bits * i for i, code in enumerate(codes[1, 2].tolist()))


# Stochastic rounding.

def test_bfloat16_stochastically():
    x = torch.cat([of_many_sizes(200, 6), torch.tensor([1.0 + 2.0 ** -9, -1.0 - 2.0 ** -8 * 0.9, 1e-39])])
    torch.manual_seed(0)
    draws = elements.to_bfloat16_stochastically(x.expand(20_000, -1))
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
        assert same(elements.to_bfloat16_stochastically(x), x)
    # added to a NaN, the noise may carry into the sign, or leave no mantissa
    odd = torch.tensor([0x7FFFFFFF, 0x7F800001, -1]).to(torch.int32).view(torch.float32)
    assert elements.to_bfloat16_stochastically(odd).isnan().all()
