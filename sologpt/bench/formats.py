"""A config trained by each recipe of train.py's key `matmul` and in each number format: val loss, time, memory."""

import torch

from sologpt.bench import process
from sologpt.bench.matmul import plain_dtypes
from sologpt.bench.pictures import GREY, draw_picture, style_axes
from sologpt.bench.rows import (
    LOSS_COLUMNS,
    MEMORY_COLUMN,
    Column,
    Comparison,
    Rows,
    choose_rows,
    cost_figures,
    final_losses,
    loss_figures,
    print_rows,
    train_row,
)
from sologpt.machine import devices
from sologpt.matmuls.recipes import NAMES
from sologpt.training.runs import Run

BASE = 'float32'


def measure(config: dict, train_args: list[str], picture: str) -> Rows:
    """The figures of each row; draws `picture`. Raises InputError."""
    device = devices.find_device(process.resolve_train(train_args)[0]['device'])
    chosen = choose_rows(make_rows(device), config['recipes'], [BASE])

    def train(name, seed):
        return train_row(name, train_args, chosen[name] | {'seed': seed})
    comparison = Comparison(BASE, train)
    comparison.train_all(chosen, range(1, config['runs'] + 1))
    rows = comparison.rows(chosen, _figures)
    print_rows(rows, [
        *LOSS_COLUMNS, Column('tok/s', '{tokens_per_s:,.0f}'), Column('/ fp32', '{speed_ratio:.2f}'), MEMORY_COLUMN,
        Column('by', _path_and_dtype, '<')])
    drawn = {name: row for name, row in rows.items() if 'failed' not in row}
    draw_picture(picture, (12, 1.7 + 0.27 * len(drawn)), _draw, drawn)
    return rows


def make_rows(device: torch.device) -> Rows:
    """Name -> train.py's keys."""
    rows = {dtype: {'dtype': dtype} for dtype in plain_dtypes(device)}
    rows |= {name: {'matmul': name} for name in NAMES}
    rows['int8 forward only'] = {'matmul': 'int8:gemms=fwd'}
    rows['mxfp4 backward only'] = {'matmul': 'mxfp4:gemms=dgrad+wgrad'}
    rows['bfloat16 weights'] = {'dtype': 'bfloat16', 'weights_dtype': 'bfloat16'}
    rows['half the weights pruned'] = {'prune': 0.5}
    return rows


def _figures(runs, base_runs):
    return (loss_figures(final_losses(runs), final_losses(base_runs)) | cost_figures(runs, base_runs)
            | {'path': matmul_path(runs[0])})


def matmul_path(run: Run) -> str:
    """What computes the matmuls of the blocks, such as 'native' or 'emulated': the header's words without the rest."""
    recipe = run.config['matmul'].partition(':')[0]
    return run.header['matmul'].partition(';')[0].removeprefix(f'{recipe}, ')


def _path_and_dtype(row):
    return row['path'] if row['dtype'] in row['path'] else f'{row["path"]} ({row["dtype"]})'


def _draw(figure, rows):
    figure.suptitle('One config trained in each number format: its loss and its speed')
    differences, speeds = figure.subplots(1, 2, sharey=True)
    names, colors = list(rows), [GREY if 'emulated' in row['path'] else 'C0' for row in rows.values()]
    differences.barh(names, [row['difference'] for row in rows.values()], color=colors,
                     xerr=[row['spread'] for row in rows.values()], error_kw={'linewidth': 1, 'capsize': 2})
    differences.axvline(0, color='black', linewidth=0.8)
    differences.invert_yaxis()  # the first row on top
    style_axes(differences, f'loss beside {BASE} (right is worse); lines: std over seeds',
               f'validation loss - loss of {BASE}, nats per token', grid='x')
    speeds.barh(names, [row['speed_ratio'] for row in rows.values()], color=colors)
    speeds.axvline(1, color='black', linewidth=0.8)
    style_axes(speeds, f'speed beside {BASE} (right is faster)', f'tokens per second / tokens per second of {BASE}',
               grid='x')
    from matplotlib.patches import Patch
    figure.legend(handles=[Patch(color='C0', label='native on this device'),
                           Patch(color=GREY, label='emulated here, so its speed says nothing about its hardware')],
                  loc='outside lower center', ncols=2, frameon=False)
