"""A config trained by each recipe of train.py's key `matmul` and in each number format: val loss, time, memory."""

import os
import re
import statistics
import tempfile

from configurator import InputError, resolve
from sologpt.bench import process
from sologpt.bench.matmul import GREY, choose, plain_dtypes
from sologpt.machine import devices
from sologpt.matmuls.recipes import NAMES
from sologpt.training.runs import read_run

BASE = 'float32'
PATH = re.compile(r'^matmuls of the blocks: (?:\w+, )?([^;\n]*)', re.M)  # a line of train.py's header


def measure(config, train_args, picture):
    """The figures as plain values; draws `picture`. Raises InputError."""
    device = devices.find_device(resolve(os.path.join(process.ROOT, 'train.py'), train_args)[0]['device'])
    chosen = choose(_rows(device), config['recipes'], [BASE])
    found, failed = {name: [] for name in chosen}, {}
    for seed in range(1, config['runs'] + 1):  # seeds outside, so that a busy minute falls on all alike
        for name in [name for name in chosen if name not in failed]:
            try:
                found[name].append(_train(name, train_args, chosen[name] | {'seed': seed}))
            except InputError as e:
                if name == BASE:  # there is nothing to compare with, and most others would fail alike
                    raise
                failed[name] = str(e).splitlines()[0]
        print(f'seed {seed} of {config["runs"]}', flush=True)
    rows = {name: {'failed': failed[name]} if name in failed else _row(found[name], found[BASE]) for name in chosen}
    _show(rows)
    _draw({name: row for name, row in rows.items() if name not in failed}, picture)
    return rows


def _rows(device):
    """Name -> train.py's keys."""
    rows = {dtype: {'dtype': dtype} for dtype in plain_dtypes(device)}
    rows |= {name: {'matmul': name} for name in NAMES}
    rows['int8 forward only'] = {'matmul': 'int8', 'matmul_gemms': 'fwd'}
    rows['mxfp4 backward only'] = {'matmul': 'mxfp4', 'matmul_gemms': 'dgrad,wgrad'}
    rows['bfloat16 weights'] = {'dtype': 'bfloat16', 'weights_dtype': 'bfloat16'}
    rows['half the weights pruned'] = {'prune': 0.5}
    return rows


def _train(name, train_args, changes):
    """(the run, what computed its matmuls)."""
    with tempfile.TemporaryDirectory() as out_dir:
        options = changes | {'out_dir': out_dir, 'sample_tokens': 0}
        printed = process.own('train.py', [*train_args, *process.flags(options)])
        return read_run(out_dir, name), PATH.search(printed)[1]


def _row(found, found_base):
    (runs, paths), (base, _) = (zip(*pairs, strict=True) for pairs in (found, found_base))
    losses, base_losses = ([run.evals[-1]['val_loss'] for run in group] for group in (runs, base))
    speed, base_speed = (statistics.median(run.get('tokens_per_s') for run in group) for group in (runs, base))
    return {'val_loss': losses, 'mean': statistics.mean(losses),
            'spread': statistics.stdev(losses) if len(losses) > 1 else 0.0,  # standard deviation over seeds
            # of the same seeds, whose luck cancels out
            'difference': statistics.mean(a - b for a, b in zip(losses, base_losses, strict=True)),
            'tokens_per_s': speed, 'speed_ratio': speed / base_speed,
            'memory_gb': max(step['memory_gb'] for run in runs for step in run.steps),
            # 'auto' measures in every run
            'dtype': ' or '.join(sorted({run.header['dtype'] for run in runs})), 'path': paths[0]}


def _show(rows):
    print(f'{"":24} {"val loss":>8} {"spread":>7} {"difference":>10} {"tok/s":>9} {"/ fp32":>6} {"memory":>8}  by')
    for name, row in rows.items():
        if 'failed' in row:
            print(f'{name:24} failed: {row["failed"]}')
        else:
            print(f'{name:24} {row["mean"]:8.4f} {row["spread"]:7.4f} {row["difference"]:+10.4f} '
                  f'{row["tokens_per_s"]:9,.0f} {row["speed_ratio"]:6.2f} {row["memory_gb"]:5.2f} GB  '
                  f'{row["path"]}{"" if row["dtype"] in row["path"] else " (" + row["dtype"] + ")"}')


def _draw(rows, picture):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print('no picture: matplotlib is not installed')
    figure = Figure(figsize=(11, 1 + 0.27 * len(rows)), dpi=110, layout='constrained')
    differences, speeds = figure.subplots(1, 2, sharey=True)
    names, colors = list(rows), [GREY if 'emulated' in row['path'] else 'C0' for row in rows.values()]
    differences.barh(names, [row['difference'] for row in rows.values()], color=colors,
                     xerr=[row['spread'] for row in rows.values()], error_kw={'linewidth': 1, 'capsize': 2})
    differences.axvline(0, color='black', linewidth=0.8)
    differences.set_xlabel(f"val loss less {BASE}'s; the spread is over seeds")
    differences.invert_yaxis()  # the first row on top
    speeds.barh(names, [row['speed_ratio'] for row in rows.values()], color=colors)
    speeds.axvline(1, color='black', linewidth=0.8)
    speeds.set_xlabel(f"tokens per second, {BASE}'s = 1; grey: emulated")
    for axes in (differences, speeds):
        axes.grid(alpha=0.25, axis='x')
    figure.savefig(picture)
    print(f'picture: {picture}')
