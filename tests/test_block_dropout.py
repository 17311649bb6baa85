import math

import pytest
import torch
import torch.nn.functional as F
from linears import linear, tensors, through

from sologpt.matmuls.block_dropout import BY_MASKING, BY_SKIPPING, block_matmul


@pytest.mark.parametrize('multiply', [BY_SKIPPING, BY_MASKING])
def test_block_dropout_is_a_masked_matmul(multiply):
    x, w, g = tensors(70, 100, 90)
    function = block_matmul(multiply, 0.4, 32).apply
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
    for multiply, reads in ((BY_SKIPPING, False), (BY_MASKING, True)):
        torch.manual_seed(5)
        y, _, dw = through(block_matmul(multiply, 0.5, 32).apply, x, w, g)
        assert y.isnan().any() == dw.isnan().any() == reads


def test_block_dropout_drops_in_training_alone():
    x, _, _ = tensors()
    layer = linear('block_dropout', rate=0.5, size=16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), F.linear(x, layer.weight))
