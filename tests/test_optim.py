import copy

import pytest
import torch

import optim
from model import GPT, GPTConfig


def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8))


def test_cosine():
    at = {step: optim.cosine(step, 1.0, 0.1, warmup_iters=9, decay_iters=109) for step in (0, 8, 9, 59, 109, 500)}
    assert at == pytest.approx({0: 0.1, 8: 0.9, 9: 1.0, 59: 0.55, 109: 0.1, 500: 0.1})
    assert optim.cosine(0, 1.0, 0.1, warmup_iters=0, decay_iters=0) == 0.1  # nothing to divide by


def test_matrices_decay_and_vectors_do_not():
    m = model()
    matrices, vectors = optim.parameter_groups(m, 0.1)
    assert {p.dim() for p in matrices['params']} == {2} and matrices['weight_decay'] == 0.1
    assert {p.dim() for p in vectors['params']} == {1} and vectors['weight_decay'] == 0.0
    assert len(matrices['params']) + len(vectors['params']) == len(list(m.parameters()))


def step(m, optimizer, n):
    for i in range(n):
        for j, p in enumerate(m.parameters()):
            p.grad = torch.full_like(p, 0.1 * (j + i + 1))
        optimizer.step()


def nanogpts(m):
    """The optimizer as nanoGPT makes it on a CPU."""
    params = dict(m.named_parameters())
    return torch.optim.AdamW([
        {'params': [p for p in params.values() if p.dim() >= 2], 'weight_decay': 0.1},
        {'params': [p for p in params.values() if p.dim() < 2], 'weight_decay': 0.0}], lr=1e-2, betas=(0.9, 0.95))


def test_goes_on_from_nanogpts_state():
    theirs, ours = model(), model()
    a = nanogpts(theirs)
    step(theirs, a, 3)
    ours.load_state_dict(theirs.state_dict())
    b = optim.adamw(ours, 0.1, (0.9, 0.95))
    optim.load_state(b, copy.deepcopy(a.state_dict()))
    assert b.param_groups[0]['fused'] and b.param_groups[0]['lr'] == 0.0  # hyperparameters are this run's
    for group in b.param_groups:
        group['lr'] = 1e-2
    step(theirs, a, 3)
    step(ours, b, 3)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


def test_state_of_another_model_is_refused():
    other = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8))
    with pytest.raises(ValueError, match='groups of'):
        optim.load_state(optim.adamw(model(), 0.1, (0.9, 0.95)), optim.adamw(other, 0.1, (0.9, 0.95)).state_dict())
