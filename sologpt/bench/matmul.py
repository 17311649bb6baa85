"""
Every recipe for a Linear's three matmuls, at several widths: what it costs, what it saves, and how far off it is.

A Linear without bias, width x width, of `tokens` rows, in the dtype that train.py's --dtype gives (auto: what it would
choose), compiled where it would be. x is Gaussian, with one channel in 128 ten times as large, as activations have
them; w is from N(0, 1 / width), g, the gradient of y, Gaussian. Errors are |found - exact| / |exact|, by the Frobenius
norm, from a Linear in float64 of these numbers before any rounding. What a recipe changes on purpose counts as well:
the weights of ternary and sparse24, the input of block_dropout, dw of fp4_dge. What is saved for backward is without
the parameter itself; a copy of it in another format counts, such as the one that autocast makes.
"""

import difflib
import functools
import os
import statistics
import textwrap
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import InputError, resolve
from sologpt.bench import process
from sologpt.machine import choices, clock, devices
from sologpt.matmuls import products, recipe_linear, recipes, ternary
from sologpt.matmuls.formats import BYTE, Encoded

SECONDS, REPEATS = 2.0, 20  # a time is the median of as many runs as fit, and of at least one
TOO_LONG = 5000  # ms of forward and backward, after which an emulated recipe is not measured at larger widths
GREY, COLORS = '0.7', [f'C{i}' for i in range(10) if i != 7]  # C7 is a grey, which is for what is emulated
BASELINES = ('float32', 'bfloat16')


def measure(config, train_args, picture):
    """The figures as plain values; draws `picture`. Raises InputError."""
    widths, tokens = _widths(config['widths']), config['tokens']
    options, _ = resolve(os.path.join(process.ROOT, 'train.py'), train_args)
    device = devices.find_device(options['device'])
    plain = plain_dtypes(device)
    chosen = choose(_rows(plain, options), config['recipes'], BASELINES)
    devices.prepare(device, *(options[key] for key in
                               ('tf32', 'reduced_precision_reduction', 'allow_fp16_accumulation')))
    dtype, why = choices.find_dtype(options['dtype'], device, (tokens, widths[-1], widths[-1]))
    compile = choices.can_compile(device)[0] if options['compile'] == 'auto' else options['compile']
    print(f'{devices.device_name(device)}; recipes in {dtype} ({why}); {"compiled" if compile else "eager"}')
    rows = {name: [] for name in chosen}
    for width in widths:
        _measure_width(rows, chosen, device, dtype, compile, width, tokens)
    figures = {'dtype': dtype, 'compiled': bool(compile), 'tokens': tokens, 'rows': rows,
               'faster_from_width': {name: crossover(rows[name]) for name in rows if name not in plain}}
    _show_crossovers(figures['faster_from_width'])
    figures |= {'accumulators': _accumulators(), 'strassen_errors': _strassen_errors(device),
                'ternary_inference': _ternary_inference(
                    device, max((width for width in widths if width <= 2048), default=widths[0]))}
    _draw(rows, picture)
    return figures


def plain_dtypes(device):
    """float32, bfloat16, and float16 where the device has it."""
    try:
        choices.find_dtype('float16', device)
    except InputError:
        return 'float32', 'bfloat16'
    return 'float32', 'bfloat16', 'float16'


def choose(rows, wanted, always):
    """
    Of rows, name -> keyword arguments, those in the comma list `wanted` ('': all), and those in `always`. What is no
    row's name may be a recipe's: all of its rows. Raises InputError.
    """
    chosen = set(always) if wanted else set(rows)
    for name in filter(None, wanted.split(',')):
        found = [name] if name in rows else [row for row, keys in rows.items() if keys.get('matmul') == name]
        if not found:
            near = difflib.get_close_matches(name, rows, 1)
            raise InputError(f'recipes: {name!r} is not known: use {near[0] + ", or another of " if near else ""}'
                             f'{", ".join(rows)}')
        chosen |= set(found)
    return {name: keys for name, keys in rows.items() if name in chosen}


def _rows(plain, options):
    """Name -> {'dtype': ...} of a plain Linear, or {'matmul': recipe, ...} with find()'s options."""
    rows = {name: {'dtype': name} for name in plain}
    rows |= {name: {'matmul': name} for name in recipes.RECIPES}
    rows['fp8'] |= {'fast_accum': options['fp8_fast_accum']}
    rows |= {f'strassen {levels}': {'matmul': 'strassen', 'levels': levels} for levels in (1, 2)}
    rows['block_dropout'] = {'matmul': 'block_dropout', 'rate': options['block_dropout'],
                             'block': options['block_dropout_size']}
    return rows


def _widths(text):
    try:
        widths = sorted({int(width) for width in text.split(',')})
    except ValueError:
        widths = []
    if not widths or widths[0] < 1:
        raise InputError(f'widths={text!r} must be whole numbers of at least 1, separated by commas')
    return widths


class Problem:
    """A Linear's numbers in float32, on the CPU, and what it makes of them in float64."""

    def __init__(self, width, tokens):
        generator = torch.Generator().manual_seed(0)
        self.x, self.g = (torch.randn(tokens, width, generator=generator) for _ in range(2))
        self.x[:, ::128] *= 10
        self.w = torch.randn(width, width, generator=generator) / width ** 0.5
        self.exact = functools.cache(self._exact)

    def _exact(self, normalised):
        """(y, dx, dw), of a Linear whose input is normalised first or not."""
        x, w = (t.double().requires_grad_() for t in (self.x, self.w))
        y = F.linear(F.rms_norm(x, x.shape[-1:]) if normalised else x, w)
        return y.detach(), *torch.autograd.grad(y, (x, w), self.g.double())


def _measure_width(rows, chosen, device, dtype, compile, width, tokens):
    """Adds to each row what is found at this width, and prints it."""
    print(f'\nwidth {width:,}, {tokens:,} tokens\n{"":14} {"fwd ms":>9} {"fwd + bwd":>9} {"/ bf16":>7} {"/ fp32":>7} '
          f'{"error y":>8} {"dx":>8} {"dw":>8} {"B/token":>8} {"/ bf16":>6}  by')
    linear = functools.partial(_measure_linear, Problem(width, tokens), device, compile)
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


def _measure_linear(problem, device, compile, dtype, matmul=None, **options):
    """Of one Linear, following the recipe `matmul` if there is one, in dtype, a name; options: find()'s."""
    tokens, width = problem.x.shape
    layer = nn.Linear(width, width, bias=False, device=device)
    layer.weight.data.copy_(problem.w)
    path, normalised = 'torch', False
    if matmul:
        layer.__class__, layer.function, path = recipe_linear.find(matmul, device, dtype, (width,), tokens, **options)
        normalised = layer.__class__ is recipe_linear.NormalisedLinear
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
    return {'forward_ms': _median_ms(lambda: forward(linear), device),
            'ms': _median_ms(lambda: forward_and_backward(linear), device),
            **{f'error_{name}': error for name, error in zip(('y', 'dx', 'dw'), errors, strict=True)},
            'saved_bytes_per_token': saved / tokens, 'path': path}


def relative_error(found, exact):
    return ((found.detach().cpu().double() - exact).norm() / exact.norm()).item()


def saved_bytes(forward, parameter):
    """Bytes of the storages that autograd keeps from forward() for backward, less the parameter's own."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()  # holds what is saved, so that no address is used twice
    storages.pop(parameter.untyped_storage().data_ptr(), None)
    del y
    return sum(storages.values())


def _median_ms(run, device):
    """Of at least one run after one that warms up."""
    run()
    times, end = [], time.perf_counter() + SECONDS
    while not times or len(times) < REPEATS and time.perf_counter() < end:
        clock.synchronize(device)
        start = time.perf_counter()
        run()
        clock.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _show(name, row):
    if 'skipped' in row:
        return print(f'{name:14} {row["skipped"]}')
    print(f'{name:14} {row["forward_ms"]:9.2f} {row["ms"]:9.2f} {row["ratio_to_bfloat16"]:7.2f} '
          f'{row["ratio_to_float32"]:7.2f} {row["error_y"]:8.1e} {row["error_dx"]:8.1e} {row["error_dw"]:8.1e} '
          f'{row["saved_bytes_per_token"]:8,.0f} {row["saved_ratio"]:6.2f}  {row["path"]}', flush=True)


def crossover(rows):
    """The smallest width from which on, at every larger one, a recipe is faster than bfloat16; None: there is none."""
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


def _accumulators():
    """Worst relative error of sums of 4096 positive products: fewer bits in the accumulator, and numbers split up."""
    a, b = torch.rand(2, 64, 4096, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double().mT
    found = {
        'float32': products.accumulated(a, b, torch.float32),
        'float16': products.accumulated(a, b, torch.float16),
        'bfloat16': products.accumulated(a, b, torch.bfloat16),
        'float16, 128 products at once': products.accumulated(a, b, torch.float16, chunk=128),
        **{f'float32 out of {n} bfloat16 product{"s" * (n > 1)}': products.split_bfloat16(a, b, n) for n in (1, 3, 6)}}
    errors = {name: ((y.double() - exact).abs() / exact).max().item() for name, y in found.items()}
    print('\nworst relative error of sums of 4096 positive products, by accumulator:')
    for name, error in errors.items():
        print(f'  {name:36} {error:8.1e}')
    return errors


def _strassen_errors(device):
    """By dtype, for 0 to 3 levels, of a product of Gaussian matrices that were rounded to that dtype before."""
    a, b = torch.randn(2, 1024, 1024, generator=torch.Generator().manual_seed(0))
    errors = {}
    print("\nerror of Strassen's algorithm at 1024 x 1024, by levels:" + ''.join(f' {n:>8}' for n in range(4)))
    for name in BASELINES:
        dtype = devices.DTYPES[name]
        x, w = (Encoded(t.to(device, dtype), None) for t in (a, b))
        exact = a.to(dtype).double() @ b.to(dtype).double().mT
        errors[name] = [relative_error(products.strassen_product(x, w, dtype, dtype, levels), exact)
                        for levels in range(4)]
        print(f'  {name:53}' + ''.join(f' {error:8.1e}' for error in errors[name]))
    return errors


def _ternary_inference(device, width):
    """ms of a width x width Linear in inference, for one token and for 64, and bytes of its weights."""
    torch.manual_seed(0)
    linear = nn.Linear(width, width, bias=False, device=device)
    w, scale = recipes.TERNARY.encode(linear.weight.detach())
    packed, planes, by_row = ternary.PackedTernary(linear), products.bit_planes(w), recipes.per('row', BYTE)
    bfloat16 = linear.weight.detach().bfloat16()
    forms = {  # name -> (what it computes, bytes of the weights, the most tokens)
        'float32': (linear, 4 * w.numel(), 64),
        'bfloat16': (lambda x: F.linear(x.bfloat16(), bfloat16), 2 * w.numel(), 64),
        'ternary in int8': (lambda x: products.int8_product(by_row.encode(x), Encoded(w, scale), None, x.dtype),
                            w.numel(), 64),
        'ternary in 2 bits': (packed, packed.packed.numel(), 64),
        'ternary in bit planes': (lambda x: products.bitplane_matmul(by_row.encode(x).values, planes),
                                  w.numel() // 4, 1)}
    figures = {'width': width, 'rows': {}}
    print(f'\ninference, width {width:,}: ms    1 token 64 tokens {"bytes":>12}')
    for name, (run, size, most) in forms.items():
        ms = {}
        for tokens in (1, 64)[:1 + (most == 64)]:
            x = torch.randn(tokens, width, device=device)
            with torch.inference_mode():
                ms[tokens] = _median_ms(functools.partial(run, x), device)
        figures['rows'][name] = {'ms': ms, 'bytes': size}
        print(f'  {name:28} {ms[1]:8.3f} {f"{ms[64]:.3f}" if 64 in ms else "":>9} {size:12,}')
    return figures


def _draw(rows, picture):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print('no picture: matplotlib is not installed')
    distinct = [name for name in rows if 'emulated' not in rows[name][0]['path']]
    styles = {name: {'color': COLORS[i % len(COLORS)], 'marker': 'os^'[i // len(COLORS)], 'label': name}
              for i, name in enumerate(distinct)}
    figure = Figure(figsize=(13, 5), dpi=110, layout='constrained')
    times, errors = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_times(times, rows, styles)
    _draw_errors(errors, rows, styles)
    figure.savefig(picture)
    print(f'picture: {picture}')


def _draw_times(axes, rows, styles):
    emulated = [name for name in rows if name not in styles]
    for name in (*styles, *emulated):
        style = styles.get(name) or {'color': GREY, 'linewidth': 1, 'zorder': 1,
                                     'label': 'emulated' if name == emulated[0] else None}
        measured = [row for row in rows[name] if 'skipped' not in row]
        axes.plot([row['width'] for row in measured], [row['ratio_to_bfloat16'] for row in measured], **style)
    widths = [row['width'] for row in rows['bfloat16']]
    axes.set_xscale('log', base=2)
    axes.set_xticks(widths, [f'{width:,}' for width in widths])
    axes.minorticks_off()
    axes.set_yscale('log', base=2)
    axes.yaxis.set_major_formatter('{x:g}')
    axes.set_xlabel('width')
    axes.set_ylabel("forward and backward, bfloat16's time = 1")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc='upper left', bbox_to_anchor=(1, 1))


def _draw_errors(axes, rows, styles):
    first = {name: row[0]['error_y'] for name, row in rows.items()}  # at the smallest width, where none is left out
    ordered = sorted(first, key=first.get, reverse=True)
    axes.barh(ordered, [first[name] for name in ordered],
              color=[styles[name]['color'] if name in styles else GREY for name in ordered])
    axes.set_xscale('log')
    axes.set_xlabel(f'relative error of y, width {rows["bfloat16"][0]["width"]:,}')
    axes.grid(alpha=0.25, axis='x')
