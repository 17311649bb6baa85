"""The figures of the gpu suite as one Markdown table, for docs/measured.md."""

import json
import re

from sologpt.bench.gpu_rows import STEP, deciding_rows

HEAD = '| what | nanoGPT | here | ratio |\n|---|---|---|---|'


def to_markdown(measured: dict) -> str:
    """
    The content of results/gpu.json as Markdown: where it was measured, and a table.

    The rows that decide come first, also those that were not reached. A row that failed has its reason in place of a
    figure. `ratio` says how many times as fast this trainer is, or how many times less it takes.
    """
    figures = measured['figures']
    lines = [*_heading(measured), '', HEAD, *_step_lines(figures), *_memory_lines(figures), *_race_lines(figures),
             *_sampling_lines(figures), *_linear_lines(figures), *_other_lines(figures)]
    return '\n'.join(lines) + '\n'


def _heading(measured):
    figures, cards = measured['figures'], measured['figures']['device']
    card = next((card for card in cards if 'failed' not in card), {})
    versions = [f'torch {measured["torch"]}', f'Python {measured["python"]}']
    versions[1:1] = [f'{name} {card[key]}' for name, key in (('CUDA', 'cuda'), ('cuDNN', 'cudnn'), ('Triton', 'triton'))
                     if card.get(key)]
    if driver := card.get('idle', {}).get('driver_version'):
        versions.append(f'driver {driver}')
    lines = [f'GPT-2 124M on {figures["settings"]["device"]}, beside nanoGPT. {", ".join(versions)}; '
             f'{_dates(measured)}. Command: `{measured["command"]}`.']
    if figures['small']:
        lines.insert(0, '**A try at a tiny size: these are no measurements.**\n')
    speeds = [f'{card["when"]}: a matmul {card["matmul_tflops"]:,.1f} TFLOP/s, a copy {card["copy_gb_per_s"]:,.0f} GB/s'
              for card in cards if 'matmul_tflops' in card]
    return lines + ([f'The card {"; ".join(dict.fromkeys(speeds))}.'] if speeds else [])


def _dates(measured):
    """The days on which rows were measured."""
    found = set(re.findall(r'"date": "(\d+-\d+-\d+)"', json.dumps(measured['figures']))) or {measured['date']}
    return min(found) if len(found) == 1 else f'{min(found)} to {max(found)}'


# ---- cells -----------------------------------------------------------------------------------------------------------

def _line(what, there='', here='', ratio=''):
    return f'| {what} | {there} | {here} | {ratio} |'


def _cell(row, key, form='{:,.1f}'):
    """A figure of a row, or the reason why there is none."""
    if row is None:
        return 'not measured'
    if 'failed' in row:
        return 'failed: ' + ' '.join(row['failed'].replace('|', '\\|').split())
    value = row.get(key)
    return '' if value is None else form(value) if callable(form) else form.format(value)


def _times(value):
    return f'{value:,.2f} x' if value < 10 else f'{value:,.0f} x'


def _quotient(over, under):
    """over / under as a ratio; '' if one of them is not known."""
    return _times(over / under) if over and under else ''


def _tokens(value):
    return f'{value:,.0f}'


def _percent(value):
    return f'{value:.1%}'


# ---- the deciding rows -----------------------------------------------------------------------------------------------

def _step_lines(figures):
    """Medians over the rounds where there are any; otherwise why there are none."""
    rows, found = figures.get('training_step', {}), figures.get('summary', {})
    there, here = ([rows[name] for n in (1, 2) if (name := f'{who}, round {n}') in rows] for who in ('nanoGPT', 'here'))
    there, here = (next((row for row in side if 'failed' not in row), side[-1] if side else None)
                   for side in (there, here))
    if 'mfu' in found:
        there, here = ({key: found[key][who] for key in ('ms_per_step', 'tokens_per_s', 'memory_gb', 'mfu')}
                       for who in ('nanoGPT', 'here'))
    of_step = f'of a training step of {STEP["batch_size"] * STEP["block_size"] * STEP["gradient_accumulation_steps"]:,}'
    lines = [
        _line(f'ms {of_step} tokens', _cell(there, 'ms_per_step'), _cell(here, 'ms_per_step'),
              _times(found['speed_ratio']) if 'speed_ratio' in found else '')]
    if there and here and 'failed' not in there | here:
        lines += [
            _line('tokens per second', _cell(there, 'tokens_per_s', _tokens), _cell(here, 'tokens_per_s', _tokens)),
            _line('MFU', _cell(there, 'mfu', _percent), _cell(here, 'mfu', _percent)),
            _line('memory, GB', _cell(there, 'memory_gb', '{:.2f}'), _cell(here, 'memory_gb', '{:.2f}'),
                  _quotient(there['memory_gb'], here['memory_gb']))]
    base = here or {}
    for name, row in rows.items():
        if 'round' not in name:
            lines.append(_line(f'ms of the same step, {name}', '', _with_mfu(row),
                               _quotient(there and there.get('ms_per_step') or base.get('ms_per_step'),
                                         row.get('ms_per_step'))))
    return lines


def _with_mfu(row):
    return _cell(row, 'ms_per_step') + (f' ({row["mfu"]:.1%} MFU)' if 'mfu' in row else '')


def _memory_lines(figures):
    rows = figures.get('memory', {})
    names = dict.fromkeys([row.name for row in deciding_rows() if row.part == 'memory']) | dict.fromkeys(rows)
    return [_line(f'memory of a step, {name}, GB', '', _foreseen(rows[name]) if 'peak_gb' in rows.get(name, {}) else
                  _cell(rows.get(name), 'memory_gb', '{:.2f}')) for name in names]


def _foreseen(row):
    return ', '.join(f'{size} sequences {gb:.2f}' for size, gb in row['peak_gb'].items())


def _race_lines(figures):
    rows = figures.get('race', {})
    target = rows.get('nanoGPT')
    reached = 'peer' in (target or {})
    what = "seconds to nanoGPT's loss"
    if reached:
        what += f', {target["target_val_loss"]:.4f} after {target["steps"]} steps'
    lines = []
    for name in dict.fromkeys(['here, 20 % of the tokens', *(name for name in rows if name != 'nanoGPT')]):
        row, share = rows.get(name), name.removeprefix('here, ')
        if row and row.get('here'):
            here = f'{row["here"]["seconds"]:,.1f} ({row["here"]["tokens"]:,} tokens)'
        elif row and 'here_final_val_loss' in row:
            here = f'not reached: {row["here_final_val_loss"]:.4f} at the end'
        else:
            here = _cell(row, 'seconds')
        there = f'{target["peer"]["seconds"]:,.1f} ({target["peer"]["tokens"]:,} tokens)' if reached else \
            _cell(target, 'none')
        lines.append(_line(f'{what}, with {share}', there, here,
                           _times(row['ratio']['seconds']) if row and row.get('ratio') else ''))
    return lines


def _sampling_lines(figures):
    rows = figures.get('sampling', {})
    there, here = rows.get('nanoGPT'), rows.get('here')
    lines = []
    for words, key in (('', 'tokens_per_s'), (', compiled', 'compiled_tokens_per_s')):
        failed = (here or {}).get('compiled_failed') if words else None
        own = {'failed': failed} if failed else here
        lines.append(_line(f'tokens per second of one text{words}', _cell(there, 'tokens_per_s') if not words else '',
                           _cell(own, key), _quotient((here or {}).get(key), (there or {}).get('tokens_per_s'))))
    return lines


def _linear_lines(figures):
    row = figures.get('linears', {}).get('fp8 and int8')
    if 'widths' not in (row or {}):
        return [_line('a Linear in fp8 and int8', '', _cell(row, 'none'))]
    lines = []
    for width, found in row['widths'].items():
        base = found[row['dtype']]['ms']
        for name, linear in found.items():
            if name != row['dtype']:
                here = _cell(linear, 'ms', '{:.3f}') + (f'; {base:.3f} in {row["dtype"]}' if 'ms' in linear else '')
                what = f'ms of a Linear {int(width):,} wide, {row["tokens"]:,} tokens, forward and backward, `{name}`'
                lines.append(_line(what, '', here, _times(linear['speed']) if 'speed' in linear else ''))
    return lines


# ---- the rest --------------------------------------------------------------------------------------------------------

def _other_lines(figures):
    """Rows that are beside nanoGPT's own, recipes at each width, and what the others say of themselves."""
    lines = []
    for part in ('launch_bound', 'matmul', 'adapters', 'more'):
        rows = figures.get(part, {})
        for name, row in rows.items():
            if name.startswith('nanoGPT, '):
                continue
            if name.startswith('here, '):
                there = rows.get('nanoGPT, ' + name.removeprefix('here, '))
                lines.append(_line(f'ms of a step of {name.removeprefix("here, ")}',
                                   _cell(there, 'ms_per_step', '{:.2f}') if there else '',
                                   _cell(row, 'ms_per_step', '{:.2f}'),
                                   _quotient((there or {}).get('ms_per_step'), row.get('ms_per_step'))))
            elif 'rows' in row and part == 'matmul':
                lines += _recipe_lines(row)
            elif 'failed' in row or 'ms_per_step' in row:
                lines.append(_line(f'{part}: {name}, ms per step' if 'ms_per_step' in row else f'{part}: {name}', '',
                                   _cell(row, 'ms_per_step')))
            else:
                lines.append(_line(f'{part}: {name}', '', f'in the JSON file, {row["seconds"]:.0f} s'))
    return lines


def _recipe_lines(row):
    lines = []
    for name, found in row['rows'].items():
        measured = [at for at in found if 'ms' in at]
        if name != 'bfloat16' and measured:
            times = ', '.join(f'{at["ms"]:.3f} ({at["width"]:,} wide)' for at in measured)
            lines.append(_line(f'ms of a Linear, {row["tokens"]:,} tokens, `{name}`, {measured[0]["path"]}', '', times,
                               ', '.join(_times(1 / at['ratio_to_bfloat16']) for at in measured)))
    return lines
