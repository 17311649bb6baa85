"""
A GPU beside nanoGPT on the same one, in one go: what it is, a training step, memory, a race to a loss, sampling, the
recipes for matmuls, adapters, and the rest. `python bench.py --suite=gpu --peer=../nanoGPT` takes at most --minutes;
called again it goes on with the rows that are missing or have failed. --small=True tries it all at a tiny size, on a
CPU too; its figures say nothing about a machine. bench.py also writes the figures as a table (gpu_table.py).

Nothing of the machine is set. The card is read before and after, so that a clock that fell shows.
"""

import os
import re
import statistics
import tempfile
import time

import torch

from configurator import InputError
from sologpt.bench import process
from sologpt.bench.gpu_card import read_card
from sologpt.bench.gpu_rows import LAST, Row, list_rows
from sologpt.bench.gpu_session import Session, caches_in, terminating
from sologpt.bench.peer import check_peer
from sologpt.bench.pictures import DARK_GREY, GREY, draw_picture, style_axes
from sologpt.machine import devices

SHOWN = ('ms_per_step', 'tokens_per_s', 'mfu', 'memory_gb', 'target_val_loss', 'here_final_val_loss', 'matmul_tflops',
         'copy_gb_per_s')


def measure(config: dict, train_args: list[str], picture: str) -> dict:
    """
    The figures: part -> row -> figures, or why there are none. Writes them to config['dest'] after each row, and goes
    on with those that it finds there. Draws `picture`. Raises InputError.
    """
    peer = check_peer(config['peer'])
    options, given = process.resolve_train(train_args)
    if other := [key for key in given if key not in ('device', 'dataset')]:
        raise InputError(f'{other[0]}: this suite sets the keys of training itself, except device and dataset')
    device, small = devices.find_device(options['device']), config['small']
    if device.type != 'cuda' and not small:
        raise InputError(f'device={device}: this suite is for a GPU; --small=True tries it at a tiny size')
    chosen = _choose(config['recipes'])
    settings = {'small': small, 'device': devices.device_name(device), 'torch': torch.__version__,
                'dataset': options['dataset']}
    figures = _begin(config['dest'], settings, config['restart'])
    end = time.monotonic() + 60 * config['minutes']
    with tempfile.TemporaryDirectory() as folder, terminating(), caches_in(folder):
        session = Session(peer, device, small, options['dataset'], folder, figures)
        not_reached = _measure_rows(session, chosen, end, config['dest'])
    figures['summary'] = summary(figures)
    draw_picture(picture, (12, 8), _draw, figures)
    if not_reached:
        print('not measured for want of time; the same command goes on with:')
        for row in not_reached:
            print(f'  {row.part}: {row.name}')
    return figures


def _choose(wanted):
    """The rows of the parts in a list separated by commas; '': all."""
    rows = list_rows()
    parts, asked = list(dict.fromkeys(row.part for row in rows)), list(filter(None, wanted.split(',')))
    if unknown := [part for part in asked if part not in parts]:
        raise InputError(f'recipes: there is no part {unknown[0]!r}: use {", ".join(parts)}')
    return [row for row in rows if not asked or row.part in asked]


def _measure_rows(session, chosen, end, dest):
    """Measure what is missing, and write it to dest. Returns the rows for which there was no time."""
    figures, not_reached = session.figures, []
    _read_card(session, 'before')
    for row in chosen:
        done, left = figures.setdefault(row.part, {}), end - LAST - time.monotonic()
        if row.name in done and _is_final(done[row.name]):
            continue
        if (5 if session.small else row.seconds) > left:
            not_reached.append(row)
            continue
        done[row.name] = _measure_row(session, row, min(left, 3 * row.seconds))
        process.write_json(dest, {'figures': figures})
    _read_card(session, 'after')
    return not_reached


def _begin(dest, settings, restart):
    """The figures to go on with. Raises InputError if they are another machine's, or others in kind."""
    if restart or not os.path.exists(dest):
        return {'settings': settings, 'small': settings['small'], 'device': []}
    try:
        figures = process.read_json(dest)['figures']
        found = figures['settings']
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{dest} is no file of this suite: give another --dest, or --restart=True') from None
    if differ := [key for key, value in settings.items() if found.get(key) != value]:
        raise InputError(f'{dest} was measured with {differ[0]}={found.get(differ[0])!r}, not {settings[differ[0]]!r}: '
                         f'give another --dest, or --restart=True')
    return figures


def _is_final(found):
    """Whether a row need not be tried again: it has figures, or the memory does not suffice, which is a finding too."""
    return 'failed' not in found or re.search(r'out of (GPU )?memory', found['failed'])


def _read_card(session, when):
    row = Row('device', when, 0, read_card, {})
    session.figures['device'].append({'when': when, **_measure_row(session, row, 2 * LAST)})


def _measure_row(session, row, seconds):
    """A row's figures, or why there are none, with the commands that were run."""
    session.commands, start = [], time.perf_counter()
    try:
        with process.time_limit(seconds):
            found = row.measure(session, session.sized(row.keys))
    except Exception as e:  # whatever it is, the other rows are still measured
        reason = str(e) if isinstance(e, InputError) else f'{type(e).__name__}: {e}'
        found = {'failed': session.plain(reason.partition('\n')[0])[:300]}
    found = {**found, 'seconds': time.perf_counter() - start, 'date': time.strftime('%Y-%m-%d'),
             'commands': session.commands}
    shown = found.get('failed') or ', '.join(f'{key} {value:,.4g}' for key, value in found.items()
                                             if key in SHOWN and isinstance(value, float))
    print(f'{row.part}: {row.name}: {shown or "done"} ({found["seconds"]:.0f} s)', flush=True)
    return found


def summary(figures: dict) -> dict:
    """The figures that are compared, as far as they are there."""
    found = {'small': figures['small']}
    steps = figures.get('training_step', {})
    pairs = [[steps.get(f'{who}, round {n}', {}) for who in ('nanoGPT', 'here')] for n in (1, 2)]
    pairs = [(there, here) for there, here in pairs if 'ms_per_step' in there and 'ms_per_step' in here]
    if pairs:
        for key in ('ms_per_step', 'tokens_per_s', 'memory_gb'):
            found[key] = {who: statistics.median(pair[i][key] for pair in pairs)
                          for i, who in enumerate(('nanoGPT', 'here'))}
        own = pairs[0][1]  # nanoGPT's model has as many FLOPs per token, and the peak is the same
        found['mfu'] = {who: rate * own['flops_per_token'] / own['peak_flops']
                        for who, rate in found['tokens_per_s'].items()}
        found['speed_ratio'] = statistics.median(there['ms_per_step'] / here['ms_per_step'] for there, here in pairs)
    runs = {name: row for name, row in figures.get('race', {}).items() if row.get('ratio')}
    if runs:
        best = max(runs, key=lambda name: runs[name]['ratio']['seconds'])
        found['race'] = {'fewer': runs[best]['ratio'], 'by': best, 'target_val_loss': runs[best]['target_val_loss']}
    sampling = {name + words: row[key] for name, row in figures.get('sampling', {}).items()
                for words, key in (('', 'tokens_per_s'), (', compiled', 'compiled_tokens_per_s')) if key in row}
    return found | ({'sampling_tokens_per_s': sampling} if sampling else {})


# ---- the picture -----------------------------------------------------------------------------------------------------

def _draw(figure, figures):
    """What has not been measured is left out."""
    speed, memory, race, sampling = figure.subplots(2, 2).flat
    name = figures['settings']['device']
    figure.suptitle(f'{name}: a try at a tiny size, no measurement' if figures['small'] else
                    f'GPT-2 124M on {name}: this trainer (blue) beside nanoGPT (grey)')
    steps, found = figures.get('training_step', {}), figures['summary']
    rates = {who: rate / 1000 for who, rate in found.get('tokens_per_s', {}).items()} | {
        name: row['tokens_per_s'] / 1000 for name, row in steps.items() if 'mfu' in row and 'round' not in name}
    shares = found.get('mfu', {}) | {name: row['mfu'] for name, row in steps.items() if 'mfu' in row}
    _draw_bars(speed, rates, {name: f', {shares[name]:.0%} MFU' for name in rates})
    style_axes(speed, 'speed of training', 'thousand tokens per second', grid='x')
    used = {name: row['memory_gb'] for name, row in figures.get('memory', {}).items() if 'memory_gb' in row}
    _draw_bars(memory, found.get('memory_gb', {}) | used)
    style_axes(memory, 'memory of training', 'most memory, GB', grid='x')
    _draw_race(race, figures.get('race', {}))
    _draw_bars(sampling, found.get('sampling_tokens_per_s', {}))
    style_axes(sampling, 'speed of sampling one text', 'tokens per second', grid='x')


def _draw_bars(axes, values, notes=None):
    names = list(values)[::-1]
    bars = axes.barh(names, [values[name] for name in names],
                     color=[GREY if name.startswith('nanoGPT') else 'C0' for name in names])
    axes.bar_label(bars, [f'{values[name]:,.{1 if values[name] < 100 else 0}f}{(notes or {}).get(name, "")}'
                          for name in names], padding=3)
    axes.margins(x=0.25)


def _draw_race(axes, rows):
    """The untrained model's loss is left out: the first fall is not what is to be seen."""
    for name, row in rows.items():
        if row.get('curve'):
            xs, losses = (values[1:] for values in row['curve'])
            is_peer = name == 'nanoGPT'
            axes.plot(xs, losses, 'o-', color=DARK_GREY if is_peer else None, label=name)
            if is_peer:
                axes.axhline(row['target_val_loss'], color=DARK_GREY, linestyle='dotted', label="nanoGPT's final loss")
    style_axes(axes, 'race to a loss', 'seconds of training', 'validation loss, nats per token')
    if axes.lines:
        axes.legend(frameon=False)
