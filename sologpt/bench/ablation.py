"""A config, and the same with one of its parts replaced at a time: val loss at its end and ms per step, over seeds."""

import os
import statistics
import tempfile

from sologpt.bench import process
from sologpt.training.runs import read_run

# what takes each part's place; AdamW at the best learning rate of those tried on config/speedrun_cpu.py (1e-3 to 1e-2)
REPLACED = {
    'the recipe': {},
    'learned positions': {'positions': 'learned'},
    'LayerNorm': {'norm': 'layernorm'},
    'no QK-norm': {'qk_norm': False},
    'GELU': {'activation': 'gelu'},
    'projections and head not from zero': {'zero_init': False},
    'no norm on the embedding': {'embd_norm': False},
    'head tied to the embedding': {'tied': True},
    'no smear': {'smear': False},
    'cosine to a tenth': {'schedule': 'cosine'},
    'five iterations in Muon': {'muon_iterations': 5},
    "momentum of Muon's authors": {'muon_momentum': 0.95, 'momentum_warmup': 300},
    'AdamW': {'optimizer': 'adamw', 'learning_rate': 6e-3},
    "GPT-2's parts": {'arch': 'gpt2', 'smear': False},
    "GPT-2's parts, AdamW": {'arch': 'gpt2', 'smear': False, 'optimizer': 'adamw', 'learning_rate': 4e-3,
                             'warmup_iters': 20},
}


def measure(config, train_args, picture):
    """The figures as plain values. Raises InputError."""
    runs = {name: [] for name in REPLACED}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, config['runs'] + 1):  # seeds outside, so that a busy minute falls on all alike
            for name, changes in REPLACED.items():
                out_dir = os.path.join(folder, 'out')
                options = changes | {'out_dir': out_dir, 'seed': seed, 'sample_tokens': 0}
                process.own('train.py', [*train_args, *process.flags(options)])
                runs[name].append(read_run(out_dir, name))
            print(f'seed {seed} of {config["runs"]}', flush=True)
    rows = {name: _row(found) for name, found in runs.items()}
    base = rows['the recipe']
    print(f'{"":36} {"val loss":>8} {"spread":>7} {"difference":>10} {"ms/step":>8}')
    for name, row in rows.items():
        # of the same seeds, whose luck cancels out
        row['difference'] = statistics.mean(a - b for a, b in zip(row['val_loss'], base['val_loss'], strict=True))
        print(f'{name:36} {row["mean"]:8.4f} {row["spread"]:7.4f} {row["difference"]:+10.4f} {row["ms_per_step"]:8.1f}')
    return rows


def _row(found):
    losses = [run.evals[-1]['val_loss'] for run in found]
    return {'val_loss': losses, 'mean': statistics.mean(losses),
            'spread': statistics.stdev(losses) if len(losses) > 1 else 0.0,  # standard deviation over seeds
            'ms_per_step': statistics.median(run.get('time_ms') for run in found)}
