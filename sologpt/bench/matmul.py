"""
Every recipe for a Linear's three matmuls, at several widths: what it costs, what it saves, and how far off it is.

The Linear is width x width, without bias, and its input has `tokens` rows. It computes in the dtype that train.py would
use, compiled where train.py would compile. x is Gaussian, with one channel in 128 ten times as large, as activations
have them. w is drawn from N(0, 1 / width). g, the gradient of y, is Gaussian.

Errors are |found - exact| / |exact|, by the Frobenius norm. `exact` is a Linear in float64 of the numbers before any
rounding. What a recipe changes on purpose counts as an error, too: the weights of ternary and sparse24, the input of
block_dropout, dw of fp4_dge. What is saved for backward is counted without the parameter itself. A copy of it in
another format counts, such as the one that autocast makes.
"""

import functools
import textwrap
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import InputError
from sologpt.bench.matmul_products import accumulator_errors, relative_error, strassen_errors, ternary_inference
from sologpt.bench.pictures import GREY, draw_picture, style_axes
from sologpt.bench.process import resolve_train
from sologpt.bench.rows import choose_rows
from sologpt.bench.timing import median_ms, prepare_device
from sologpt.machine import choices, devices
from sologpt.matmuls import recipes
from sologpt.matmuls.recipe_linear import RecipeLinear, find_strategy
from sologpt.matmuls.spec import parse_matmul

TOO_LONG = 5000  # ms of forward and backward, after which an emulated recipe is not measured at larger widths
COLORS = [f'C{i}' for i in range(10) if i != 7]  # C7 is a grey, which is for what is emulated
BASELINES = ('float32', 'bfloat16')


def measure(config: dict, train_args: list[str], picture: str) -> dict:
    """The figures of each row, by width, and of products on their own; draws `picture`. Raises InputError."""
    widths, tokens = _parse_widths(config['widths']), config['tokens']
    options, _ = resolve_train(train_args)
    device = prepare_device(options)
    plain = plain_dtypes(device)
    chosen = choose_rows(make_rows(plain, options['matmul']), config['recipes'], BASELINES)
    dtype, why = choices.find_dtype(options['dtype'], device, (tokens, widths[-1], widths[-1]))
    compile = choices.can_compile(device)[0] if options['compile'] == 'auto' else options['compile']
    print(f'{devices.device_name(device)}; recipes in {dtype} ({why}); {"compiled" if compile else "eager"}')
    rows = {name: [] for name in chosen}
    for width in widths:
        _measure_width(rows, chosen, device, dtype, compile, width, tokens)
    figures = {'dtype': dtype, 'compiled': bool(compile), 'tokens': tokens, 'rows': rows,
               'faster_from_width': {name: crossover(rows[name]) for name in rows if name not in plain}}
    _show_crossovers(figures['faster_from_width'])
    figures |= {'accumulators': accumulator_errors(), 'strassen_errors': strassen_errors(device),
                'ternary_inference': ternary_inference(
                    device, max((width for width in widths if width <= 2048), default=widths[0]))}
    draw_picture(picture, (13, 6), _draw, rows)
    return figures


def plain_dtypes(device: torch.device) -> tuple[str, ...]:
    """float32, bfloat16, and float16 if the device has it."""
    try:
        choices.find_dtype('float16', device)
    except InputError:
        return 'float32', 'bfloat16'
    return 'float32', 'bfloat16', 'float16'


def make_rows(plain: tuple[str, ...], given: str = '') -> dict[str, dict]:
    """
    Name -> {'dtype': ...} of a plain Linear, or {'matmul': text of a MatmulSpec}. given: a text that replaces the row
    of its recipe, such as 'fp8:fast_accum=False'.
    """
    rows = {name: {'dtype': name} for name in plain}
    rows |= {name: {'matmul': name} for name in recipes.RECIPES}
    rows |= {f'strassen {levels}': {'matmul': f'strassen:{levels}'} for levels in (1, 2)}
    rows['block_dropout'] = {'matmul': 'block_dropout'}
    if given.partition(':')[0] in rows:
        rows[given.partition(':')[0]] = {'matmul': given}
    return rows


def _parse_widths(text):
    try:
        widths = sorted({int(width) for width in text.split(',')})
    except ValueError:
        widths = []
    if not widths or widths[0] < 1:
        raise InputError(f'widths={text!r} must be whole numbers of at least 1, separated by commas')
    return widths


class Problem:
    """The numbers of a Linear in float32, on the CPU, and what it computes of them in float64."""

    def __init__(self, width: int, tokens: int):
        generator = torch.Generator().manual_seed(0)
        self.x, self.g = (torch.randn(tokens, width, generator=generator) for _ in range(2))
        self.x[:, ::128] *= 10
        self.w = torch.randn(width, width, generator=generator) / width ** 0.5
        self.exact = functools.cache(self._exact)

    def _exact(self, normalised):
        """(y, dx, dw) of a Linear. normalised: whether its input is normalised first."""
        x, w = (t.double().requires_grad_() for t in (self.x, self.w))
        y = F.linear(F.rms_norm(x, x.shape[-1:]) if normalised else x, w)
        return y.detach(), *torch.autograd.grad(y, (x, w), self.g.double())


def _measure_width(rows, chosen, device, dtype, compile, width, tokens):
    """Add to each row what is found at this width, and print it."""
    print(f'\nwidth {width:,}, {tokens:,} tokens\n{"":14} {"fwd ms":>9} {"fwd + bwd":>9} {"/ bf16":>7} {"/ fp32":>7} '
          f'{"error y":>8} {"dx":>8} {"dw":>8} {"B/token":>8} {"/ bf16":>6}  by')
    linear = functools.partial(measure_linear, Problem(width, tokens), device, compile)
    baselines = {name: linear(**chosen[name]) for name in BASELINES}
    for name, keys in chosen.items():
        if rows[name] and _takes_too_long(rows[name][-1]):
            row = {'width': width, 'skipped': f'not measured: a smaller one took more than {TOO_LONG / 1000:g} s'}
        else:
            row = {'width': width} | (baselines.get(name) or linear(**{'dtype': dtype} | keys))
            row |= {f'ratio_to_{base}': row['ms'] / found['ms'] for base, found in baselines.items()}
            row['saved_ratio'] = row['saved_bytes_per_token'] / baselines['bfloat16']['saved_bytes_per_token']
        rows[name].append(row)
        _show(name, row)


def _takes_too_long(row):
    return 'skipped' in row or 'emulated' in row['path'] and row['ms'] > TOO_LONG


def measure_linear(problem: Problem, device: torch.device, compile: bool, dtype: str, matmul: str = '') -> dict:
    """The figures of one Linear in dtype, a name. It follows `matmul`, the text of a MatmulSpec, if there is one."""
    tokens, width = problem.x.shape
    layer = nn.Linear(width, width, bias=False, device=device)
    layer.weight.data.copy_(problem.w)
    path, normalised = 'torch', False
    if matmul:
        strategy = find_strategy(parse_matmul(matmul), device, dtype, (width,), tokens)
        layer, path, normalised = RecipeLinear(layer, strategy), strategy.how, strategy.normalised
    x, g = (t.to(device, devices.DTYPES[dtype], copy=True) for t in (problem.x, problem.g))
    x.requires_grad_()
    torch.manual_seed(0)  # some recipes round or drop at random

    def forward(linear=layer):
        with devices.autocast(device, dtype):
            return linear(x)

    def forward_and_backward(linear=layer):
        y = forward(linear)
        return y, *torch.autograd.grad(y, (x, layer.weight), g)

    errors = [relative_error(found, exact) for found, exact in
              zip(forward_and_backward(), problem.exact(normalised), strict=True)]
    saved = saved_bytes(forward, layer.weight)
    linear = layer
    if compile:
        torch.compiler.reset()  # it compiles one forward() for 8 layers, and leaves the ninth as it is
        linear = torch.compile(layer)  # an nn.Linear's own compile() does nothing
    return {'forward_ms': median_ms(lambda: forward(linear), device),
            'ms': median_ms(lambda: forward_and_backward(linear), device),
            **{f'error_{name}': error for name, error in zip(('y', 'dx', 'dw'), errors, strict=True)},
            'saved_bytes_per_token': saved / tokens, 'path': path}


def saved_bytes(forward: Callable[[], torch.Tensor], parameter: torch.Tensor) -> int:
    """Bytes of the storages that autograd keeps from forward() for backward, without the parameter's own."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()  # holds what is saved, so that no address is used twice
    storages.pop(parameter.untyped_storage().data_ptr(), None)
    del y
    return sum(storages.values())


def _show(name, row):
    if 'skipped' in row:
        return print(f'{name:14} {row["skipped"]}')
    print(f'{name:14} {row["forward_ms"]:9.2f} {row["ms"]:9.2f} {row["ratio_to_bfloat16"]:7.2f} '
          f'{row["ratio_to_float32"]:7.2f} {row["error_y"]:8.1e} {row["error_dx"]:8.1e} {row["error_dw"]:8.1e} '
          f'{row["saved_bytes_per_token"]:8,.0f} {row["saved_ratio"]:6.2f}  {row["path"]}', flush=True)


def crossover(rows: list[dict]) -> int | None:
    """The width from which on a recipe is faster than bfloat16, at this and every larger width; None: there is none."""
    found = None
    for row in reversed(rows):
        if row.get('ratio_to_bfloat16', 1) >= 1:
            break
        found = row['width']
    return found


def _show_crossovers(crossovers):
    faster = [f'{name} from {width:,}' for name, width in crossovers.items() if width]
    never = [name for name, width in crossovers.items() if not width]
    print()
    for label, names in (('faster than bfloat16, forward and backward', faster), ('not at the largest width', never)):
        print(textwrap.fill(f'{label}: {", ".join(names) or "none"}', 118, subsequent_indent='  '))


# ---- the picture -----------------------------------------------------------------------------------------------------

def _draw(figure, rows):
    figure.suptitle("A Linear's three matmuls by each recipe: time and error")
    native = [name for name in rows if 'emulated' not in rows[name][0]['path']]
    styles = {name: {'color': COLORS[i % len(COLORS)], 'marker': 'os^'[i // len(COLORS)], 'label': name}
              for i, name in enumerate(native)}
    times, errors = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_times(times, rows, styles)
    _draw_errors(errors, rows, styles)
    figure.legend(*times.get_legend_handles_labels(), loc='outside lower center', ncols=5, frameon=False)


def _draw_times(axes, rows, styles):
    """Native recipes are lines. Emulated ones are a band: their times say nothing about hardware that has them."""
    for name, style in styles.items():
        measured = [row for row in rows[name] if 'skipped' not in row]
        axes.plot([row['width'] for row in measured], [row['ratio_to_bfloat16'] for row in measured], **style)
    widths = [row['width'] for row in rows['bfloat16']]
    emulated = [[rows[name][i]['ratio_to_bfloat16'] for name in rows
                 if name not in styles and 'skipped' not in rows[name][i]] for i in range(len(widths))]
    bands = [(width, min(ratios), max(ratios)) for width, ratios in zip(widths, emulated, strict=True) if ratios]
    if bands:
        axes.fill_between(*zip(*bands, strict=True), color=GREY, alpha=0.5, linewidth=2, zorder=0,
                          label='emulated recipes, fastest to slowest')
    axes.set_xscale('log', base=2)
    axes.set_xticks(widths, [f'{width:,}' for width in widths])
    axes.minorticks_off()
    axes.set_yscale('log', base=2)
    axes.yaxis.set_major_formatter('{x:g}')
    style_axes(axes, 'time beside bfloat16 (lower is faster)', 'width of the Linear',
               "ms of forward and backward / bfloat16's ms")


def _draw_errors(axes, rows, styles):
    """At the largest width at which no recipe has been left out."""
    at = max(i for i in range(len(rows['bfloat16'])) if all('skipped' not in row[i] for row in rows.values()))
    errors = {name: row[at]['error_y'] for name, row in rows.items()}
    ordered = sorted(errors, key=errors.get, reverse=True)
    axes.barh(ordered, [errors[name] for name in ordered],
              color=[styles[name]['color'] if name in styles else GREY for name in ordered])
    axes.set_xscale('log')
    style_axes(axes, f'error of the output at width {rows["bfloat16"][at]["width"]:,}; grey: emulated',
               '|found - exact| / |exact|', grid='x')
