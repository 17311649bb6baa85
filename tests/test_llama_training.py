"""Training with arch='llama': gradients against transformers, and what else of training meets its parts."""

import pytest
import torch

from model import GPT
from sologpt.files.families import FAMILIES

transformers = pytest.importorskip('transformers')

BASE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2)
LLAMA3 = {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': 32, 'low_freq_factor': 1,
                              'high_freq_factor': 4, 'original_max_position_embeddings': 32}}
VARIANTS = [
    ('llama', dict(num_key_value_heads=6)), ('llama', dict(num_key_value_heads=1)),
    ('llama', dict(tie_word_embeddings=True, hidden_size=72, num_attention_heads=9, num_key_value_heads=3)),
    ('llama', dict(head_dim=16, attention_bias=True, mlp_bias=True)), ('llama', LLAMA3),
    ('mistral', dict(sliding_window=8)), ('qwen2', dict(use_sliding_window=True, sliding_window=8,
                                                        max_window_layers=1)),
    ('qwen3', dict(head_dim=16, tie_word_embeddings=True))]


def theirs_and_ours(kind, changes, folder):
    """A model of transformers with random weights, gains and biases, and the same as a GPT read from its files."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **BASE | changes))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn(p.shape)
    theirs.save_pretrained(folder)
    return theirs, GPT.from_pretrained(str(folder))


def ids(batch=2, length=41):
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(1))


def gradients(kind, model):
    """Their name -> our gradient."""
    own = {name: p.grad for name, p in model.named_parameters()}
    found = {}
    for ours, names in FAMILIES[kind].names(model.config.n_layer, model.config.tied):
        rows = model.config.parts_of('.'.join(ours.split('.')[3:])) if len(names) > 1 else None
        for end in ('weight', 'bias'):
            if (grad := own.pop(f'{ours}.{end}', None)) is not None:
                found |= {f'{name}.{end}': part
                          for name, part in zip(names, grad.split(rows) if rows else [grad], strict=True)}
    assert set(own) <= {'lm_head.weight'}
    return found


@pytest.mark.parametrize('kind, changes', VARIANTS)
def test_all_gradients_are_those_of_transformers(kind, changes, tmp_path):
    theirs, ours = theirs_and_ours(kind, changes, tmp_path)
    idx = ids()
    expected = theirs(idx, labels=idx).loss
    expected.backward()
    loss = ours.train().loss(idx[:, :-1], idx[:, 1:])
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    found = gradients(kind, ours)
    assert found.keys() == {name for name, _ in theirs.named_parameters()}
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-4 * p.grad.abs().max().item(), rtol=1e-4, msg=name)
