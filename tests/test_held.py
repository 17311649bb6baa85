import torch
from linears import apart, small

from sologpt.matmuls import held


def test_bfloat16_weights_are_half_the_memory_and_nearly_the_same_model():
    for arch in ('gpt2', 'modern'):
        model, ids = small(arch), torch.randint(0, 11, (2, 8))
        plain = model.hidden(ids)
        size = sum(p.numel() * p.itemsize for p in model.parameters())
        held.hold_matrices_in_bfloat16(model)
        assert sum(p.numel() * p.itemsize for p in model.parameters()) < 0.55 * size
        with torch.autocast('cpu', torch.bfloat16):
            hidden = model.hidden(ids)
        assert apart(hidden, plain) < 0.02
