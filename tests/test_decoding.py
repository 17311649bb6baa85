import re

import pytest
import torch
import torch.nn as nn
from test_adapters import IDX, adapted, base
from test_bank import ADAPTERS, low_rank
from test_model import KINDS, uncached, varied
from torch._dynamo.testing import CompileCounterWithBackend

from configurator import InputError
from sologpt.adapters.bank import Bank
from sologpt.inference import compiled_step
from sologpt.inference.compiled_step import CompiledStep
from sologpt.inference.contexts import FixedCache
from sologpt.inference.generation import Step, lists_of, sample
from sologpt.machine.devices import autocast
from sologpt.matmuls.held import hold_all_linears_in

CPU = torch.device('cpu')


def compiled(m):
    """(a step, what counts how often it is compiled)"""
    counter = CompileCounterWithBackend('aot_eager')
    return CompiledStep(m, backend=counter), counter


@pytest.mark.parametrize('kind', [dict(bias=True), *KINDS[1:]])
def test_greedy_text_is_that_without_a_cache_and_compiled_once(kind):
    m = varied(**kind)
    step, counter = compiled(m)
    for prompt in (1, 7, 16, 20):
        idx = torch.randint(33, (3, prompt))
        with torch.no_grad():
            assert torch.equal(m.generate(idx, 25, temperature=0, step=step), uncached(m, idx, 25))
        for window_step in (3, 16):  # beyond block_size
            texts = [m.generate(idx, 40, temperature=0, window_step=window_step, step=which) for which in (step, None)]
            assert torch.equal(*texts)
    assert counter.frame_count == 1
    idx = torch.randint(33, (1, 5))  # another batch
    assert torch.equal(m.generate(idx, 9, temperature=0, step=step), m.generate(idx, 9, temperature=0))
    assert counter.frame_count == 2


def test_a_compiled_step_has_room_for_the_text_and_not_for_all_positions(monkeypatch):
    monkeypatch.setattr(compiled_step, 'LEAST_ROOM', 4)
    m = varied(block_size=200, arch='llama', n_kv_head=1, window=5, windowed=[0])
    step, counter = compiled(m)
    rooms = []
    for n in (2, 3, 9, 60, 20, 250):
        assert torch.equal(m.generate(IDX[:, :1], n, temperature=0, window_step=9, step=step),
                           m.generate(IDX[:, :1], n, temperature=0, window_step=9))
        rooms.append(step.cache.layers[0].k.size(2))
    assert rooms == [4, 4, 16, 64, 64, 200] and counter.frame_count == 4


@pytest.mark.parametrize('kind', [dict(), dict(arch='modern', smear=True)])
def test_drawn_ids_are_the_same_and_end_alike(kind):
    m = varied(n_ids=30, document_eot=3, **kind)  # which a text that is continued does not heed
    step, _ = compiled(m)
    idx = torch.full((4, 2), 3)
    for options in (dict(), dict(top_k=5, temperature=2.0), dict(top_p=0.8, temperature=3.0, ends=[3, 7])):
        texts = [m.generate(idx, 60, window_step=4, generator=torch.Generator().manual_seed(0), step=which, **options)
                 for which in (step, None)]
        assert torch.equal(*texts) and texts[0].max() < 30 and len(texts[0].unique()) > 5
    assert (texts[0][:, 2:] == 3).any() and (texts[0][:, 2:] == 7).any()


def test_drawing_is_as_by_multinomial():
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    for _ in range(20):
        expected = torch.multinomial(logits.softmax(-1), 1, generator=theirs)[:, 0]
        assert torch.equal(sample(logits, generator=ours), expected)


@pytest.mark.parametrize('method, kind', [
    *((method, kind) for method in ('prompt', 'prefix') for kind in (dict(), dict(arch='modern', smear=True))),
    ('bottleneck', dict())])
def test_adapters(method, kind):
    m = adapted(base(method=method, **kind), method)
    step, counter = compiled(m)
    for length in (1, 20):
        idx = torch.arange(2 * length).view(2, length) % 33
        for window_step in (1, 4):
            texts = [m.generate(idx, 25, temperature=0, window_step=window_step, step=which) for which in (step, None)]
            assert torch.equal(*texts)
    assert counter.frame_count == 1


def test_adapters_of_rows_are_changed_without_compiling_again():
    m = base()
    bank = Bank(m, [low_rank({}, *adapter) for adapter in ADAPTERS[:2]], torch.float32)
    bank.select([1, 2, 0])
    step, counter = compiled(m)
    for change in (lambda: None, lambda: bank.load(1, low_rank({}, *ADAPTERS[3])), lambda: bank.select([2, 0, 1])):
        change()
        texts = [m.generate(IDX[:, :4], 20, temperature=0, window_step=4, step=which) for which in (step, None)]
        assert torch.equal(*texts)
    assert counter.frame_count == 1


@pytest.mark.parametrize('kind', [dict(bias=True), *KINDS[1:]])
def test_held_linears_multiply_as_under_autocast(kind):
    m, held = varied(**kind), varied(**kind)
    table, state = held.transformer.wte.weight, {name: p.clone() for name, p in held.named_parameters()}
    hold_all_linears_in(held, 'bfloat16')
    linears = [layer for layer in held.modules() if isinstance(layer, nn.Linear)]
    assert all(p.dtype == torch.bfloat16 for layer in linears for p in layer.parameters())
    assert held.transformer.wte.weight is table and torch.equal(table, state['transformer.wte.weight'])
    idx = torch.randint(33, (2, 12))
    with autocast(CPU, 'bfloat16'), torch.no_grad():
        assert torch.equal(held(idx, idx)[0], m(idx, idx)[0])
        assert torch.equal(held.generate(idx, 30, temperature=0), m.generate(idx, 30, temperature=0))


@pytest.mark.parametrize('kind', [dict(bias=True), *KINDS[1:]])
def test_bfloat16_logits_are_near_those_of_the_growing_cache(kind):
    m = varied(**kind)
    hold_all_linears_in(m, 'bfloat16')
    idx, steps = torch.randint(33, (3, 12)), (Step(m), compiled(m)[0])
    with autocast(CPU, 'bfloat16'), torch.no_grad():
        for step in steps:
            cache = m.new_cache(3, 16)
            m.hidden(idx[:, :8], cache)
            step.begin(cache)
        for t in range(8, 12):
            expected, found = (step(idx[:, t:t + 1]).float() for step in steps)
            assert (found - expected).norm() <= 0.03 * expected.norm()


def test_reading_is_one_behind_computing_and_loses_nothing():
    seen = []

    def stream(n):
        for i in range(n):
            seen.append(i)
            yield torch.tensor([i, 10 * i])
    for n in (0, 1, 5):
        seen.clear()
        for i, ids in enumerate(lists_of(stream(n))):
            assert ids == [i, 10 * i] and seen[-1] == min(i + 1, n - 1)
        assert len(seen) == n


def test_addresses_stay():
    """What a CUDA graph was captured with is where the next text, another window, another position is."""
    m = varied(arch='modern', smear=True)
    step, _ = compiled(m)
    places = set()
    for prompt in (3, 9):
        for _ in m.stream(torch.zeros(2, prompt, dtype=torch.long), 30, window_step=4, step=step):
            kept = [step.ids, step.cache.position, step.cache.last_embedding]
            kept += [t for layer in step.cache.layers for t in (layer.k, layer.v)]
            places.add(tuple(t.data_ptr() for t in kept))
    assert len(places) == 1


def test_a_fixed_cache_takes_what_a_growing_one_holds():
    m = varied()
    idx = torch.randint(33, (2, 9))
    with torch.no_grad():
        caches = [m.new_cache(2, positions) for positions in (9, 12)]
        for cache in caches:
            m.hidden(idx[:, :8], cache)
        fixed = FixedCache(caches[0], 12)
        fixed.copy_from(caches[0])
        expected = m.hidden(idx[:, 8:], caches[1])
        torch.testing.assert_close(m.contextual(m.transformer.wte(idx[:, 8:]), fixed), expected)
    for ours, theirs in zip(fixed.layers, caches[1].layers, strict=True):
        torch.testing.assert_close(ours.k[:, :, :9], theirs.k[:, :, :9])
        torch.testing.assert_close(ours.v[:, :, :9], theirs.v[:, :, :9])
        assert not ours.k[:, :, 9:].any() and not ours.v[:, :, 9:].any()


def test_sample_compiles_before_its_clock_starts(project, monkeypatch, capsys):
    project.train(max_iters=3)
    options = dict(start='ab', num_samples=2, max_new_tokens=30, temperature=1.0)
    plain = project.sample(**options)
    assert re.search(r'^60 tokens in [\d.]+ s: \d+ tok/s \(float32\); beyond 16 tokens [^;]+$', capsys.readouterr().err)
    compile_by = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda *args, backend, options, **kwargs: compile_by(
        *args, backend='aot_eager', **kwargs))
    assert project.sample(compile=True, **options) == plain
    assert re.search(r' tok/s \(float32\); .*; compiled in \d+ s$', capsys.readouterr().err)
    with pytest.raises(InputError, match="compile='maybe'"):
        project.sample(compile='maybe')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', [dict(bias=True), *KINDS[1:]])
def test_a_replayed_graph_computes_what_the_model_does(kind, dtype):
    m = varied(**kind).cuda()
    hold_all_linears_in(m, dtype)
    idx, steps = torch.randint(33, (2, 16), device='cuda'), (Step(m), CompiledStep(m))
    with autocast(idx.device, dtype), torch.no_grad():
        for prompt in (5, 2):
            for step in steps:
                cache = m.new_cache(2, 16)
                m.hidden(idx[:, :prompt], cache)
                step.begin(cache)
            for t in range(prompt, 16):
                expected, found = (step(idx[:, t:t + 1]).float() for step in steps)
                assert (found - expected).norm() <= (1e-2 if dtype == 'float32' else 5e-2) * expected.norm()
        assert step.seconds > 0 and step.run != step.compiled
