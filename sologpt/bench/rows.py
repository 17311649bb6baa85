"""
Rows of a comparison: each row is a config that is trained with several seeds, and compared with a base row.

    comparison = Comparison(base, train)     # train(name, seed) -> Run
    comparison.train_all(names, seeds)
    rows = comparison.rows(names, figures)   # figures(runs, base_runs) -> plain values
    print_rows(rows, columns)

loss_figures() and cost_figures() compute what every comparison reports.
"""

import difflib
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from configurator import InputError
from sologpt.bench import process
from sologpt.training.runs import Run, read_run

Rows = dict[str, dict]  # name -> figures, or {'failed': reason}


def choose_rows(rows: Rows, wanted: str, always: Iterable[str]) -> Rows:
    """
    Choose among `rows`, name -> keys of train.py. `wanted` is a list separated by commas; '' takes all rows. The rows
    in `always` are taken too. A name that no row has may be a recipe's, such as 'strassen': it takes all rows of that
    recipe. Raises InputError.
    """
    chosen = set(always) if wanted else set(rows)
    for name in filter(None, wanted.split(',')):
        found = [name] if name in rows else [
            row for row, keys in rows.items() if keys.get('matmul', '').partition(':')[0] == name]
        if not found:
            near = difflib.get_close_matches(name, rows, 1)
            raise InputError(f'recipes: {name!r} is not known: use {near[0] + ", or another of " if near else ""}'
                             f'{", ".join(rows)}')
        chosen |= set(found)
    return {name: keys for name, keys in rows.items() if name in chosen}


def train_row(name: str, train_args: list[str], keys: dict, read_more: Callable[[str], dict] | None = None) -> Run:
    """
    Train in a temporary folder, with `keys` over `train_args`, and read the log. read_more(out_dir): further facts for
    the Run's header, read before the folder is deleted. Raises InputError.
    """
    with tempfile.TemporaryDirectory() as out_dir:
        process.run_own('train.py', [*train_args, *process.flags({'sample_tokens': 0} | keys | {'out_dir': out_dir})])
        run = read_run(out_dir, name)
        run.header |= read_more(out_dir) if read_more else {}
        return run


class Comparison:
    """
    The runs of some rows.

    A row that fails is not trained again, and the others go on. If the base row fails, there is nothing to compare
    with, and most others would fail alike: its error is raised.
    """

    def __init__(self, base: str, train: Callable[..., Run | None]):
        """train(name, *key): the run of a row with this key, such as a seed. It raises InputError if it fails."""
        self.base, self._train = base, train
        self.runs: dict[str, dict[tuple, Run]] = defaultdict(dict)  # name -> key -> run
        self.failed: dict[str, str] = {}  # name -> reason

    def train(self, name: str, *key) -> None:
        """Train a row, unless it has failed before. Raises InputError for the base row."""
        if name in self.failed:
            return
        try:
            self.runs[name][key] = self._train(name, *key)
        except InputError as e:
            self.fail(name, e)

    def fail(self, name: str, error: InputError) -> None:
        """Record why a row failed. Raises the error of the base row."""
        if name == self.base:
            raise error
        self.failed[name] = str(error).splitlines()[0]

    def train_all(self, names: Iterable[str], rounds: range, round_is: str = 'seed') -> None:
        """Train every row in every round. The rounds are the outer loop, so that a busy minute falls on all rows."""
        for number in rounds:
            for name in names:
                self.train(name, number)
            print(f'{round_is} {number} of {rounds.stop - 1}', flush=True)

    def rows(self, names: Iterable[str], figures: Callable[[list[Run], list[Run]], dict]) -> Rows:
        """Name -> figures(runs, runs of the base row) or {'failed': reason}."""
        base_runs = list(self.runs[self.base].values())
        return {name: {'failed': self.failed[name]} if name in self.failed else
                figures(list(self.runs[name].values()), base_runs) for name in names}


def loss_figures(losses: list[float], base_losses: list[float]) -> dict:
    """
    val_loss of each seed; mean; spread, the standard deviation over seeds; difference, the mean difference from the
    base row's loss with the same seed, so that the luck of a seed cancels out.
    """
    return {'val_loss': losses, 'mean': statistics.mean(losses),
            'spread': statistics.stdev(losses) if len(losses) > 1 else 0.0,
            'difference': statistics.mean(a - b for a, b in zip(losses, base_losses, strict=True))}


def final_losses(runs: list[Run]) -> list[float]:
    """The val loss at the end of each run."""
    return [run.evals[-1]['val_loss'] for run in runs]


def cost_figures(runs: list[Run], base_runs: list[Run]) -> dict:
    """ms_per_step and tokens_per_s, medians over the runs; speed_ratio to the base row; memory_gb at most; dtype."""
    ms, base_ms = (statistics.median(run.get('time_ms') for run in group) for group in (runs, base_runs))
    return {'ms_per_step': ms, 'tokens_per_s': 1000 * runs[0].header['tokens_per_iter'] / ms,
            'speed_ratio': base_ms / ms, 'memory_gb': max(run.max_memory() for run in runs),
            # 'auto' measures in every run
            'dtype': ' or '.join(sorted({run.header['dtype'] for run in runs}))}


class Column(NamedTuple):
    """A column of a table."""
    title: str
    show: str | Callable[[dict], str]  # a format string such as '{mean:.4f}' of a row's figures, or a function of them
    align: str = '>'


LOSS_COLUMNS = (Column('val loss', '{mean:.4f}'), Column('spread', '{spread:.4f}'),
                Column('difference', '{difference:+.4f}'))
MEMORY_COLUMN = Column('memory', '{memory_gb:.2f} GB')


def print_rows(rows: Rows, columns: Iterable[Column]) -> None:
    """Print a table with a line for each row. A row that failed has its reason instead."""
    columns = list(columns)
    cells = {name: [_cell(column, row) for column in columns] for name, row in rows.items() if 'failed' not in row}
    names = max(map(len, rows))
    widths = [max(len(column.title), *(len(row[i]) for row in cells.values())) for i, column in enumerate(columns)]

    def line(name, texts):
        aligned = [f'{text:{column.align}{width}}' for text, column, width in zip(texts, columns, widths, strict=True)]
        return f'{name:{names}}  {"  ".join(aligned)}'.rstrip()
    print(line('', [column.title for column in columns]))
    for name, row in rows.items():
        print(line(name, cells[name]) if name in cells else f'{name:{names}}  failed: {row["failed"]}')


def _cell(column, row):
    return column.show(row) if callable(column.show) else column.show.format(**row)
