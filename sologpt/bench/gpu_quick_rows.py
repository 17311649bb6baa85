"""
The rows of the quick check: every path that the project takes on a GPU, once, at a tiny size.

A row is run in a Lab, and hands back what it found, which can be checked: losses, tensors or a text. Rows of a lane run
one after the other in one process; the lanes run at the same time, because compiling takes a core and hardly a GPU.
"""

import os
import socket
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn

from configurator import InputError
from sologpt.adapters.methods import METHODS
from sologpt.bench import process
from sologpt.bench.gpu_quick_lab import TOLERANCE, Lab, Losses, Refused, Tensors, Text, own_logits
from sologpt.machine import choices, devices
from sologpt.matmuls import recipes
from sologpt.matmuls.recipe_linear import RecipeLinear, find_strategy
from sologpt.matmuls.spec import parse_matmul

LANES = ('eager', 'compiled', 'compiled recipes')
OF_RECIPE = 0.03  # what a recipe adds to the tolerance of losses
OF_RANDOM = 0.25  # and what numbers do that are drawn at random, which a GPU does in another order
RANDOM = ('mxfp4', 'nvfp4', 'block_dropout')  # recipes that round or drop at random
WIDTH, ROWS = 256, 512  # of a Linear that is compiled alone


class Row(NamedTuple):
    name: str
    lane: str
    run: Callable[[Lab], Losses | Tensors | Text | Refused]
    skip: Callable[[Lab], str | None] = lambda lab: None  # why the row cannot be run here


def list_rows() -> list[Row]:
    """All rows."""
    return [*_eager_rows(), *_dtype_rows(), *_memory_rows(), *_recipe_rows(), *_adapter_rows(), *_file_rows(),
            *_process_rows(), *_compiled_rows(), *_compiled_recipe_rows()]


def _train(name, keys, more=0.0, falls=True, lane='eager', skip=lambda lab: None):
    return Row(name, lane, lambda lab: lab.compare(keys, more, falls), skip)


# ---- why a row cannot be run here ------------------------------------------------------------------------------------

def needs_cuda(lab: Lab) -> str | None:
    """A reason, unless the device is a GPU of CUDA."""
    return None if lab.device.type == 'cuda' else 'needs CUDA'


def needs_compiler(lab: Lab) -> str | None:
    """A reason, unless torch.compile works here for CUDA. The row `torch.compile` says why it does not."""
    return needs_cuda(lab) or (None if lab.compiles else 'torch.compile does not work')


def needs_float8(lab: Lab) -> str | None:
    """A reason, unless torch has 8-bit floats on the device."""
    return None if choices.has_float8(lab.device) else 'torch has no 8-bit floats on this device'


def needs_dtype(name: str) -> Callable[[Lab], str | None]:
    """A function that gives a reason unless the device computes in a dtype, named so."""
    def skip(lab):
        try:
            choices.find_dtype(name, lab.device)
        except InputError as e:
            return str(e)
    return skip


def needs_kernel(name: str) -> Callable[[Lab], str | None]:
    """A function that gives a reason unless the device has an attention kernel, named so."""
    def skip(lab):
        too_old = lab.device.type == 'cuda' and torch.cuda.get_device_capability(lab.device) < (8, 0)
        return needs_cuda(lab) or ('needs compute capability 8.0' if too_old else None)
    return skip if name in choices.GPU_ATTENTION else lambda lab: None


# ---- the rows --------------------------------------------------------------------------------------------------------

def _eager_rows():
    modern = dict(arch='modern', smear=True)
    return [
        _train('eager step', {}),
        _train('eager step, arch=modern', modern),
        *(_train(f'attention {name}', dict(attn_backend=name), skip=needs_kernel(name))
          for name in ('sdpa', 'cudnn', 'flash', 'math')),
        _train('attention auto', dict(attn_backend='auto')),
        _train('document_mask', dict(document_mask=True)),
        _train('document_mask, arch=modern', modern | dict(document_mask=True)),
        _train('dropout', dict(dropout=0.1), OF_RANDOM),
        *(_train(f'dropout, attention {name}', dict(dropout=0.1, attn_backend=name), OF_RANDOM,
                 skip=needs_kernel(name)) for name in ('cudnn', 'flash')),
        Row('loss in chunks', 'eager', lambda lab: lab.compare(_in_chunks(lab))),
        _train('the device by its number', {'device': 'cuda:0'}, skip=needs_cuda)]


def _in_chunks(lab):
    """Keys for a micro-batch of two chunks of the loss."""
    return dict(dataset=lab.tokens + '-many', batch_size=40, gradient_accumulation_steps=1, max_iters=3,
                eval_interval=3)


def _dtype_rows():
    rows = [_train(name, dict(dtype=name), skip=needs_dtype(name)) for name in devices.DTYPES]
    half = needs_dtype('float16')
    return rows + [
        _train('float32 without TF32', dict(dtype='float32', tf32=False), skip=needs_cuda),
        _train('accumulate=float32', dict(accumulate='float32'), skip=needs_cuda),
        _train('accumulate=float16', dict(accumulate='float16', dtype='float16'), OF_RECIPE, skip=needs_cuda),
        _train('float16, Muon', dict(dtype='float16', optimizer='muon', arch='modern'), skip=half)]


def _memory_rows():
    small = dict(batch_size='auto', gradient_accumulation_steps=None, total_batch_size=256)
    return [
        _train('Muon', dict(optimizer='muon')),
        _train('optimizer_state=8bit', dict(optimizer_state='8bit'), OF_RECIPE, skip=needs_float8),
        _train('optimizer_state=8bit, Muon', dict(optimizer_state='8bit', optimizer='muon'), OF_RECIPE,
               skip=needs_float8),
        _train('optimizer_state=cpu', dict(optimizer_state='cpu')),
        _train('optimizer_state=cpu, Muon', dict(optimizer_state='cpu', optimizer='muon')),
        _train('weights_dtype=bfloat16', dict(weights_dtype='bfloat16', dtype='bfloat16'), OF_RECIPE,
               skip=needs_dtype('bfloat16')),
        _train('checkpoint_activations=True', dict(checkpoint_activations=True)),
        _train('checkpoint_activations=selective', dict(checkpoint_activations='selective')),
        _train('checkpoint_activations=True, dropout', dict(checkpoint_activations=True, dropout=0.1), OF_RANDOM),
        _train('prune', dict(prune=0.5)),
        _train('batch_size=auto', small),
        _train('memory_limit', dict(memory_limit=2.0), skip=needs_cuda),
        Row('out of memory: advice', 'eager', lambda lab: lab.refused(
            dict(memory_limit=0.03, batch_size=512), 'out of GPU memory with batch_size='), needs_cuda)]


def _recipe_rows():
    names = [*recipes.RECIPES, 'strassen:1', 'block_dropout:0.25']
    return [_train(f'matmul={name}', {'matmul': name} | ({'learning_rate': 1e-3} if name == 'ternary' else {}),
                   OF_RANDOM if name.startswith(RANDOM) else OF_RECIPE, skip=_needs_of_recipe(name)) for name in names]


def _needs_of_recipe(name):
    """A function that gives the reason if the device cannot follow a recipe at all."""
    def skip(lab):
        try:
            find_strategy(parse_matmul(name), lab.device, lab.dtype, (WIDTH,), ROWS)
        except InputError as e:
            return str(e)
    return skip


def _adapter_rows():
    def row(name, **keys):
        return Row(name, 'eager', lambda lab: lab.compare({'init_from': lab.base(), 'block_size': 48} | keys,
                                                          OF_RECIPE, falls=False))
    return [*(row(f'adapter={method}', adapter=method) for method in METHODS),
            row('LoRA with adapter_dropout', adapter='lora', adapter_dropout=0.01),
            row('QLoRA', adapter='lora', base_format='nf4')]


def _file_rows():
    def serve(lab):
        return lab.draw(adapters=','.join(lab.adapter(method) for method in ('lora', 'vera')))
    return [
        Row('resume from a checkpoint', 'eager', _resume),
        Row('decoding', 'eager', lambda lab: lab.draw(out_dir=lab.base())),
        Row('decoding, ternary weights', 'eager',
            lambda lab: lab.draw(out_dir=lab.base(matmul='ternary', learning_rate=1e-3))),
        Row('decoding, an adapter for each row', 'eager', serve),
        Row('decoding, QLoRA', 'eager', lambda lab: lab.draw(out_dir=lab.adapter('lora', base_format='nf4'))),
        Row('export to hf', 'eager', lambda lab: lab.export('hf', own_logits)),
        Row('export to torch', 'eager', lambda lab: lab.export('torch', _program_logits))]


def _program_logits(folder, ids):
    return torch.export.load(os.path.join(folder, 'model.pt2')).module()(ids.expand(2, -1))[:1]


def _resume(lab):
    """The losses of half a run and of the other half, beside those of a whole run."""
    keys, half, out_dir = dict(eval_interval=3, lr_decay_iters=6), dict(max_iters=3), lab.new_folder()
    lab.train(keys | half | dict(always_save_checkpoint=True), out_dir)
    return Losses(lab.train(keys | dict(init_from='resume'), out_dir), lab.train(keys), 0.01)


def _process_rows():
    return [Row(f'torchrun, one process{words}', 'eager', lambda lab, keys=keys: _as_torchrun(lab, keys), _needs_nccl)
            for words, keys in (('', {}), (', sharding=fsdp', dict(sharding='fsdp')))]


def _needs_nccl(lab):
    if sys.platform == 'win32' or lab.device.type == 'cuda' and not torch.distributed.is_nccl_available():
        return 'torch has no NCCL here'


def _as_torchrun(lab, keys):
    """Losses of train.py as the only process of torchrun, which ends with its run."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    own = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR='localhost', MASTER_PORT=port)

    def run(script, keys):
        os.environ |= {name: str(value) for name, value in own.items()}
        try:
            process.run_own(script, process.flags(keys))
        finally:
            for name in own:
                del os.environ[name]
    return Losses(lab.train(keys, run=run), lab.train_on_cpu({}), TOLERANCE[lab.dtype])


# ---- compiled --------------------------------------------------------------------------------------------------------

def _compiled_rows():
    def row(name, more=0.0, **keys):
        return _train(name, dict(compile=True) | keys, more, lane='compiled', skip=needs_compiler)
    return [
        Row('torch.compile', 'compiled', _compiler, needs_cuda),
        row('compiled step'),
        Row('compiled decoding', 'compiled', lambda lab: lab.draw(out_dir=lab.base(), compile=True), needs_compiler),
        row('CUDA graphs', compile='cuda_graphs'),
        Row('compiled, loss in chunks', 'compiled', lambda lab: lab.compare(_in_chunks(lab) | dict(compile=True)),
            needs_compiler),
        row('compiled, arch=modern, Muon', arch='modern', optimizer='muon'),
        row('compiled, checkpoint_activations=selective', checkpoint_activations='selective'),
        row('compiled, document_mask', document_mask=True),
        row('compiled, dropout', OF_RANDOM, dropout=0.1)]


def _compiler(lab):
    works, why = choices.can_compile(lab.device)
    return Refused('it works' if works else why, 'it works')


def _compiled_recipe_rows():
    names = [name for name in recipes.RECIPES if not name.startswith(RANDOM)]
    names = sorted(names, key=lambda name: not name.startswith(('fp8', 'int8')))  # what is native somewhere, first
    return [Row(f'compiled Linear, matmul={name}', 'compiled recipes',
                lambda lab, name=name: _compiled_linear(lab, name),
                lambda lab, name=name: needs_compiler(lab) or _needs_of_recipe(name)(lab)) for name in names]


def _compiled_linear(lab, name):
    """y, dx and dw of a Linear that follows a recipe, beside the same in float32 on the CPU, which emulates it."""
    tensors = []
    for device, dtype in ((lab.device, lab.dtype), (torch.device('cpu'), 'float32')):
        devices.prepare_device(device)
        torch.manual_seed(0)
        layer, x, g = nn.Linear(WIDTH, WIDTH, bias=False), torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
        layer, x, g = layer.to(device), x.to(device).requires_grad_(), g.to(device)
        linear = RecipeLinear(layer, find_strategy(parse_matmul(name), device, dtype, (WIDTH,), ROWS))
        if device.type == 'cuda':
            torch._dynamo.reset()
            linear = torch.compile(linear)
        with devices.autocast(device, dtype):
            y = linear(x)
        tensors.append([y, *torch.autograd.grad(y, (x, layer.weight), g.to(y.dtype))])
    return Tensors(*[[t.detach().float().cpu() for t in found] for found in tensors], 0.05)
