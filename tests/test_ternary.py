import math

import pytest
import torch
from linears import linear

from sologpt.matmuls import ternary


@pytest.mark.parametrize('n_in', [64, 50])
def test_packed_weights_give_the_training_forward(n_in):
    layer = linear('ternary', n_in, 24)
    packed = ternary.PackedTernary(layer)
    assert packed.packed.numel() == 24 * math.ceil(n_in / 4)
    x = torch.randn(2, 3, n_in)
    assert torch.equal(packed(x), layer(x))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(packed(x), layer(x))


def test_bit_planes_multiply_exactly():
    x, w = torch.randint(-128, 128, (5, 200), dtype=torch.int8), torch.randint(-1, 2, (33, 200), dtype=torch.int8)
    assert torch.equal(ternary.bitplane_matmul(x, ternary.bit_planes(w)), x.long() @ w.long().T)
