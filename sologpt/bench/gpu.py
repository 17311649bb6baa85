"""
A GPU beside nanoGPT on the same one, in one go: what it is, a training step, memory, a race to a loss, sampling, the
recipes for matmuls, adapters, and the rest. `python bench.py --suite=gpu --peer=../nanoGPT` takes at most --minutes;
called again it goes on with the rows that are missing or have failed. --small=True tries it all at a tiny size, on a
CPU too; its figures say nothing about a machine.

Nothing of the machine is set. The card is read before and after, so that a clock that fell shows.
"""

import json
import os
import re
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import configurator
from configurator import InputError
from sologpt.bench import process, race
from sologpt.bench.gpu_rows import (
    STEP,
    Session,
    by_number,
    facts,
    foreseen,
    of_adapters,
    race_here,
    race_peer,
    sample,
    sample_peer,
    suite,
    train,
    train_peer,
    wait_for_batches,
)
from sologpt.machine import devices

# models so small that launching kernels is most of the time
CHARS = dict(gradient_accumulation_steps=1, max_iters=60, dataset='chars')
SMALLEST = STEP | CHARS | dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12)
SHAKESPEARE = STEP | CHARS | dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64)
MODERN = dict(arch='modern', n_head=6, optimizer='muon', muon_lr=0.0)
PEAK = dict(gradient_accumulation_steps=1, max_iters=4)  # where memory alone is asked for
COLD, WARM = 60, 35  # seconds to plan with for a run that compiles, and for one that finds its kernels in the cache
SHOWN = ('ms_per_step', 'tokens_per_s', 'mfu', 'memory_gb', 'target_val_loss', 'here_final_val_loss', 'matmul_tflops',
         'copy_gb_per_s')
LAST = 25  # seconds that are left for reading the card and for the picture


class Row(NamedTuple):
    part: str
    name: str
    seconds: float  # to plan with on a large GPU: it may take three times as long, as far as there is time
    run: Callable  # (session, keys) -> figures
    keys: dict


def rows():
    """All rows, the most important first: what does not fit in the time is left to the next call."""
    step, memory = [], []
    for name, more in {
            'attention sdpa': dict(attn_backend='sdpa'), 'attention cudnn': dict(attn_backend='cudnn'),
            'attention flash': dict(attn_backend='flash'), 'attention math': dict(attn_backend='math'),
            'micro-batch 32': dict(batch_size=32, gradient_accumulation_steps=2),
            'micro-batch 64': dict(batch_size=64, gradient_accumulation_steps=1)}.items():
        step.append(Row('training_step', name, COLD, train, STEP | more))
    for name, seconds, more in (
            ('optimizer_state 8bit', WARM, dict(optimizer_state='8bit')),
            ('optimizer_state cpu', WARM, dict(optimizer_state='cpu')),
            ('checkpoint_activations selective', COLD, dict(checkpoint_activations='selective')),
            ('checkpoint_activations', COLD, dict(checkpoint_activations=True)),
            ('LoRA', COLD, dict(init_from='base', adapter='lora')),
            ('QLoRA', COLD, dict(init_from='base', adapter='lora', base_format='nf4'))):
        memory.append(Row('memory', name, seconds, train, STEP | PEAK | more))
    twelve = STEP | PEAK | dict(memory_limit=12.0)
    linears = dict(tokens=8192, recipes='fp8,fp8_row,fp8_block,int8,sparse24')
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
        *step, *memory,
        Row('memory', 'foreseen, optimizer_state 8bit', 30, foreseen, STEP | dict(optimizer_state='8bit')),
        Row('memory', 'foreseen, checkpoint_activations selective', 30, foreseen,
            STEP | dict(checkpoint_activations='selective')),
        Row('race', 'here, 12 % of the tokens', COLD, race_here, dict(share=0.12)),
        Row('race', 'here, 35 % of the tokens', COLD, race_here, dict(share=0.35)),
        *(Row('matmul', f'widths {widths}', 150, suite, dict(suite='matmul', widths=widths) | linears)
          for widths in ('768,2048', '1024,4096')),
        Row('matmul', 'float32 without TF32', 40, suite,
            dict(suite='matmul', widths='768,1024,2048,4096', tokens=8192, recipes='float32', tf32=False)),
        Row('adapters', 'serving', 60, of_adapters, dict(recipes='')),
        Row('adapters', 'a step, eager', 150, of_adapters, dict(recipes='lora,qlora')),
        *(Row('launch_bound', f'{who}, {name}, {"compiled" if compile else "eager"}', 45 if compile else 20, run,
              keys | dict(compile=compile))
          for name, keys in (('4 x 128, T=64', SMALLEST), ('6 x 384, T=256', SHAKESPEARE))
          for compile in (True, False) for who, run in (('nanoGPT', train_peer), ('here', train))),
        *(Row('launch_bound', f'here, {name}, CUDA graphs', 45, train, keys | dict(compile=True, cuda_graphs=True))
          for name, keys in (('4 x 128, T=64', SMALLEST), ('6 x 384, T=256', SHAKESPEARE))),
        Row('more', 'float16 with loss scaling', COLD, train, STEP | dict(dtype='float16')),
        Row('more', 'document_mask', COLD, train, STEP | dict(document_mask=True)),
        Row('more', 'the device by its number', 20, by_number, SMALLEST | dict(compile=False)),
        Row('more', 'wait for a batch', 30, wait_for_batches, {}),
        Row('more', 'sweep of micro-batches', 400, suite, STEP | dict(suite='sweep')),
        Row('matmul', 'every recipe', 450, suite, dict(suite='matmul', widths='1024', tokens=2048)),
        Row('adapters', 'a step of the others, eager', 300, of_adapters,
            dict(recipes='dora,vera,bottleneck,prompt,prefix')),
    ]


def measure(config, train_args, picture):
    """
    The figures as plain values: part -> row -> figures, or why there are none. Writes them to config['dest'] after each
    row, and goes on with those that it finds there. Draws `picture`. Raises InputError.
    """
    peer = process.check_peer(config['peer'])
    options, given = configurator.resolve(race.TRAIN, train_args)
    if other := [key for key in given if key not in ('device', 'dataset')]:
        raise InputError(f'{other[0]}: this suite sets the keys of training itself, but for device and dataset')
    device, small = devices.find_device(options['device']), config['small']
    if device.type != 'cuda' and not small:
        raise InputError(f'device={device}: this suite is for a GPU; --small=True tries it at a tiny size')
    chosen = [row for row in rows() if not config['recipes'] or row.part in config['recipes'].split(',')]
    if unknown := set(filter(None, config['recipes'].split(','))) - {row.part for row in chosen}:
        raise InputError(f'recipes: there is no part {min(unknown)!r}: use {", ".join({r.part: 0 for r in rows()})}')
    settings = {'small': small, 'device': devices.device_name(device), 'torch': torch.__version__,
                'dataset': options['dataset']}
    figures = _begun(config['dest'], settings, config['restart'])
    end, not_reached = time.monotonic() + 60 * config['minutes'], []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left running
    cache = {name: os.environ.get(name) for name in ('TORCHINDUCTOR_CACHE_DIR', 'TRITON_CACHE_DIR')}
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ |= {name: os.path.join(folder, name) for name in cache}  # shared by the rows, and then gone
            session = Session(peer, device, small, options['dataset'], folder, figures)
            _read_card(session, 'before')
            for row in chosen:
                done, left = figures.setdefault(row.part, {}), end - LAST - time.monotonic()
                if row.name in done and _final(done[row.name]):
                    continue
                if (5 if small else row.seconds) > left:
                    not_reached.append(row)
                    continue
                done[row.name] = _measured(session, row, min(left, 3 * row.seconds))
                process.write_json(config['dest'], {'figures': figures})
            _read_card(session, 'after')
    finally:
        signal.signal(signal.SIGTERM, before)
        for name, value in cache.items():
            os.environ.pop(name, None)
            os.environ |= {name: value} if value is not None else {}
    figures['summary'] = summary(figures)
    _draw(figures, picture)
    print(json.dumps(figures['summary'], indent=1))
    if not_reached:
        print('not measured for want of time; the same command goes on with:')
        for row in not_reached:
            print(f'  {row.part}: {row.name}')
    return figures


def _begun(dest, settings, restart):
    """The figures to go on with. Raises InputError if they are another machine's, or others in kind."""
    if restart or not os.path.exists(dest):
        return {'settings': settings, 'small': settings['small'], 'device': []}
    try:
        with open(dest, encoding='utf-8') as f:
            figures = json.load(f)['figures']
        found = figures['settings']
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{dest} is no file of this suite: give another --dest, or --restart=True') from None
    if differ := [key for key, value in settings.items() if found.get(key) != value]:
        raise InputError(f'{dest} was measured with {differ[0]}={found.get(differ[0])!r}, not {settings[differ[0]]!r}: '
                         f'give another --dest, or --restart=True')
    return figures


def _final(found):
    """Whether a row need not be tried again: it has figures, or the memory does not suffice, which is a finding too."""
    return 'failed' not in found or re.search(r'out of (GPU )?memory', found['failed'])


def _read_card(session, when):
    session.figures['device'].append({'when': when, **_measured(session, Row('device', when, 0, facts, {}), 2 * LAST)})


def _measured(session, row, seconds):
    """A row's figures, or why there are none, with the commands that were run."""
    session.commands, start = [], time.perf_counter()
    try:
        with process.time_limit(seconds):
            found = row.run(session, session.sized(row.keys))
    except Exception as e:  # whatever it is, the other rows are still measured
        reason = str(e) if isinstance(e, InputError) else f'{type(e).__name__}: {e}'
        found = {'failed': session.plain(reason.partition('\n')[0])[:300]}
    found = {**found, 'seconds': time.perf_counter() - start, 'date': time.strftime('%Y-%m-%d'),
             'commands': session.commands}
    shown = found.get('failed') or ', '.join(f'{key} {value:,.4g}' for key, value in found.items()
                                             if key in SHOWN and isinstance(value, float))
    print(f'{row.part}: {row.name}: {shown or "done"} ({found["seconds"]:.0f} s)', flush=True)
    return found


# What it comes to

def summary(figures):
    """The figures that are compared, as far as they are there."""
    found = {'small': figures['small']}
    steps = figures.get('training_step', {})
    pairs = [[steps.get(f'{who}, round {n}', {}) for who in ('nanoGPT', 'here')] for n in (1, 2)]
    pairs = [(there, here) for there, here in pairs if 'ms_per_step' in there and 'ms_per_step' in here]
    if pairs:
        for key in ('ms_per_step', 'tokens_per_s', 'memory_gb'):
            found[key] = {who: statistics.median(pair[i][key] for pair in pairs)
                          for i, who in enumerate(('nanoGPT', 'here'))}
        of_own = pairs[0][1]  # nanoGPT's FLOPs per token are the same: the model is, and the peak too
        found['mfu'] = {who: rate * of_own['flops_per_token'] / of_own['peak_flops']
                        for who, rate in found['tokens_per_s'].items()}
        found['speed_ratio'] = statistics.median(there['ms_per_step'] / here['ms_per_step'] for there, here in pairs)
    runs = {name: row for name, row in figures.get('race', {}).items() if row.get('ratio')}
    if runs:
        best = max(runs, key=lambda name: runs[name]['ratio']['seconds'])
        found['race'] = {'fewer': runs[best]['ratio'], 'by': best, 'target_val_loss': runs[best]['target_val_loss']}
    sampling = {name: row['tokens_per_s'] for name, row in figures.get('sampling', {}).items() if 'tokens_per_s' in row}
    return found | ({'sampling_tokens_per_s': sampling} if sampling else {})


def _draw(figures, picture):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print('no picture: matplotlib is not installed')
    figure = Figure(figsize=(12, 8), dpi=100, layout='constrained')
    (speed, memory), (race_axes, sampling) = figure.subplots(2, 2)
    name = figures['settings']['device']
    figure.suptitle(f'{name}: a try at a tiny size, no measurement' if figures['small'] else name)

    def bars(axes, values, label, notes=None):
        names = list(values)[::-1]
        drawn = axes.barh(names, [values[n] for n in names],
                          color=['0.6' if n.startswith('nanoGPT') else 'C0' for n in names])
        axes.bar_label(drawn, [f'{values[n]:,.{1 if values[n] < 100 else 0}f}{(notes or {}).get(n, "")}'
                               for n in names], padding=3)
        axes.set_xlabel(label)
        axes.margins(x=0.25)
    steps, found = figures.get('training_step', {}), figures['summary']
    rates = {who: rate / 1000 for who, rate in found.get('tokens_per_s', {}).items()} | {
        name: row['tokens_per_s'] / 1000 for name, row in steps.items() if 'mfu' in row and 'round' not in name}
    shares = found.get('mfu', {}) | {name: row['mfu'] for name, row in steps.items() if 'mfu' in row}
    bars(speed, rates, 'training: thousand tokens per second, and MFU', {n: f', {shares[n]:.0%}' for n in rates})
    bars(memory, found.get('memory_gb', {}) | {
        name: row['memory_gb'] for name, row in figures.get('memory', {}).items() if 'memory_gb' in row},
        'most memory, GB')
    for name, row in figures.get('race', {}).items():
        if row.get('curve'):
            race_axes.plot(*([values[1:] for values in row['curve']]), 'o-', label=name,
                           color='0.6' if name == 'nanoGPT' else None)
            if name == 'nanoGPT':
                race_axes.axhline(row['target_val_loss'], color='0.6', linestyle='dotted')
    race_axes.set_xlabel('seconds of training')
    race_axes.set_ylabel('val loss')
    if race_axes.lines:
        race_axes.legend(frameon=False)
    bars(sampling, found.get('sampling_tokens_per_s', {}), 'sampling: tokens per second, one text')
    figure.savefig(picture)
    print(f'picture: {picture}')
