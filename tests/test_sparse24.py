import itertools

import numpy as np
import pytest
import torch
from reference_formats import (
    gaussian,
)

from sologpt.matmuls.sparse24 import Sparse24


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
