"""
The same step of a config in micro-batches of 1, 2, 4, ... sequences, until the memory or the step ends.

Every size is a run of its own, of a few steps, with the same dtype and the same peak for MFU. Times are medians without
the first step, which warms up and compiles. The best size is the one with the least memory among those within 2 % of
the fastest.
"""

import torch

from configurator import InputError
from sologpt.bench.pictures import draw_picture, style_axes
from sologpt.bench.process import resolve_train
from sologpt.bench.rows import train_row
from sologpt.machine import choices, devices
from sologpt.training.resume import overruled_key
from sologpt.training.runs import Run
from sologpt.training.step import resolve_step

WITHIN = 0.98  # of the fastest: the sizes among which the best is the one with the least memory
QUIET = {'eval_iters': 1, 'always_save_checkpoint': False, 'wandb_log': False, 'log_interval': 1}


def measure(config: dict, train_args: list[str], picture: str) -> dict:
    """The figures of each size, and the flags of the best; draws `picture`. Raises InputError."""
    tokens, block_size = tokens_of_step(*resolve_train(train_args))
    print(f'{tokens:,} tokens per step in sequences of {block_size}; {config["steps"]} steps of each')
    print(f'{"batch_size":>10} {"accumulation":>12} {"ms/step":>10} {"ms/micro-step":>13} {"tok/s":>10} {"MFU":>6} '
          f'{"memory":>8}')
    keys = QUIET | {'total_batch_size': tokens, 'block_size': block_size, 'max_iters': config['steps'] + 1,
                    'eval_interval': config['steps'] + 1, 'dtype': _find_dtype(train_args)}
    rows = _sweep(train_args, keys)
    fastest = max(row['tokens_per_s'] for row in rows)
    best = min((row for row in rows if row['tokens_per_s'] >= WITHIN * fastest), key=lambda row: row['memory_gb'])
    chosen = f'--batch_size={best["batch_size"]} --gradient_accumulation_steps={best["gradient_accumulation_steps"]}'
    print(f'best: {chosen} (the least memory among the sizes within {1 - WITHIN:.0%} of the fastest)')
    draw_picture(picture, (10, 4.4), _draw, rows, best)
    return {'tokens_per_step': tokens, 'block_size': block_size, 'rows': rows, 'best': chosen}


def tokens_of_step(config: dict, given: list[str]) -> tuple[int, int]:
    """(tokens in a step, tokens in a sequence) of train.py's config. Raises InputError."""
    if overruled := overruled_key(config, given):
        config = config | {overruled: None}
    tokens = config['total_batch_size']
    if tokens is None and config['batch_size'] == 'auto':
        raise InputError('batch_size=auto needs total_batch_size, the tokens in a step')
    return tokens or resolve_step(config, world_size=1).tokens, config['block_size']


def _find_dtype(train_args):
    """One for all rows: 'auto' measures, and may come out otherwise in every run."""
    config, _ = resolve_train(train_args)
    device, width = devices.find_device(config['device']), config['n_embd']
    devices.prepare_device(device)
    return choices.find_dtype(config['dtype'], device, (config['block_size'], width, 4 * width))[0]


def _sweep(train_args, keys):
    rows, batch_size = [], 1
    while keys['total_batch_size'] % (batch_size * keys['block_size']) == 0:
        try:
            run = train_row('', train_args, keys | {'batch_size': batch_size})
        except InputError as e:
            if 'out of GPU memory' not in str(e):
                raise
            print(f'{batch_size:>10} {keys["total_batch_size"] // (batch_size * keys["block_size"]):>12}  '
                  f'out of GPU memory')
            break
        keys = keys | {'peak_flops': run.header['peak_flops']}  # one for all rows, because it may be measured
        rows.append(_row(run, batch_size))
        _show(rows[-1])
        if next_would_not_fit(rows):
            print(f'{2 * batch_size:>10} would not fit into the memory of this machine')
            break
        batch_size *= 2
    if not rows:
        raise InputError('out of GPU memory with a single sequence: try --checkpoint_activations=True')
    return rows


def _row(run: Run, batch_size: int) -> dict:
    ms, accumulated = run.get('time_ms'), run.config['gradient_accumulation_steps']
    return {'batch_size': batch_size, 'gradient_accumulation_steps': accumulated, 'ms_per_step': ms,
            'ms_per_micro_step': ms / accumulated, 'tokens_per_s': run.header['tokens_per_iter'] / ms * 1000,
            'mfu': run.get('mfu'), 'memory_gb': run.max_memory()}


def _show(row):
    print(f'{row["batch_size"]:>10} {row["gradient_accumulation_steps"]:>12} {row["ms_per_step"]:>10,.1f} '
          f'{row["ms_per_micro_step"]:>13,.2f} {row["tokens_per_s"]:>10,.0f} {row["mfu"]:>6.1%} '
          f'{row["memory_gb"]:>5.2f} GB', flush=True)


def next_would_not_fit(rows: list[dict]) -> bool:
    """Whether twice the last size would take more than the CPU's memory: the system would end the process, or swap."""
    if len(rows) < 2:
        return False
    before, now = (row['memory_gb'] for row in rows[-2:])
    return now + 2 * (now - before) > devices.usable_memory(torch.device('cpu')) / 1e9


def _draw(figure, rows, best):
    figure.suptitle('One training step, divided into micro-batches')
    sizes = [row['batch_size'] for row in rows]
    speeds, memory = figure.subplots(1, 2)
    for axes, key, title, label in ((speeds, 'tokens_per_s', 'speed', 'tokens per second'),
                                    (memory, 'memory_gb', 'memory', 'most memory, GB')):
        axes.plot(sizes, [row[key] for row in rows], 'o-')
        axes.plot(best['batch_size'], best[key], 'o', markersize=12, fillstyle='none', color='C3',
                  label=f'chosen: least memory within {1 - WITHIN:.0%} of the fastest')
        axes.set_xscale('log', base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_ylim(0, 1.25 * max(row[key] for row in rows))
        style_axes(axes, title, 'sequences in a micro-batch', label)
        axes.legend(frameon=False)
