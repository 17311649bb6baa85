import copy
from unittest import mock

import pytest
import torch

from model import GPT, GPTConfig
from sologpt.training import moments, pruning, schedules
from sologpt.training.adamw import adamw
from sologpt.training.muon import POLAR_EXPRESS, orthogonalize
from sologpt.training.muon import muon as make_muon
from sologpt.training.optimizers import load_state


def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8))


def test_cosine():
    at = {step: schedules.cosine(step, warmup_iters=9, decay_iters=109, floor=0.1) for step in (0, 8, 9, 59, 109, 500)}
    assert at == pytest.approx({0: 0.1, 8: 0.9, 9: 1.0, 59: 0.55, 109: 0.1, 500: 0.1})
    assert schedules.cosine(0, warmup_iters=0, decay_iters=0, floor=0.1) == 0.1  # nothing to divide by


def test_wsd():
    at = {step: schedules.wsd(step, warmup_iters=9, decay_iters=100, floor=0.1, decay_part=0.4)
          for step in (0, 8, 9, 60, 80, 90, 100, 500)}
    assert at == pytest.approx({0: 0.1, 8: 0.9, 9: 1.0, 60: 1.0, 80: 0.55, 90: 0.325, 100: 0.1, 500: 0.1})
    assert [schedules.wsd(s, 0, 4, 0.0, 0.0) for s in (0, 3, 4)] == [1.0, 1.0, 0.0]  # no decay before the end
    assert schedules.wsd(0, 0, 0, 0.1, 0.5) == 0.1


def test_rates_follow_each_groups_highest_and_momentum_warms_up():
    optimizer = make_muon(model(), 3e-3, 0.1, (0.9, 0.95), muon_lr=0.02, embd_lr=0.1, momentum_warmup=10)
    schedules.set_rates(optimizer, 5, 0.5)
    assert [g['lr'] for g in optimizer.param_groups] == pytest.approx([0.01, 0.05, 1.5e-3, 1.5e-3])
    assert optimizer.param_groups[0]['momentum'] == pytest.approx(0.9)
    schedules.set_rates(optimizer, 99, 0.0)
    assert optimizer.param_groups[0]['momentum'] == 0.95 and optimizer.param_groups[3]['lr'] == 0.0


def test_matrices_decay_and_vectors_do_not():
    m = model()
    matrices, vectors = adamw(m, 1e-3, 0.1, (0.9, 0.95)).param_groups
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
    b = adamw(ours, 1e-2, 0.1, (0.9, 0.95))
    load_state(b, copy.deepcopy(a.state_dict()))
    assert b.param_groups[0]['fused']  # hyperparameters are this run's
    schedules.set_rates(b, 3, 1.0)
    step(theirs, a, 3)
    step(ours, b, 3)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


def test_state_of_another_model_is_refused():
    other = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8))
    with pytest.raises(ValueError, match='groups of'):
        load_state(adamw(model(), 1e-3, 0.1, (0.9, 0.95)),
                         adamw(other, 1e-3, 0.1, (0.9, 0.95)).state_dict())


@pytest.mark.parametrize('shape', [(3, 16, 16), (2, 16, 64)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_orthogonalize_is_u_vt(shape, dtype):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    G = U * torch.logspace(-4, -6, 16) @ Vh  # singular values from 0.5 to 0.005 of the norm
    out = orthogonalize(G, 6, dtype).float()
    torch.testing.assert_close(out, U @ Vh, atol=2e-2 if dtype == torch.float32 else 5e-2, rtol=0)


def polynomial(matrix, iterations):
    """The definition, for one matrix."""
    X = matrix / (1.02 * matrix.norm())
    for a, b, c in POLAR_EXPRESS[:iterations]:
        A = X @ X.mT
        X = a * X + b * A @ X + c * A @ A @ X
    return X


@pytest.mark.parametrize('shape', [(2, 24, 24), (2, 24, 96)])
def test_both_ways_of_computing_are_the_polynomial(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([polynomial(matrix, 4) for matrix in G])
    torch.testing.assert_close(orthogonalize(G, 4, torch.float32), expected, atol=1e-4, rtol=1e-4)


def muon(m, **changes):
    return make_muon(m, 1e-2, 0.1, (0.9, 0.95), **dict(muon_lr=0.1, head_lr=2e-2, momentum=0.9, momentum_warmup=0,
                                                        iterations=6) | changes)


def modern():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, arch='modern', smear=True))


def test_muon_step_by_step():
    """Two steps: every matrix one by one, by the definition; the rest as torch's AdamW makes them."""
    m, reference = modern(), modern()
    optimizer = muon(m)
    velocity = {name: torch.zeros_like(p) for name, p in m.named_parameters()}
    others = [p for name, p in reference.named_parameters() if '.h.' not in name and name != 'lm_head.weight']
    adam = torch.optim.AdamW([{'params': others, 'lr': 1e-2}, {'params': [reference.lm_head.weight], 'lr': 2e-2}],
                             betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    rng = torch.Generator().manual_seed(1)
    for i in range(2):
        for p, q in zip(m.parameters(), reference.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=rng)
            q.grad = p.grad.clone()
        schedules.set_rates(optimizer, i, 1.0)
        optimizer.step()
        adam.step()
        with torch.no_grad():
            for name, q in reference.named_parameters():
                if '.h.' not in name:
                    continue
                velocity[name] = 0.9 * velocity[name] + 0.1 * q.grad
                update = 0.1 * q.grad + 0.9 * velocity[name]
                pieces = update.split(8) if 'c_attn' in name else [update]
                pieces = [polynomial(piece.mT, 6).mT if 'c_fc' in name else polynomial(piece, 6) for piece in pieces]
                scale = 2.0 if 'c_fc' in name else 1.0  # sqrt(32 / 8)
                q.mul_(1 - 0.1 * 0.1).sub_(torch.cat(pieces), alpha=0.1 * scale)
    for (name, p), q in zip(m.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=0, msg=name)


def test_muon_goes_on_from_its_state():
    straight, stopped = modern(), modern()
    a, b = muon(straight), muon(stopped)
    for i in range(4):
        if i == 2:
            state, weights = copy.deepcopy(b.state_dict()), stopped.state_dict()
            stopped = modern()
            stopped.load_state_dict(weights)
            b = muon(stopped)
            load_state(b, state)
        for m, optimizer in ((straight, a), (stopped, b)):
            schedules.set_rates(optimizer, i, 1.0)
            step(m, optimizer, 1)
    for p, q in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(p, q)


def test_muon_takes_the_blocks_matrices_and_the_rest_is_adamws():
    m = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8, bias=True))  # tied, positions
    names = {id(p): name for name, p in m.named_parameters()}
    matrices, tables, head, vectors = ([names[id(p)] for p in g['params']] for g in muon(m).param_groups)
    block = 'transformer.h.0.'
    assert matrices == [block + n for n in ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight',
                                            'mlp.c_proj.weight')]
    assert tables == ['transformer.wte.weight', 'transformer.wpe.weight'] and head == []
    assert len(vectors) == len(names) - 6 and all(n.endswith('bias') or 'ln_' in n for n in vectors)


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_small_updates_of_bfloat16_weights_count_in_the_mean(kind):
    """Half of one last digit: rounded to the nearest it would be lost, every time."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=64, block_size=4, vocab_size=8))
    weight = model.transformer.h[0].mlp.c_fc.weight
    weight.data = torch.ones_like(weight, dtype=torch.bfloat16)
    optimizer = adamw(model, 0.001, 0.0, (0.9, 0.95)) if kind == 'adamw' else \
        make_muon(model, 0.001, 0.0, (0.9, 0.95), muon_lr=0.001)
    schedules.set_rates(optimizer, 0, 1.0)
    moved = 0.0
    for _ in range(40):
        with torch.no_grad():
            weight.fill_(1)
        # of Muon, a rank-one gradient's update: 2 sqrt(1 / 256 / 64) = 1 / 64 everywhere
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved += (1 - weight.float()).mean().item() / 40
    expected = 0.001 if kind == 'adamw' else 0.001 / 64
    assert moved == pytest.approx(expected, rel=0.15) and set(weight.unique().tolist()) <= {1, 1 - 2 ** -8}
    assert weight.dtype == torch.bfloat16


def train(m, optimizer, steps, seed=0):
    """The losses on sequences that count upwards."""
    schedules.set_rates(optimizer, 0, 1.0)
    losses = []
    for step in range(steps):
        start = torch.randint(11, (16, 1), generator=torch.Generator().manual_seed(step))
        ids = (start + torch.arange(9)) % 11
        torch.manual_seed(seed + step)
        loss = m(ids[:, :-1], ids[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def made(kind, m, keep):
    if kind == 'muon':
        return make_muon(m, 3e-3, 0.1, (0.9, 0.95), muon_lr=0.02, momentum_warmup=0, keep=keep)
    return adamw(m, 3e-3, 0.1, (0.9, 0.95), keep=keep)


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_moments_in_the_cpus_memory_are_the_same_and_in_8_bits_nearly(kind):
    losses, held = {}, {}
    for keep in moments.MOMENTS:
        m = model().train()
        optimizer = made(kind, m, keep)
        losses[keep] = train(m, optimizer, 60)
        held[keep] = sum(t.nbytes for p in m.parameters() if p.numel() >= 256
                         for key, t in optimizer.state[p].items() if key != 'step')
    assert losses['cpu'] == losses['float32'] and losses['float32'][-1] < 0.6 * losses['float32'][0]
    assert losses['8bit'] != losses['float32']
    assert losses['8bit'][-1] == pytest.approx(losses['float32'][-1], abs=0.03)
    assert held['8bit'] == pytest.approx(held['float32'] * (1 + 4 / 256) / 4, rel=0.01)


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
@pytest.mark.parametrize('keep', moments.MOMENTS)
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(kind, keep):
    m = model()
    optimizer, scaler = made(kind, m, keep), torch.amp.GradScaler('cpu', init_scale=4.0)
    schedules.set_rates(optimizer, 0, 1.0)
    for finite in (False, True):
        before = [p.clone() for p in m.parameters()]
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        if not finite:
            m.transformer.wte.weight.grad[0, 0] = torch.inf
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p, b) != finite for p, b in zip(m.parameters(), before, strict=True))


def test_moments_in_8_bits_are_within_a_digit_and_in_the_mean_exact():
    p = torch.randn(40, 10)
    for which, value in ((0, torch.randn(40, 10) * torch.logspace(-6, 3, 10)), (1, torch.rand(40, 10) ** 4 + 1e-12)):
        keep = moments.MOMENTS['8bit'][which]
        mean, blocks = torch.zeros_like(value), torch.cat([value.flatten(), torch.zeros(112)]).view(-1, 256)
        ulp = (blocks.abs().amax(1, keepdim=True) / 448 * 2 ** -9).expand(-1, 256).flatten()[:400].view_as(value)
        for seed in range(400):
            torch.manual_seed(seed)
            kept = keep.new(p)
            keep.write(kept, value)
            read = keep.read(kept, p)
            if which == 0:  # a step of the grid is an eighth of a number, or of the smallest normal one
                assert ((read - value).abs() <= 0.126 * value.abs() + 1.01 * ulp).all()
            mean += read / 400
        assert (mean - value).norm() <= 0.01 * value.norm()
    assert (keep.read(keep.new(p), p) == 0).all()
    keep.write(kept, torch.zeros(40, 10))
    assert keep.read(kept, p).max() < 1e-30


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
@pytest.mark.parametrize('before, after', [('float32', '8bit'), ('8bit', 'cpu'), ('cpu', 'float32'), ('8bit', '8bit')])
def test_moments_go_over_from_one_way_of_keeping_them_to_another(kind, before, after):
    straight, stopped = model().train(), model().train()
    one, other = made(kind, straight, before), made(kind, stopped, before)
    train(straight, one, 20)
    train(stopped, other, 20)
    saved = {'state': {i: {k: v.clone() for k, v in s.items()} for i, s in other.state_dict()['state'].items()},
             'param_groups': other.state_dict()['param_groups']}
    other = made(kind, stopped, after)
    load_state(other, saved)
    losses = train(straight, one, 20, 99), train(stopped, other, 20, 99)
    if before == after or '8bit' not in (before, after):
        assert losses[0] == losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def test_pruning_rises_to_its_share_and_holds():
    w = torch.randn(40, 25)
    pruned = pruning.Pruning([w], 0.8, 20, 60)
    shares = []
    for step in range(80):
        before = w.clone()
        with torch.no_grad():
            w.add_(torch.randn(40, 25), alpha=0.01)
        pruned.step(step)
        shares.append((w == 0).float().mean().item())
        if step == 60:
            assert before.abs()[w == 0].max() < before.abs()[w != 0].min() + 0.1  # the smallest, but for this step
    assert shares[20] == 0 and shares[30] == pytest.approx(0.8 * (1 - 0.75 ** 3), abs=1e-3)
    assert shares[30:40] == [shares[30]] * 10 and shares[60:] == [pytest.approx(0.8)] * 20


@pytest.mark.parametrize('prune, expected', [
    (0.0, (0.0, 0.2, 0.7)), ('', (0.0, 0.2, 0.7)), (0.5, (0.5, 0.2, 0.7)), ('0.5', (0.5, 0.2, 0.7)),
    ('0.5:0.3-0.8', (0.5, 0.3, 0.8))])
def test_prune_is_a_number_or_a_text(prune, expected):
    assert pruning.parse_prune(prune) == expected


@pytest.mark.parametrize('start, end', [(4.5, 4.5), (3, 9), (0, 8.1)])
def test_pruning_has_its_share_at_its_end(start, end):
    w = torch.randn(20, 20)
    pruned = pruning.Pruning([w], 0.5, start, end)
    for step in range(10):
        pruned.step(step)
    assert (w == 0).sum() == 200


def test_muons_flops():
    """5 iterations of three products: at 124M parameters under 1 % of a step of 0.5M tokens."""
    with torch.device('meta'):
        m = GPT(GPTConfig(arch='modern', vocab_size=50304, n_layer=12, n_head=6, n_embd=768, block_size=1024))
    square, wide = 5 * 6 * 768 ** 3, 5 * (2 * 2 * 4 + 2) * 768 ** 3
    assert muon(m, iterations=5).flops() == 12 * (4 * square + 2 * wide)
    assert muon(m, iterations=5).flops() < 0.01 * 524288 * m.flops_per_token()


def test_muons_flops_are_those_of_its_products():
    from torch.utils.flop_counter import FlopCounterMode
    m = modern()
    optimizer = muon(m, iterations=4)
    schedules.set_rates(optimizer, 0, 1.0)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert optimizer.flops() == counter.get_total_flops()


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_moments_come_back_beside_the_update_and_before_they_are_used(kind, monkeypatch):
    """In a stream of its own on a GPU: here streams are played by what writes down the calls."""
    calls = mock.MagicMock()
    side, main = calls.side, calls.main
    monkeypatch.setattr(moments, 'copy_stream', lambda device: side)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: main)
    monkeypatch.setattr(torch.cuda, 'stream', calls.use)
    how, gpu = moments.MOMENTS['cpu'][0], torch.device('cuda', 0)
    how.begin_step(gpu)
    value = calls.value
    value.device = gpu
    how.write(calls.kept, value)
    assert calls.mock_calls == [
        mock.call.main.wait_stream(side),  # what is read next has to be back
        mock.call.side.wait_stream(main),  # the update comes before its copy
        mock.call.use(side), mock.call.use().__enter__(), mock.call.kept.copy_(value, non_blocking=True),
        mock.call.use().__exit__(None, None, None), mock.call.value.record_stream(side)]

    m, order = model(), []
    optimizer = made(kind, m, 'cpu')
    schedules.set_rates(optimizer, 0, 1.0)
    monkeypatch.setattr(moments.MomentsOnCPU, 'finish_copies', lambda self, device: order.append('finished'))
    monkeypatch.setattr(moments.MomentsOnCPU, 'begin_step', lambda self, device: order.append('begun'))
    monkeypatch.setattr(moments.MomentsOnCPU, 'write', lambda self, kept, value: order.append('written'))
    step(m, optimizer, 1)
    assert optimizer.state_dict() and order[0] == 'begun' and order[1:-1] and order[-1] == 'finished'
