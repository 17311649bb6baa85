"""
Runs on cards that are not there. A row of RUNS is a run of train.py with a tiny model, and what has to be true of it.

  pytest -m cuda_dry -n 0                       # all rows: about half an hour
  pytest -m cuda_dry -n 0 -k 'RTX_4070'

They need the CUDA 13 build of torch (pip install torch==2.13.0), gcc and nm. Without them they are skipped.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from model import GPT, GPTConfig
from sologpt.bench import plan, process
from sologpt.bench.gpu_session import write_random_tokens
from sologpt.files.checkpoint import save_checkpoint
from sologpt.nullgpu.cards import find_card
from sologpt.nullgpu.events import Memcpy, Op
from sologpt.nullgpu.run import DryRun, TrainingStep, gemms, launches, run_script, waits

pytestmark = [pytest.mark.cuda_dry, pytest.mark.usefixtures('null_gpu')]
TINY = dict(device='cuda', n_layer=2, n_head=4, n_embd=256, block_size=256, batch_size=4, max_iters=6,
            gradient_accumulation_steps=2, eval_interval=1000, eval_iters=1, warmup_iters=2, log_interval=100)
ATTENTION = {'cudnn': '_cudnn_attention', 'flash': '_flash_attention', 'sdpa': '_attention'}  # parts of names
EIGHT_BITS = ('int8', 'float8_e4m3fn', 'float8_e5m2')


# ---- what has to be true of a run: functions of the run and of its last step -----------------------------------------

def nothing_refused(dry: DryRun, step: TrainingStep) -> None:
    assert dry.refusals == []


def attention_as_promised(dry: DryRun, step: TrainingStep) -> None:
    """The attention kernel of the header is the one that runs, forward and backward, in every layer."""
    promised = re.search(r'; attention (\w+)', dry.stdout)[1]
    kernels = [event.name for event in step.micro_steps[1] if isinstance(event, Op) and event.kind == 'attention']
    assert len(kernels) >= 2 * TINY['n_layer'] and all(ATTENTION[promised] in name for name in kernels)


def efficient_attention(dry: DryRun, step: TrainingStep) -> None:
    """A mask goes to the kernel that takes one."""
    kernels = [event.name for event in step.micro_steps[1] if isinstance(event, Op) and event.kind == 'attention']
    assert all('_efficient_attention' in name for name in kernels)


def flex_attention(dry: DryRun, step: TrainingStep) -> None:
    """FlexAttention's kernels run, a forward and two halves of a backward in every layer, and no other attention."""
    kernels = [kernel.name for kernel in launches(step.micro_steps[1], 'triton') if 'flex_attention' in kernel.name]
    assert sum('backward' not in name for name in kernels) == TINY['n_layer'] and len(kernels) >= 2 * TINY['n_layer']
    assert not any(isinstance(event, Op) and event.kind == 'attention' for event in step.micro_steps[1])


def no_stack(dry: DryRun, step: TrainingStep) -> None:
    """No Triton kernel of a step has spilled registers into memory."""
    assert [kernel.name for kernel in launches(step.micro_steps[1] + step.update, 'triton') if kernel.stack] == []


def no_wait(dry: DryRun, step: TrainingStep) -> None:
    """The program does not wait for the device between the first launch of a micro-step and its last."""
    assert waits(step.micro_steps[1]) == []


def no_wait_in_the_update(dry: DryRun, step: TrainingStep) -> None:
    assert waits(step.update) == []


def weight_gradients_in_float32(dry: DryRun, step: TrainingStep) -> None:
    """The matmuls that sum over the tokens of a micro-batch write float32: 6 in a block, 1 in a piece of the loss."""
    tokens = TINY['batch_size'] * TINY['block_size']
    found = [gemm for gemm in gemms(step.micro_steps[1]) if gemm.k == tokens and gemm.layout == 'NT']
    assert len(found) == 6 * TINY['n_layer'] + 1 and {gemm.d for gemm in found} == {'float32'}


def eight_bits_are_tn(dry: DryRun, step: TrainingStep) -> None:
    """Matmuls of 8 bits have the one layout that cuBLAS has for them: three for each Linear of the blocks."""
    found = [gemm for gemm in gemms(step.micro_steps[1]) if gemm.a in EIGHT_BITS]
    assert len(found) == 3 * 4 * TINY['n_layer'] and {gemm.layout for gemm in found} == {'TN'}


def emulated_in_bfloat16(dry: DryRun, step: TrainingStep) -> None:
    """Matmuls of an emulated format take bfloat16, and give float32."""
    found = [gemm for gemm in gemms(step.micro_steps[1]) if gemm.d == 'float32']
    assert len(found) >= 3 * 4 * TINY['n_layer'] and {gemm.a for gemm in found} == {'bfloat16'}


def one_update_kernel_per_parameter(dry: DryRun, step: TrainingStep) -> None:
    """The update of moments in 8 bits is compiled: some small kernels for the norm, and one or two per parameter."""
    parameters = 2 + 6 * TINY['n_layer'] + 1
    assert len(launches(step.update, 'triton')) <= 2 * parameters and len(launches(step.update, 'aten')) <= 60


def moments_are_copied(dry: DryRun, step: TrainingStep) -> None:
    """Both moments of each parameter come from the CPU's memory and go back, without a wait."""
    for direction in ('host_to_device', 'device_to_host'):
        copies = [e for e in step.update if isinstance(e, Memcpy) and e.direction == direction and e.bytes > 1000]
        assert len(copies) >= 2 * 4 * TINY['n_layer'] and not any(copy.waits for copy in copies)


def nf4_is_decoded(dry: DryRun, step: TrainingStep) -> None:
    """The base's matmuls are in bfloat16, and its weights take 4 bits: less than half of those of a bfloat16 base."""
    assert {gemm.a for gemm in gemms(step.micro_steps[1])} <= {'bfloat16', 'float32'}


def chose_a_micro_batch(dry: DryRun, step: TrainingStep) -> None:
    assert re.search(r'fastest of .*tokens per second', dry.stdout)


RUNS_WELL = (nothing_refused, no_wait)
ALWAYS = (*RUNS_WELL, attention_as_promised, no_stack)


# ---- the rows --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """
    A row. Its name is that of a test. keys: beside TINY; 'base' and 'llama' as init_from are models with random
    weights, the second one with grouped queries. checks: what has to be true.
    """
    name: str
    card: str
    keys: dict = field(default_factory=dict)
    checks: tuple[Callable[[DryRun, TrainingStep], None], ...] = ALWAYS


CARDS = ('T4', 'RTX 3060', 'RTX 4070', 'A100', 'H100', 'RTX 5090')
MUON = dict(arch='modern', optimizer='muon')
DOCUMENTS = dict(document_mask=True, attn_backend='flex')
LORA = dict(init_from='base', adapter='lora')
LLAMA = dict(init_from='llama')
RUNS = [
    *(Run('gpt2', card, {}, (*ALWAYS, weight_gradients_in_float32)) for card in CARDS),
    *(Run('modern', card, MUON, (*ALWAYS, weight_gradients_in_float32)) for card in ('T4', 'RTX 4070', 'H100')),
    Run('eager', 'RTX 3060', dict(compile=False)),
    Run('float32', 'RTX 3060', dict(dtype='float32')),
    Run('muon in bfloat16', 'RTX 4070', MUON | dict(weights_dtype='bfloat16')),
    *(Run('8-bit moments', card, dict(optimizer_state='8bit'),
          (*ALWAYS, no_wait_in_the_update, one_update_kernel_per_parameter)) for card in ('RTX 3060', 'H100')),
    Run('8-bit moments, bfloat16 weights', 'RTX 4070', dict(optimizer_state='8bit', weights_dtype='bfloat16'),
        (*ALWAYS, no_wait_in_the_update, one_update_kernel_per_parameter)),
    Run('bfloat16 weights', 'RTX 5090', dict(weights_dtype='bfloat16'), (*ALWAYS, no_wait_in_the_update)),
    Run('offloaded moments', 'RTX 4070', dict(optimizer_state='cpu'), (*ALWAYS, moments_are_copied)),
    *(Run(f'checkpointing {kind}', 'RTX 4070', dict(checkpoint_activations=kind, arch=arch, attn_backend='flash'))
      for kind in (True, 'selective') for arch in ('gpt2', 'modern')),
    *(Run('dropout', card, dict(dropout=0.1)) for card in ('RTX 4070', 'H100')),
    *(Run('document_mask', card, DOCUMENTS, (*RUNS_WELL, flex_attention, no_stack))
      for card in ('T4', 'RTX 4070', 'H100', 'RTX 5090')),
    Run('document_mask, modern', 'RTX 4070', DOCUMENTS | MUON, (*RUNS_WELL, flex_attention, no_stack)),
    Run('document_mask, heads of 128', 'RTX 5090', DOCUMENTS | dict(n_head=2), (*RUNS_WELL, flex_attention, no_stack)),
    Run('document_mask, eager', 'H100', dict(document_mask=True, compile=False)),
    *(Run(f'matmul {name}', card, dict(matmul=name), (*ALWAYS, eight_bits_are_tn))
      for name, card in (('fp8', 'RTX 4070'), ('fp8', 'H100'), ('fp8_row', 'H100'), ('fp8', 'RTX 5090'),
                         ('int8', 'T4'), ('int8', 'RTX 3060'), ('int8', 'H100'))),
    *(Run(f'matmul {name}', card, dict(matmul=name), (*ALWAYS, emulated_in_bfloat16))
      for name, card in (('mxfp8', 'RTX 3060'), ('mxfp6_e2m3', 'H100'))),
    *(Run(f'matmul {name}', card, dict(matmul=name)) for name, card in (
        ('mxfp4', 'H100'), ('nvfp4:keep_last=0', 'RTX 5090'), ('fp4_dge', 'RTX 4070'), ('block_dropout:0.1', 'A100'))),
    Run('LoRA', 'RTX 4070', LORA),
    Run('QLoRA', 'RTX 3060', LORA | dict(base_format='nf4'), (*ALWAYS, nf4_is_decoded)),
    *(Run('llama', card, LLAMA, (*ALWAYS, weight_gradients_in_float32))
      for card in ('T4', 'RTX 4070', 'H100', 'RTX 5090')),
    *(Run('llama, float32', card, LLAMA | dict(dtype='float32')) for card in ('T4', 'RTX 4070')),
    *(Run('llama, document_mask', card, LLAMA | DOCUMENTS, (*RUNS_WELL, flex_attention, no_stack))
      for card in ('T4', 'H100')),
    Run('llama, dense document_mask', 'RTX 4070', LLAMA | dict(document_mask=True, attn_backend='sdpa'),
        (*ALWAYS, efficient_attention)),
    Run('llama, muon', 'H100', LLAMA | dict(optimizer='muon')),
    Run('llama, checkpointing selective', 'RTX 4070', LLAMA | dict(checkpoint_activations='selective',
                                                                   attn_backend='flash')),
    Run('llama, matmul fp8', 'H100', LLAMA | dict(matmul='fp8'), (*ALWAYS, eight_bits_are_tn)),
    Run('llama, LoRA', 'RTX 4070', LLAMA | dict(adapter='lora')),
    Run('cuda_graphs', 'RTX 4070', dict(compile='cuda_graphs')),
    Run('cuda_graphs, llama', 'RTX 4070', LLAMA | dict(compile='cuda_graphs')),
    Run('batch_size auto', 'RTX 4070', dict(batch_size='auto', total_batch_size=8 * 256,
                                            gradient_accumulation_steps=None), (nothing_refused, chose_a_micro_batch)),
    Run('deterministic', 'RTX 4070', dict(deterministic=True)),
]


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    """A folder of random tokens of GPT-2's vocabulary."""
    folder = str(tmp_path_factory.mktemp('data') / 'tokens')
    write_random_tokens(folder, 'tokens')
    return folder


@pytest.fixture(scope='module')
def bases(tmp_path_factory, tokens):
    """Checkpoints with random weights: what init_from is -> the folder."""
    folders = {}
    for name, parts in (('base', {}), ('llama', dict(arch='llama', n_kv_head=2))):
        folders[name] = str(tmp_path_factory.mktemp(name))
        model = GPT(GPTConfig(**{key: TINY[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size')}, **parts))
        save_checkpoint(folders[name], {'model': model.state_dict(), 'model_args': model.config.to_save(),
                                        'iter_num': 0, 'config': {'dataset': tokens}}, best=False)
    return folders


def train(card, tokens, folder, **keys):
    """A run of train.py that ended well. A key that is None is left out."""
    keys = TINY | dict(dataset=tokens, out_dir=str(folder)) | keys
    keys = {key: value for key, value in keys.items() if value is not None}
    dry = run_script(find_card(card), process.ROOT, os.path.join(process.ROOT, 'train.py'), process.flags(keys))
    assert dry.returncode == 0, dry.stderr[-3000:]
    return dry


@pytest.mark.parametrize('run', RUNS, ids=lambda run: f'{run.name}-{run.card}'.replace(' ', '_'))
def test_run(run, tokens, bases, tmp_path):
    keys = {key: bases[value] if key == 'init_from' else value for key, value in run.keys.items()}
    dry = train(run.card, tokens, tmp_path, **keys)
    for check in run.checks:
        check(dry, dry.training_steps()[-1])


@pytest.mark.parametrize('keys', [
    {}, MUON, dict(checkpoint_activations='selective'), dict(checkpoint_activations=True), dict(compile=False),
    dict(document_mask=True, attn_backend='flex'), dict(optimizer_state='8bit'), dict(weights_dtype='bfloat16')],
    ids=lambda keys: ','.join(map(str, keys.values())) or 'gpt2')
def test_the_memory_forecast_is_that_of_the_allocator(keys, tokens, tmp_path):
    """GPT-2's smallest size in micro-batches of 16: within 5 %."""
    keys = TINY | dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16, max_iters=3) | keys
    options, _ = process.resolve_train(process.flags(dict(dtype='bfloat16', compile=True) | keys |
                                                     dict(dataset=tokens)))
    forecast = plan.forecast(options, plan.model_config(options)).at(16).peak
    dry = train('RTX 4090', tokens, tmp_path, **keys)
    assert abs(forecast / dry.peak - 1) < 0.05, f'{forecast / 1e9:.2f} GB, and {dry.peak / 1e9:.2f}'


def test_a_run_that_does_not_fit_ends_with_advice(tokens, tmp_path):
    keys = TINY | dict(n_layer=12, n_embd=1024, block_size=1024, batch_size=64, compile=False, dataset=tokens,
                       out_dir=str(tmp_path))
    dry = run_script(find_card('RTX 3060'), process.ROOT, os.path.join(process.ROOT, 'train.py'), process.flags(keys))
    assert dry.returncode == 2 and dry.out_of_memory and '--batch_size=' in dry.stderr


DECODING = '''
import sys
sys.path.insert(0, sys.argv[1])
import torch
from model import GPT, GPTConfig
from sologpt.inference.compiled_step import CompiledStep
from sologpt.machine import devices
model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=4, n_embd=256, attn_backend='cudnn'))
model = model.cuda().eval()
with devices.autocast(torch.device('cuda'), 'bfloat16'):
    for step in (None, CompiledStep(model)):
        ids = torch.zeros(1, 4, dtype=torch.long, device='cuda')
        print(model.generate(ids, 8, 0.0, step=step).shape)
'''


@pytest.mark.parametrize('card', ['RTX 3060', 'H100'])
def test_decoding_asks_cudnn_for_no_plan_per_token(card, tmp_path):
    """Each new length would be a new plan, which takes up to half a second. The prompt alone may be one."""
    (tmp_path / 'draw.py').write_text(DECODING)
    dry = run_script(find_card(card), str(tmp_path), 'draw.py', [process.ROOT])
    assert dry.returncode == 0, dry.stderr[-3000:]
    assert dry.stdout.splitlines() == ['torch.Size([1, 12])'] * 2 and dry.refusals == []
    cudnn = [event for event in dry.events if isinstance(event, Op) and 'cudnn' in event.name]
    assert len(cudnn) <= 2 * 2  # two prompts in two layers
