"""A config, and the same with one of its parts replaced at a time: val loss at its end and ms per step, over seeds."""

from sologpt.bench.rows import (
    LOSS_COLUMNS,
    Column,
    Comparison,
    Rows,
    cost_figures,
    final_losses,
    loss_figures,
    print_rows,
    train_row,
)

BASE = 'the recipe'
# train.py's keys that replace a part. AdamW has the best of the learning rates that were tried on
# config/speedrun_cpu.py, from 1e-3 to 1e-2
REPLACED = {
    BASE: {},
    'learned positions': {'positions': 'learned'},
    'LayerNorm': {'norm': 'layernorm'},
    'no QK-norm': {'qk_norm': False},
    'GELU': {'activation': 'gelu'},
    'projections and head not from zero': {'zero_init': False},
    'no norm on the embedding': {'embd_norm': False},
    'head tied to the embedding': {'tied': True},
    'no smear': {'smear': False},
    'cosine to a tenth': {'schedule': 'cosine'},
    'five iterations in Muon': {'optimizer': 'muon:5'},
    "momentum of Muon's authors": {'muon_momentum': 0.95, 'momentum_warmup': 300},
    'AdamW': {'optimizer': 'adamw', 'learning_rate': 6e-3},
    "GPT-2's parts": {'arch': 'gpt2', 'smear': False},
    "GPT-2's parts, AdamW": {'arch': 'gpt2', 'smear': False, 'optimizer': 'adamw', 'learning_rate': 4e-3,
                             'warmup_iters': 20},
}


def measure(config: dict, train_args: list[str], picture: str) -> Rows:
    """The figures of each row. Raises InputError."""
    def train(name, seed):
        return train_row(name, train_args, REPLACED[name] | {'seed': seed})
    comparison = Comparison(BASE, train)
    comparison.train_all(REPLACED, range(1, config['runs'] + 1))
    rows = comparison.rows(REPLACED, _figures)
    print_rows(rows, [*LOSS_COLUMNS, Column('ms/step', '{ms_per_step:.1f}')])
    return rows


def _figures(runs, base_runs):
    return loss_figures(final_losses(runs), final_losses(base_runs)) | cost_figures(runs, base_runs)
