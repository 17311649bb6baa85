"""One call of the gpu suite: where it runs, the keys of its steps, the token files and the model that rows share."""

import contextlib
import json
import os
import pickle
import shlex
import signal
import tempfile
from collections.abc import Iterator

import numpy as np
import torch

from model import GPT, GPTConfig
from sologpt.bench import process
from sologpt.bench.peer import link_tokens
from sologpt.files.checkpoint import save_checkpoint
from sologpt.machine import choices
from sologpt.tokens.corpus import Options, prepare_corpus
from sologpt.tokens.data_folder import token_files_in_progress
from sologpt.tokens.sources import Source, installed_code
from sologpt.tokens.splits import SomeDocuments
from sologpt.tokens.tokenizer import GPT2_EOT, Bytes

# keys that both trainers have: GPT-2 124M; the tokens of a step are a multiple of many micro-batches
STEP = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16, gradient_accumulation_steps=4,
            max_iters=20, dataset='tokens')
SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, max_iters=3)  # what --small changes, and micro-batches / 8
CACHES = ('TORCHINDUCTOR_CACHE_DIR', 'TRITON_CACHE_DIR')
CODE_TOKENS = 20_000_000  # of the text of a race
TABLE = 50304  # rows of GPT-2's table, padded
LARGE = 14e9  # bytes of a GPU in which nanoGPT's step fits in micro-batches of 16


class Session:
    """
    peer      the folder of nanoGPT
    device    the torch.device, and dtype, the name of the dtype of all runs on it
    small     whether everything is tried at a tiny size
    dataset   of a race; None: the source of the installed packages
    folder    a temporary folder
    figures   of the rows so far: part -> row -> figures
    commands  that the present row has run
    """

    def __init__(self, peer: str, device: torch.device, small: bool, dataset: str | None, folder: str, figures: dict):
        self.peer, self.device, self.small, self.dataset = peer, device, small, dataset
        self.folder, self.figures, self.commands = folder, figures, []
        self.dtype = 'float32' if device.type == 'cpu' else choices.find_dtype('auto', device)[0]
        self.compile = device.type == 'cuda'
        self.halved = device.type == 'cuda' and torch.cuda.get_device_properties(device).total_memory < LARGE

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def sized(self, keys: dict) -> dict:
        """The keys as they are, or at a tiny size. On a GPU with less than LARGE bytes, a step has more pieces."""
        if not self.small:
            halved = self.halved and keys.get('batch_size') == STEP['batch_size']
            return keys | ({'batch_size': keys['batch_size'] // 2, 'gradient_accumulation_steps': 2 * keys[
                'gradient_accumulation_steps']} if halved else {})
        return keys | {key: SMALL[key] for key in SMALL if key in keys} | (
            {'batch_size': max(1, keys['batch_size'] // 8)} if 'batch_size' in keys else {})

    def note(self, who: str, script: str, keys: dict) -> None:
        """Keep a command for the figures of the row."""
        self.commands.append(self.plain(f'{who}: python {script} {shlex.join(process.flags(keys))}'))

    def plain(self, text: str) -> str:
        """The text without the paths of this machine."""
        return text.replace(self.folder, '...').replace(os.getcwd() + os.sep, '').replace(self.peer, 'nanoGPT')

    def file(self, name: str, content: str) -> str:
        """Write a file of the session. Returns its path."""
        with open(self.path(name), 'w', encoding='utf-8') as f:
            f.write(content)
        return self.path(name)

    def tokens(self, name: str) -> str:
        """
        The path of a data folder. 'tokens' has random ones of GPT-2's vocabulary, with an end of text now and then.
        'chars' has random ones of 65 characters. 'code' is the source of the installed packages, in bytes. Any other
        name is data/<name>, here or nanoGPT's.
        """
        folder = self.path(name)
        if name not in ('tokens', 'chars', 'code'):
            return link_tokens(name, self.peer, tempfile.mkdtemp(dir=self.folder))
        if os.path.exists(folder):
            return folder
        if name == 'code' and not self.small:
            self.child('gpu_session', f'prepare_code({folder + "-begun"!r}, {CODE_TOKENS})')
            os.rename(folder + '-begun', folder)
        else:
            write_random_tokens(folder, name)
        return folder

    def base(self) -> str:
        """A checkpoint of GPT-2's shape with random weights, which both trainers load. Its ids are characters."""
        folder = self.path('base')
        if not os.path.exists(folder):
            os.makedirs(folder)
            os.makedirs(self.path('base-ids'))
            size = self.sized({key: STEP[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size')})
            model = GPT(GPTConfig(**size, vocab_size=TABLE))
            _write_meta(self.path('base-ids'), model.config.vocab_size)
            save_checkpoint(folder, {'model': model.state_dict(), 'model_args': model.config.to_save(), 'iter_num': 0,
                                     'config': {'dataset': self.path('base-ids')}}, best=False)
        return folder

    def child(self, module: str, call: str):
        """What a call of sologpt/bench/<module>.py prints in its last line, as JSON, in a process of its own."""
        printed, _ = process.run_script(process.ROOT, '-c', [f'from sologpt.bench import {module}; {module}.{call}'])
        return json.loads(printed.splitlines()[-1])


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, so that nothing is left running."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def caches_in(folder: str) -> Iterator[None]:
    """Compiled kernels are shared by the rows, and deleted with the folder."""
    before = {name: os.environ.get(name) for name in CACHES}
    os.environ |= {name: os.path.join(folder, name) for name in CACHES}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {name: value} if value is not None else {}


def write_random_tokens(folder: str, name: str) -> None:
    """Write a data folder of made-up ids. name: 'tokens', 'chars' or 'code', as in Session.tokens()."""
    os.makedirs(folder)
    rng = np.random.default_rng(0)
    for split, n in (('train', 2_000_000), ('val', 100_000)):
        ids = {'tokens': rng.integers(0, GPT2_EOT, n), 'chars': rng.integers(0, 65, n),
               'code': np.arange(n) * 7 % 40 + 60 + rng.integers(0, 2, n)}[name]
        if name == 'tokens':
            ids[rng.random(n) < 1 / 500] = GPT2_EOT
        ids.astype('<u2').tofile(os.path.join(folder, f'{split}.bin'))
    if name != 'tokens':  # without a description, both trainers assume GPT-2's vocabulary
        _write_meta(folder, 65 if name == 'chars' else 256)


def _write_meta(folder, n):
    chars = [chr(32 + i) for i in range(n)]
    with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
        pickle.dump({'vocab_size': n, 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}, f)


def prepare_code(folder: str, tokens: int) -> None:
    """
    Write the source of the installed packages in bytes, in one file of each split, as nanoGPT reads it. Both trainers
    are told that there are as many ids as GPT-2 has. Then the race has the model of the measured step, and its kernels
    are compiled already.
    """
    prepare_corpus(folder, Source(installed_code(), name='installed packages'), Bytes(), SomeDocuments(0.05),
                   Options(tokens, shard_tokens=2 * tokens))
    for split in ('train', 'val'):
        path, = token_files_in_progress(folder, split)
        os.replace(path, os.path.join(folder, f'{split}.bin'))
    os.remove(os.path.join(folder, 'meta.json'))
    _write_meta(folder, TABLE)
    print(tokens)
