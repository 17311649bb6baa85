"""
The rows of the gpu suite, the most important first: what does not fit in the time is left to the next call.

The first rows decide, and one call of 9 minutes has them all. Their seconds are planned for a large GPU (an H100, or
a card like it) on a machine that has compiled nothing yet. They are planned, not measured:

    540 = 9 minutes, the default of --minutes
    -25   LAST: the card again, the picture, the tables
    -20   FIRST: the card; the first import of torch on a new machine
    495 are left

     60   a step of nanoGPT's        START 12, COMPILED 40, 20 steps of 65,536 tokens 3, the data, its end 5
     60   the same step here         the same, and an evaluation of one batch
     60   12 GB                      another micro-batch has other kernels: compiled again
    115   the race, nanoGPT          START 12, CACHED 15 (its step is known from the first row), EVALUATED 15,
                                     240 steps 35, data 10, two checkpoints 8, its loss evaluated here 20
     75   the race, here             START 12, COMPILED 40, EVALUATED 10, 48 steps 7, two checkpoints 6
     25   sampling, nanoGPT          START 12, the model written 3, 1000 tokens 10
     45   sampling, here             START 12, 1000 tokens 6, compiled 25, 1000 tokens 2: both in one process
     50   fp8 and int8               START 12, six Linears compiled at 6 each
    490

START is starting Python and importing torch, COMPILED is compiling a model of 124M, CACHED is compiling it where its
kernels lie in the folder that all rows share, EVALUATED is compiling it for evaluations. Long parts are kept short:
the race has few steps, and two evaluations on either side. Its data has as many ids as GPT-2, so that nanoGPT's step in
it is one that has been compiled before. Sampling is warmed up by a few tokens. The Linears follow only recipes that
hardware multiplies.
"""

from collections.abc import Callable
from typing import NamedTuple

from sologpt.bench.gpu_measurements import (
    foreseen,
    race_here,
    race_peer,
    run_adapters,
    run_suite,
    sample,
    sample_peer,
    time_linears,
    train,
    train_by_number,
    train_peer,
    wait_for_batches,
)
from sologpt.bench.gpu_session import STEP

# models so small that launching kernels is most of the time
CHARS = dict(gradient_accumulation_steps=1, max_iters=60, dataset='chars')
SMALLEST = STEP | CHARS | dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12)
SHAKESPEARE = STEP | CHARS | dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64)
TINY_MODELS = {'4 x 128, T=64': SMALLEST, '6 x 384, T=256': SHAKESPEARE}
MODERN = dict(arch='modern', n_head=6, optimizer='muon', muon_lr=0.0)
PEAK = dict(gradient_accumulation_steps=1, max_iters=4)  # where memory alone is asked for
TWELVE = STEP | PEAK | dict(memory_limit=12.0)
COLD, WARM = 60, 35  # seconds to plan with for a run that compiles, and for one that finds its kernels in the cache
FIRST, LAST = 20, 25  # seconds that are left for reading the card at first, and for the card and the pictures at last


class Row(NamedTuple):
    part: str
    name: str
    seconds: float  # to plan with on a large GPU; a row may take three times as long, as far as there is time
    measure: Callable  # (session, keys) -> figures
    keys: dict  # of train.py, or of the measurement


def list_rows() -> list[Row]:
    """All rows."""
    return [
        *deciding_rows(),
        Row('training_step', 'nanoGPT, round 2', WARM, train_peer, STEP),
        Row('training_step', 'here, round 2', WARM, train, STEP),
        Row('memory', 'foreseen', 30, foreseen, STEP),
        Row('memory', '12 GB, micro-batch 32', COLD, train, TWELVE | dict(batch_size=32)),
        Row('training_step', 'modern, Muon', WARM, train, STEP | MODERN),
        *_step_rows(), *_memory_rows(),
        Row('race', 'here, 12 % of the tokens', WARM, race_here, dict(share=0.12)),
        Row('race', 'here, 35 % of the tokens', COLD, race_here, dict(share=0.35)),
        *_matmul_rows(),
        Row('adapters', 'serving', 60, run_adapters, dict(recipes='')),
        Row('adapters', 'a step, eager', 150, run_adapters, dict(recipes='lora,qlora')),
        *_launch_bound_rows(),
        *_other_rows(),
    ]


def deciding_rows() -> list[Row]:
    """The rows that decide, which one call measures on a large GPU."""
    return [
        Row('training_step', 'nanoGPT, round 1', COLD, train_peer, STEP),
        Row('training_step', 'here, round 1', COLD, train, STEP),
        Row('memory', '12 GB, micro-batch 24', COLD, train, TWELVE | dict(batch_size=24)),
        Row('race', 'nanoGPT', 115, race_peer, STEP),
        Row('race', 'here, 20 % of the tokens', 75, race_here, dict(share=0.2)),
        Row('sampling', 'nanoGPT', 25, sample_peer, {}),
        Row('sampling', 'here', 45, sample, {}),
        Row('linears', 'fp8 and int8', 50, time_linears, dict(widths=(2048, 4096), tokens=8192,
                                                             recipes=('fp8', 'int8'))),
    ]


def _step_rows():
    return [Row('training_step', name, COLD, train, STEP | keys) for name, keys in {
        'attention cudnn': dict(attn_backend='cudnn'),
        'attention flash': dict(attn_backend='flash'), 'attention math': dict(attn_backend='math'),
        'micro-batch 32': dict(batch_size=32, gradient_accumulation_steps=2),
        'micro-batch 64': dict(batch_size=64, gradient_accumulation_steps=1)}.items()]


def _memory_rows():
    rows = [Row('memory', name, seconds, train, STEP | PEAK | keys) for name, seconds, keys in (
        ('optimizer_state 8bit', WARM, dict(optimizer_state='8bit')),
        ('optimizer_state cpu', WARM, dict(optimizer_state='cpu')),
        ('checkpoint_activations selective', COLD, dict(checkpoint_activations='selective')),
        ('checkpoint_activations', COLD, dict(checkpoint_activations=True)),
        ('LoRA', COLD, dict(init_from='base', adapter='lora')),
        ('QLoRA', COLD, dict(init_from='base', adapter='lora', base_format='nf4')))]
    return rows + [
        Row('memory', 'foreseen, optimizer_state 8bit', 30, foreseen, STEP | dict(optimizer_state='8bit')),
        Row('memory', 'foreseen, checkpoint_activations selective', 30, foreseen,
            STEP | dict(checkpoint_activations='selective'))]


def _matmul_rows():
    linears = dict(suite='matmul', tokens=8192)
    return [
        *(Row('matmul', f'widths {widths}', 150, run_suite,
              linears | dict(widths=widths, recipes='fp8,fp8_row,fp8_block,int8,sparse24'))
          for widths in ('768,2048', '1024,4096')),
        Row('matmul', 'float32 without TF32', 40, run_suite,
            linears | dict(widths='768,1024,2048,4096', recipes='float32', tf32=False))]


def _launch_bound_rows():
    rows = [Row('launch_bound', f'{who}, {name}, {"compiled" if compile else "eager"}', 45 if compile else 20, measure,
                keys | dict(compile=compile))
            for name, keys in TINY_MODELS.items()
            for compile in (True, False)
            for who, measure in (('nanoGPT', train_peer), ('here', train))]
    return rows + [Row('launch_bound', f'here, {name}, CUDA graphs', 45, train,
                       keys | dict(compile='cuda_graphs')) for name, keys in TINY_MODELS.items()]


def _other_rows():
    return [
        Row('more', 'float16 with loss scaling', COLD, train, STEP | dict(dtype='float16')),
        Row('more', 'document_mask', COLD, train, STEP | dict(document_mask=True)),
        Row('more', 'the device by its number', 20, train_by_number, SMALLEST | dict(compile=False)),
        Row('more', 'wait for a batch', 30, wait_for_batches, {}),
        Row('more', 'sweep of micro-batches', 400, run_suite, STEP | dict(suite='sweep')),
        Row('matmul', 'every recipe', 450, run_suite, dict(suite='matmul', widths='1024', tokens=2048)),
        Row('adapters', 'a step of the others, eager', 300, run_adapters,
            dict(recipes='dora,vera,bottleneck,prompt,prefix'))]
