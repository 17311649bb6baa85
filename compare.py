"""
Several runs side by side: a table of what differs and how they did, and a picture of their losses.

  python compare.py out-a out-b
  python compare.py out-a ../nanoGPT/run.log --gpu="RTX 4070"

A run is an out_dir with log.jsonl, such a file itself, or a console log: nanoGPT's, or train.py's. Times and MFU are
medians over the logged steps.
"""

import json
import math
import os
import re
import shlex
import sys
import time
from typing import NamedTuple

from configurator import InputError, configure
from sologpt.machine import devices
from sologpt.machine.peaks import datasheet_flops
from sologpt.training.runs import NANOGPTS_SOURCE, NANOGPTS_STEP, read_run

# ----------------------------------------------------------------------------------------------------------------------
plot = 'compare.png'  # the picture (.png, .svg or .pdf); '': none
dest = ''  # where the figures are also written, as JSON
gpu = ''  # a GPU's name, such as 'RTX 4070': MFU also against its datasheet peak for the run's dtype
peak_flops: float | None = None  # FLOP/s: MFU also against this peak
# ----------------------------------------------------------------------------------------------------------------------
paths = [arg for arg in sys.argv[1:] if not arg.startswith('-')]
configure(globals(), [arg for arg in sys.argv[1:] if arg.startswith('-')])


def column_names(paths):
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


def row(label, values, show=str, better=None):
    """better: min, max, or None where no value is better than another or they do not compare."""
    cells = ['-' if v is None else show(v) for v in values]
    if better and len(set(cells) - {'-'}) > 1:
        best = show(better(v for v in values if v is not None and not math.isnan(v)))
        cells = [cell + (' *' if cell == best else '  ') for cell in cells]
    else:
        cells = [cell + '  ' for cell in cells]
    return Row(label, values, cells)


def digits(x):
    """Four of them, and all before the point: 1.250, 26.51, 121.9, 52,340"""
    return f'{x:,.{max(0, 3 - int(math.log10(max(x, 1))))}f}'


def same(values):
    return len({v for v in values if v is not None}) == 1


def config_rows(runs):
    rows = []
    for key in sorted({key for run in runs for key in run.config} - {'out_dir'}):  # that one names the column
        # a console log of nanoGPT gives only what was set: what one sets and another does not differs between them
        partial = {key in run.config for run in runs if run.header.get('peak_source') == NANOGPTS_SOURCE}
        if len({run.config[key] for run in runs if key in run.config}) > 1 or len(partial) > 1:
            rows.append(row(key, [str(run.config[key]) if key in run.config else None for run in runs]))
    return rows


def speed_rows(runs, peaks):
    """peaks: {what it is: for each run, the FLOP/s that MFU is also shown against}."""
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
        row('max memory, GB', [max((s['memory_gb'] for s in run.steps if s.get('memory_gb')), default=None)
                               for run in runs], '{:.1f}'.format, min)]


def dtype_of(run):
    return run.get('dtype') if run.get('dtype') in devices.DTYPES else None


def other_peaks(runs):
    """What --gpu and --peak_flops ask for. Raises InputError."""
    peaks = {}
    if gpu:
        if not datasheet_flops(gpu, 'float32'):
            raise InputError(f'gpu={gpu!r} is not in the table of hardware.py: give the exact name, such as "RTX 4070" '
                             f'or "H100 PCIe", or its rate with --peak_flops=')
        listed = [datasheet_flops(gpu, dtype_of(run) or 'bfloat16', run.config.get('tf32', True))
                  for run in runs]
        peaks[f'{gpu}, {"/".join(f"{n / 1e12:.4g}" for n in dict.fromkeys(listed) if n)} TFLOP/s'] = listed
    if peak_flops is not None:
        if peak_flops <= 0:
            raise InputError(f'peak_flops={peak_flops} must be above 0')
        peaks[f'{peak_flops / 1e12:.4g} TFLOP/s'] = [peak_flops] * len(runs)
    return peaks


def common_points(runs, axis, at_most=4):
    """
    Where to compare val losses: positions at which all runs have evaluated, else evenly over the range that all cover,
    the last of either included; and then the end of the run that went furthest.
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


def loss_rows(runs):
    better = min if len({run.config['dataset'] for run in runs if run.config.get('dataset')}) < 2 else None
    lowest = [min(run.evals, key=lambda e: e['val_loss'], default=None) for run in runs]
    rows = [row('final train loss', [(run.evals and run.evals[-1].get('train_loss')) or run.steps[-1]['loss']
                                     for run in runs], '{:.4f}'.format, better),
            row('lowest val loss', [e and e['val_loss'] for e in lowest], '{:.4f}'.format, better),
            row('  at step', [e and e['iter'] for e in lowest], '{:,}'.format),
            row('  perplexity (per token)', [e and math.exp(e['val_loss']) for e in lowest], digits, better)]
    for axis, unit in (('iter', 'steps'), ('tokens', 'tokens'), ('seconds', 's of training')):
        for x in common_points(runs, axis):
            losses = [run.val_loss_at(axis, x) for run in runs]
            between = any(loss is not None and x not in run.curve(axis)[0]
                          for run, loss in zip(runs, losses, strict=True))
            at = digits(x) if axis == 'seconds' else f'{x:,.0f}' if x < 1e6 else f'{x / 1e6:,.1f}M'
            rows.append(row(f'val loss at {at} {unit}{" ~" * between}', losses, '{:.4f}'.format, better))
    return rows


def print_table(sections, names):
    """sections: {title: rows}. Rows without any value are left out."""
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


# ---- the picture -----------------------------------------------------------------------------------------------------

def draw(runs):
    """Val losses, and thin the train losses, against steps, tokens and training time. Needs matplotlib."""
    from matplotlib.figure import Figure  # without pyplot it needs no display and opens no window
    units = {'iter': ((1, 'steps'),),
             'tokens': ((1e9, 'tokens, billions'), (1e6, 'tokens, millions'), (1, 'tokens')),
             'seconds': ((3600, 'hours of training'), (60, 'minutes of training'), (1, 'seconds of training'))}
    figure = Figure(figsize=(15, 5.2), dpi=110, layout='constrained')
    panels = figure.subplots(1, 3, sharey=True)
    most = max(len(run.evals) for run in runs)
    for panel, (axis, choices) in zip(panels, units.items(), strict=True):
        curves = [(run.place(axis), run.curve(axis)) for run in runs]
        ends = [max([*xs, *(() if steps is None else steps)], default=0) for steps, (xs, _) in curves]
        unit, label = next((u for u in choices if max(ends) >= u[0]), choices[-1])
        for i, (run, (steps, (xs, losses))) in enumerate(zip(runs, curves, strict=True)):
            if steps is not None:
                panel.plot(steps / unit, [s['loss'] for s in run.steps], color=f'C{i}', linewidth=0.7, alpha=0.4)
            # a line between few evaluations, of which the first is the untrained model's, would not be the run's course
            panel.plot([x / unit for x in xs], losses, color=f'C{i}', linewidth=2 if len(xs) >= 5 else 0,
                       label=run.name, marker='o' if most <= 30 or len(xs) < 5 else None, markersize=4)
        known = [end for end in ends if end]
        if known and max(known) > 8 * min(known):  # on a linear axis the short run would be a stroke at the left
            firsts = [x for _, (xs, _) in curves for x in xs if x > 0]
            panel.set_xscale('log', nonpositive='mask')
            panel.xaxis.set_major_formatter('{x:g}')
            panel.set_xlim(left=min(firsts or known) / unit / 2)
            label += ' (log)'
        else:
            panel.set_xlim(left=0)
        panel.set_xlabel(label)
        panel.grid(alpha=0.25)
        panel.spines[['top', 'right']].set_visible(False)
    if min(len(run.evals) for run in runs) >= 5:  # then the first fall is not what is to be seen
        later = [e['val_loss'] for run in runs for e in run.evals[1 + len(run.evals) // 10:]]
        low, high = min(later), max(later)
        panels[0].set_ylim(top=high + max(0.15 * (high - low), 0.02 * high))
    panels[0].set_ylabel('loss, nats per token\n(thick: validation, thin: training)')
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=min(len(runs), 6), frameon=False)
    return figure


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
sections = {'config, where it differs': config_rows(runs), 'speed': speed_rows(runs, other_peaks(runs)),
            'loss': loss_rows(runs)}
print_table(sections, names)
if estimated := [run.name for run in runs if run.evals and not run.seconds_logged]:
    print(f'seconds are not logged in {", ".join(estimated)}: median step time x iterations stands for them')
if gpu and (unknown := [run.name for run in runs if not dtype_of(run)]):
    print(f'the dtype is not logged in {", ".join(unknown)}: bfloat16 is assumed for {gpu}')
if len({run.config['dataset'] for run in runs if run.config.get('dataset')}) > 1:
    print('the datasets differ: the losses do not compare')

if dest:
    figures = {title: {r.label.strip(' ~'): dict(zip(names, r.values, strict=True)) for r in rows}
               for title, rows in sections.items()}
    with open(dest, 'w', encoding='utf-8') as f:
        json.dump({'command': shlex.join(['python', 'compare.py', *sys.argv[1:]]), 'date': time.strftime('%Y-%m-%d'),
                   'runs': dict(zip(names, paths, strict=True)), 'figures': figures}, f, indent=1)
    print(f'figures: {dest}')
if plot:
    try:
        figure = draw(runs)
        figure.savefig(plot)
        print(f'picture: {plot}')
    except ImportError:
        print('no picture: matplotlib is not installed (pip install matplotlib)')
