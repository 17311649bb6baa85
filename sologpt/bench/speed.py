"""This trainer against a peer with nanoGPT's command line: speed of training and of sampling, side by side."""

import os
import re
import statistics
import tempfile

from configurator import InputError
from sologpt.bench import process

# nanoGPT's README configuration for a CPU, whole; and a model large enough for the matmuls to matter, a few iterations
SETUPS = {
    'characters, 4 layers x 128, T=64, B=12': dict(
        block_size=64, batch_size=12, n_layer=4, n_head=4, n_embd=128, max_iters=2000, lr_decay_iters=2000, dropout=0.0,
        eval_iters=20, eval_interval=2000, log_interval=1),
    'characters, 6 layers x 384, T=256, B=16': dict(
        block_size=256, batch_size=16, n_layer=6, n_head=6, n_embd=384, max_iters=12, lr_decay_iters=2000, dropout=0.0,
        eval_iters=1, eval_interval=12, log_interval=1, always_save_checkpoint=True),
}
CONFIG = os.path.join('config', 'train_shakespeare_char.py')


def measure(config, train_args, picture):
    """The figures as plain values. Trains in a temporary folder, with the peer's token files. Raises InputError."""
    if train_args:
        raise InputError(f'{train_args[0]}: this suite trains models of its own, and takes no config')
    peer, here = process.check_peer(config['peer']), process.ROOT
    data = os.path.join(peer, 'data', 'shakespeare_char')
    if not os.path.exists(os.path.join(data, 'train.bin')):
        raise InputError(f'there is no {data}/train.bin: run python data/shakespeare_char/prepare.py in {peer}')
    figures = {}
    with tempfile.TemporaryDirectory() as out:
        for name, setup in SETUPS.items():
            rows = {'peer': [], 'here': []}
            for _ in range(config['runs']):
                for who, folder in (('peer', peer), ('here', here)):
                    rows[who].append(_train(folder, os.path.join(out, who), setup | {'dataset': data}))
            figures[name] = _compare(rows, setup['batch_size'] * setup['block_size'])
            _show(name, figures[name])
        # both continue the peer's checkpoint of the last setup, half of the way beyond block_size; here once as
        # sample.py does by default, once moving the context for every token, as the peer does
        default, exact = {}, {'window_step': 1}
        rows = {'peer': [], 'here': [], 'here, context moved for every token': []}
        for _ in range(config['runs']):
            for who, where, options in zip(rows, (peer, here, here), (default, default, exact), strict=True):
                rows[who].append(_sampling_speed(where, os.path.join(out, 'peer'), options))
        name = 'sampling 500 tokens, 6 layers x 384, T=256, one sample'
        figures[name] = {who: {'tokens_per_s': statistics.median(speeds)} for who, speeds in rows.items()}
        for who in list(rows)[1:]:
            figures[name][who]['ratio'] = statistics.median(h / p for h, p in zip(rows[who], rows['peer'], strict=True))
        _show(name, figures[name])
    return figures


def _train(folder, out_dir, setup):
    options = setup | {'out_dir': out_dir, 'device': 'cpu', 'compile': False}
    out, _ = process.run(folder, 'train.py', [CONFIG, *process.flags(options)])
    times = [float(t) for t in re.findall(r'^iter \d+: .*?time ([\d.]+)ms', out, re.M)]
    evaluated = re.findall(r'^step (\d+): .*?val loss ([\d.]+)', out, re.M)
    # the first iterations warm up; in nanoGPT those beside an evaluation include it, which a median passes over
    return {'ms': statistics.median(times[3:]), 'val_loss': float(evaluated[-1][1]),
            'iterations': int(evaluated[-1][0])}


def _sampling_speed(folder, out_dir, more):
    """Tokens per second from whole runs that differ only in how many tokens they draw."""
    options = {'out_dir': out_dir, 'device': 'cpu', 'num_samples': 1, 'start': 'A'} | more
    _, long = process.run(folder, 'sample.py', process.flags(options | {'max_new_tokens': 501}))
    _, short = process.run(folder, 'sample.py', process.flags(options | {'max_new_tokens': 1}))
    return 500 / (long - short)


def _compare(rows, tokens):
    figures = {who: {'ms_per_iteration': statistics.median(r['ms'] for r in runs),
                     'tokens_per_s': tokens / statistics.median(r['ms'] for r in runs) * 1000,
                     'val_loss': [r['val_loss'] for r in runs], 'iterations': runs[0]['iterations']}
               for who, runs in rows.items()}
    figures['here']['ratio'] = statistics.median(p['ms'] / h['ms'] for h, p in zip(rows['here'], rows['peer'],
                                                                                   strict=True))
    return figures


def _show(name, figures):
    print(name)
    for who, row in figures.items():
        print(f'  {who}: ' + ', '.join(f'{k} {v:,.2f}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items()),
              flush=True)
