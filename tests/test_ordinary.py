import copy

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from sologpt.machine.devices import autocast
from sologpt.matmuls import ordinary, recipe_linear
from sologpt.training.build import prepare_model
from sologpt.training.loss import TrainingLoss

CPU = torch.device('cpu')
KINDS = [dict(arch='gpt2', bias=True), dict(arch='gpt2', bias=False), dict(arch='modern', smear=True),
         dict(arch='llama', n_kv_head=1, bias='qkv', qk_norm='gain')]


@pytest.mark.parametrize('parts', [None, (2, 2, 2), (4, 1, 1)])
@pytest.mark.parametrize('needed', [(True, True), (True, False), (False, True)])
def test_gradients_are_a_linears(parts, needed):
    g = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(n, m, generator=g, dtype=torch.float64) for n, m in ((7, 4), (6, 4), (7, 6)))
    x.requires_grad_(needed[0]), w.requires_grad_(needed[1])
    wanted = [t for t, is_needed in zip((x, w), needed, strict=True) if is_needed]
    y = ordinary.OrdinaryMatmul.apply(x, w, parts)
    y = torch.cat(y, dim=1) if parts else y
    torch.testing.assert_close(y, F.linear(x, w))
    for ours, theirs in zip(torch.autograd.grad(y, wanted, grad), torch.autograd.grad(F.linear(x, w), wanted, grad),
                            strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('compiled, dtype, tolerance', [
    (False, 'float32', 1e-5), (False, 'bfloat16', 2e-2), (True, 'bfloat16', 2e-2)])
def test_a_model_trains_as_with_nn_linears(kind, compiled, dtype, tolerance):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=33, n_layer=2, n_head=2, n_embd=16, zero_init=False, **kind))
    idx = torch.randint(33, (2, 16))
    results = []
    for changed in (False, True):
        m = copy.deepcopy(model).train()
        if changed:
            recipe_linear.sum_in_float32(m)
        with autocast(CPU, dtype):
            loss = TrainingLoss(m, compiled, backend='aot_eager', fullgraph=True)(idx, idx)
        loss.backward()
        results.append({'loss': loss} | {name: p.grad for name, p in m.named_parameters()})
    plain, ours = results
    assert plain.keys() == ours.keys() and all(g.dtype == torch.float32 for g in ours.values())
    for name in plain:
        assert (ours[name] - plain[name]).norm() <= tolerance * plain[name].norm(), name


@pytest.mark.parametrize('changes, is_used', [
    ({}, True), ({'weights_dtype': 'bfloat16'}, False), ({'sharding': 'fsdp'}, False), ({'matmul': 'ternary'}, False)])
def test_only_float32_weights_in_16_bits_on_a_gpu_have_gradients_of_their_own_kind(changes, is_used):
    keys = {'matmul': '', 'weights_dtype': 'float32', 'sharding': '', 'batch_size': 1, 'block_size': 16} | changes
    for dtype, device in (('bfloat16', 'cuda'), ('float16', 'cuda'), ('float32', 'cuda'), ('bfloat16', 'cpu')):
        model = GPT(GPTConfig(block_size=16, vocab_size=33, n_layer=1, n_head=2, n_embd=16))
        prepare_model(model, keys, None, dtype, torch.device(device))
        uses = model.transformer.h[0].attn.project is ordinary.by_parts
        assert uses == (is_used and device == 'cuda' and dtype != 'float32')
