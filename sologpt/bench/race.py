"""
Seconds of training to the val loss that a peer reaches at its end, here and there, on the same token files.

Evaluation and start-up count on neither side. The first step, which warms up and compiles, counts as a median one. The
peer's seconds are the median of the step times that it prints, times its steps. This trainer's seconds are the sum of
its steps. The target is the loss of the peer's last checkpoint, on the tokens that this trainer evaluates on. If that
checkpoint cannot be loaded here, it is the loss that the peer prints at its end.
"""

import os
import re
import shlex
import statistics
import tempfile

from configurator import InputError
from sologpt.bench import process
from sologpt.bench.peer import check_peer, link_tokens, seed_args, train_peer
from sologpt.bench.pictures import DARK_GREY, GREY, draw_picture, moving_mean, style_axes
from sologpt.files.models import read_model
from sologpt.training.runs import Run, read_run

SHAPE = ('n_layer', 'n_embd', 'block_size')
SAME = ('eval_iters', 'batch_size', 'device', 'dtype')  # keys by which both are evaluated


def measure(config: dict, train_args: list[str], picture: str) -> dict:
    """The figures of each seed and their median; draws `picture`. Raises InputError."""
    peer, peer_args = check_peer(config['peer']), shlex.split(config['peer_args'])
    if not train_args:
        raise InputError('no config for this trainer: add one, such as config/speedrun_cpu.py')
    options, _ = process.resolve_train(train_args)
    if options['batch_size'] == 'auto':
        raise InputError('batch_size=auto: give a number, because the peer is evaluated in the same batches')
    races = []
    with tempfile.TemporaryDirectory() as folder:
        data = link_tokens(options['dataset'], peer, folder)
        for seed in range(1, config['runs'] + 1):
            there, here = (os.path.join(folder, f'{who} {seed}') for who in ('peer', 'here'))
            theirs = race_peer(peer, peer_args, data, seed, there)
            process.run_own('train.py', [*train_args, *process.flags({'dataset': data, 'out_dir': here, 'seed': seed})])
            ours = read_run(here, 'here')
            same = {key: ours.config[key] for key in SAME}
            races.append(race_figures(peer_figures(theirs), ours, *find_target(theirs, same, data, there)))
            _show(seed, races[-1])
    draw_picture(picture, (9, 5), _draw, theirs, ours, races[-1], os.path.basename(peer))
    shape = {key: ours.config[key] for key in SHAPE}
    _warn_of_shapes(shape, peer_args)
    ratios, median = [race['ratio'] for race in races], None
    if all(ratios):
        median = {key: statistics.median(ratio[key] for ratio in ratios) for key in ratios[0]}
    print('median over seeds: ' + _fewer(median) if median else 'not every seed reached the target: no median')
    return {'shape': shape, 'seeds': races, 'median_ratio': median}


def race_peer(peer: str, peer_args: list[str], data: str, seed: int, out_dir: str) -> Run:
    """Train the peer with this seed; its console log is out_dir.log. Raises InputError."""
    args = [*peer_args, *seed_args(peer, seed, f'{out_dir}.py'),
            *process.flags({'dataset': data, 'out_dir': out_dir})]
    theirs, _ = train_peer(peer, args, f'{out_dir}.log')
    if not theirs.evals:
        raise InputError('the peer printed no line `step N: train loss ..., val loss ...`')
    return theirs


def find_target(theirs: Run, same: dict, data: str, out_dir: str) -> tuple[float, str]:
    """
    (the val loss to be reached, on which tokens). out_dir: of the peer. same: keys by which this trainer evaluates
    itself, with which it evaluates the peer's checkpoint, too.
    """
    path, evaluated = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'evaluated')
    try:
        model_args, _, _ = read_model(path)
        # one step that changes nothing, because only a run that trains has a log
        process.run_own('train.py', process.flags(same | {
            'init_from': path, 'out_dir': evaluated, 'dataset': data, 'block_size': model_args['block_size'],
            'max_iters': 1, 'learning_rate': 0.0, 'gradient_accumulation_steps': 1, 'compile': False,
            'always_save_checkpoint': False}))
        return read_run(evaluated, 'target').evals[0]['val_loss'], 'the same tokens'
    except InputError as e:
        return theirs.evals[-1]['val_loss'], f'as the peer printed it: {str(e).splitlines()[0]}'


def peer_figures(theirs: Run) -> dict:
    """What the peer needed until its last evaluation."""
    last = theirs.evals[-1]
    return {'iterations': last['iter'], 'tokens': last['iter'] * theirs.header['tokens_per_iter'],
            'seconds': last['iter'] * theirs.get('time_ms') / 1000, 'val_loss_printed': last['val_loss']}


def race_figures(peer: dict, ours: Run, target: float, target_is: str) -> dict:
    """What this trainer's run needed until the target, beside peer_figures(); no ratio if it did not reach it."""
    reached = next((e for e in ours.evals if e['val_loss'] <= target and e['iter'] > 0), None)
    here = reached and {'iterations': reached['iter'], 'tokens': reached['tokens'], 'val_loss': reached['val_loss'],
                        'seconds': reached['seconds'] + ours.get('time_ms') / 1000}  # the log's are without the first
    speed = {'peer': peer['tokens'] / peer['seconds'],
             'here': ours.header['tokens_per_iter'] / ours.get('time_ms') * 1000}
    return {'target_val_loss': target, 'target_is': target_is, 'peer': peer, 'here': here,
            'here_final_val_loss': ours.evals[-1]['val_loss'], 'tokens_per_s': speed,
            'ratio': here and {key: peer[key] / here[key] for key in ('seconds', 'iterations', 'tokens')}}


def _warn_of_shapes(shape, peer_args):
    others = {key: value for key, value in re.findall(r'--(\w+)=(\S+)', ' '.join(peer_args)) if key in SHAPE}
    if differ := [key for key, value in others.items() if value != str(shape[key])]:
        print(f'NOTE: the models differ in {", ".join(differ)}: {others} there, {shape} here')


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


def _draw(figure, theirs, ours, race, peer_name):
    axes = figure.subplots()
    window = max(1, len(theirs.steps) // 40)
    axes.plot(theirs.place('seconds'), moving_mean([step['loss'] for step in theirs.steps], window), color=GREY,
              label=f'{peer_name}: training loss, mean of {window} steps')
    xs, losses = theirs.curve('seconds')
    axes.plot(xs, losses, 'o', color=DARK_GREY, label=f'{peer_name}: validation loss')
    axes.plot(*ours.curve('seconds'), 'o-', color='C0', markersize=3, label='this trainer: validation loss')
    target = race['target_val_loss']
    axes.axhline(target, color='black', linestyle='dotted', linewidth=1,
                 label=f"{peer_name}'s loss at its end: {target:.3f}")
    if race['here']:
        ends = race['here']['seconds'], race['peer']['seconds']
        axes.annotate('', (ends[0], target), (ends[1], target), arrowprops={'arrowstyle': '->', 'color': 'C3'})
        axes.annotate(f'{race["ratio"]["seconds"]:.1f} x fewer seconds', (sum(ends) / 2, target), (0, 6),
                      textcoords='offset points', ha='center', color='C3')
    later = [e['val_loss'] for e in ours.evals[1 + len(ours.evals) // 10:]] or losses
    axes.set_ylim(min(*later, *losses) - 0.05, max(*later, target) * 1.15)  # the first fall is not what is to be seen
    axes.set_xlim(left=0)
    style_axes(axes, f'Loss against seconds of training on one machine, beside {peer_name}', 'seconds of training',
               'loss, nats per token')
    axes.legend(frameon=False, loc='upper right')
