"""This trainer against a peer with nanoGPT's command line: speed of training and of sampling, side by side."""

import os
import statistics
import tempfile

from configurator import InputError
from sologpt.bench import process
from sologpt.bench.peer import check_peer, train_peer
from sologpt.training.runs import Run, read_run

# nanoGPT's README configuration for a CPU; and a model large enough for the matmuls to matter, a few iterations
SETUPS = {
    'characters, 4 layers x 128, T=64, B=12': dict(
        block_size=64, batch_size=12, n_layer=4, n_head=4, n_embd=128, max_iters=2000, lr_decay_iters=2000, dropout=0.0,
        eval_iters=20, eval_interval=2000, log_interval=1),
    'characters, 6 layers x 384, T=256, B=16': dict(
        block_size=256, batch_size=16, n_layer=6, n_head=6, n_embd=384, max_iters=12, lr_decay_iters=2000, dropout=0.0,
        eval_iters=1, eval_interval=12, log_interval=1, always_save_checkpoint=True),
}
CONFIG = os.path.join('config', 'train_shakespeare_char.py')
SAMPLING = 'sampling 500 tokens, 6 layers x 384, T=256, one sample'


def measure(config: dict, train_args: list[str], picture: str) -> dict:
    """
    The figures of each setup, by trainer. Both train on the peer's token files, in a temporary folder. Raises
    InputError.
    """
    if train_args:
        raise InputError(f'{train_args[0]}: this suite trains models of its own, and takes no config')
    peer = check_peer(config['peer'])
    data = os.path.join(peer, 'data', 'shakespeare_char')
    if not os.path.exists(os.path.join(data, 'train.bin')):
        raise InputError(f'there is no {data}/train.bin: run python data/shakespeare_char/prepare.py in {peer}')
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, setup in SETUPS.items():
            rows = {'peer': [], 'here': []}
            for _ in range(config['runs']):
                for who, runs in rows.items():
                    runs.append(_train(who, peer, os.path.join(folder, who), setup | {'dataset': data}))
            figures[name] = _training_figures(rows, setup['batch_size'] * setup['block_size'])
            _show(name, figures[name])
        figures[SAMPLING] = _sampling_figures(peer, os.path.join(folder, 'peer'), config['runs'])
        _show(SAMPLING, figures[SAMPLING])
    return figures


def _train(who, peer, out_dir, setup):
    args = [CONFIG, *process.flags(setup | {'out_dir': out_dir, 'device': 'cpu', 'compile': False})]
    if who == 'peer':
        return _run_figures(train_peer(peer, args, f'{out_dir}.log')[0])
    process.run_script(process.ROOT, 'train.py', args)
    return _run_figures(read_run(out_dir, who))


def _run_figures(run: Run) -> dict:
    # the first iterations warm up; nanoGPT's beside an evaluation include it, which a median passes over
    return {'ms': statistics.median(step['time_ms'] for step in run.steps[3:]),
            'val_loss': run.evals[-1]['val_loss'], 'iterations': run.evals[-1]['iter']}


def _training_figures(rows, tokens):
    figures = {}
    for who, runs in rows.items():
        ms = statistics.median(run['ms'] for run in runs)
        figures[who] = {'ms_per_iteration': ms, 'tokens_per_s': 1000 * tokens / ms,
                        'val_loss': [run['val_loss'] for run in runs], 'iterations': runs[0]['iterations']}
    figures['here']['ratio'] = statistics.median(there['ms'] / here['ms'] for here, there in
                                                 zip(rows['here'], rows['peer'], strict=True))
    return figures


def _sampling_figures(peer, out_dir, n_runs):
    """
    Both continue the peer's checkpoint, half of the way beyond block_size. This trainer does so twice: as sample.py
    does by default, and moving the context for every token, as the peer does.
    """
    rows = {'peer': (peer, {}), 'here': (process.ROOT, {}),
            'here, context moved for every token': (process.ROOT, {'window_step': 1})}
    speeds = {who: [] for who in rows}
    for _ in range(n_runs):
        for who, (folder, options) in rows.items():
            speeds[who].append(_sampling_speed(folder, out_dir, options))
    figures = {who: {'tokens_per_s': statistics.median(found)} for who, found in speeds.items()}
    for who in list(rows)[1:]:
        figures[who]['ratio'] = statistics.median(here / there for here, there in
                                                  zip(speeds[who], speeds['peer'], strict=True))
    return figures


def _sampling_speed(folder, out_dir, more):
    """Tokens per second, from two whole runs that differ only in how many tokens they draw."""
    options = {'out_dir': out_dir, 'device': 'cpu', 'num_samples': 1, 'start': 'A'} | more
    _, long = process.run_script(folder, 'sample.py', process.flags(options | {'max_new_tokens': 501}))
    _, short = process.run_script(folder, 'sample.py', process.flags(options | {'max_new_tokens': 1}))
    return 500 / (long - short)


def _show(name, figures):
    print(name)
    for who, row in figures.items():
        print(f'  {who}: ' + ', '.join(f'{k} {v:,.2f}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items()),
              flush=True)
