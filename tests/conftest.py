import contextlib
import gc
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault('WANDB_MODE', 'offline')
os.environ['HF_HUB_OFFLINE'] = '1'  # without a network the hub is asked again and again, for half a minute
os.environ['OMP_NUM_THREADS'] = '1'  # the models are tiny: a second thread would only be waited for

from configurator import InputError  # noqa: E402
from sologpt.nullgpu.build import build_library  # noqa: E402
from sologpt.tokens import tokenizer  # noqa: E402

TINY = dict(dataset='tiny', n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4, gradient_accumulation_steps=1,
            max_iters=6, eval_interval=3, eval_iters=2, warmup_iters=2, learning_rate=1e-2, out_dir='out',
            device='cpu', dtype='float32', peak_flops=1e12)


def options(script_options):
    return [f'--{key}={value}' for key, value in script_options.items()]


class Project:
    """The project's scripts, run in a folder of their own."""

    def __init__(self, folder):
        self.folder = folder

    def _in_process(self, script, argv):
        out, before = io.StringIO(), (sys.argv, sys.excepthook)
        handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
        sys.argv = [script, *argv]
        try:
            # the garbage of a process with many tests in it takes long to collect
            with contextlib.redirect_stdout(out), mock.patch.multiple(gc, collect=int, freeze=int):
                return runpy.run_path(os.path.join(ROOT, script), run_name='__main__'), out.getvalue()
        finally:
            sys.argv, sys.excepthook = before
            for signum, handler in handlers:
                signal.signal(signum, handler)

    def train(self, *files, **overrides):
        """Run train.py in this process, on the tiny model and data. Returns (its globals, what it printed)."""
        return self._in_process('train.py', [*files, *options(TINY | overrides)])

    def resume(self, **overrides):
        few = {k: TINY[k] for k in ('out_dir', 'device', 'dtype', 'peak_flops')}
        return self._in_process('train.py', options(few | dict(init_from='resume') | overrides))

    def sample(self, **overrides):
        few = dict(out_dir='out', device='cpu', dtype='float32', num_samples=1, max_new_tokens=20)
        return self._in_process('sample.py', options(few | overrides))[1]

    def run(self, *command, **kwargs):
        """Run a command of the README as a process of its own: `python` is this one, paths are the project's."""
        return subprocess.run(self.command(*command), cwd=self.folder, capture_output=True, text=True, timeout=200,
                              **kwargs)

    def command(self, *words):
        words = [os.path.join(ROOT, w) if w.endswith('.py') and os.path.exists(os.path.join(ROOT, w)) else w
                 for w in words]
        return [sys.executable, *words]


def write_tokens(folder, train, val, vocab_size=256, **meta):
    """A data folder of bytes with the given ids."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {'train': np.asarray(train), 'val': np.asarray(val)}
    for split in ids:
        ids[split].astype('<u2').tofile(folder / f'{split}.bin')
    described = {'tokenizer': tokenizer.Bytes().to_dict(), 'vocab_size': vocab_size, 'dtype': 'uint16',
                 'tokens': {k: len(v) for k, v in ids.items()}, 'source': 'a test'} | meta
    (folder / 'meta.json').write_text(json.dumps(described), encoding='utf-8')
    return folder


@pytest.fixture(autouse=True)
def nothing_compiled():
    """torch compiles a function for so many models, and then no more: each test has all of them."""
    yield
    if 'torch._dynamo' in sys.modules:
        sys.modules['torch._dynamo'].reset()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty folder with data/tiny, text-like bytes in which the next one can be learnt."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    ids = (np.arange(3000) * 7 % 40 + 60 + rng.integers(0, 2, 3000)).astype(int)
    write_tokens(tmp_path / 'data' / 'tiny', ids[:2500], ids[2500:])
    return Project(tmp_path)


@pytest.fixture
def run_bench(project, monkeypatch):
    """bench.py in this process, its scripts too; returns (the figures, what it printed)."""
    from sologpt.bench import process
    monkeypatch.setattr(process, 'run_own', lambda script, args: project._in_process(script, args)[1])

    def run(*argv):
        _, out = project._in_process('bench.py', [*argv, '--dest=figures.json'])
        return json.loads((project.folder / 'figures.json').read_text()), out
    return run


@pytest.fixture(scope='module')
def hf(tmp_path_factory):
    """A folder with a GPT-2 in Hugging Face's format, all of whose weights are random."""
    import torch
    transformers = pytest.importorskip('transformers')
    folder, generator = tmp_path_factory.mktemp('gpt2'), torch.Generator().manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=33, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=None))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope='session')
def null_gpu():
    """Skips a test where the null GPU cannot be built."""
    try:
        build_library()
    except InputError as error:
        pytest.skip(str(error))
