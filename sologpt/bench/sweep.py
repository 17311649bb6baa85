"""
The same step of a config in micro-batches of 1, 2, 4, ... sequences, until the memory or the step ends.

Every size is a run of its own, of a few steps. Times are medians without the first step, which warms up and compiles.
"""

import re
import tempfile

import torch

from configurator import InputError
from sologpt.bench import process
from sologpt.machine import devices
from sologpt.training.runs import read_run


def measure(config, train_args, picture):
    """The figures as plain values; draws `picture`. Raises InputError."""
    quiet = {'eval_iters': 1, 'always_save_checkpoint': False, 'wandb_log': False, 'sample_tokens': 0,
             'log_interval': 1}
    rows = []
    with tempfile.TemporaryDirectory() as out_dir:
        quiet |= {'out_dir': out_dir}
        printed = process.own('train.py', [*train_args, *process.flags(quiet | {'eval_only': True})])
        step, block_size = (int(re.search(pattern, printed)[1].replace(',', '')) for pattern in
                            (r'tokens per iteration will be: ([\d,]+)', r'sequences x (\d+) tokens'))
        print(f'{step:,} tokens per step in sequences of {block_size}; {config["steps"]} steps of each')
        print(f'{"batch_size":>10} {"accumulation":>12} {"ms/step":>10} {"ms/micro-step":>13} {"tok/s":>10} {"MFU":>6} '
              f'{"memory":>8}')
        batch_size = 1
        while step % (batch_size * block_size) == 0:
            options = {'batch_size': batch_size, 'total_batch_size': step, 'max_iters': config['steps'] + 1,
                       'eval_interval': config['steps'] + 1}
            try:
                process.own('train.py', [*train_args, *process.flags(quiet | options)])
            except InputError as e:
                if 'out of GPU memory' not in str(e):
                    raise
                print(f'{batch_size:>10} {step // (batch_size * block_size):>12}  out of GPU memory')
                break
            rows.append(_row(read_run(out_dir, ''), batch_size))
            _show(rows[-1])
            if _next_would_not_fit(rows):
                print(f'{2 * batch_size:>10} would not fit into the memory of this machine')
                break
            batch_size *= 2
    # of those within 2 % of the fastest the one with the least memory
    fastest = max(row['tokens_per_s'] for row in rows)
    best = min((row for row in rows if row['tokens_per_s'] >= 0.98 * fastest), key=lambda row: row['memory_gb'])
    chosen = f'--batch_size={best["batch_size"]} --gradient_accumulation_steps={best["gradient_accumulation_steps"]}'
    print(f'best: {chosen}')
    _draw(rows, best, picture)
    return {'tokens_per_step': step, 'block_size': block_size, 'rows': rows, 'best': chosen}


def _row(found, batch_size):
    ms, accumulated = found.get('time_ms'), found.header['config']['gradient_accumulation_steps']
    return {'batch_size': batch_size, 'gradient_accumulation_steps': accumulated, 'ms_per_step': ms,
            'ms_per_micro_step': ms / accumulated, 'tokens_per_s': found.header['tokens_per_iter'] / ms * 1000,
            'mfu': found.get('mfu'), 'memory_gb': max(s['memory_gb'] for s in found.steps)}


def _show(row):
    print(f'{row["batch_size"]:>10} {row["gradient_accumulation_steps"]:>12} {row["ms_per_step"]:>10,.1f} '
          f'{row["ms_per_micro_step"]:>13,.2f} {row["tokens_per_s"]:>10,.0f} {row["mfu"]:>6.1%} '
          f'{row["memory_gb"]:>5.2f} GB', flush=True)


def _next_would_not_fit(rows):
    """On a CPU the system would end the process, or swap: the memory that the next size would take is foreseen."""
    if len(rows) < 2:
        return False
    before, now = (row['memory_gb'] for row in rows[-2:])
    return now + 2 * (now - before) > devices.memory_limit(torch.device('cpu')) / 1e9


def _draw(rows, best, picture):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print('no picture: matplotlib is not installed')
    figure = Figure(figsize=(10, 4), dpi=110, layout='constrained')
    for axes, (key, label) in zip(figure.subplots(1, 2), (('tokens_per_s', 'tokens per second'),
                                                          ('memory_gb', 'most memory, GB')), strict=True):
        axes.plot([row['batch_size'] for row in rows], [row[key] for row in rows], 'o-')
        axes.plot(best['batch_size'], best[key], 'o', markersize=12, fillstyle='none', color='C3', label='best')
        axes.set_xscale('log', base=2)
        axes.set_xticks([row['batch_size'] for row in rows], [str(row['batch_size']) for row in rows])
        axes.set_ylim(0, 1.1 * max(row[key] for row in rows))
        axes.set_xlabel('sequences in a micro-batch')
        axes.set_ylabel(label)
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
    figure.savefig(picture)
    print(f'picture: {picture}')
