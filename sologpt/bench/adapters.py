"""
Finetuning by each method of train.py's key `adapter`, and by all weights: what it reaches, takes, and costs to serve.

finetuning  the given config by each row, at several learning rates with seed 1, and at the best of them with more seeds
step_124m   a step of one sequence on a base with GPT-2's shape and random weights. The learning rate is 0, which takes
            as long
serving     decoding with that base, alone and with a low-rank adapter of its own for each row of the batch

A row that fails is recorded as failed. If full finetuning fails, the suite ends: there is nothing to compare with.
"""

import tempfile

from model import GPT, GPTConfig
from sologpt.adapters.methods import METHODS
from sologpt.adapters.methods.lora import LoRA
from sologpt.bench.adapter_finetuning import finetuning
from sologpt.bench.adapter_rows import (
    BASE,
    RANK,
    ROWS,
    SHAPE,
    VIRTUAL_TOKENS,
    find_machine,
    megabytes,
    size_figures,
    train_adapter,
)
from sologpt.bench.adapter_serving import serving
from sologpt.bench.rows import MEMORY_COLUMN, Column, Comparison, Rows, choose_rows, cost_figures, print_rows
from sologpt.files.checkpoint import save_checkpoint

ROUNDS = 2  # in which the rows of step_124m take turns


def measure(config: dict, train_args: list[str], picture: str) -> dict:
    """The figures of the three parts; draws `picture`. Raises InputError."""
    return {'finetuning': finetuning(config, train_args, picture),
            'step_124m': step_124m(config, train_args, SHAPE), 'serving': serving(train_args, SHAPE)}


def step_124m(config: dict, train_args: list[str], shape: dict, rounds: int = ROUNDS) -> Rows:
    """The figures of a training step of each row, on a base of this shape. Raises InputError."""
    _, _, dtype = find_machine(train_args, shape['block_size'], shape['n_embd'])
    chosen, steps = choose_rows(ROWS, config['recipes'], [BASE]), config['steps']
    with tempfile.TemporaryDirectory() as folder:
        # virtual tokens take positions beside those of the text
        model = GPT(GPTConfig(**shape | {'block_size': shape['block_size'] + VIRTUAL_TOKENS}))
        save_checkpoint(folder, {'model': model.state_dict(), 'model_args': model.config.to_save(), 'iter_num': 0},
                        best=False)
        del model
        # at a rate of 0 no evaluation is better than the one before, so that no large checkpoint is written
        keys = {'init_from': folder, 'dtype': dtype, 'block_size': shape['block_size'], 'batch_size': 1,
                'gradient_accumulation_steps': 1, 'learning_rate': 0, 'max_iters': steps + 1,
                'eval_interval': steps + 1, 'eval_iters': 1, 'log_interval': 1, 'always_save_checkpoint': False}

        def train(name, round):
            rank = {'adapter_r': RANK} if issubclass(METHODS.get(ROWS[name]['adapter'], GPT), LoRA) else {}
            return train_adapter(name, train_args, keys | rank)
        comparison = Comparison(BASE, train)
        comparison.train_all(chosen, range(1, rounds + 1), 'round')
    rows = comparison.rows(chosen, lambda runs, base_runs: cost_figures(runs, base_runs) | size_figures(runs[0]))
    print()
    print_rows(rows, [Column('ms/step', '{ms_per_step:,.1f}'), Column('speed', '{speed_ratio:.2f}'),
                      Column('trained', '{trained:,}'), megabytes('train, MB', 'training_bytes'), MEMORY_COLUMN])
    return rows
