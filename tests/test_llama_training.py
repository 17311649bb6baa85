"""Training with arch='llama': gradients against transformers, and what else of training meets its parts."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from sologpt.bench.plan import measured_step
from sologpt.files.checkpoint import save_checkpoint
from sologpt.files.families import FAMILIES
from sologpt.inference.contexts import Documents
from sologpt.machine.devices import autocast
from sologpt.matmuls import attention
from sologpt.matmuls.attention import ATTENTION
from sologpt.matmuls.document_attention import block_mask, dense_mask
from sologpt.matmuls.held import hold_matrices_in_bfloat16
from sologpt.matmuls.recipe_linear import convert
from sologpt.matmuls.recipes import NAMES
from sologpt.matmuls.spec import MatmulSpec
from sologpt.training.adamw import adamw
from sologpt.training.forecast import Forecast
from sologpt.training.muon import muon
from sologpt.training.schedules import set_rates

transformers = pytest.importorskip('transformers')

CPU = torch.device('cpu')

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


@pytest.mark.parametrize('kind, changes', VARIANTS)
def test_bfloat16_is_no_further_from_float32_than_transformers(kind, changes, tmp_path):
    theirs, _ = theirs_and_ours(kind, changes, tmp_path)
    theirs.bfloat16().save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(str(tmp_path)).eval(), ids(4, 64)
    with torch.no_grad():
        found = theirs(idx).logits.float()
        with autocast(CPU, 'bfloat16'):
            logits = ours(idx, idx)[0].float()
        exact = theirs.float()(idx).logits
    assert 0 < (logits - exact).norm() < (found - exact).norm()


# ---- what else of training meets its parts ---------------------------------------------------------------------------

SHAPE = dict(arch='llama', block_size=32, vocab_size=97, n_layer=2, n_head=6, n_kv_head=2, n_embd=48, n_inner=80)
ODD = dict(n_head=9, n_kv_head=3, n_embd=72, n_inner=100)  # widths that are not whole blocks of most formats


def small(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE | changes)).train()


def loss_and_gradients(model, dtype='float32'):
    idx = ids(2, 33)
    with autocast(CPU, dtype):
        loss = model.loss(idx[:, :-1], idx[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize('shape', [{}, ODD], ids=['even', 'odd'])
@pytest.mark.parametrize('recipe', NAMES)
def test_every_recipe_trains_it_nearly_as_float32_does(recipe, shape):
    plain, model = small(**shape), small(**shape)
    convert(model, MatmulSpec(recipe, keep_last=0), 'float32', 64, CPU)
    expected, found = loss_and_gradients(plain), loss_and_gradients(model)
    torch.testing.assert_close(found[0], expected[0], atol=0.1 if recipe == 'ternary' else 0.02, rtol=0)
    for name, grad in found[1].items():
        if recipe not in ('ternary', 'block_dropout'):  # which are other models
            alike = F.cosine_similarity(grad.flatten(), expected[1][name].flatten(), dim=0)
            assert alike > {'sparse24': 0.5, 'mxfp4': 0.3, 'nvfp4': 0.6, 'fp4_dge': 0.6}.get(recipe, 0.97), name
        assert grad.isfinite().all() and grad.any()


@pytest.mark.parametrize('changes', [
    {}, dict(head_dim=16), dict(n_kv_head=1, bias='qkv'), dict(tied=True, qk_norm='gain', head_dim=32)])
def test_flops_are_those_that_are_done(changes):
    model, idx = small(attn_backend='math', **changes), ids(2, 32)
    with FlopCounterMode(display=False) as counter:
        model.loss(idx, idx).backward()
    assert counter.get_total_flops() == idx.numel() * model.flops_per_token()


def test_muon_orthogonalises_queries_keys_values_gate_and_up_each_on_its_own():
    """Of SmolLM2's kind: the rows of c_attn are divisible by 3, and the parts are not their thirds."""
    model = small(n_head=9, n_kv_head=3, n_embd=72, n_inner=100)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = muon(model, 0.0, 0.0, (0.9, 0.95), 0.1)
    set_rates(optimizer, 0, 1.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for i, (name, rows) in itertools.product(range(2), (
            ('attn.c_attn', [72, 24, 24]), ('attn.c_proj', [72]), ('mlp.c_fc', [100, 100]), ('mlp.c_proj', [72]))):
        name = f'transformer.h.{i}.{name}.weight'
        moved = (before[name] - model.get_parameter(name).detach()) / 0.1
        for part in moved.split(rows):
            singular = torch.linalg.svdvals(part) / max(1, part.size(0) / part.size(1)) ** 0.5
            assert singular.max() < 1.3 and singular.square().mean() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize('keep', ['8bit', 'cpu'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_moments_and_weights_in_other_formats(keep, dtype):
    """Gains are vectors: they stay in float32, and learn."""
    model = small(qk_norm='gain', bias='qkv', tied=True)
    if dtype == 'bfloat16':
        hold_matrices_in_bfloat16(model)
    optimizer, losses = adamw(model, 1e-2, 0.1, (0.9, 0.95), keep=keep), []
    set_rates(optimizer, 0, 1.0)
    for _ in range(8):
        losses.append(loss_and_gradients(model, dtype)[0].item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert losses[-1] < 0.8 * losses[0]
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.dim() == 1 else getattr(torch, dtype))
        if name.endswith('_norm.weight'):
            assert (p != 1).all()


@pytest.mark.filterwarnings('ignore:flex_attention called without torch.compile')
@pytest.mark.parametrize('window', [1, 5, 128, 200, 300])
@pytest.mark.parametrize('T', [256, 300])
def test_blocks_of_windows_within_documents_are_the_dense_mask(T, window):
    idx = torch.where(torch.rand(2, T, generator=torch.Generator().manual_seed(0)) < 0.01, 0, 1)
    dense, blocks = (Documents(idx, 0, make, {window}).masks[window] for make in (dense_mask, block_mask))
    steps = torch.arange(T)
    assert dense.sum(-1).max() <= window and dense.diagonal(dim1=-2, dim2=-1).all()
    visited = blocks.to_dense()[:, 0].bool()[:, steps[:, None] // 128, steps // 128]
    seen = torch.stack([blocks.mask_mod(b, 0, steps[:, None], steps) for b in range(2)])
    assert torch.equal(seen & visited, dense[:, 0])
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 16) for heads in (4, 2, 2))
    expected = ATTENTION['sdpa'](q, k, v, 0.0, dense)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=blocks, enable_gqa=True), expected)


@pytest.mark.parametrize('capability, dtype, masked, shared', [
    ((7, 5), torch.float16, False, False), ((8, 9), torch.float32, False, False), ((8, 9), torch.float16, True, False),
    ((8, 9), torch.bfloat16, False, True), ((9, 0), torch.float16, False, True)])
def test_keys_are_shared_where_a_fused_kernel_takes_it(monkeypatch, capability, dtype, masked, shared):
    """Anything else would be torch's math on a GPU, whose scores exist in memory."""
    taken = []

    def fused(q, k, v, enable_gqa, **options):
        taken.append((enable_gqa, k.size(1)))
        return q
    monkeypatch.setattr(F, 'scaled_dot_product_attention', fused)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    monkeypatch.setattr(attention, 'for_each_query', lambda z, H: z.expand(1, H, 8, 16))
    with FakeTensorMode():
        q, k = (torch.empty(1, heads, 8, 16, device='cuda', dtype=dtype) for heads in (6, 1))
        ATTENTION['sdpa'](q, k, k, 0.0, torch.ones(8, 8, dtype=torch.bool, device='cuda') if masked else None)
    assert taken == [(True, 1) if shared else (False, 6)]


@pytest.mark.parametrize('changes', [
    dict(tied=True, bias='linears', document_eot=3),
    dict(n_kv_head=1, qk_norm='gain', window=9, checkpoint_activations='selective')])
def test_a_step_takes_the_memory_that_was_foreseen(changes):
    model = small(block_size=64, vocab_size=3000, loss_chunk=64, **changes)

    def optimizer(model):
        return adamw(model, 0.0, 0.1, (0.9, 0.95))
    foreseen = Forecast(model, optimizer, 64, 'bfloat16', gpu=False).at(40).peak
    assert foreseen == pytest.approx(measured_step(model, optimizer(model), 40, 64, 'bfloat16'), rel=0.03)


@pytest.mark.parametrize('keys', [
    dict(matmul='ternary'), dict(matmul='sparse24:until=1.0'), dict(prune='0.5:0.0-0.5'),
    dict(optimizer='muon', weights_dtype='bfloat16', dtype='bfloat16'), dict(deterministic=True, document_mask=True),
    dict(batch_size='auto', total_batch_size=128, gradient_accumulation_steps='None')], ids=str)
def test_runs_begin_from_it_and_draw_text(project, keys):
    """Of a base with 16 positions, bytes, grouped queries and a window in one block."""
    model = small(block_size=16, vocab_size=256, window=5, windowed=[0], n_embd=32, n_head=4)
    os.mkdir('base')
    save_checkpoint('base', {'model': model.state_dict(), 'model_args': model.config.to_save(), 'iter_num': 0}, False)
    ran, _ = project.train(**dict(init_from='base', n_head=4, max_iters=3) | keys)
    assert ran['model'].config.n_kv_head == 2 and ran['progress'].iter_num == 3
    if 'dtype' not in keys:
        assert len(project.sample(start='ab')) > 10
    if 'prune' in keys:
        assert (ran['model'].transformer.h[0].mlp.c_fc.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
