import torch
from linears import apart, small

from model import GPT, GPTConfig
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


def test_a_tied_head_that_is_in_the_dtype_already_stays_tied():
    for dtype, tied in (('bfloat16', True), ('float32', False)):
        model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=11, block_size=8)).bfloat16()
        held.hold_all_linears_in(model, dtype)
        assert (model.lm_head.weight is model.transformer.wte.weight) == tied
        assert model.lm_head.weight.dtype == getattr(torch, dtype)
        assert not any(p.requires_grad for p in model.lm_head.parameters())
