"""
A config finetuned by each row of the adapters suite, at several learning rates, and at the best of them over seeds.

A run's val loss is its lowest after the first step: that of the weights which train.py keeps.
"""

import math

from configurator import InputError
from sologpt.bench.adapter_rows import BASE, ROWS, find_machine, megabytes, size_figures, train_adapter
from sologpt.bench.pictures import GREY, draw_picture, style_axes
from sologpt.bench.rows import (
    LOSS_COLUMNS,
    MEMORY_COLUMN,
    Column,
    Comparison,
    Rows,
    choose_rows,
    cost_figures,
    loss_figures,
    print_rows,
)

RATES = {  # learning rates; the list is widened where the best is at its end
    BASE: (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 'lora': (1e-3, 3e-3, 1e-2, 3e-2), 'qlora': (1e-3, 3e-3, 1e-2, 3e-2),
    'dora': (1e-3, 3e-3, 1e-2, 3e-2), 'vera': (3e-3, 1e-2, 3e-2, 1e-1), 'bottleneck': (3e-4, 1e-3, 3e-3, 1e-2),
    'prompt': (1e-2, 3e-2, 1e-1, 3e-1), 'prefix': (1e-2, 3e-2, 1e-1, 3e-1)}
for name in ROWS:  # a method without rates of its own
    RATES.setdefault(name, RATES['lora'])
FACTOR, WIDENED = 3, 2  # the list is widened by this factor, at most so often


def finetuning(config: dict, train_args: list[str], picture: str) -> Rows:
    """The figures of each row; draws `picture`. Raises InputError."""
    train_config, _, dtype = find_machine(train_args)
    if train_config['init_from'] in ('scratch', 'resume'):
        raise InputError(f'init_from={train_config["init_from"]!r}: name the base that is finetuned')
    names = list(choose_rows(ROWS, config['recipes'], [BASE]))
    search = RateSearch([*train_args, f'--dtype={dtype}'])
    search.find_rates(names)
    for seed in range(2, config['runs'] + 1):
        for name in names:
            search.comparison.train(name, search.best_rate(name), seed)
        print(f'seed {seed} of {config["runs"]}', flush=True)
    rows = search.rows(names, config['runs'])
    print()
    print_rows(rows, [
        Column('best rate', lambda row: f'{row["best_rate"]:g}{"!" if row["best_at_end"] else " "}'), *LOSS_COLUMNS,
        Column('trained', '{trained:,}'), Column('share', '{share:.2%}'), megabytes('file, MB', 'file_bytes'),
        megabytes('train, MB', 'training_bytes'), MEMORY_COLUMN, Column('ms/step', '{ms_per_step:.1f}'),
        Column('speed', '{speed_ratio:.2f}')])
    print(f'(!: at an end of the rates that were tried; speed: {BASE} = 1)', flush=True)
    drawn = {name: row for name, row in rows.items() if 'failed' not in row}
    draw_picture(picture, (12, 5.5), _draw, drawn)
    return rows


class RateSearch:
    """The learning rates of each row, and its runs by (rate, seed). A run that diverged is None."""

    def __init__(self, train_args: list[str]):
        self.train_args, self.rates = train_args, {}
        self.comparison = Comparison(BASE, self._train)

    def _train(self, name, rate, seed):
        # min_lr follows from the rate. An adapter is saved even if it has become worse, because its size is asked for
        keys = {'learning_rate': rate, 'min_lr': None, 'seed': seed, 'always_save_checkpoint': name != BASE}
        try:
            return train_adapter(name, self.train_args, keys)
        except InputError as e:
            if seed == 1 and 'not finite' in str(e):  # the rate is too high
                return None
            raise

    def find_rates(self, names: list[str]) -> None:
        """Train each row at each of its rates with seed 1, and at more where the best is at an end."""
        self.rates = {name: sorted(RATES[name]) for name in names}
        most = max(map(len, self.rates.values()))
        for i in range(most):  # the outer loop, so that a busy minute falls on all rows
            for name in names:
                if i < len(self.rates[name]):
                    self.comparison.train(name, self.rates[name][i], 1)
            print(f'learning rate {i + 1} of {most}', flush=True)
        for _ in range(WIDENED):
            for name in names:
                self._widen(name)

    def _widen(self, name):
        """Try one rate more, beyond the end at which the best one is."""
        rates, best = self.rates[name], self.best_rate(name)
        if not self._is_at_end(name) or name in self.comparison.failed:
            return
        rate = float(f'{best * (FACTOR if best == rates[-1] else 1 / FACTOR):.1g}')
        self.comparison.train(name, rate, 1)
        self.rates[name] = sorted([*rates, rate])
        print(f'{name}: also at {rate:g}', flush=True)

    def _loss(self, name, rate, seed=1):
        run = self.comparison.runs[name].get((rate, seed))
        return min((e['val_loss'] for e in run.evals if e['iter'] > 0), default=math.inf) if run else math.inf

    def best_rate(self, name: str) -> float:
        """The rate of the lowest val loss with seed 1."""
        return min(self.rates[name], key=lambda rate: self._loss(name, rate))

    def _is_at_end(self, name):
        return self.best_rate(name) in (self.rates[name][0], self.rates[name][-1])

    def rows(self, names: list[str], seeds: int) -> Rows:
        """Name -> figures of the runs at the best rate, or {'failed': reason}. Raises InputError if the base failed."""
        for name in names:
            if name not in self.comparison.failed and self._loss(name, self.best_rate(name)) == math.inf:
                self.comparison.fail(name, InputError(f'{name} diverged at every learning rate'))
        failed = self.comparison.failed
        return {name: {'failed': failed[name]} if name in failed else self._row(name, seeds) for name in names}

    def _row(self, name, seeds):
        rate, by_rate = self.best_rate(name), [self._loss(name, rate) for rate in self.rates[name]]
        runs, base_runs = self._best_runs(name, seeds), self._best_runs(BASE, seeds)
        losses, base_losses = ([self._loss(row, self.best_rate(row), seed) for seed in range(1, seeds + 1)]
                               for row in (name, BASE))
        return {'learning_rates': self.rates[name], 'val_loss_by_rate': [x if x < math.inf else None for x in by_rate],
                'best_rate': rate, 'best_at_end': self._is_at_end(name),
                'val_loss_before': runs[0].evals[0]['val_loss'], **loss_figures(losses, base_losses),
                **size_figures(runs[0]), 'file_bytes': runs[0].header['file_bytes'], **cost_figures(runs, base_runs)}

    def _best_runs(self, name, seeds):
        return [self.comparison.runs[name][self.best_rate(name), seed] for seed in range(1, seeds + 1)]


# ---- the picture -----------------------------------------------------------------------------------------------------

def _draw(figure, rows):
    figure.suptitle('Finetuning one base: adapters beside full finetuning')
    by_rate, by_share = figure.subplots(1, 2)
    colors = {name: 'black' if name == BASE else f'C{i}' for i, name in enumerate(n for n in ROWS if n in rows)}
    _draw_rates(by_rate, rows, colors)
    for name, row in rows.items():
        by_share.errorbar(row['share'], row['mean'], row['spread'], fmt='o', color=colors[name], capsize=3)
    by_share.set_xscale('log')
    style_axes(by_share, 'at the best rate: mean and standard deviation over seeds',
               'trained parameters / all parameters', 'lowest validation loss, nats per token')
    _label(by_share, rows, colors)
    figure.legend(*by_rate.get_legend_handles_labels(), loc='outside lower center', ncols=5, frameon=False)


def _draw_rates(axes, rows, colors):
    """Methods may coincide, so each has a marker and dashes of its own, and those behind are larger."""
    before = rows[BASE]['val_loss_before']
    for i, (name, row) in enumerate(rows.items()):
        losses = [math.nan if loss is None else loss for loss in row['val_loss_by_rate']]
        behind = len(rows) - i
        axes.plot(row['learning_rates'], losses, marker='os^vDPX*'[i % 8], color=colors[name],
                  label='all weights' if name == BASE else name, markersize=4 + 0.6 * behind,
                  linewidth=0.8 + 0.35 * behind, dashes=(4, i) if i else (None, None), alpha=0.9)
    axes.axhline(before, color=GREY, linestyle='dotted', label='the base before finetuning')
    lowest = min(loss for row in rows.values() for loss in row['val_loss_by_rate'] if loss is not None)
    margin = 0.05 * abs(before - lowest) or 1e-3
    axes.set_ylim(min(lowest, before) - margin, max(lowest, before) + margin)  # what is worse than both is no choice
    axes.set_xscale('log')
    style_axes(axes, 'at each learning rate, seed 1', 'learning rate', 'lowest validation loss, nats per token')


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
