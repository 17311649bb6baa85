"""Number formats written out number by number, in Python's floats, which hold every quantity here exactly."""

import bisect
import itertools
import math

import pytest
import torch

from sologpt.matmuls.elements import E2M1, E2M3, E3M2, E4M3, E5M2

ELEMENTS = {'e4m3': E4M3, 'e5m2': E5M2, 'e3m2': E3M2, 'e2m3': E2M3, 'e2m1': E2M1}
each_element = pytest.mark.parametrize('name', ELEMENTS)
INF, NAN = math.inf, math.nan


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


def same(a, b):
    """Bit by bit, but for NaN's bits: -0 is not 0."""
    a, b = a.float(), b.float()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()) \
        and torch.equal(a.nan_to_num(0), b.nan_to_num(0)) and torch.equal(a.isinf(), b.isinf())


def digits(values):
    """The most binary digits that any of the values has, from the first 1 to the last."""
    numerators = {value.as_integer_ratio()[0] for value in values.float().unique().tolist()}
    return max((n // (n & -n)).bit_length() for n in map(abs, numerators) if n)


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


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def z_scores(samples, exact):
    """Of the means: about a standard normal distribution if the samples' mean is `exact`."""
    samples = samples.double()
    deviation = samples.std(0).clamp(min=1e-12)
    return (samples.mean(0) - exact.double()) / (deviation / len(samples) ** 0.5)
