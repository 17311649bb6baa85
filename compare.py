"""
Several runs side by side: a table of what differs and how they did, and a picture of their losses.

  python compare.py out-a out-b
  python compare.py out-a ../nanoGPT/run.log --gpu="RTX 4070"

A run is an out_dir with log.jsonl, a log.jsonl itself, or a console log of nanoGPT or train.py. Times and MFU are
medians over the logged steps.
"""

import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from configurator import InputError, configure
from sologpt.bench.curves import draw_curves, loss_scales, tokenizers_differ
from sologpt.bench.pictures import draw_picture
from sologpt.bench.process import write_json
from sologpt.machine import devices
from sologpt.machine.peaks import datasheet_flops
from sologpt.training.runs import NANOGPTS_SOURCE, NANOGPTS_STEP, Run, read_run

# ----------------------------------------------------------------------------------------------------------------------
plot = 'compare.png'  # the picture, a .png, .svg or .pdf; '': none
dest = ''  # a JSON file for the figures; '': none
gpu = ''  # the name of a GPU, such as 'RTX 4070': show MFU against its datasheet peak, too
peak_flops: float | None = None  # FLOP/s: show MFU against this peak, too
# ----------------------------------------------------------------------------------------------------------------------
paths = []
configure(globals(), files=paths)


def column_names(paths: list[str]) -> list[str]:
    """The last part of each path; where another run has that too, as many parts as tell the two apart."""
    parts = [os.path.abspath(os.path.dirname(p) if os.path.basename(p) == 'log.jsonl' else p).split(os.sep)
             for p in paths]
    names = []
    for i, own in enumerate(parts):
        others = parts[:i] + parts[i + 1:]
        n = next((n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others)), None)
        names.append('/'.join(own[-n:]) if n else f'{own[-1]} ({i + 1})')  # the same path twice
    return names


# ---- the table -------------------------------------------------------------------------------------------------------

class Row(NamedTuple):
    label: str
    values: list  # one per run, None where it has none
    cells: list   # the same as text, the best marked


def row(label: str, values: list, show: Callable[[Any], str] = str, better: Callable | None = None) -> Row:
    """
    A Row. show: makes a value text. better: min, max, or None if no value is better than another, or if they do not
    compare.
    """
    cells = ['-' if v is None else show(v) for v in values]
    if better and len(set(cells) - {'-'}) > 1:
        best = show(better(v for v in values if v is not None and not math.isnan(v)))
        cells = [cell + (' *' if cell == best else '  ') for cell in cells]
    else:
        cells = [cell + '  ' for cell in cells]
    return Row(label, values, cells)


def digits(x: float) -> str:
    """The number with four digits, and all of those before the point: 1.250, 26.51, 121.9, 52,340"""
    return f'{x:,.{max(0, 3 - int(math.log10(max(x, 1))))}f}'


def same(values: list) -> bool:
    """Whether the values that are known are all the same."""
    return len({v for v in values if v is not None}) == 1


def show_value(value: Any) -> str:
    """A key's value as the console shows it, so that a log and a console agree."""
    return f'{value:.6g}' if isinstance(value, float) else str(value)


def config_rows(runs: list[Run]) -> list[Row]:
    """The config's keys that differ between runs."""
    rows = []
    for key in sorted({key for run in runs for key in run.config} - {'out_dir'}):  # that one names the column
        # a console log of nanoGPT gives only what was set: what one sets and another does not differs between them
        partial = {key in run.config for run in runs if run.header.get('peak_source') == NANOGPTS_SOURCE}
        values = [show_value(run.config[key]) if key in run.config else None for run in runs]
        if not same(values) or len(partial) > 1:
            rows.append(row(key, values))
    return rows


def speed_rows(runs: list[Run], peaks: dict[str, list]) -> list[Row]:
    """Speed and memory. peaks: what it is -> for each run, the FLOP/s that MFU is also shown against."""
    def each(compute, *keys):
        return [run.derived(compute, *keys) for run in runs]

    def fact(key):
        return [run.get(key) for run in runs]

    step = each('{:,}'.format, 'tokens_per_iter')
    made_of = each('{:,} = {} x {} x {}'.format, 'tokens_per_iter', *NANOGPTS_STEP)
    peak = each(lambda peak, source: f'{peak / 1e12:.4g} ({re.split("[,;] ", source)[0]})', 'peak_flops', 'peak_source')
    # what one device did, however many there were
    achieved = each(lambda mfu, peak: mfu * peak, 'mfu', 'peak_flops')
    same_step = same(fact('tokens_per_iter'))
    same_micro_step = same(each(lambda b, t: b * t, 'batch_size', 'block_size'))
    same_peak = len({run.get('peak_source') == NANOGPTS_SOURCE for run in runs}) == 1
    return [
        row('device', fact('device')),
        row('dtype', fact('dtype')),
        row('parameters', fact('parameters'), lambda n: f'{n / 1e6:.2f}M' if n >= 1e6 else f'{n:,}'),
        row('FLOPs per token', fact('flops_per_token'), lambda n: f'{digits(n / 1e6)}M'),
        row('tokens per step = batch x block x accumulation', [m or n for m, n in zip(made_of, step, strict=True)]),
        row('ms per step', fact('time_ms'), digits, min if same_step else None),
        row('ms per micro-step', each(lambda ms, n, processes: ms * processes / n, 'time_ms',
                                      'gradient_accumulation_steps', 'processes'), digits,
            min if same_micro_step else None),
        row('tokens per second', each(lambda n, ms: n / ms * 1000, 'tokens_per_iter', 'time_ms'),
            lambda n: f'{n / 1000:.1f}k', max),
        row('MFU', fact('mfu'), '{:.1%}'.format, max if same_peak else None),
        row('  of TFLOP/s', peak),
        *(row(f'MFU of {what}', [flops and of and flops / of for flops, of in zip(achieved, of_run, strict=True)],
              '{:.1%}'.format, max) for what, of_run in peaks.items()),
        row('max memory, GB', [run.max_memory() for run in runs], '{:.1f}'.format, min)]


def dtype_of(run: Run) -> str | None:
    """The name of the run's dtype, if it is logged."""
    return run.get('dtype') if run.get('dtype') in devices.DTYPES else None


def other_peaks(runs: list[Run], gpu: str, peak_flops: float | None) -> dict[str, list]:
    """The peaks that --gpu and --peak_flops ask for: see speed_rows(). Raises InputError."""
    peaks = {}
    if gpu:
        if not datasheet_flops(gpu, 'float32'):
            raise InputError(f'gpu={gpu!r} is not in the table of sologpt/machine/peaks.py: give the exact name, such '
                             f'as "RTX 4070" or "H100 PCIe", or its rate with --peak_flops=')
        listed = [datasheet_flops(gpu, dtype_of(run) or 'bfloat16', run.config.get('tf32', True))
                  for run in runs]
        peaks[f'{gpu}, {"/".join(f"{n / 1e12:.4g}" for n in dict.fromkeys(listed) if n)} TFLOP/s'] = listed
    if peak_flops is not None:
        if peak_flops <= 0:
            raise InputError(f'peak_flops={peak_flops} must be above 0')
        peaks[f'{peak_flops / 1e12:.4g} TFLOP/s'] = [peak_flops] * len(runs)
    return peaks


def common_points(runs: list[Run], axis: str, at_most: int = 4) -> list[float]:
    """
    Positions on an axis at which to compare val losses, and the end of the run that went furthest.

    They are positions at which all runs have evaluated. If there are none, they lie evenly over the range that all runs
    cover. The last of either is included.
    """
    curves = [xs for xs in ([x for x in run.curve(axis)[0] if x > 0] for run in runs) if xs]
    if not curves:
        return []
    shared = sorted(set.intersection(*(set(xs) for xs in curves)))
    if shared:
        n = min(at_most, len(shared))
        points = [shared[(i + 1) * len(shared) // n - 1] for i in range(n)]
    else:
        start, end = max(xs[0] for xs in curves), min(xs[-1] for xs in curves)
        points = [x for x in (end * (i + 1) / at_most for i in range(at_most)) if x >= start]
    furthest = max(xs[-1] for xs in curves)
    return points + [furthest] * (points[-1:] != [furthest])


def losses_compare(runs: list[Run]) -> bool:
    """Whether the runs have read the same data, as far as their logs tell."""
    return len({run.config['dataset'] for run in runs if run.config.get('dataset')}) < 2 and not tokenizers_differ(runs)


def loss_rows(runs: list[Run]) -> list[Row]:
    """Losses at the end, at their lowest, and at common points."""
    better = min if losses_compare(runs) else None
    lowest = [min(run.evals, key=lambda e: e['val_loss'], default=None) for run in runs]
    rows = [row('final train loss', [(run.evals and run.evals[-1].get('train_loss')) or run.steps[-1]['loss']
                                     for run in runs], '{:.4f}'.format, better),
            row('lowest val loss', [e and e['val_loss'] for e in lowest], '{:.4f}'.format, better),
            row('  at step', [e and e['iter'] for e in lowest], '{:,}'.format),
            row('  perplexity (per token)', [e and math.exp(e['val_loss']) for e in lowest], digits, better)]
    scales, scaled_in = loss_scales(runs)
    if scaled_in == 'nats per byte':
        rows.append(row('  lowest val loss, nats per byte', [
            e and e['val_loss'] / scale for e, scale in zip(lowest, scales, strict=True)], '{:.4f}'.format))
    for axis, unit in (('iter', 'steps'), ('tokens', 'tokens'), ('seconds', 's of training')):
        for x in common_points(runs, axis):
            losses = [run.val_loss_at(axis, x) for run in runs]
            between = any(loss is not None and x not in run.curve(axis)[0]
                          for run, loss in zip(runs, losses, strict=True))
            at = digits(x) if axis == 'seconds' else f'{x:,.0f}' if x < 1e6 else f'{x / 1e6:,.1f}M'
            rows.append(row(f'val loss at {at} {unit}{" ~" * between}', losses, '{:.4f}'.format, better))
    return rows


def print_table(sections: dict[str, list[Row]], names: list[str]) -> None:
    """Print the rows under their titles, with a column for each name. Rows without any value are left out."""
    sections = {title: [r for r in rows if any(v is not None for v in r.values)] for title, rows in sections.items()}
    shown = [r for rows in sections.values() for r in rows]
    width = max(len(r.label) + 2 for r in shown)
    widths = [2 + max(len(name) + 2, *(len(r.cells[i]) for r in shown)) for i, name in enumerate(names)]
    for title, rows in sections.items():
        if rows:
            for label, cells in [(title, [name + '  ' for name in names])] + [('  ' + r.label, r.cells) for r in rows]:
                print(f'{label:{width}}' + ''.join(f'{c:>{w}}' for c, w in zip(cells, widths, strict=True)).rstrip())
            print()
    if any('*' in cell for r in shown for cell in r.cells):
        print('* the best of its row; rows without one do not compare, or no value is better')
    if any(r.label.endswith('~') for r in shown):
        print('~ interpolated linearly where a run has no evaluation just there; -: beyond its evaluations')


# ----------------------------------------------------------------------------------------------------------------------
if not paths:
    raise InputError('no runs given: python compare.py out-a out-b (or --help)')
for key, file in (('plot', plot), ('dest', dest)):
    if file and (os.path.isdir(file) or not os.path.isdir(os.path.dirname(file) or '.')):
        raise InputError(f'{key}={file}: that is a folder, or its folder does not exist')
if plot and os.path.splitext(plot)[1] not in ('.png', '.svg', '.pdf'):
    raise InputError(f'plot={plot}: must end in .png, .svg or .pdf')
names = column_names(paths)
runs = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
sections = {'config, where it differs': config_rows(runs),
            'speed': speed_rows(runs, other_peaks(runs, gpu, peak_flops)), 'loss': loss_rows(runs)}
print_table(sections, names)
if estimated := [run.name for run in runs if run.evals and not run.seconds_logged]:
    print(f'seconds are not logged in {", ".join(estimated)}: median step time x iterations stands for them')
if gpu and (unknown := [run.name for run in runs if not dtype_of(run)]):
    print(f'the dtype is not logged in {", ".join(unknown)}: bfloat16 is assumed for {gpu}')
if tokenizers_differ(runs):
    print('the tokenizers differ: losses per token do not compare' +
          (', losses per byte do for the same text' if loss_scales(runs)[1] == 'nats per byte' else ''))
elif not losses_compare(runs):
    print('the datasets differ: the losses do not compare')

if dest:
    figures = {title: {r.label.strip(' ~'): dict(zip(names, r.values, strict=True)) for r in rows}
               for title, rows in sections.items()}
    write_json(dest, {'command': shlex.join(['python', 'compare.py', *sys.argv[1:]]), 'date': time.strftime('%Y-%m-%d'),
                      'runs': dict(zip(names, paths, strict=True)), 'figures': figures})
    print(f'figures: {dest}')
figure = draw_picture(plot, (15, 5.4), draw_curves, runs) if plot else None
