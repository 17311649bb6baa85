"""
What the gpu suite runs: a row is one of these functions, called with the session and train.py's keys, and returns plain
values. Both trainers run as they are, in processes of their own. What they do not print is had from config files, which
both run as Python: nanoGPT is asked for its memory and the seconds of its generate(), and here evaluations are not
compiled, which would take a third of a row's time and belongs to no step. Learning rates of timed steps are 0: a step
takes as long, and no checkpoint is written. nanoGPT is measured without evaluations for the same reasons.
"""

import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import tempfile
import zlib

import numpy as np
import torch

import configurator
from configurator import InputError
from model import GPT, GPTConfig
from sologpt.bench import adapters, plan, process, race
from sologpt.files import checkpoint
from sologpt.machine import choices, clock, devices, peaks
from sologpt.tokens import corpus
from sologpt.tokens.sources import Source, installed_code
from sologpt.tokens.tokenizer import GPT2_EOT, Bytes
from sologpt.training.runs import read_run

# keys that both trainers have: GPT-2 124M, its tokens per step a multiple of many micro-batches
STEP = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16, gradient_accumulation_steps=4,
            max_iters=20, dataset='tokens')
SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, max_iters=3)  # what --small changes, and micro-batches / 8
UNTIMED = {'eval_interval': 10 ** 6, 'always_save_checkpoint': False, 'learning_rate': 0.0}
RACE_STEPS, CODE_TOKENS = 460, 40_000_000  # 30M tokens for nanoGPT, out of a text of so many
NEW_TOKENS = 1000


class Session:
    """One call of this suite: where it runs, and what its rows share."""

    def __init__(self, peer, device, small, dataset, folder, figures):
        self.peer, self.device, self.small, self.dataset = peer, device, small, dataset
        self.folder, self.figures, self.commands = folder, figures, []
        self.dtype = 'float32' if device.type == 'cpu' else choices.find_dtype('auto', device)[0]
        self.compile = device.type == 'cuda'

    def path(self, name):
        return os.path.join(self.folder, name)

    def sized(self, keys):
        """The keys as they are, or tiny."""
        if not self.small:
            return dict(keys)
        return keys | {key: SMALL[key] for key in SMALL if key in keys} | (
            {'batch_size': max(1, keys['batch_size'] // 8)} if 'batch_size' in keys else {})

    def note(self, who, script, keys):
        """Keeps the command."""
        self.commands.append(self.plain(f'{who}: python {script} {shlex.join(process.flags(keys))}'))

    def plain(self, text):
        """Without the places of this machine."""
        return text.replace(self.folder, '...').replace(os.getcwd() + os.sep, '').replace(self.peer, 'nanoGPT')

    def file(self, name, content):
        with open(self.path(name), 'w', encoding='utf-8') as f:
            f.write(content)
        return self.path(name)

    def tokens(self, name):
        """
        A data folder: 'tokens', random ones of GPT-2's vocabulary with an end of text now and then, 'chars', of 65
        characters, 'code', the installed packages' source in bytes, or else data/<name>, here or nanoGPT's.
        """
        folder = self.path(name)
        if name not in ('tokens', 'chars', 'code'):
            return race.token_files(name, self.peer, tempfile.mkdtemp(dir=self.folder))
        if os.path.exists(folder):
            return folder
        if name == 'code' and not self.small:
            self.child(f'prepare_code({folder + "-begun"!r}, {CODE_TOKENS})')
            os.rename(folder + '-begun', folder)
            return folder
        os.makedirs(folder)
        rng = np.random.default_rng(0)
        for split, n in (('train', 2_000_000), ('val', 100_000)):
            ids = {'tokens': rng.integers(0, GPT2_EOT, n), 'chars': rng.integers(0, 65, n),
                   'code': np.arange(n) * 7 % 40 + 60 + rng.integers(0, 2, n)}[name]
            if name == 'tokens':
                ids[rng.random(n) < 1 / 500] = GPT2_EOT
            ids.astype('<u2').tofile(os.path.join(folder, f'{split}.bin'))
        if name != 'tokens':  # nanoGPT takes a folder without for GPT-2's vocabulary, and so does this trainer
            _write_meta(folder, 65 if name == 'chars' else 256)
        return folder

    def base(self):
        """A checkpoint of GPT-2's shape with random weights that both load, whose ids are characters."""
        folder = self.path('base')
        if not os.path.exists(folder):
            os.makedirs(folder)
            os.makedirs(self.path('base-ids'))
            size = self.sized({key: STEP[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size')})
            model = GPT(GPTConfig(**size, vocab_size=50304))
            _write_meta(self.path('base-ids'), model.config.vocab_size)
            checkpoint.save(folder, {'model': model.state_dict(), 'model_args': model.config.to_save(), 'iter_num': 0,
                                     'config': {'dataset': self.path('base-ids')}}, best=False)
        return folder

    def child(self, call, module='gpu_rows'):
        """What a function of bench/ prints last, as JSON, in a process of its own."""
        printed, _ = process.run(process.ROOT, '-c', [f'from sologpt.bench import {module}; {module}.{call}'])
        return json.loads(printed.splitlines()[-1])


def _write_meta(folder, n):
    chars = [chr(32 + i) for i in range(n)]
    with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
        pickle.dump({'vocab_size': n, 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}, f)


def prepare_code(folder, tokens):
    """The source of the installed packages in bytes, in one file of each split, as nanoGPT reads it."""
    corpus.prepare(folder, Source(installed_code(), name='installed packages'), Bytes(), corpus.SomeDocuments(0.05),
                   tokens, shard=2 * tokens)
    for split in ('train', 'val'):
        path, = corpus.files_of(folder, split)
        os.replace(path, os.path.join(folder, f'{split}.bin'))
    print(tokens)


# Training steps

def train_peer(session, keys):
    """Of nanoGPT: the median step, and the most memory."""
    memory = ('torch.cuda.max_memory_allocated(device)' if session.device.type == 'cuda' else
              'resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024')
    hook = session.file('memory.py', f'import atexit, resource\n'
                                     f"atexit.register(lambda: print('most memory', {memory}))\n")
    keys = _of_peer(session, keys) | UNTIMED | {'eval_iters': 0}
    session.note('nanoGPT', 'train.py', keys)
    printed, _ = process.run(session.peer, 'train.py', [hook, *process.flags(keys)])
    run = read_run(session.file('peer.log', printed), 'nanoGPT')
    ms = run.get('time_ms')
    return {'ms_per_step': ms, 'tokens_per_s': 1000 * run.header['tokens_per_iter'] / ms,
            'memory_gb': int(_last(r'^most memory (\d+)$', printed)) / 1e9}


def _last(pattern, printed):
    found = re.findall(pattern, printed, re.M)
    if not found:
        raise InputError(f'there is no line {pattern} in what it printed')
    return found[-1]


def _of_peer(session, keys):
    return {'dropout': 0.0} | _of_machine(session, keys) | {'out_dir': session.path('out-peer')}


def _of_machine(session, keys):
    return {'device': f'{session.device}', 'dtype': session.dtype, 'log_interval': 1} | keys | {
        'compile': session.compile and keys.get('compile', True), 'dataset': session.tokens(keys['dataset'])}


def train(session, keys):
    """Of this trainer, likewise, and what goes with it."""
    keys = _of_own(session, keys) | UNTIMED | {'eval_iters': 1}
    session.note('here', 'train.py', keys)
    process.own('train.py', process.flags(keys))
    run = read_run(keys['out_dir'], 'here')
    return {'ms_per_step': run.get('time_ms'), 'tokens_per_s': run.get('tokens_per_s'), 'mfu': run.get('mfu'),
            'memory_gb': max(step['memory_gb'] for step in run.steps),
            **{key: run.header[key] for key in ('flops_per_token', 'peak_flops', 'peak_source', 'parameters')}}


def _of_own(session, keys):
    if session.device.type == 'cpu':  # which refuses what is for a GPU alone
        keys = {key: value for key, value in keys.items() if key not in ('memory_limit', 'cuda_graphs')} | (
            {'attn_backend': 'sdpa'} if keys.get('attn_backend') in choices.GPU_ATTENTION else {})
    return _of_machine(session, keys) | {'out_dir': session.path('out')} | (
        {'init_from': session.base()} if keys.get('init_from') == 'base' else {})


def foreseen(session, keys):
    """What memory.py says that this step takes, in GB, by the sequences of a micro-batch."""
    keys = _of_own(session, keys)
    sizes = {max(1, keys['batch_size'] * n // 16) for n in (16, 24, 32, 64)}
    session.note('here', 'bench.py --suite=plan', keys)
    return {'peak_gb': session.child(f'print_foreseen({process.flags(keys)!r}, {sorted(sizes)})')}


def print_foreseen(train_args, sizes):
    options, _ = configurator.resolve(race.TRAIN, train_args)
    found = plan.forecast(options | {'compile': options['compile'] is True}, plan.model_config(options))
    print(json.dumps({size: found.at(size).peak / 1e9 for size in sizes}))


def by_number(session, keys):
    """train() on the device by its number, such as cuda:0."""
    return train(session, keys | {'device': f'{session.device.type}:{session.device.index or 0}'})


def wait_for_batches(session, keys):
    """How long a step of 50 ms waits for its batch, and how long a batch takes at once after another."""
    size = session.sized(STEP)
    call = (session.tokens('tokens'), size['batch_size'], size['block_size'], 50.0, 2000, 20, f'{session.device}')
    return session.child(f'read_batches(*{call!r})', 'data')


# The race

def race_peer(session, keys):
    """nanoGPT's recipe, warm-up and decay scaled to its tokens: seconds, and the loss that is to be reached."""
    name, steps = session.dataset or 'code', 20 if session.small else RACE_STEPS
    keys = _of_peer(session, keys | {'dataset': name}) | {
        'max_iters': steps, 'lr_decay_iters': steps, 'warmup_iters': steps // 20, 'eval_interval': steps // 4,
        'learning_rate': 6e-4, 'min_lr': 6e-5, 'eval_iters': 2 if session.small else 50}
    folder = race.token_files(keys.pop('dataset'), session.peer, tempfile.mkdtemp(dir=session.folder))
    session.note('nanoGPT', 'train.py', keys | {'dataset': folder})
    run = race.train_peer(session.peer, process.flags({k: v for k, v in keys.items() if k != 'out_dir'}), folder, 1,
                          session.path('race-peer'))
    same = {key: keys[key] for key in ('eval_iters', 'batch_size', 'device')}
    target, on = race.target(run, same, folder, session.path('race-peer'))
    return {'target_val_loss': target, 'target_is': on,
            'val_crc32': _crc(folder), 'eval_iters': keys['eval_iters'],
            'steps': steps, 'peer': race.peer_figures(run), 'curve': run.curve('seconds')}


def _crc(folder):
    with open(os.path.join(folder, 'val.bin'), 'rb') as f:
        return zlib.crc32(f.read())


def race_here(session, keys):
    """This trainer's recipe for GPT-2's size, with a share of nanoGPT's tokens."""
    theirs = session.figures['race'].get('nanoGPT', {})
    if 'peer' not in theirs:
        raise InputError('nanoGPT has not been measured')
    steps = max(4, round(keys['share'] * theirs['steps']))
    keys = _of_own(session, session.sized(STEP | {'n_head': 6, 'dataset': session.dataset or 'code'}))
    keys = _in_one_step(keys) | {
        'max_iters': steps, 'momentum_warmup': steps // 4, 'eval_interval': steps // 4,
        'eval_iters': theirs['eval_iters']}
    if _crc(keys['dataset']) != theirs['val_crc32']:
        raise InputError("the token files are others than nanoGPT's were: --restart=True measures both")
    session.note('here', 'train.py config/train_fineweb_124m.py', keys)
    process.own('train.py', [os.path.join(process.ROOT, 'config', 'train_fineweb_124m.py'), *process.flags(keys)])
    run = read_run(keys['out_dir'], 'here')
    return race.figures(theirs['peer'], run, theirs['target_val_loss'], theirs['target_is']) | {
        'curve': run.curve('seconds')}


# Sampling

def sample_peer(session, keys):
    """nanoGPT's sample.py draws two texts in turn; the first warms up."""
    hook = session.file('generate.py', '''import time
_generate = GPT.generate
def _timed(self, idx, n, **keys):
    start = time.perf_counter()
    y = _generate(self, idx, n, **keys)
    y.tolist()
    print(f'\\ndrawn {n} {time.perf_counter() - start}')
    return y
GPT.generate = _timed
''')
    return _sample(session, 'nanoGPT', session.peer, hook, {'num_samples': 2, 'dtype': session.dtype})


def sample(session, keys):
    """sample.py here draws its text twice; the first time compiles and warms up."""
    hook = session.file('stream.py', '''import time
import model
_stream = model.GPT.stream
def _timed(*args, **keys):
    for ids in _stream(*args, **keys):
        pass
    ids.tolist()
    start, n = time.perf_counter(), 0
    for ids in _stream(*args, **keys):
        yield ids
        n += 1
    ids.tolist()
    print(f'\\ndrawn {n} {time.perf_counter() - start}')
model.GPT.stream = _timed
''')
    return _sample(session, 'here', None, hook, {'num_samples': 1, 'compile': session.compile and keys['compile']})


def _sample(session, who, folder, hook, keys):
    keys = {'device': f'{session.device}', 'start': 'A', 'max_new_tokens': 20 if session.small else NEW_TOKENS,
            'out_dir': session.base()} | keys
    session.note(who, 'sample.py', keys)
    arguments = [hook, *process.flags(keys)]
    printed = process.run(folder, 'sample.py', arguments)[0] if folder else process.own('sample.py', arguments)
    n, seconds = _last(r'^drawn (\d+) ([\d.e-]+)$', printed)
    return {'tokens_per_s': int(n) / float(seconds), 'tokens': int(n)}


# Other suites

def suite(session, keys):
    """The figures of another suite."""
    dest = session.path('suite.json')
    if session.small:
        keys |= {'matmul': {'widths': 32, 'tokens': 32}, 'sweep': {'steps': 1, 'gradient_accumulation_steps': 1}}[
            keys['suite']]
    if keys['suite'] == 'sweep':
        keys = _in_one_step(_of_machine(session, keys)) | {'learning_rate': 0.0}
    keys = keys | {'device': f'{session.device}', 'dest': dest}
    session.note('here', 'bench.py', keys)
    process.own('bench.py', process.flags(keys))
    with open(dest, encoding='utf-8') as f:
        return json.load(f)['figures']


def _in_one_step(keys):
    """The tokens of a step in total_batch_size."""
    return {key: value for key, value in keys.items() if key != 'gradient_accumulation_steps'} | {
        'total_batch_size': keys['batch_size'] * keys['block_size'] * keys['gradient_accumulation_steps']}


def of_adapters(session, keys):
    """What adapters cost at GPT-2's shape: that suite without its finetunings, which take an hour."""
    arguments = process.flags({'device': f'{session.device}', 'dtype': session.dtype, 'compile': False,
                               'dataset': session.tokens('tokens')})
    call = f'adapters_at_124m({keys["recipes"]!r}, {arguments!r}, {session.small})'
    session.commands.append(session.plain(call))
    return session.child(call)


def adapters_at_124m(recipes, train_args, small):
    """Prints what adapters.step_124m() finds of these, or, where there are none, adapters.serving()."""
    if small:
        adapters.SHAPE |= dict(n_layer=2, n_head=2, n_embd=32, block_size=96)
        recipes, adapters.ROUNDS = recipes and 'lora', 1
    print(json.dumps(adapters.step_124m({'recipes': recipes, 'steps': 2 if small else 10}, train_args) if recipes else
                     adapters.serving(train_args)))


# The card

def facts(session, keys):
    return session.child(f'read_device({f"{session.device}"!r}, {session.dtype!r}, {session.small})')


def read_device(name, dtype, small):
    """Prints what the device is, and how fast a large matmul and a copy are just now."""
    device = devices.find_device(name)
    devices.prepare(device)
    flops = peaks.matmul_flops(device, devices.DTYPES[dtype])
    found = {'name': devices.device_name(device), 'torch': torch.__version__, 'cuda': torch.version.cuda,
             'python': sys.version.split()[0], 'matmul_tflops': flops / 1e12}
    source = torch.ones(2 ** 24 if small else 2 ** 31, dtype=torch.uint8, device=device)
    dest = torch.empty_like(source)
    found['copy_gb_per_s'] = 2 * source.numel() / 1e9 / clock.shortest_seconds(lambda: dest.copy_(source), device)
    if device.type == 'cuda':
        import triton
        properties = torch.cuda.get_device_properties(device)
        found |= {'capability': list(torch.cuda.get_device_capability(device)), 'triton': triton.__version__,
                  'memory_gb': properties.total_memory / 1e9, 'multiprocessors': properties.multi_processor_count,
                  'cudnn': torch.backends.cudnn.version(), 'idle': nvidia_smi(properties)}
        a = torch.randn(8192, 8192, device=device, dtype=devices.DTYPES[dtype])
        for _ in range(int(2 * flops / (2 * 8192 ** 3))):  # two seconds, which are queued
            a @ a
        found['busy'] = nvidia_smi(properties)
    print(json.dumps(found))


def nvidia_smi(properties):
    """Driver, clocks in MHz, power in W and temperature in C of this card, as nvidia-smi says; {} if it does not."""
    asked = 'uuid,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu'
    try:
        said = subprocess.run(['nvidia-smi', f'--query-gpu={asked}', '--format=csv,noheader,nounits'],
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    cards = [dict(zip(asked.split(','), line.split(', '), strict=False)) for line in said.stdout.splitlines()]
    return next((card for card in cards if f'{properties.uuid}' in card.pop('uuid')), {})
