"""
Finetuning by each method of train.py's key `adapter`, and by all weights: what it reaches, takes, and costs to serve.

finetuning  the given config by each row at several learning rates with seed 1, and at the best of them with more seeds.
            A run's val loss is its lowest after the first step, that of the weights which train.py keeps
step_124m   a step of one sequence on a base with GPT-2's shape and random weights. The rate is 0: it takes as long
serving     decoding with that base, alone and with a low-rank adapter of its own for each row of the batch

A row whose run fails is recorded as failed; without full finetuning there is nothing to compare with, and all ends.
"""

import functools
import math
import os
import statistics
import tempfile
import time

import torch

from configurator import InputError, resolve
from model import GPT, GPTConfig
from sologpt.adapters import adapter_files
from sologpt.adapters.adapters import AdapterConfig, Bottleneck, attach
from sologpt.adapters.bank import Bank
from sologpt.bench import process
from sologpt.bench.matmul import choose
from sologpt.files import checkpoint
from sologpt.machine import choices, clock, devices
from sologpt.matmuls.attention import ATTENTION
from sologpt.training.runs import read_run

BASE = 'full'
ROWS = {  # name -> train.py's keys; what they leave out is as the config has it
    BASE: {'adapter': ''},
    'lora': {'adapter': 'lora'},
    'qlora': {'adapter': 'lora', 'base_format': 'nf4'},
    'dora': {'adapter': 'dora'},
    'vera': {'adapter': 'vera', 'adapter_r': None},
    'bottleneck': {'adapter': 'bottleneck', 'adapter_r': None, 'adapter_targets': ','.join(Bottleneck.linears)},
    'prompt': {'adapter': 'prompt'},
    'prefix': {'adapter': 'prefix'},
}
RESET = {'adapter_from': '', 'base_format': 'float32', 'base': '', 'wandb_log': False, 'sample_tokens': 0}
RATES = {  # learning rates; the list is widened where the best is at its end
    BASE: (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 'lora': (1e-3, 3e-3, 1e-2, 3e-2), 'qlora': (1e-3, 3e-3, 1e-2, 3e-2),
    'dora': (1e-3, 3e-3, 1e-2, 3e-2), 'vera': (3e-3, 1e-2, 3e-2, 1e-1), 'bottleneck': (3e-4, 1e-3, 3e-3, 1e-2),
    'prompt': (1e-2, 3e-2, 1e-1, 3e-1), 'prefix': (1e-2, 3e-2, 1e-1, 3e-1)}
STEP, WIDENED = 3, 2  # by which factor, and at most how often
SHAPE = dict(arch='gpt2', n_layer=12, n_head=12, n_embd=768, vocab_size=50304, block_size=1024)  # 124M parameters
RANK, ROUNDS = 16, 2  # at that shape; rounds in which the rows take turns
BATCH, PROMPT = 8, 64  # rows that are served, and tokens of their prompts
DECODED, READ = 20, 10  # positions decoded, and prompts read: times are medians over them


def measure(config, train_args, picture):
    """The figures as plain values; draws `picture`. Raises InputError."""
    figures = {'finetuning': finetuning(config, train_args)}
    _draw({name: row for name, row in figures['finetuning'].items() if 'failed' not in row}, picture)
    return figures | {'step_124m': step_124m(config, train_args), 'serving': serving(train_args)}


def _machine(train_args, tokens=None, width=None):
    """(train.py's options, the device, the dtype of a run of so many tokens and that width), for all runs the same."""
    options, _ = resolve(os.path.join(process.ROOT, 'train.py'), train_args)
    device = devices.find_device(options['device'])
    devices.prepare(device, *(options[key] for key in
                               ('tf32', 'reduced_precision_reduction', 'allow_fp16_accumulation')))
    tokens, width = tokens or options['batch_size'] * options['block_size'], width or options['n_embd']
    return options, device, choices.find_dtype(options['dtype'], device, (tokens, width, 4 * width))[0]


def _reason(name, error):
    """Why a row failed. Raises the error if there is then nothing to compare with."""
    if name == BASE:
        raise error
    return str(error).splitlines()[0]


def _train(name, train_args, keys):
    """The run; its header also has file_bytes, the size of what is used afterwards."""
    with tempfile.TemporaryDirectory() as out_dir:
        process.own('train.py', [*train_args, *process.flags(RESET | ROWS[name] | keys | {'out_dir': out_dir})])
        run = read_run(out_dir, name)
        path = os.path.join(out_dir, adapter_files.WEIGHTS)
        run.header['file_bytes'] = os.path.getsize(path) if os.path.exists(path) else 4 * run.header['parameters']
        return run


# Finetuning


def finetuning(config, train_args):
    """Name -> figures of a row. Raises InputError."""
    options, _, dtype = _machine(train_args)
    if options['init_from'] in ('scratch', 'resume'):
        raise InputError(f'init_from={options["init_from"]!r}: name the base that is finetuned')
    chosen = choose(ROWS, config['recipes'], [BASE])
    trials = [Trials(name, [*train_args, f'--dtype={dtype}']) for name in chosen]
    most = max(len(trial.rates) for trial in trials)
    for i in range(most):  # rates and seeds outside, so that a busy minute falls on all alike
        for trial in trials:
            if i < len(trial.rates):
                trial.train(trial.rates[i], 1)
        print(f'learning rate {i + 1} of {most}', flush=True)
    for _ in range(WIDENED):
        for trial in trials:
            trial.widen()
    for seed in range(2, config['runs'] + 1):
        for trial in trials:
            trial.train(trial.best(), seed)
        print(f'seed {seed} of {config["runs"]}', flush=True)
    rows = {}
    for trial in trials:  # of which the first is BASE
        rows[trial.name] = trial.row(config['runs'], rows.get(BASE))
    _show(rows)
    return rows


class Trials:
    """The runs of one row."""

    def __init__(self, name, train_args):
        self.name, self.train_args, self.rates = name, train_args, sorted(RATES[name])
        self.runs, self.failed = {}, ''  # (learning rate, seed) -> run, or None if it diverged

    def train(self, rate, seed):
        if self.failed:
            return
        # where the rate ends follows from it; an adapter is saved even if it has become worse, for its size
        keys = {'learning_rate': rate, 'min_lr': None, 'seed': seed, 'always_save_checkpoint': self.name != BASE}
        try:
            self.runs[rate, seed] = _train(self.name, self.train_args, keys)
        except InputError as e:
            if seed == 1 and 'not finite' in str(e):  # the rate is too high
                self.runs[rate, seed] = None
            else:
                self.failed = _reason(self.name, e)

    def loss(self, rate, seed=1):
        run = self.runs.get((rate, seed))
        return min((e['val_loss'] for e in run.evals if e['iter'] > 0), default=math.inf) if run else math.inf

    def best(self):
        return min(self.rates, key=self.loss)

    def at_end(self):
        return self.best() in (self.rates[0], self.rates[-1])

    def widen(self):
        """Try one rate more beyond the end at which the best one is."""
        if self.at_end() and not self.failed:
            factor = STEP if self.best() == self.rates[-1] else 1 / STEP
            rate = float(f'{self.best() * factor:.1g}')
            self.train(rate, 1)
            self.rates = sorted([*self.rates, rate])
            print(f'{self.name}: also at {rate:g}', flush=True)

    def row(self, seeds, base):
        """base: the row of full finetuning; None: this is it."""
        rate, by_rate = self.best(), [self.loss(rate) for rate in self.rates]
        if min(by_rate) == math.inf and not self.failed:
            self.failed = _reason(self.name, InputError(f'{self.name} diverged at every learning rate'))
        if self.failed:
            return {'failed': self.failed}
        runs = [self.runs[rate, seed] for seed in range(1, seeds + 1)]
        losses = [self.loss(rate, seed) for seed in range(1, seeds + 1)]
        header, ms = runs[0].header, statistics.median(run.get('time_ms') for run in runs)
        return {'learning_rates': self.rates, 'val_loss_by_rate': [x if x < math.inf else None for x in by_rate],
                'best_rate': rate, 'best_at_end': self.at_end(), 'val_loss_before': runs[0].evals[0]['val_loss'],
                'val_loss': losses, 'mean': statistics.mean(losses),
                'spread': statistics.stdev(losses) if seeds > 1 else 0.0,  # standard deviation over seeds
                # of the same seeds, whose luck cancels out
                'difference': statistics.mean(a - b for a, b in zip(losses, (base or {}).get('val_loss', losses),
                                                                    strict=True)),
                **_sizes(header), 'file_bytes': header['file_bytes'],
                'memory_gb': max(step['memory_gb'] for run in runs for step in run.steps),
                'ms_per_step': ms, 'speed_ratio': base['ms_per_step'] / ms if base else 1.0, 'dtype': header['dtype']}


def _sizes(header):
    return {'trained': header['trained'], 'parameters': header['parameters'],
            'share': header['trained'] / header['parameters'],
            'training_bytes': header.get('training_bytes')}  # of weights, gradients and AdamW's moments


def _mb(size):
    return f'{"" if size is None else format(size / 1e6, ",.2f"):>9}'


def _show(rows):
    print(f'\n{"":10} {"best rate":>9} {"val loss":>8} {"spread":>7} {"difference":>10} {"trained":>11} {"share":>7} '
          f'{"file, MB":>9} {"train, MB":>9} {"memory":>8} {"ms/step":>8} {"speed":>6}')
    for name, row in rows.items():
        if 'failed' in row:
            print(f'{name:10} failed: {row["failed"]}')
        else:
            print(f'{name:10} {row["best_rate"]:8g}{"!" if row["best_at_end"] else " "} {row["mean"]:8.4f} '
                  f'{row["spread"]:7.4f} {row["difference"]:+10.4f} {row["trained"]:11,} {row["share"]:7.2%} '
                  f'{_mb(row["file_bytes"])} {_mb(row["training_bytes"])} {row["memory_gb"]:5.2f} GB '
                  f'{row["ms_per_step"]:8.1f} {row["speed_ratio"]:6.2f}')
    print(f'(!: at an end of the rates tried; speed: {BASE} = 1)', flush=True)


# A step at GPT-2's shape


def step_124m(config, train_args):
    """Name -> figures of a row. Raises InputError."""
    options, _, dtype = _machine(train_args, SHAPE['block_size'], SHAPE['n_embd'])
    chosen, steps = choose(ROWS, config['recipes'], [BASE]), config['steps']
    with tempfile.TemporaryDirectory() as folder:
        # virtual tokens take positions beside those of the text; full finetuning forgets them
        model = GPT(GPTConfig(**SHAPE | {'block_size': SHAPE['block_size'] + options['num_virtual_tokens']}))
        checkpoint.save(folder, {'model': model.state_dict(), 'model_args': model.config.to_save(), 'iter_num': 0},
                        best=False)
        del model
        # at a rate of 0 no evaluation is better than the one before, so that no large checkpoint is written
        keys = {'init_from': folder, 'dtype': dtype, 'block_size': SHAPE['block_size'], 'batch_size': 1,
                'gradient_accumulation_steps': 1, 'learning_rate': 0, 'max_iters': steps + 1,
                'eval_interval': steps + 1, 'eval_iters': 1, 'log_interval': 1, 'always_save_checkpoint': False}
        runs, failed = {name: [] for name in chosen}, {}
        for _ in range(ROUNDS):
            for name in [name for name in chosen if name not in failed]:
                rank = {'adapter_r': RANK} if ROWS[name]['adapter'] in ('lora', 'dora') else {}
                try:
                    runs[name].append(_train(name, train_args, keys | rank))
                except InputError as e:
                    failed[name] = _reason(name, e)
    rows = {}
    print(f'\n{"":10} {"ms/step":>9} {"speed":>6} {"trained":>11} {"train, MB":>9} {"memory":>9}')
    for name in chosen:
        rows[name] = {'failed': failed[name]} if name in failed else _step_row(runs[name], rows.get(BASE))
        _show_step(name, rows[name])
    return rows


def _step_row(runs, base):
    ms = statistics.median(step['time_ms'] for run in runs for step in run.steps[1:])  # the first warms up
    return {'ms_per_step': ms, 'speed_ratio': base['ms_per_step'] / ms if base else 1.0, **_sizes(runs[0].header),
            'memory_gb': max(step['memory_gb'] for run in runs for step in run.steps), 'dtype': runs[0].header['dtype']}


def _show_step(name, row):
    print(f'{name:10} failed: {row["failed"]}' if 'failed' in row else
          f'{name:10} {row["ms_per_step"]:9,.1f} {row["speed_ratio"]:6.2f} {row["trained"]:11,} '
          f'{_mb(row["training_bytes"])} {row["memory_gb"]:6.2f} GB', flush=True)


# Serving


def serving(train_args):
    """Seconds of decoding a batch with an adapter to each row, and without; and of loading and swapping an adapter."""
    _, device, dtype = _machine(train_args, SHAPE['block_size'], SHAPE['n_embd'])
    torch.manual_seed(0)
    base = GPT(GPTConfig(**SHAPE)).eval().to(device)
    adapters, load_s, file_bytes = _load_adapters(base.config)
    figures = {'rows': BATCH, 'r': RANK, 'file_bytes': file_bytes, 'load_s': load_s, 'dtypes': {}}
    print(f'\nan adapter of rank {RANK}: {file_bytes / 1e6:.2f} MB, loaded in {1000 * load_s:.1f} ms\n{BATCH} rows: ms '
          f'{"":8} {"base":>9} {"adapters":>9} {"ratio":>6}')
    for name in dict.fromkeys((dtype, 'float32')):
        found = figures['dtypes'][name] = _serve(base, adapters, device, name)
        for what, row in found.items():
            if what != 'swap_s':
                print(f'{name:9} {what:10} {1000 * row["base_s"]:9.1f} {1000 * row["adapters_s"]:9.1f} '
                      f'{row["ratio"]:6.2f}')
        print(f'{name:9} an adapter swapped in {1000 * found["swap_s"]:.1f} ms', flush=True)
    return figures


def _load_adapters(model_config):
    """(low-rank matrices of BATCH random adapters, read from files; the median seconds of that; a file's bytes)."""
    settings, loaded, seconds = AdapterConfig('lora', r=RANK), [], []
    with torch.device('meta'):
        skeleton = GPT(model_config)
    attach(skeleton, settings)
    shapes = {name: tensor.shape for name, tensor in adapter_files.tensors_of(skeleton).items()}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(BATCH):
            tensors = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
            adapter_files.write(folder, adapter_files.Adapter(settings, tensors), model_config)
            start = time.perf_counter()
            loaded.append(adapter_files.low_rank(model_config, adapter_files.read(folder), folder))
            seconds.append(time.perf_counter() - start)
        return loaded, statistics.median(seconds), os.path.getsize(os.path.join(folder, adapter_files.WEIGHTS))


def _serve(base, adapters, device, dtype):
    with_bank = GPT(base.config).eval()
    with_bank.load_state_dict(base.state_dict(keep_vars=True), assign=True)  # the very same weights
    bank = Bank(with_bank, adapters, devices.DTYPES[dtype])
    slots, models = list(range(1, BATCH + 1)), {'base_s': base, 'adapters_s': with_bank}
    bank.select(slots)
    attn_backend, _ = choices.find_attn_backend('auto', device, dtype, base.config.block_size)
    for block in (*base.transformer.h, *with_bank.transformer.h):
        block.attn.attend = ATTENTION[attn_backend]
    prompt = torch.randint(base.config.vocab_size, (BATCH, PROMPT), device=device)
    figures = {}
    with torch.no_grad(), devices.autocast(device, dtype):
        # a stream's first position is the prompt's, which warms up; each that follows is one step with a cache
        streams = {name: functools.partial(next, model.stream(prompt, DECODED + 2, temperature=0))
                   for name, model in models.items()}
        reads = {name: functools.partial(model, prompt) for name, model in models.items()}
        for what, runs, times in (('T=1', streams, DECODED), (f'T={PROMPT}', reads, READ)):
            seconds = _in_turn(runs, times, device)
            figures[what] = seconds | {'ratio': seconds['adapters_s'] / seconds['base_s']}

    def swap():
        bank.load(1, adapters[-1])
        bank.select(slots)
    return figures | _in_turn({'swap_s': swap}, DECODED, device)


def _in_turn(runs, times, device):
    """Name -> median seconds, of calls in turn; the first two of each warm up."""
    seconds = {name: [] for name in runs}
    for _ in range(times + 2):
        for name, run in runs.items():
            clock.synchronize(device)
            start = time.perf_counter()
            run()
            clock.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[2:]) for name, found in seconds.items()}


# The picture


def _draw(rows, picture):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print('no picture: matplotlib is not installed')
    figure = Figure(figsize=(12, 5), dpi=110, layout='constrained')
    by_rate, by_share = figure.subplots(1, 2)
    colors = {name: 'black' if name == BASE else f'C{i}' for i, name in enumerate(n for n in ROWS if n in rows)}
    before = rows[BASE]['val_loss_before']
    for name, row in rows.items():
        losses = [math.nan if loss is None else loss for loss in row['val_loss_by_rate']]
        by_rate.plot(row['learning_rates'], losses, 'o-', color=colors[name], label=name, markersize=4,
                     linewidth=3 if name == BASE else 1.2)
        by_share.errorbar(row['share'], row['mean'], row['spread'], fmt='o', color=colors[name], capsize=3)
    by_rate.axhline(before, color='0.6', linestyle='dotted', label='before')
    lowest = min(loss for row in rows.values() for loss in row['val_loss_by_rate'] if loss is not None)
    margin = 0.05 * abs(before - lowest) or 1e-3
    by_rate.set_ylim(min(lowest, before) - margin, max(lowest, before) + margin)  # what is worse than both is no choice
    by_rate.set_xlabel('learning rate')
    by_rate.set_ylabel('lowest val loss, seed 1')
    by_rate.legend(frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
    by_share.set_xlabel('share of the parameters that is trained')
    by_share.set_ylabel('lowest val loss at the best rate, mean and spread over seeds')
    for axes in (by_rate, by_share):
        axes.set_xscale('log')
        axes.grid(alpha=0.25)
    _label(by_share, rows, colors)
    figure.savefig(picture)
    print(f'picture: {picture}')


def _label(axes, rows, colors):
    """Names beside the points, away from a neighbour at the same height, and moved up where they would still meet."""
    shares, means = ({name: row[key] for name, row in rows.items()} for key in ('share', 'mean'))
    axes.set_xlim(min(shares.values()) / 8, 2)
    gap = 0.045 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    placed = []  # (share, side, height)
    for name in sorted(rows, key=means.get):
        share, height = shares[name], means[name]
        left = share > 0.2 or any(share < shares[other] < 10 * share and abs(means[other] - height) < gap
                                  for other in rows)
        for other, side, taken in placed:
            if side == left and 1 / 10 < share / other < 10:
                height = max(height, taken + gap)
        placed.append((share, left, height))
        axes.annotate(name, (share, means[name]), (share / 1.4 if left else share * 1.4, height), color=colors[name],
                      ha='right' if left else 'left', va='center', bbox={'color': 'white', 'alpha': 0.7, 'pad': 0.5},
                      arrowprops={'arrowstyle': '-', 'color': colors[name], 'linewidth': 0.6})
