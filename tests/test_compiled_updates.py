import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from model import GPT, GPTConfig
from sologpt.matmuls import elements
from sologpt.training import schedules
from sologpt.training.adamw import adamw, update_rows
from sologpt.training.moments import MOMENTS, in_rows, put_back
from sologpt.training.muon import momentum_of_rows, muon
from sologpt.training.optimizers import build_optimizer, load_state


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes, which are run as they are."""
    made = []

    def keep(module, inputs):
        made.append(module.graph)
        return make_boxed_func(module.forward)
    compile, backend = torch.compile, aot_autograd(fw_compiler=keep)
    monkeypatch.setattr(torch, 'compile', lambda f, **options: compile(f, **options, backend=backend))
    return made


def model(bfloat16, vocab_size=16):
    """The matrices of such a model are whole rows, unless its vocabulary is smaller."""
    torch.manual_seed(0)
    m = GPT(GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=32))
    for p in m.parameters():
        if bfloat16 and p.dim() == 2:
            p.data = p.data.to(torch.bfloat16)
    return m


def made(kind, m, keep, compile=True):
    if kind == 'muon':
        return muon(m, 3e-3, 0.1, (0.9, 0.95), muon_lr=0.02, keep=keep, compile=compile)
    return adamw(m, 3e-3, 0.1, (0.9, 0.95), keep=keep, compile=compile)


def steps(m, optimizer, numbers):
    """Steps with those numbers, on gradients and random numbers that follow from them. Rates change in each."""
    for n in numbers:
        rng = torch.Generator().manual_seed(n)
        for p in m.parameters():
            p.grad = torch.randn(p.shape, generator=rng).to(p.dtype)
        schedules.set_rates(optimizer, n, 1 / (n + 1))
        torch.manual_seed(n)
        optimizer.step()


def values(m, optimizer):
    return [t.float() for p in m.parameters() for t in (p.detach(), *optimizer.state[p].values())]


@pytest.fixture
def one_way_to_draw(monkeypatch):
    """Eager code on a CPU draws other random bits than compiled code."""
    monkeypatch.setattr(elements, 'random_16_bits',
                        lambda like: torch.randint(0, 1 << 16, like.shape, dtype=torch.int32, device=like.device))


def test_compiled_code_has_the_bits_of_the_same_code_run_eagerly(monkeypatch, one_way_to_draw):
    """AdamW and Muon's momentum, with 8-bit moments and weights in bfloat16, by torch's compiler for the CPU."""
    first, second = how = MOMENTS['8bit']
    of_adamw = [torch.tensor(x) for x in (1e-4, 1e-2, 0.9, 1e-8, 0.1, 0.05)]

    def step(weight, grad, average, square):
        update_rows(first, second, weight, grad, average, square, of_adamw)
        return momentum_of_rows(first, grad, average, torch.tensor(0.9))
    def integers(low, high, shape, dtype, device):  # in place of random numbers, which a compiler draws in its own way
        return (torch.arange(shape.numel(), dtype=dtype) * 40503 % high).view(shape)
    monkeypatch.setattr(torch, 'randint', integers)
    monkeypatch.setattr(torch, 'rand_like', lambda x: integers(0, 2 ** 16, x.shape, torch.int32, None) / 2 ** 16)
    compiled = torch.compile(step, dynamic=True, fullgraph=True, options={'cpp.simdlen': 1})
    results = []
    for run in (step, compiled):
        rng = torch.Generator().manual_seed(1)
        weight, grad = (torch.randn(40, 30, generator=rng).to(torch.bfloat16) for _ in range(2))
        kept = [moment.new(weight) for moment in how]
        for _ in range(3):
            rows = in_rows(weight)
            update = run(rows, in_rows(grad), *(moment.parts(k) for moment, k in zip(how, kept, strict=True)))
            put_back(weight, rows)
        results.append([weight, *kept, update])
    assert all(torch.equal(eager, of_compiled) for eager, of_compiled in zip(*results, strict=True))


@pytest.mark.parametrize('kind, keep, bfloat16', [
    ('adamw', '8bit', False), ('adamw', '8bit', True), ('adamw', 'float32', True), ('muon', '8bit', True)])
def test_compiled_updates_are_the_eager_ones_and_are_compiled_once(graphs, one_way_to_draw, kind, keep, bfloat16):
    m, reference = model(bfloat16), model(bfloat16)
    eager, optimizer = made(kind, reference, keep, compile=False), made(kind, m, keep)
    steps(reference, eager, range(4))
    steps(m, optimizer, range(1))
    n = len(graphs)
    # one per dtype of weights; Muon's momentum, and its weights in three layouts; parameters of one row count apart
    assert 0 < n <= (8 if kind == 'muon' else 3)
    steps(m, optimizer, range(1, 4))
    for one, other in zip(values(reference, eager), values(m, optimizer), strict=True):
        close = torch.isclose(one, other, rtol=1e-4, atol=1e-6)
        assert close.float().mean() > 0.98  # a last digit may decide which way a number is rounded
    schedules.set_rates(optimizer, 4, 0.0)
    optimizer.step()
    assert len(graphs) == n and all(p.isfinite().all() for p in m.parameters())
    # below sm_89, Triton cannot cast to 8-bit floats
    dtypes = {getattr(node.meta.get('val'), 'dtype', None) for graph in graphs for node in graph.nodes}
    assert not dtypes & {torch.float8_e4m3fn, torch.float8_e5m2}


def test_a_compiled_run_goes_on_from_its_state(graphs):
    straight, stopped = model(True, 11), model(True, 11)
    one, other = made('adamw', straight, '8bit'), made('adamw', stopped, '8bit')
    steps(straight, one, range(6))
    steps(stopped, other, range(3))
    state = copy.deepcopy(other.state_dict())
    other = made('adamw', stopped, '8bit')
    load_state(other, state)
    steps(stopped, other, range(3, 6))
    assert graphs and all(map(torch.equal, values(straight, one), values(stopped, other)))


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_updates_are_compiled_where_the_run_is_and_that_helps(kind, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda f, **options: compiled.append(f))
    keys = {'optimizer': kind, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95, 'learning_rate': 1e-3,
            'muon_lr': 0.02, 'embd_lr': None, 'head_lr': None, 'muon_momentum': 0.9, 'momentum_warmup': 0,
            'loraplus_lr_ratio': 1.0, 'adapter': '', 'adapter_from': ''}
    for compile, keep, bfloat16, expected in ((True, '8bit', False, True), (True, 'float32', True, True),
                                              (True, 'float32', False, False), (True, 'cpu', True, False),
                                              (False, '8bit', True, False)):
        build_optimizer(model(bfloat16), keys | {'optimizer_state': keep}, 'float32', compile)
        assert bool(compiled) == expected, (compile, keep, bfloat16)
        compiled.clear()
