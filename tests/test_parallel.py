import json
import math
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, options

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.files.checkpoint import read_checkpoint
from sologpt.machine import clock, sharding
from sologpt.matmuls.recipe_linear import convert, restore
from sologpt.matmuls.spec import parse_matmul
from sologpt.training.loss import TrainingLoss

# several runs of train.py in one group of processes, for to start them takes longer than the runs
WORKER = '''
import contextlib, json, os, runpy, signal, sys
import torch
import torch.distributed as dist
import configurator
from sologpt.machine import clock, devices
from sologpt.training import muon
from sologpt.machine import processes, sharding
from configurator import InputError

root, by_hand = sys.argv[1], len(sys.argv) > 2
configurator.report_errors()
processes.start_processes(torch.device('cpu'), 'gloo')
rank, end, seed = dist.get_rank(), processes.end_processes, devices.seed_device
processes.start_processes, processes.end_processes = lambda *_: None, dist.barrier
clock.shortest_seconds = lambda *_, **__: 1.0  # of a Linear, for the header


def interrupted_in_step_2(device, value):  # of which only one process hears
    if value % 2 ** 32 == 2 * 2 + 1:
        os.kill(os.getpid(), signal.SIGTERM)
    seed(device, value)


def counted(*args):
    calls.append(args)
    return orthogonalize(*args)


def elements(tensors):
    return sum(t.to_local().numel() for t in tensors if sharding.is_share(t))


orthogonalize, muon.orthogonalize = muon.orthogonalize, counted
wrote = {}
for argv in json.load(open('runs.json')):
    out_dir = next(arg for arg in argv if arg.startswith('--out_dir=')).removeprefix('--out_dir=')
    devices.seed_device = interrupted_in_step_2 if out_dir == 'interrupted' else seed
    sys.argv, calls = ['train.py', *argv], []
    try:
        ran = runpy.run_path(os.path.join(root, 'train.py'), run_name='__main__')
        moments = [t for state in ran['opt'].state.values() for t in state.values()]
        wrote[out_dir] = [elements(ran['model'].parameters()), elements(moments), len(calls)]
    except InputError as e:
        wrote[out_dir] = str(e)

if by_hand:  # a step more of the last run
    model, optimizer, saved = ran['model'], ran['opt'], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t), ran['autocast']:
        loss = model.loss(ran['x'], ran['y'])
    shapes = {p.shape for block in model.transformer.h for p in block.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    kept = sum(t.numel() for t in saved if t.shape in shapes and t.untyped_storage().nbytes())
    loss.backward()
    grads, before = [p.grad for p in model.parameters()], [p.to_local().clone() for p in model.parameters()]
    if rank == 1:
        grads[0].to_local()[0] = float('inf')
    scaler = torch.amp.GradScaler('cpu', init_scale=1.0)
    scaler.scale(loss.detach())
    scaler.step(optimizer)
    scaler.update()
    after = [p.to_local() for p in model.parameters()]
    wrote['by hand'] = {'kept': kept, 'grads': elements(grads), 'scale': scaler.get_scale(),
                        'moved': not all(map(torch.equal, before, after))}
json.dump(wrote, open(f'wrote.{rank}', 'w'))
if rank == dist.get_world_size() - 1:
    try:
        raise InputError('is reported')
    except InputError:
        with contextlib.suppress(SystemExit):
            sys.excepthook(*sys.exc_info())
end()
'''


def torchrun(project, n, runs, *more):
    """The runs of train.py in n processes that share the model. Returns (what each of these wrote, what is printed)."""
    (project.folder / 'runs.json').write_text(json.dumps([options(run | dict(sharding='fsdp')) for run in runs]))
    (project.folder / 'worker.py').write_text(WORKER)
    ran = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}',
                          'worker.py', ROOT, *more], capture_output=True, text=True, cwd=project.folder, timeout=200,
                         env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': ROOT})
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr
    assert 'error: is reported\n' in ran.stderr
    return [json.loads((project.folder / f'wrote.{rank}').read_text()) for rank in range(n)], ran.stdout


def logged(project, out):
    """{(iter, key): value} of what must not depend on the number of processes."""
    with open(project.folder / out / 'log.jsonl', encoding='utf-8') as f:
        records = [json.loads(line) for line in f][1:]
    keys = ('loss', 'grad_norm', 'train_loss', 'val_loss')
    return {(r['iter'], key): r[key] for r in records for key in keys if key in r}


def check_same_format(one, two):
    """Of two runs' folders: the same tensors, but for rounding, under the same names, in files of the same size."""
    sizes = [os.path.getsize(f'{folder}/ckpt.pt') for folder in (one, two)]
    assert sizes[0] == pytest.approx(sizes[1], abs=500)  # a tied table once, and no padding
    one, two = (read_checkpoint(f'{folder}/ckpt.pt') for folder in (one, two))
    assert one.keys() == two.keys() and one['optimizer']['param_groups'] == two['optimizer']['param_groups']
    for a, b in ((one['model'], two['model']),
                 *zip(*(c['optimizer']['state'].values() for c in (one, two)), strict=True)):
        assert list(a) == list(b)
        for key in a:
            assert type(b[key]) is torch.Tensor and a[key].dtype == b[key].dtype
            torch.testing.assert_close(a[key], b[key], atol=1e-3, rtol=0)


def held_by_the_first(tensors, n):
    """Elements of the first of n processes: so many whole rows of each that the last has no more."""
    return sum(math.ceil(t.size(0) / n) * t[0].numel() for t in tensors)


GPT2 = dict(bias=True)
MODERN = dict(arch='modern', smear=True, optimizer='muon', embd_lr=1e-3, grad_clip=0.5)
CASES = {'gpt2': GPT2, 'modern': MODERN}


def test_shares_train_as_one_process_and_go_on_as_any_number(project, monkeypatch):
    """In steps of 6 micro-batches; of rows that 2 divides and 3 does not, and a Linear with a single one."""
    monkeypatch.setattr(clock, 'shortest_seconds', lambda *_, **__: 1.0)
    setup = TINY | dict(gradient_accumulation_steps=6, max_iters=6, eval_interval=3)
    half = dict(max_iters=3, lr_decay_iters=6)
    lora = setup | dict(init_from='base', adapter='lora', loraplus_lr_ratio=4.0, max_iters=3, bias=True)
    int8 = lora | dict(matmul='int8:until=0.5', checkpoint_activations=True)
    for name, case in CASES.items():
        project.train(**setup | case | dict(out_dir=name))
        project.train(**setup | case | half | dict(out_dir=f'{name}_half'))
    shutil.copytree('gpt2', 'base')
    project.train(**lora | dict(out_dir='lora'))
    project.train(**int8 | dict(out_dir='int8'))
    wrote, out = torchrun(
        project, 2, [*(setup | case | dict(out_dir=f'{name}_2') for name, case in CASES.items()),
                     setup | GPT2 | dict(out_dir='interrupted'), setup | MODERN | half | dict(out_dir='halves'),
                     lora | dict(out_dir='lora_2'), int8 | dict(out_dir='int8_2'),
                     lora | dict(out_dir='nf4', base_format='nf4'), lora | dict(out_dir='prompt', adapter='prompt'),
                     setup | dict(out_dir='bf16', arch='modern', dtype='bfloat16', sample_tokens=4, max_iters=2)],
        'by hand')

    for name in CASES:
        assert logged(project, f'{name}_2') == pytest.approx(logged(project, name), abs=1e-5)
        check_same_format(name, f'{name}_2')
        # of weights and moments each process holds its rows
        saved = read_checkpoint(f'{name}_2/ckpt.pt')
        weights = list({t.data_ptr(): t for t in saved['model'].values()}.values())
        moments = [t for state in saved['optimizer']['state'].values() for t in state.values() if t.dim()]
        first, second = (of_process[f'{name}_2'] for of_process in wrote)
        assert first[:2] == [held_by_the_first(tensors, 2) for tensors in (weights, moments)]
        assert [a + b for a, b in zip(first[:2], second[:2], strict=True)] == [
            sum(t.numel() for t in tensors) for tensors in (weights, moments)]
        # and of the 8 parameters of Muon it orthogonalises a half, in 6 steps
        assert first[2] == second[2] == (24 if name == 'modern' else 0)
    # in bfloat16 no matrix of a block is kept from the forward to the backward; gradients are shares; a step that is
    # not finite in one process is left out by both
    n_params = sum(t.numel() for t in read_checkpoint('bf16/ckpt.pt')['model'].values())
    for of_process in wrote:
        assert of_process['by hand'] == {'kept': 0, 'grads': n_params // 2, 'scale': 0.5, 'moved': False}
    assert out.count(' a sample ') == 1

    # a base and its adapter are shared as well
    for name, most in (('lora', 1e-5), ('int8', 2e-3)):
        assert logged(project, f'{name}_2') == pytest.approx(logged(project, name), abs=most)
    check_same_format('lora', 'lora_2')
    assert 'would be whole in every process' in wrote[0]['nf4'] and 'use another adapter' in wrote[0]['prompt']

    # from shares to one process
    resume = {key: TINY[key] for key in ('device', 'dtype', 'peak_flops')} | dict(init_from='resume', max_iters=6)
    assert read_checkpoint('interrupted/ckpt.pt')['iter_num'] == 3
    assert out.count('go on with --init_from=resume') == 1
    for name, folder in (('gpt2', 'interrupted'), ('modern', 'halves')):
        project.resume(out_dir=folder, max_iters=6)
        assert logged(project, folder) == pytest.approx(logged(project, name), abs=1e-5)

    # and back, to another number of them
    torchrun(project, 3, [resume | dict(out_dir=f'{name}_half') for name in CASES])
    for name in CASES:
        assert logged(project, f'{name}_half') == pytest.approx(logged(project, name), abs=1e-5)


@pytest.mark.parametrize('overrides, message', [(dict(prune=0.5), 'with prune=0.5: the smallest weights'),
                                                (dict(weights_dtype='bfloat16'), 'the shares are in float32')])
def test_what_does_not_combine_with_shares(project, monkeypatch, overrides, message):
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(InputError, match=message):
        project.train(sharding='fsdp', **overrides)


# ---- in this process alone -------------------------------------------------------------------------------------------

CPU = torch.device('cpu')
KINDS = [dict(arch='gpt2'), dict(arch='llama', n_kv_head=1, bias='qkv', qk_norm='gain', window=5)]
N_LAYER = 10  # more than the compiler's limit of versions of a function


@pytest.fixture
def alone():
    """A group of one process: this one."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Backend:
    """A backend for torch.compile that records which graphs it was given, and how often each one ran."""

    def __init__(self):
        self.runs = []  # for each graph

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager
        compiled, i = aot_eager(graph, inputs), len(self.runs)
        self.runs.append(0)

        def run(*args):
            self.runs[i] += 1
            return compiled(*args)
        return run


@pytest.fixture
def backend(monkeypatch):
    """What torch.compile uses, if no other backend is asked for."""
    backend, torch_compile = Backend(), torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **options: torch_compile(f, **{'backend': backend} | options))
    return backend


def new_model(n_layer=N_LAYER, **config):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=n_layer, n_head=2, n_embd=16, **config))


def loss_and_gradients(loss_of, model, dtype):
    idx = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = loss_of(idx, idx.roll(-1, 1))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize('recompute', [False, True, 'selective'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind['arch'])
def test_each_block_of_a_sharded_model_is_one_compiled_graph(alone, backend, kind, dtype, recompute):
    from torch._dynamo.utils import counters
    counters.clear()
    config = dict(**kind, zero_init=False, checkpoint_activations=recompute)
    whole, model = new_model(**config), new_model(**config)
    expected = loss_and_gradients(whole.loss, whole, dtype)
    sharding.shard(model, CPU, dtype, compile=True)
    loss, gradients = loss_and_gradients(TrainingLoss(model, compile=True, sharded=True), model, dtype)
    assert not counters['graph_break'] and backend.runs == [N_LAYER]
    # the compiled matmuls are autocast's, and the gains of norms are not rounded to the dtype
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    shares = {name: grad.full_tensor() for name, grad in gradients.items()}
    rtol, atol = (0.02, 2e-4) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(shares, expected[1], rtol=rtol, atol=atol)


def test_compiled_blocks_of_a_sharded_model_follow_a_recipe_until_it_ends(alone, backend):
    """Blocks that differ share no graph, and a block that has changed is compiled again."""
    whole, model = new_model(), new_model()
    for m in (whole, model):
        convert(m, parse_matmul('int8:keep_last=4'), 'float32', 64, CPU)
    sharding.shard(model, CPU, None, compile=True)
    loss_of, losses = TrainingLoss(model, compile=True, sharded=True), []
    for _ in range(2):
        losses.append(loss_and_gradients(whole.loss, whole, torch.float32)[0])
        torch.testing.assert_close(loss_and_gradients(loss_of, model, torch.float32)[0], losses[-1], rtol=1e-6, atol=0)
        restore(whole)
        restore(model)
    assert losses[0] != losses[1] and backend.runs == [6, 8, 6]


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind['arch'])
def test_a_sharded_model_draws_text_without_compiling(alone, backend, kind):
    model = new_model(**kind, zero_init=False)
    idx = torch.tensor([[1, 2, 3]])
    expected = model.generate(idx, 20, temperature=0, window_step=4)
    sharding.shard(model, CPU, torch.float32, compile=True)
    loss_and_gradients(TrainingLoss(model, compile=True, sharded=True), model, torch.float32)
    assert torch.equal(model.generate(idx, 20, temperature=0, window_step=4), expected)
    assert backend.runs == [N_LAYER]
    loss_and_gradients(model.loss, model, torch.float32)  # which is still compiled
    assert backend.runs == [2 * N_LAYER]


@pytest.mark.parametrize('recompute', [False, True, 'selective'])
@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind['arch'])
def test_a_replicated_model_is_one_compiled_graph(alone, backend, kind, recompute):
    """In steps of two micro-batches, and without a warning of torch."""
    from torch._dynamo.utils import counters
    counters.clear()
    config = dict(n_layer=2, **kind, zero_init=False, checkpoint_activations=recompute)
    whole, model = new_model(**config), new_model(**config)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        replicated = sharding.replicate(TrainingLoss(model, compile=True), CPU)
    for replicated.require_backward_grad_sync in (False, True):
        expected = loss_and_gradients(whole.loss, whole, torch.float32)
        torch.testing.assert_close(loss_and_gradients(replicated, model, torch.float32), expected, rtol=1e-5, atol=1e-6)
    assert not counters['graph_break'] and backend.runs == [2]
