import pytest
import torch

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.adapters.adapter import attach
from sologpt.adapters.config import AdapterConfig
from sologpt.bench.plan import measured_step
from sologpt.machine import peaks
from sologpt.matmuls.attention import ATTENTION
from sologpt.matmuls.held import hold_base
from sologpt.matmuls.recipe_linear import convert
from sologpt.matmuls.spec import MatmulSpec
from sologpt.training import build, forecast, moments
from sologpt.training.adamw import adamw as make_adamw
from sologpt.training.forecast import Forecast, Usage
from sologpt.training.liveness import nbytes
from sologpt.training.micro_batch import MemoryAdvice, fastest
from sologpt.training.muon import muon as make_muon

SHAPE = dict(block_size=64, vocab_size=9000, n_layer=2, n_head=2, n_embd=64, loss_chunk=128)
KINDS = [dict(arch='gpt2'), dict(arch='modern', smear=True)]


def built(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE | changes)).train()


def adamw(model):
    return make_adamw(model, 0.0, 0.1, (0.9, 0.95))


def muon(model):
    return make_muon(model, 0.0, 0.0, (0.9, 0.95), 0.0)


@pytest.mark.parametrize('kind, make_optimizer, checkpointed', [
    (KINDS[0], adamw, False), (KINDS[1], muon, False), (KINDS[0], muon, 'selective'), (KINDS[1], adamw, True)])
def test_a_step_takes_what_was_foreseen(kind, make_optimizer, checkpointed):
    model = built(checkpoint_activations=checkpointed, **kind)
    foreseen = Forecast(model, make_optimizer, 64, 'bfloat16', gpu=False)
    assert foreseen.at(100).peak == pytest.approx(
        measured_step(model, make_optimizer(model), 100, 64, 'bfloat16'), rel=0.1)


@pytest.mark.parametrize('compile', [False, True])
def test_many_sequences_are_foreseen_where_blocks_are_computed_again(compile):
    """In the backward of few sequences the head's gradient takes most, in that of many a block."""
    model = built(checkpoint_activations=True, vocab_size=30000, n_layer=2, n_embd=128, loss_chunk=1024)
    foreseen = Forecast(model, adamw, 64, 'bfloat16', compile)
    for size in (32, 1024):
        step = forecast._step(model, adamw, size, 64, 'bfloat16', compile, False, True)
        assert foreseen.at(size).backward == pytest.approx(step.backward, rel=0.01)


def test_the_compiled_graphs_keep_what_they_keep():
    """Of the compiled step, what stays for backward is the same, and the whole is less."""
    model = built()
    eager, compiled = (Forecast(model, adamw, 64, 'bfloat16', compile).at(64) for compile in (False, True))
    assert (compiled.weights, compiled.gradients, compiled.optimizer, compiled.update) == (
        eager.weights, eager.gradients, eager.optimizer, eager.update)
    assert compiled.forward < eager.forward and compiled.activations <= 1.05 * eager.activations
    tokens, width, layers = 64 * 64, 64, 2
    # in 16 bits: two inputs of norms, two of Linears, q, k, v, attention, two of the width of the MLP; in float32 the
    # statistics; and the loss's gradients
    per_layer = tokens * width * 2 * (2 + 2 + 3 + 1 + 8)
    loss = tokens * width * 2 + 9000 * width * 4
    assert layers * per_layer + loss == pytest.approx(compiled.activations, rel=0.15)


def test_the_kernels_of_gpus_keep_as_much_as_torchs_choice():
    steps = []
    for backend in ('sdpa', 'cudnn', 'flash'):
        model = built(block_size=256, attn_backend=backend)
        steps.append(Forecast(model, adamw, 256, 'bfloat16').at(16))
        assert model.transformer.h[0].attn.attend is ATTENTION[backend]
    assert steps[0] == steps[1] == steps[2]


def test_on_a_gpu_eager_layernorms_keep_float32():
    """Of each of the two layers' two norms and the last: the input, in 4 bytes for 2."""
    here, there = (Forecast(built(), adamw, 64, 'bfloat16', gpu=gpu).at(64) for gpu in (False, True))
    assert there.activations - here.activations == pytest.approx(5 * 64 * 64 * 64 * 2, rel=0.1)
    assert Forecast(built(arch='modern'), adamw, 64, 'bfloat16').at(64) == Forecast(
        built(arch='modern'), adamw, 64, 'bfloat16', gpu=False).at(64)


def test_less_is_kept_of_checkpointed_blocks():
    kept = {}
    for how, compile in ((False, False), ('selective', False), (True, False), (False, True), ('selective', True)):
        model = built(checkpoint_activations=how)
        kept[how, compile] = Forecast(model, adamw, 64, 'bfloat16', compile).at(64).activations
    assert kept[True, False] < 0.8 * kept['selective', False]
    assert all(kept['selective', compile] < 0.9 * kept[False, compile] for compile in (False, True))


def test_the_optimizers_state_by_how_it_is_kept():
    model = built()
    state = {keep: Forecast(model, lambda m, keep=keep: make_adamw(m, 0.0, 0.1, (0.9, 0.95), keep=keep), 64,
                            'float32', offloaded=keep == 'cpu').at(32).optimizer for keep in moments.MOMENTS}
    assert state['float32'] == pytest.approx(8 * model.n_params(), rel=0.001)
    assert state['8bit'] == pytest.approx(2 * model.n_params(), rel=0.05) and state['cpu'] == 0


@pytest.mark.parametrize('held, compile', [('float32', True), ('nf4', False)])
def test_an_adapter_needs_gradients_and_moments_of_its_own_alone(held, compile):
    model = built()
    hold_base(model, held, 'bfloat16')
    model.requires_grad_(False)
    attach(model, AdapterConfig('lora', r=4))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    step = Forecast(model, adamw, 64, 'bfloat16', compile).at(32)
    assert step.gradients == 4 * trained and step.optimizer == pytest.approx(8 * trained, abs=1000)
    assert step.weights == pytest.approx(nbytes([*model.parameters(), *model.buffers()]), rel=1e-3)


@pytest.mark.parametrize('recipe, compile', [
    ('fp8', False), ('int8', False), ('fp4_dge', False), ('ternary', False), ('block_dropout', False),
    ('sparse24', True)])
def test_a_recipe_is_foreseen_and_the_model_stays_as_it_is(recipe, compile):
    model = built(n_layer=1)
    convert(model, MatmulSpec(recipe, keep_last=0), 'bfloat16', 64 * 64, torch.device('cpu'))
    before = {name: p.clone() for name, p in model.named_parameters()}
    step = Forecast(model, adamw, 64, 'bfloat16', compile).at(32)
    assert step.peak > step.activations > 0
    ids = torch.randint(9000, (1, 64))
    assert model.loss(ids, ids).isfinite()  # nothing without data has stayed
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


class Known(Forecast):
    """10 bytes, and 4 for each sequence."""

    def __init__(self):
        self._known = [[Usage(size, 10, 0, 0, 4 * size, 10 + 4 * size, 10, 10) for size in (1, 2)]]


def test_those_that_fit():
    assert Known().at(7).peak == 38 and Known().at(7).temporary == 0
    assert Known().fitting(1.05 * 38, [12, 9, 7, 1]) == [7, 1] and Known().fitting(14, [12, 1]) == []


@pytest.mark.parametrize('batch_size, limit, advice', [
    (12, 100, '--batch_size=6 --gradient_accumulation_steps=8, which is foreseen to take 0.0 GB'),
    (12, 30, '--batch_size=4 --gradient_accumulation_steps=12,'), (1, 100, '--checkpoint_activations=True, '),
    (12, 5, '--checkpoint_activations=True, ')])
def test_out_of_memory_names_what_fits(batch_size, limit, advice):
    with pytest.raises(InputError) as e, MemoryAdvice(batch_size, 4, limit, Known):
        raise torch.OutOfMemoryError('CUDA out of memory')
    assert advice in str(e.value)


def test_other_errors_pass_and_all_out_of_memory_is_advised_on():
    advice = MemoryAdvice(12, 4, 100, Known)
    with pytest.raises(RuntimeError, match='out of resource'), advice:
        raise RuntimeError('out of resource: shared memory')
    with pytest.raises(InputError, match='--batch_size=6'), advice:
        raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')


def test_an_evaluation_out_of_memory_gets_the_forecast_of_training():
    model = built(n_layer=1)
    with pytest.raises(InputError, match='is foreseen to take'), torch.no_grad():
        with MemoryAdvice(64, 1, 1e9, lambda: Forecast(model, adamw, 64, 'bfloat16')):
            raise torch.OutOfMemoryError('CUDA out of memory')


def test_the_peak_is_measured_while_the_device_is_empty(project, monkeypatch):
    events = []
    find_peak, place = peaks.find_peak, build._place
    monkeypatch.setattr(peaks, 'find_peak', lambda *args: events.append('find_peak') or find_peak(*args))
    monkeypatch.setattr(build, '_place', lambda *args: events.append('_place') or place(*args))
    project.train(max_iters=1, eval_interval=1)
    assert events == ['find_peak', '_place']


def test_without_a_forecast_the_next_smaller_is_named():
    with pytest.raises(InputError, match='--gradient_accumulation_steps=8, a guess'):
        with MemoryAdvice(12, 4, 100, None):
            raise torch.OutOfMemoryError('CUDA out of memory')


@pytest.mark.parametrize('device, limit, seconds, tried, best', [
    ('cuda', 300, lambda n: 1 + n, [64, 32], 64),  # larger is faster: half is tried, and no more
    ('cuda', 300, lambda n: n ** 2, [64, 32, 16, 8, 4, 2, 1], 1),
    ('cuda', 100, lambda n: 1 + n, [16, 8], 16), ('cpu', 300, lambda n: n ** 2, [1, 2], 1),
    ('cpu', 300, lambda n: 1 + n, [1, 2, 4, 8, 16, 32, 64], 64)])
def test_the_fastest_of_those_that_fit(device, limit, seconds, tried, best):
    asked = []

    def time(size):
        asked.append(size)
        return seconds(size)
    found, why = fastest([64, 48, 32, 16, 8, 4, 2, 1], time, Known(), limit, torch.device(device))
    assert (asked, found) == (tried, best) and f'{best}: 1.00' in why


def test_a_size_that_does_not_fit_after_all_is_passed_over():
    def time(size):
        if size > 16:
            raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')
        if size > 8:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return 1 + size
    assert fastest([32, 16, 8, 4], time, Known(), 1000, torch.device('cuda'))[0] == 8

    def broken(size):
        raise RuntimeError('CUDA error: an illegal memory access was encountered')
    with pytest.raises(RuntimeError, match='illegal'):
        fastest([16, 8, 4], broken, Known(), 1000, torch.device('cuda'))
    with pytest.raises(InputError, match='not even batch_size=1 fits in 0.0 GB'):
        fastest([16, 8, 4], time, Known(), 12, torch.device('cuda'))
