import math
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from configurator import InputError
from model import GPTConfig
from sologpt.adapters.adapter import attach, merge, model_class, parts
from sologpt.adapters.config import AdapterConfig
from sologpt.adapters.methods.bottleneck import Bottleneck
from sologpt.adapters.methods.dora import DoRA
from sologpt.adapters.methods.lora import LoRA
from sologpt.adapters.methods.vera import Projection, VeRA
from sologpt.adapters.targets import Target
from sologpt.machine.devices import autocast
from sologpt.matmuls.attention import ATTENTION
from sologpt.matmuls.held import hold_base
from sologpt.matmuls.nf4 import NF4Linear

METHODS = ('lora', 'dora', 'vera', 'bottleneck', 'prompt', 'prefix')
BESIDE = METHODS[:4]
KINDS = [dict(bias=True), dict(bias=False), dict(arch='modern', smear=True)]
LLAMA = dict(arch='llama', n_kv_head=1, bias='qkv', qk_norm='gain', window=6)
P = 3
IDX, TARGETS = torch.randint(33, (2, 3, 12), generator=torch.Generator().manual_seed(7))


def randomise(tensors, std=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in tensors:
            t.copy_(torch.randn(t.shape, generator=generator) * std)


def base(held='float32', method='lora', **changes):
    """A model that can have an adapter of the method. All of its weights are far from zero, so that errors show."""
    cls = model_class(AdapterConfig(method))
    m = cls(GPTConfig(**dict(block_size=16, vocab_size=33, n_layer=2, n_head=2, n_embd=32) | changes)).eval()
    randomise(m.parameters())
    hold_base(m, held, 'float32')
    return m


def trained(m):
    return {name: p for name, p in m.named_parameters() if p.requires_grad}


def adapted(m, method, seed=1, **config):
    attach(m, AdapterConfig(method, **dict(r=4, lora_alpha=2.0, num_virtual_tokens=P) | config))
    randomise(trained(m).values(), seed=seed)
    return m


@torch.no_grad()
def logits(m, idx=IDX):
    return m.lm_head(m.hidden(idx))


def assert_same(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# Training.

@pytest.mark.parametrize('kind', [*KINDS, LLAMA])
@pytest.mark.parametrize('method', METHODS)
def test_training_begins_at_the_base_and_changes_the_adapter_alone(method, kind):
    m = base(method=method, **kind)
    former, before = {name: p.clone() for name, p in m.named_parameters()}, logits(m)
    attach(m, AdapterConfig(method, r=4, num_virtual_tokens=P))
    if method in BESIDE:
        assert torch.equal(logits(m), before)
    else:
        m.begin_from(IDX[:1, :P])
    start = {name: p.detach().clone() for name, p in trained(m).items()}
    buffers = {name: b.clone() for name, b in m.named_buffers()}
    optimizer = torch.optim.Adam(trained(m).values(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        m.train().loss(IDX, TARGETS).backward()
        optimizer.step()
    now = dict(m.named_parameters())
    assert start.keys() == {'virtual'} if method not in BESIDE else len(start) == (
        sum(len(part.targets) for _, part in parts(m)) * {'lora': 2, 'dora': 3, 'vera': 2, 'bottleneck': 4}[method])
    assert not any(torch.equal(now[name], p) for name, p in start.items())
    frozen = {name.replace('.base.', '.'): p for name, p in now.items() if name not in start}
    assert frozen.keys() == former.keys() and all(torch.equal(p, former[name]) for name, p in frozen.items())
    assert all(torch.equal(b, buffers[name]) for name, b in m.named_buffers())  # VeRA's projection


@pytest.mark.parametrize('method, held, kind', [
    *((method, 'float32', dict()) for method in METHODS), ('lora', 'nf4', dict()), ('dora', 'nf4', KINDS[2]),
    ('lora', 'float32', LLAMA), ('vera', 'nf4', LLAMA), ('dora', 'float32', LLAMA), ('prefix', 'float32', LLAMA),
    ('prefix', 'float32', KINDS[2])])
def test_checkpointed_and_compiled_gradients_are_the_plain_ones(method, held, kind):
    found = []
    for how in ('plain', 'checkpointed', 'compiled'):
        again = how == 'checkpointed' and (method in ('lora', 'dora') or 'selective')
        m = adapted(base(held, method, n_layer=1, checkpoint_activations=again, **kind), method).train()
        run = m.loss
        if how == 'compiled':
            run = torch.compile(m.loss, backend='aot_eager', fullgraph=True)
        loss = run(IDX, TARGETS)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in trained(m).values())])
    for plain, *others in zip(*found, strict=True):
        assert plain.abs().sum() > 0
        for other in others:
            torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize('held', ['float32', 'nf4'])
@pytest.mark.parametrize('kind', [*KINDS, LLAMA])
@pytest.mark.parametrize('method', METHODS)
def test_bfloat16_gradients_are_near_those_in_float32(method, kind, held):
    found = []
    for dtype in ('float32', 'bfloat16'):
        m = adapted(base(held, method, **kind), method).train()
        with autocast(torch.device('cpu'), dtype):
            loss = m.loss(IDX, TARGETS)
        loss.backward()
        found.append([loss.detach(), torch.cat([p.grad.flatten() for p in trained(m).values()])])
    for exact, rounded in zip(*found, strict=True):
        assert 0 < (rounded - exact).norm() <= 0.1 * exact.norm()


def by_hand(part, W, bias, x):
    """What a part computes, by its paper, one target after the other."""
    bias = torch.zeros(len(W)) if bias is None else bias
    h, pieces, begin = x @ W.T + bias, [], 0
    for i, target in enumerate(part.targets):
        rows = target.rows
        pieces += [h[..., begin:rows.start], by_hand_of_target(part, i, target, W[rows], bias[rows], x)]
        begin = rows.stop
    return torch.cat([*pieces, h[..., begin:]], dim=-1)


def by_hand_of_target(part, i, target, W, bias, x):
    own = {name: getattr(part, name)[i] for name in part.file_ends}
    if isinstance(part, DoRA):
        merged = W + target.scale * own['B'] @ own['A']
        return x @ (merged * (own['m'] / merged.norm(dim=1).detach())[:, None]).T + bias
    h = x @ W.T + bias
    if isinstance(part, LoRA):
        return h + target.scale * (x @ own['A'].T) @ own['B'].T
    if isinstance(part, VeRA):
        A, B = part.projection.A[:, :x.size(-1)], part.projection.B[:len(W)]
        return h + own['b'] * ((x @ A.T * own['d']) @ B.T)
    return h + F.gelu(h @ own['D'].T + own['c']) @ own['U'].T + own['e']


WHOLE = [Target('whole', slice(0, 36), 3, 0.7)]
FIRST = [Target('q', slice(0, 20), 3, 0.7)]
PARTS = [Target('q', slice(0, 12), 3, 0.7), Target('v', slice(20, 28), 2, -1.3), Target('w', slice(28, 36), 3, 0.7)]


@pytest.mark.parametrize('held', ['float32', 'nf4'])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('targets', [WHOLE, FIRST, PARTS], ids=['whole', 'first', 'parts'])
@pytest.mark.parametrize('cls', [LoRA, DoRA, VeRA, Bottleneck])
def test_outputs_and_gradients_equal_the_papers(cls, targets, bias, held):
    torch.manual_seed(0)
    linear = nn.Linear(24, 36, bias).requires_grad_(False)
    if cls is VeRA:  # it has one rank for all
        targets = [replace(target, r=5) for target in targets]
    shared = [Projection(5, 40, 60, 0)] if cls is VeRA else []
    part = cls(NF4Linear(linear) if held == 'nf4' else linear, targets, 0.0, *shared)
    ours = [p for p in part.parameters() if p.requires_grad]
    randomise(ours, 0.5)
    x, weights = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 36)
    expected = by_hand(part, part.base.weight, linear.bias, x)
    y = part(x)
    assert_same(y, expected)
    others = torch.ones(36, dtype=torch.bool)
    for target in targets:
        others[target.rows] = False
    assert torch.equal(y[..., others], part.base(x)[..., others])
    for found, grad in zip(*(torch.autograd.grad((out * weights).sum(), [x, *ours]) for out in (y, expected)),
                           strict=True):
        assert_same(found, grad)
    if isinstance(part, DoRA):
        for length, A, B, target in zip(part.lengths(), part.A, part.B, targets, strict=True):
            torch.testing.assert_close(length, (part.base.weight[target.rows] + target.scale * B @ A).norm(dim=1))
    if cls.mergeable:
        assert_same(x @ (part.base.weight + part.delta()).T + (linear.bias if bias else 0), expected)


@pytest.mark.parametrize('method', ['lora', 'dora', 'vera'])
def test_dropout_is_of_the_adapters_input_alone(method):
    m = base()
    attach(m, AdapterConfig(method, r=4, dropout=0.5))
    assert torch.equal(logits(m.train()), logits(m.eval()))
    randomise(trained(m).values())
    plain = adapted(base(), method, seed=0, lora_alpha=32.0)
    assert torch.equal(logits(m), logits(plain)) and not torch.equal(logits(m.train()), logits(plain))


@pytest.mark.parametrize('method', ['lora', 'vera', 'prompt', 'prefix'])
def test_flops_are_those_that_are_done(method):
    m = adapted(base(method=method, loss_chunk=0, attn_backend='math'), method).train()
    T = 16 - m.n_virtual
    idx = torch.zeros(2, T, dtype=torch.long)
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}  # which torch does not count
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        m.loss(idx, idx).backward()
    # in the first block nothing needs the gradient of the input of c_attn, nor, of a prefix, of the queries
    not_needed = {'lora': 2 * 32 * 96 + 2 * 4 * 32, 'vera': 2 * 32 * 96 + 2 * 4 * 32, 'prompt': 0,
                  'prefix': 2 * 32 * 96 + 2 * 16 * 32}[method]
    assert counter.get_total_flops() == pytest.approx(2 * T * (m.flops_per_token() - not_needed), rel=1e-9)
    assert m.flops_per_token(T) == m.flops_per_token()


# Merging.

LOW_RANK = [('lora', {}), ('lora', dict(use_rslora=True, rank_pattern={'c_fc': 2})), ('vera', {})]
MERGEABLE = [*LOW_RANK, ('lora', dict(target_modules=['attn.c_attn'])), ('dora', {})]


@pytest.mark.parametrize('held', ['float32', 'nf4'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method, options', MERGEABLE)
def test_merged_logits_equal_unmerged(method, options, kind, held):
    plain, m = logits(base(held, **kind)), adapted(base(held, **kind), method, **options)
    unmerged, expected = logits(m), {name: part.base.weight + part.delta().detach() for name, part in parts(m)}
    merge(m)
    assert_same(logits(m), unmerged)
    assert (unmerged - plain).abs().max() > 0.01 * plain.abs().max()
    for name, weight in expected.items():
        assert type(m.get_submodule(name)) is nn.Linear and torch.equal(m.get_submodule(name).weight, weight)
    assert m.state_dict().keys() == base(**kind).state_dict().keys() and not parts(m)
    assert all(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize('method, options', LOW_RANK)
def test_merging_by_1_and_then_by_minus_1_gives_the_base(method, options):
    m = base()
    for weight in (1, -1):
        merge(adapted(m, method, **options), weight)
    for p, q in zip(m.parameters(), base().parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_what_cannot_be_merged_or_stacked_says_so():
    for method, why in (('bottleneck', 'not linear'), ('prompt', 'virtual tokens'), ('prefix', 'virtual tokens')):
        with pytest.raises(InputError, match=why):
            merge(adapted(base(method=method), method))
    for method in ('bottleneck', 'dora'):
        with pytest.raises(InputError, match=method):
            parts(adapted(base(), method))[0][1].low_rank()


@pytest.mark.parametrize('changes, message', [
    (dict(method='nothing'), 'nothing'), (dict(r=0), 'r=0'), (dict(dropout=1.0), 'dropout'),
    (dict(rank_pattern={'c_fc': 0}), 'rank_pattern'), (dict(target_modules=['q_proj']), 'q_proj'),
    (dict(target_modules=['lm_head']), 'lm_head'), (dict(target_modules='.*wte'), 'wte'),
    (dict(target_modules='nothing'), 'nothing'), (dict(target_modules='('), r'\(')])
def test_config_refused(changes, message):
    with pytest.raises(InputError, match=message):
        attach(base(), AdapterConfig(**dict(method='lora') | changes))


# Virtual tokens.

@pytest.mark.parametrize('kind', [*KINDS, LLAMA])
def test_a_prompt_is_as_ids_of_its_own(kind):
    m = adapted(base(method='prompt', **kind), 'prompt')
    larger = base(vocab_size=33 + P, **kind)
    weights = m.state_dict()
    table = torch.cat([weights['transformer.wte.weight'], weights.pop('virtual')])
    weights['transformer.wte.weight'] = table
    weights['lm_head.weight'] = F.pad(weights['lm_head.weight'], (0, 0, 0, P)) if larger.config.tied is False else table
    larger.load_state_dict(weights)
    ids = torch.cat([torch.arange(33, 33 + P).expand(len(IDX), -1), IDX], dim=1)
    assert_same(logits(m), logits(larger, ids)[:, P:, :33])
    assert_same(m(IDX, TARGETS)[0], logits(m))
    assert m(IDX)[0].shape == (3, 1, 33)


@pytest.mark.parametrize('method', ['prompt', 'prefix'])
@pytest.mark.parametrize('kind', [dict(bias=True), dict(arch='modern'), LLAMA | dict(window=None)])
def test_begun_from_a_text_it_is_that_text_before(method, kind):
    m, text = adapted(base(method=method, **kind), method), torch.tensor([[5, 1, 30]])
    m.begin_from(text)
    expected = logits(base(**kind), torch.cat([text.expand(len(IDX), -1), IDX], dim=1))[:, P:]
    assert_same(logits(m), expected)
    for block in m.transformer.h:
        block.attn.attend = ATTENTION['math']
    assert_same(logits(m), expected)


@pytest.mark.parametrize('method', ['prompt', 'prefix'])
@pytest.mark.parametrize('kind', [*KINDS, LLAMA])
@pytest.mark.parametrize('length', [1, 5, 13, 15])
def test_greedy_with_cache_and_virtual_tokens_equals_without(method, kind, length):
    m = adapted(base(method=method, **kind), method)
    naive = idx = torch.arange(2 * length).view(2, length)
    for _ in range(25):
        naive = torch.cat([naive, logits(m, naive[:, -(16 - P):])[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(m.generate(idx, 25, temperature=0), naive)
    assert m.generate(idx, 25, temperature=0, window_step=4).shape == naive.shape


@pytest.mark.parametrize('method', ['prompt', 'prefix'])
def test_virtual_tokens_take_positions_of_the_block(method):
    with pytest.raises(InputError, match='16 virtual tokens leave no room'):
        adapted(base(method=method), method, num_virtual_tokens=16)
    m = adapted(base(method=method), method)
    m.hidden(torch.zeros(1, 16 - P, dtype=torch.long))
    with pytest.raises(ValueError, match='block_size is 16'):
        m.hidden(torch.zeros(1, 17 - P, dtype=torch.long))
    assert m.new_cache(1, 1).layers[0].shape[2] == 1 + P and math.isfinite(m.flops_per_token())
