"""The rows of the gpu suite, the most important first: what does not fit in the time is left to the next call."""

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
COLD, WARM = 60, 35  # seconds to plan with for a run that compiles, and for one that finds its kernels in the cache


class Row(NamedTuple):
    part: str
    name: str
    seconds: float  # to plan with on a large GPU; a row may take three times as long, as far as there is time
    measure: Callable  # (session, keys) -> figures
    keys: dict  # of train.py, or of the measurement


def list_rows() -> list[Row]:
    """All rows."""
    twelve = STEP | PEAK | dict(memory_limit=12.0)
    return [
        Row('training_step', 'nanoGPT, round 1', COLD, train_peer, STEP),
        Row('training_step', 'here, round 1', COLD, train, STEP),
        Row('memory', '12 GB, micro-batch 24', COLD, train, twelve | dict(batch_size=24)),
        Row('sampling', 'nanoGPT', 35, sample_peer, {}),
        Row('sampling', 'here, compiled', 60, sample, dict(compile=True)),
        Row('race', 'nanoGPT', 150, race_peer, STEP),
        Row('race', 'here, 20 % of the tokens', 70, race_here, dict(share=0.2)),
        Row('training_step', 'nanoGPT, round 2', WARM, train_peer, STEP),
        Row('training_step', 'here, round 2', WARM, train, STEP),
        Row('memory', 'foreseen', 30, foreseen, STEP),
        Row('memory', '12 GB, micro-batch 32', COLD, train, twelve | dict(batch_size=32)),
        Row('training_step', 'modern, Muon', COLD, train, STEP | MODERN),
        Row('sampling', 'here', 30, sample, dict(compile=False)),
        *_step_rows(), *_memory_rows(),
        Row('race', 'here, 12 % of the tokens', COLD, race_here, dict(share=0.12)),
        Row('race', 'here, 35 % of the tokens', COLD, race_here, dict(share=0.35)),
        *_matmul_rows(),
        Row('adapters', 'serving', 60, run_adapters, dict(recipes='')),
        Row('adapters', 'a step, eager', 150, run_adapters, dict(recipes='lora,qlora')),
        *_launch_bound_rows(),
        *_other_rows(),
    ]


def _step_rows():
    return [Row('training_step', name, COLD, train, STEP | keys) for name, keys in {
        'attention sdpa': dict(attn_backend='sdpa'), 'attention cudnn': dict(attn_backend='cudnn'),
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
