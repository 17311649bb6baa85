"""
What a row of the gpu suite measures: a function (session, keys of train.py) -> plain values.

Both trainers run as they are, in processes of their own. nanoGPT is asked for its memory and for the seconds of its
generate() by config files, which it runs as Python. This trainer says both itself. Learning rates of timed steps are 0:
a step takes as long, and no checkpoint is written. Evaluations are as small as can be, because they belong to no step.
"""

import functools
import json
import os
import re
import tempfile
import time
import zlib

import torch

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.bench import adapters, matmul, peer, plan, process, race
from sologpt.bench.gpu_session import STEP, Session
from sologpt.files.models import read_model
from sologpt.inference.compiled_step import CompiledStep
from sologpt.inference.generation import lists_of, stream
from sologpt.machine import choices, clock, devices
from sologpt.matmuls.held import hold_all_linears_in
from sologpt.training.build import with_loss_chunk
from sologpt.training.runs import read_run

UNTIMED = {'eval_interval': 10 ** 6, 'always_save_checkpoint': False, 'learning_rate': 0.0}
RACE_STEPS, RACE_SECONDS = 240, 35  # nanoGPT's steps, and what they take on a large GPU: a slower one does fewer
LEAST_RACE_STEPS = 60
NEW_TOKENS, WARM_UP_TOKENS = 1000, 20  # of a text that is drawn, and of one before it


# ---- training steps --------------------------------------------------------------------------------------------------

def train_peer(session: Session, keys: dict) -> dict:
    """nanoGPT's median step, and its most memory."""
    memory = ('torch.cuda.max_memory_allocated(device)' if session.device.type == 'cuda' else
              'resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024')
    hook = session.file('memory.py', f'import atexit, resource\n'
                                     f"atexit.register(lambda: print('most memory', {memory}))\n")
    keys = _peer_keys(session, keys) | UNTIMED | {'eval_iters': 0}
    session.note('nanoGPT', 'train.py', keys)
    run, printed = peer.train_peer(session.peer, [hook, *process.flags(keys)], session.path('peer.log'))
    ms = run.get('time_ms')
    return {'ms_per_step': ms, 'tokens_per_s': 1000 * run.header['tokens_per_iter'] / ms,
            'memory_gb': int(_find_last(r'^most memory (\d+)$', printed)) / 1e9}


def _find_last(pattern, printed):
    found = re.findall(pattern, printed, re.M)
    if not found:
        raise InputError(f'nanoGPT printed no line {pattern}')
    return found[-1]


def _peer_keys(session, keys):
    return {'dropout': 0.0} | _machine_keys(session, keys) | {'out_dir': session.path('out-peer')}


def _machine_keys(session, keys):
    return {'device': f'{session.device}', 'dtype': session.dtype, 'log_interval': 1} | keys | {
        'compile': session.compile and keys.get('compile', True), 'dataset': session.tokens(keys['dataset'])}


def train(session: Session, keys: dict) -> dict:
    """This trainer's median step and most memory, its MFU, and what that is made of."""
    keys = _own_keys(session, keys) | UNTIMED | {'eval_iters': 1}
    session.note('here', 'train.py', keys)
    process.run_own('train.py', process.flags(keys))
    run = read_run(keys['out_dir'], 'here')
    return {'ms_per_step': run.get('time_ms'), 'tokens_per_s': run.get('tokens_per_s'), 'mfu': run.get('mfu'),
            'memory_gb': run.max_memory(),
            **{key: run.header[key] for key in ('flops_per_token', 'peak_flops', 'peak_source', 'parameters')}}


def _own_keys(session, keys):
    if session.device.type == 'cpu':  # which refuses what is for a GPU alone
        keys = {key: value for key, value in keys.items() if key != 'memory_limit'} | (
            {'attn_backend': 'sdpa'} if keys.get('attn_backend') in choices.GPU_ATTENTION else {})
    return _machine_keys(session, keys) | {'out_dir': session.path('out')} | (
        {'init_from': session.base()} if keys.get('init_from') == 'base' else {})


def train_by_number(session: Session, keys: dict) -> dict:
    """train() on the device by its number, such as cuda:0."""
    return train(session, keys | {'device': f'{session.device.type}:{session.device.index or 0}'})


def foreseen(session: Session, keys: dict) -> dict:
    """The memory that is foreseen for this step, in GB, by the sequences of a micro-batch."""
    keys = _own_keys(session, keys)
    sizes = {max(1, keys['batch_size'] * n // 16) for n in (16, 24, 32, 64)}
    session.note('here', 'bench.py --suite=plan', keys)
    return {'peak_gb': session.child('gpu_measurements', f'print_foreseen({process.flags(keys)!r}, {sorted(sizes)})')}


def print_foreseen(train_args: list[str], sizes: list[int]) -> None:
    """Print, as JSON: sequences -> GB."""
    options, _ = process.resolve_train(train_args)
    device = devices.find_device(options['device'])
    shape = plan.model_config(options)
    if device.type == 'cuda':
        shape = with_loss_chunk(shape, devices.usable_memory(device, options['memory_limit']))
    found = plan.forecast(options | {'compile': options['compile'] is True}, shape)
    print(json.dumps({size: found.at(size).peak / 1e9 for size in sizes}))


def wait_for_batches(session: Session, keys: dict) -> dict:
    """How long a step of 50 ms waits for its batch, and how long a batch takes at once after another."""
    size = session.sized(STEP)
    call = (session.tokens('tokens'), size['batch_size'], size['block_size'], 50.0, 2000, 20, f'{session.device}')
    return session.child('data', f'read_batches(*{call!r})')


# ---- the race --------------------------------------------------------------------------------------------------------

def race_peer(session: Session, keys: dict) -> dict:
    """nanoGPT's recipe, warm-up and decay scaled to its tokens: seconds, and the loss that is to be reached."""
    name, steps = session.dataset or 'code', _race_steps(session)
    keys = _peer_keys(session, keys | {'dataset': name}) | {
        'max_iters': steps, 'lr_decay_iters': steps, 'warmup_iters': steps // 20, 'eval_interval': steps // 2,
        'learning_rate': 6e-4, 'min_lr': 6e-5, 'eval_iters': 2 if session.small else 20}
    folder = peer.link_tokens(keys.pop('dataset'), session.peer, tempfile.mkdtemp(dir=session.folder))
    session.note('nanoGPT', 'train.py', keys | {'dataset': folder})
    args = process.flags({key: value for key, value in keys.items() if key != 'out_dir'})
    run = race.race_peer(session.peer, args, folder, 1, session.path('race-peer'))
    same = {key: keys[key] for key in race.SAME}
    target, target_is = race.find_target(run, same, folder, session.path('race-peer'))
    return {'target_val_loss': target, 'target_is': target_is, 'val_crc32': _crc(folder),
            'eval_iters': keys['eval_iters'], 'steps': steps, 'peer': race.peer_figures(run),
            'curve': run.curve('seconds')}


def _race_steps(session):
    """An even number, so that nanoGPT's last evaluation is at its end."""
    if session.small:
        return 20
    ms = session.figures.get('training_step', {}).get('nanoGPT, round 1', {}).get('ms_per_step')
    steps = RACE_STEPS if ms is None else int(min(RACE_STEPS, max(LEAST_RACE_STEPS, 1000 * RACE_SECONDS / ms)))
    return steps - steps % 2


def _crc(folder):
    with open(os.path.join(folder, 'val.bin'), 'rb') as f:
        return zlib.crc32(f.read())


def race_here(session: Session, keys: dict) -> dict:
    """This trainer's recipe for GPT-2's size, with a share of nanoGPT's tokens. keys: {'share': ...}."""
    theirs = session.figures['race'].get('nanoGPT', {})
    if 'peer' not in theirs:
        raise InputError('nanoGPT has not been measured')
    steps = max(4, round(keys['share'] * theirs['steps']))
    keys = _own_keys(session, session.sized(STEP | {'n_head': 6, 'dataset': session.dataset or 'code'}))
    keys = _in_total_batch_size(keys) | {
        'max_iters': steps, 'momentum_warmup': steps // 4, 'eval_interval': -(-steps // 2),
        'eval_iters': theirs['eval_iters']}
    if _crc(keys['dataset']) != theirs['val_crc32']:
        raise InputError("the token files are others than nanoGPT's were: --restart=True measures both")
    session.note('here', 'train.py config/train_fineweb_124m.py', keys)
    config_file = os.path.join(process.ROOT, 'config', 'train_fineweb_124m.py')
    process.run_own('train.py', [config_file, *process.flags(keys)])
    run = read_run(keys['out_dir'], 'here')
    return race.race_figures(theirs['peer'], run, theirs['target_val_loss'], theirs['target_is']) | {
        'curve': run.curve('seconds')}


# ---- sampling --------------------------------------------------------------------------------------------------------

PEER_HOOK = '''import time
_generate = GPT.generate
def _timed(self, idx, n, **keys):
    _generate(self, idx, WARM_UP_TOKENS, **keys)
    start = time.perf_counter()
    y = _generate(self, idx, n, **keys)
    y.tolist()
    print(f'\\ndrawn {n} {time.perf_counter() - start}')
    return y
GPT.generate = _timed
'''


def sample_peer(session: Session, keys: dict) -> dict:
    """nanoGPT's sample.py draws a text, after a short one that warms up."""
    keys = {'device': f'{session.device}', 'start': 'A', 'max_new_tokens': _new_tokens(session),
            'out_dir': session.base(), 'num_samples': 1, 'dtype': session.dtype}
    session.note('nanoGPT', 'sample.py', keys)
    hook = session.file('generate.py', PEER_HOOK.replace('WARM_UP_TOKENS', f'{WARM_UP_TOKENS}'))
    printed, _ = process.run_script(session.peer, 'sample.py', [hook, *process.flags(keys)])
    n, seconds = _find_last(r'^drawn (\d+) ([\d.e-]+)$', printed)
    return {'tokens_per_s': int(n) / float(seconds), 'tokens': int(n)}


def _new_tokens(session):
    return 20 if session.small else NEW_TOKENS


def sample(session: Session, keys: dict) -> dict:
    """
    This trainer draws a text with sample.py's settings, eager and compiled, after a short one that warms up and
    compiles.
    """
    call = f'print_sampling({session.base()!r}, {f"{session.device}"!r}, {_new_tokens(session)}, {session.compile})'
    session.commands.append(session.plain(call))
    return session.child('gpu_measurements', call)


def print_sampling(source: str, device_name: str, new_tokens: int, compile: bool) -> None:
    """Print, as JSON, how many tokens per second are drawn from a checkpoint: eager, and compiled if that is asked."""
    device = devices.find_device(device_name)
    devices.prepare_device(device)
    shape = GPTConfig.from_saved(read_model(source)[0])
    dtype, _ = choices.find_dtype('auto', device, (shape.block_size, shape.n_embd, 4 * shape.n_embd))
    attn_backend, _ = choices.find_attn_backend('auto', device, dtype, shape.block_size)
    model, _ = GPT.from_checkpoint(source, dropout=0.0, attn_backend=attn_backend)
    model.eval().to(device)
    hold_all_linears_in(model, dtype)
    prompt, window_step = torch.full((1, 1), 33, device=device), max(1, shape.block_size // 8)

    def tokens_per_s(step=None):
        for n in (WARM_UP_TOKENS, new_tokens):
            generator = torch.Generator(device).manual_seed(1337)
            clock.synchronize(device)
            start = time.perf_counter()
            with devices.autocast(device, dtype):
                drawn = list(lists_of(stream(model, prompt, n, 0.8, 200, window_step=window_step, generator=generator,
                                             step=step)))
        return len(drawn) / (time.perf_counter() - start)
    found = {'tokens': new_tokens, 'tokens_per_s': tokens_per_s()}
    if compile:
        found |= _or_failed(lambda: {'compiled_tokens_per_s': tokens_per_s(CompiledStep(model))}, 'compiled_failed')
    print(json.dumps(found))


def _or_failed(measure, key='failed'):
    """What measure() returns, or why it failed, by this key: a part of a row does not take the rest of it down."""
    try:
        return measure()
    except Exception as e:
        return {key: f'{type(e).__name__}: {e}'.partition('\n')[0][:300]}


# ---- Linears ---------------------------------------------------------------------------------------------------------

def time_linears(session: Session, keys: dict) -> dict:
    """Width -> recipe -> the figures of a Linear, as the suite matmul has them, beside the one in the run's dtype."""
    sizes = ((32,), 32) if session.small else (keys['widths'], keys['tokens'])
    call = (f'print_linears({f"{session.device}"!r}, {session.dtype!r}, {session.compile}, {keys["recipes"]!r}, '
            f'*{sizes!r})')
    session.commands.append(call)
    return {'dtype': session.dtype, 'tokens': sizes[1], 'widths': session.child('gpu_measurements', call)}


def print_linears(device_name: str, dtype: str, compile: bool, names: tuple[str, ...], widths: tuple[int, ...],
                  tokens: int) -> None:
    """Print, as JSON: width -> dtype or recipe -> its figures, with `speed`, how many times as fast as dtype it is."""
    device = devices.find_device(device_name)
    devices.prepare_device(device)
    found = {}
    for width in widths:
        linear = functools.partial(matmul.measure_linear, matmul.Problem(width, tokens), device, compile, dtype)
        base = linear()
        rows = {name: _or_failed(lambda linear=linear, name=name: linear(name)) for name in names}
        found[width] = {dtype: base, **{name: row | ({'speed': base['ms'] / row['ms']} if 'ms' in row else {})
                                        for name, row in rows.items()}}
    print(json.dumps(found))


# ---- other suites ----------------------------------------------------------------------------------------------------

def run_suite(session: Session, keys: dict) -> dict:
    """The figures of another suite, which keys['suite'] names."""
    dest = session.path('suite.json')
    if session.small:
        keys |= {'matmul': {'widths': 32, 'tokens': 32}, 'sweep': {'steps': 1, 'gradient_accumulation_steps': 1}}[
            keys['suite']]
    if keys['suite'] == 'sweep':
        keys = _in_total_batch_size(_machine_keys(session, keys)) | {'learning_rate': 0.0}
    keys = keys | {'device': f'{session.device}', 'dest': dest}
    session.note('here', 'bench.py', keys)
    process.run_own('bench.py', process.flags(keys))
    return process.read_json(dest)['figures']


def _in_total_batch_size(keys):
    """The tokens of a step in total_batch_size."""
    return {key: value for key, value in keys.items() if key != 'gradient_accumulation_steps'} | {
        'total_batch_size': keys['batch_size'] * keys['block_size'] * keys['gradient_accumulation_steps']}


def run_adapters(session: Session, keys: dict) -> dict:
    """What adapters cost at GPT-2's shape: that suite without its finetunings, which take an hour."""
    arguments = process.flags({'device': f'{session.device}', 'dtype': session.dtype, 'compile': False,
                               'dataset': session.tokens('tokens')})
    call = f'print_adapters({keys["recipes"]!r}, {arguments!r}, {session.small})'
    session.commands.append(session.plain(call))
    return session.child('gpu_measurements', call)


def print_adapters(recipes: str, train_args: list[str], small: bool) -> None:
    """Print, as JSON, what adapters.step_124m() finds of these recipes; if there are none, what serving() finds."""
    shape, steps, rounds = adapters.SHAPE, 10, adapters.ROUNDS
    if small:
        shape, steps, rounds = shape | dict(n_layer=2, n_head=2, n_embd=32, block_size=96), 2, 1
        recipes = recipes and 'lora'
    print(json.dumps(adapters.step_124m({'recipes': recipes, 'steps': steps}, train_args, shape, rounds) if recipes
                     else adapters.serving(train_args, shape)))
