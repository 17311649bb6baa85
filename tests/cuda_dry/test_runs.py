"""
train.py on cards that are not there. Each row of RUNS is a run of a tiny model, and what has to be true of it.

  pytest -m cuda_dry -n 0                       # all rows: some minutes
  pytest -m cuda_dry -n 0 -k 'RTX_4070'

They need the CUDA 13 build of torch (pip install torch==2.13.0), gcc and nm. Without them they are skipped.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from sologpt.bench import plan, process
from sologpt.bench.gpu_session import write_random_tokens
from sologpt.nullgpu.cards import find_card
from sologpt.nullgpu.events import Op
from sologpt.nullgpu.run import DryRun, TrainingStep, gemms, launches, run_script, waits

pytestmark = pytest.mark.cuda_dry
TINY = dict(device='cuda', n_layer=2, n_head=4, n_embd=256, block_size=256, batch_size=4, max_iters=6,
            gradient_accumulation_steps=2, eval_interval=1000, eval_iters=1, warmup_iters=2)
ATTENTION = {'cudnn': '_cudnn_attention', 'flash': '_flash_attention', 'sdpa': '_attention'}  # parts of names


# ---- what has to be true of a run: functions of the run and of its last step -----------------------------------------

def nothing_refused(dry: DryRun, step: TrainingStep) -> None:
    assert dry.refusals == []


def attention_as_promised(dry: DryRun, step: TrainingStep) -> None:
    """The attention kernel of the header is the one that runs, forward and backward, in every layer."""
    promised = re.search(r'; attention (\w+)', dry.stdout)[1]
    kernels = [event.name for event in step.micro_steps[1] if isinstance(event, Op) and event.kind == 'attention']
    assert len(kernels) == 2 * TINY['n_layer'] and all(ATTENTION[promised] in name for name in kernels)


def no_stack(dry: DryRun, step: TrainingStep) -> None:
    """No Triton kernel of a step has spilled registers into memory."""
    assert [kernel.name for kernel in launches(step.micro_steps[1] + step.update, 'triton') if kernel.stack] == []


def no_wait(dry: DryRun, step: TrainingStep) -> None:
    """The program does not wait for the device between the first launch of a micro-step and its last."""
    assert waits(step.micro_steps[1]) == []


def eight_bits_are_tn(dry: DryRun, step: TrainingStep) -> None:
    """Matmuls of 8 bits have the one layout that cuBLAS has for them, and there are some."""
    layouts = [gemm.layout for gemm in gemms(step.micro_steps[1]) if gemm.a == 'int8' or gemm.a.startswith('float8')]
    assert layouts and set(layouts) == {'TN'}


ALWAYS = (nothing_refused, attention_as_promised, no_stack, no_wait)


# ---- the rows --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """
    A row. Its name is that of a test. keys: beside TINY. checks: beside ALWAYS, unless they replace it.
    """
    name: str
    card: str
    keys: dict = field(default_factory=dict)
    checks: tuple[Callable[[DryRun, TrainingStep], None], ...] = ALWAYS


RUNS = [
    *(Run('default', card) for card in ('T4', 'RTX 3060', 'RTX 4070', 'A100', 'H100', 'RTX 5090')),
    Run('modern', 'RTX 4070', dict(arch='modern', optimizer='muon')),
    Run('cuda_graphs', 'RTX 4070', dict(compile='cuda_graphs')),
    *(Run('fp8', card, dict(matmul='fp8'), (*ALWAYS, eight_bits_are_tn)) for card in ('H100', 'RTX 5090')),
]


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    """A folder of random tokens of GPT-2's vocabulary."""
    folder = str(tmp_path_factory.mktemp('data') / 'tokens')
    write_random_tokens(folder, 'tokens')
    return folder


def train(card, tokens, folder, **keys):
    """A run of train.py that ended well."""
    keys = TINY | dict(dataset=tokens, out_dir=str(folder)) | keys
    dry = run_script(find_card(card), process.ROOT, os.path.join(process.ROOT, 'train.py'), process.flags(keys))
    assert dry.returncode == 0, dry.stderr[-3000:]
    return dry


@pytest.mark.parametrize('run', RUNS, ids=lambda run: f'{run.name}-{run.card.replace(" ", "_")}')
def test_run(run, tokens, tmp_path):
    dry = train(run.card, tokens, tmp_path, **run.keys)
    for check in run.checks:
        check(dry, dry.training_steps()[-1])


def test_the_memory_forecast_is_that_of_the_allocator(tokens, tmp_path):
    """GPT-2's smallest size in micro-batches of 16: within 5 %."""
    keys = TINY | dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16, max_iters=3)
    options, _ = process.resolve_train(process.flags(keys | dict(dataset=tokens, dtype='bfloat16', compile=True)))
    forecast = plan.forecast(options, plan.model_config(options)).at(16).peak
    dry = train('RTX 4090', tokens, tmp_path, **keys)
    assert abs(forecast / dry.peak - 1) < 0.05, f'{forecast / 1e9:.2f} GB, and {dry.peak / 1e9:.2f}'


def test_a_run_that_does_not_fit_ends_with_advice(tokens, tmp_path):
    keys = TINY | dict(n_layer=12, n_embd=1024, block_size=1024, batch_size=64, compile=False, dataset=tokens,
                       out_dir=str(tmp_path))
    dry = run_script(find_card('RTX 3060'), process.ROOT, os.path.join(process.ROOT, 'train.py'), process.flags(keys))
    assert dry.returncode == 2 and dry.out_of_memory and '--batch_size=' in dry.stderr
