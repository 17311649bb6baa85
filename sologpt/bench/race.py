"""
Seconds of training to the val loss that a peer reaches at its end, here and there, on the same token files.

Evaluation and start-up count on neither side, and the first step, which warms up and compiles, counts as a median one.
The peer's seconds are its median step time, of those it prints, times its steps; this trainer's are the sum of its
steps. The target is the loss of its last checkpoint on the tokens that
this trainer evaluates on; where that cannot be loaded here, the loss that the peer prints at its end.
"""

import os
import pickle
import re
import shlex
import statistics
import tempfile

import configurator
from configurator import InputError
from sologpt.bench import process
from sologpt.tokens import data_folder
from sologpt.training.runs import read_run

TRAIN = os.path.join(process.ROOT, 'train.py')
SHAPE = ('n_layer', 'n_embd', 'block_size')


def measure(config, train_args, picture):
    """The figures as plain values; draws `picture`. Raises InputError."""
    peer, peer_args = process.check_peer(config['peer']), shlex.split(config['peer_args'])
    if not train_args:
        raise InputError('no config for this trainer: add one, such as config/speedrun_cpu.py')
    races = []
    with tempfile.TemporaryDirectory() as folder:
        options, _ = configurator.resolve(TRAIN, train_args)
        if options['batch_size'] == 'auto':
            raise InputError('batch_size=auto: give a number, for the peer is evaluated in the same batches')
        data = token_files(options['dataset'], peer, folder)
        for seed in range(1, config['runs'] + 1):
            there, here = (os.path.join(folder, f'{who} {seed}') for who in ('peer', 'here'))
            theirs = train_peer(peer, peer_args, data, seed, there)
            process.own('train.py', [*train_args, *process.flags({'dataset': data, 'out_dir': here, 'seed': seed})])
            ours = read_run(here, 'here')
            same = {key: ours.config[key] for key in ('eval_iters', 'batch_size', 'device')}
            races.append(figures(peer_figures(theirs), ours, *target(theirs, same, data, there)))
            _show(seed, races[-1])
        process.own('compare.py', [f'{there}.log', here, f'--plot={os.path.abspath(picture)}'])
        print(f'picture of the last: {picture}')
    shape = {key: ours.config[key] for key in SHAPE}
    others = {key: value for key, value in re.findall(r'--(\w+)=(\S+)', ' '.join(peer_args)) if key in SHAPE}
    if differ := [key for key, value in others.items() if value != str(shape[key])]:
        print(f'NOTE: the models differ in {", ".join(differ)}: {others} there, {shape} here')
    ratios, median = [race['ratio'] for race in races], None
    if all(ratios):
        median = {key: statistics.median(ratio[key] for ratio in ratios) for key in ratios[0]}
    print('median over seeds: ' + _fewer(median) if median else 'not every seed reached the target: no median')
    return {'shape': shape, 'seeds': races, 'median_ratio': median}


def token_files(dataset, peer, folder):
    """A folder with links to the token files and a description of them for either trainer."""
    here, there = (os.path.join(root, 'data', dataset or '') for root in ('', peer))
    source = here if os.path.exists(os.path.join(here, 'train.bin')) else there
    if not os.path.exists(os.path.join(source, 'train.bin')):
        raise InputError(f'dataset={dataset!r}: no train.bin in {here} or {there}: run its prepare.py')
    data = os.path.join(folder, 'data')
    os.mkdir(data)
    for name in os.listdir(source):
        if name.endswith('.bin') or name in ('meta.json', 'meta.pkl'):
            os.symlink(os.path.join(os.path.abspath(source), name), os.path.join(data, name))
    if not os.path.exists(os.path.join(data, 'meta.pkl')):  # without it nanoGPT takes 50,304 ids
        with open(os.path.join(data, 'meta.pkl'), 'wb') as f:
            pickle.dump({'vocab_size': data_folder.read_meta(source)['vocab_size']}, f)
    return data


def train_peer(peer, peer_args, data, seed, out_dir):
    """The peer's Run; its console log is out_dir.log."""
    with open(os.path.join(peer, 'train.py'), encoding='utf-8') as f:
        has_seed = re.search(r'^seed\b.*=', f.read(), re.M)
    if not has_seed:  # nanoGPT has no such key, but it runs its config files
        with open(f'{out_dir}.py', 'w', encoding='utf-8') as f:
            f.write(f'_manual_seed = torch.manual_seed\n'
                    f'torch.manual_seed = lambda seed: _manual_seed(seed + {seed - 1})\n')
    printed, _ = process.run(peer, 'train.py', [*peer_args, f'--seed={seed}' if has_seed else f'{out_dir}.py',
                                        *process.flags({'dataset': data, 'out_dir': out_dir})])
    with open(f'{out_dir}.log', 'w', encoding='utf-8') as f:
        f.write(printed)
    theirs = read_run(f'{out_dir}.log', 'peer')
    if not theirs.evals:
        raise InputError('the peer printed no line `step N: train loss ..., val loss ...`')
    return theirs


def target(theirs, same, data, out_dir):
    """(the val loss to be reached, on which tokens); same: the keys by which this trainer evaluates itself."""
    try:
        printed = process.own('train.py', ['--init_from=resume', '--eval_only=True', *process.flags(
            same | {'out_dir': out_dir, 'dataset': data, 'compile': False})])
        return float(re.findall(r'val loss ([\d.]+)', printed)[-1]), 'the same tokens'
    except InputError as e:
        return theirs.evals[-1]['val_loss'], f'as the peer printed it: {str(e).splitlines()[0]}'


def peer_figures(theirs):
    last = theirs.evals[-1]
    return {'iterations': last['iter'], 'tokens': last['iter'] * theirs.header['tokens_per_iter'],
            'seconds': last['iter'] * theirs.get('time_ms') / 1000, 'val_loss_printed': last['val_loss']}


def figures(peer, ours, target, measured_on):
    """Of this trainer's Run beside peer_figures()."""
    reached = next((e for e in ours.evals if e['val_loss'] <= target and e['iter'] > 0), None)
    here = reached and {'iterations': reached['iter'], 'tokens': reached['tokens'], 'val_loss': reached['val_loss'],
                        'seconds': reached['seconds'] + ours.get('time_ms') / 1000}  # the log's are without the first
    speed = {'peer': peer['tokens'] / peer['seconds'],
             'here': ours.header['tokens_per_iter'] / ours.get('time_ms') * 1000}
    return {'target_val_loss': target, 'target_is': measured_on, 'peer': peer, 'here': here,
            'here_final_val_loss': ours.evals[-1]['val_loss'], 'tokens_per_s': speed,
            'ratio': here and {key: peer[key] / here[key] for key in ('seconds', 'iterations', 'tokens')}}


def _show(seed, race):
    print(f'seed {seed}: val loss {race["target_val_loss"]:.4f} ({race["target_is"]})')
    for who in ('peer', 'here'):
        row = race[who]
        cost = (f'{row["seconds"]:.2f} s, {row["iterations"]:,} iterations, {row["tokens"]:,} tokens' if row else
                f'not reached, {race["here_final_val_loss"]:.4f} at the end')
        print(f'  {who}: {cost}; {race["tokens_per_s"][who] / 1000:.1f}k tok/s')
    if race['ratio']:
        print(f'  {_fewer(race["ratio"])}', flush=True)


def _fewer(ratio):
    return ', '.join(f'{value:.1f} x fewer {key}' for key, value in ratio.items())
