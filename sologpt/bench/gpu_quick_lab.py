"""
Where the rows of the quick check run: scripts of this project in this process, on a tiny model, beside the CPU.

A row runs the scripts themselves, so that it checks what a user runs. In one process they share the imports, the
device and the tiny models, so that a row takes a fraction of a second.
"""

import contextlib
import functools
import io
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from configurator import InputError
from model import GPT
from sologpt.bench import process
from sologpt.machine import choices
from sologpt.tokens import data_folder
from sologpt.tokens.tokenizer import Bytes, Chars
from sologpt.training.runs import read_run

STEPS = 6
TINY = dict(n_layer=2, n_head=2, n_embd=128, block_size=64, batch_size=2, gradient_accumulation_steps=2,
            max_iters=STEPS, eval_interval=STEPS, eval_iters=1, learning_rate=3e-3, warmup_iters=0, log_interval=1,
            compile=False, attn_backend='sdpa', peak_flops=1e12, always_save_checkpoint=False)
# keys that say how to compute, and not what: on the CPU, the same losses are computed without them
OF_THE_DEVICE = ('device', 'dtype', 'compile', 'attn_backend', 'accumulate', 'tf32', 'memory_limit', 'optimizer_state',
                 'checkpoint_activations', 'weights_dtype', 'backend')
TOLERANCE = {'float32': 0.01, 'float16': 0.01, 'bfloat16': 0.02}  # float32 may be TF32, which has float16's digits
MANY_IDS = 8192  # from as many on, the loss is computed in chunks
TRAINED = 100  # steps of the models that draw text


class Wrong(Exception):
    """A row ran to its end, but what it computed is not right."""


@dataclass
class Losses:
    """The losses of a few steps, beside those of the same steps elsewhere."""
    found: list[float]
    reference: list[float]
    tolerance: float  # the largest relative difference
    falls: bool = True  # whether they have to

    def check(self) -> None:
        """Raises Wrong."""
        shown = ', '.join(f'{loss:.3f}' for loss in self.found)
        off = np.abs(np.array(self.found) / np.array(self.reference) - 1)
        if len(self.found) != len(self.reference) or not np.all(off <= self.tolerance):  # also if it is nan
            raise Wrong(f'losses {shown}; expected, within {self.tolerance:.0%}, '
                        f'{", ".join(f"{loss:.3f}" for loss in self.reference)}')
        if self.falls and not self.found[-1] < self.found[0]:
            raise Wrong(f'the loss does not fall: {shown}')


@dataclass
class Tensors:
    """Tensors, beside the same computed elsewhere."""
    found: list[torch.Tensor]
    reference: list[torch.Tensor]
    tolerance: float  # the largest |found - reference| / |reference|, by the Frobenius norm

    def check(self) -> None:
        """Raises Wrong."""
        for found, reference in zip(self.found, self.reference, strict=True):
            off = ((found.detach().cpu().float() - reference).norm() / reference.norm()).item()
            if not off <= self.tolerance:
                raise Wrong(f'off by {off:.2g} of its norm, more than {self.tolerance:.2g}')


@dataclass
class Text:
    """A text that was drawn greedily, beside the same text drawn on the CPU."""
    found: str
    reference: str

    def check(self) -> None:
        """Raises Wrong."""
        if self.found != self.reference:
            raise Wrong(f'drew {self.found[:60]!r}, the CPU {self.reference[:60]!r}')


@dataclass
class Refused:
    """What the error of a run said, and what it has to say."""
    said: str
    message: str

    def check(self) -> None:
        """Raises Wrong."""
        if self.message not in self.said:
            raise Wrong(f'it said {self.said!r}, expected {self.message!r}')


class Lab:
    """
    device  the torch.device; dtype, the name of what it computes in by default
    folder  a folder of this process, which may have been used by one before it
    tokens  the path of a data folder, see write_text()
    """

    def __init__(self, device: torch.device, folder: str, tokens: str):
        self.device, self.folder, self.tokens = device, folder, tokens
        self.dtype = 'float32' if device.type == 'cpu' else choices.find_dtype('auto', device)[0]
        self._losses, self._n = {}, 0  # keys -> losses on the CPU

    def run(self, script: str, keys: dict) -> str:
        """Run a script of this project in this process. Returns what it printed. Raises whatever it raises."""
        path, before, out = os.path.join(process.ROOT, script), (sys.argv, sys.excepthook), io.StringIO()
        sys.argv = [path, *process.flags(keys)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                runpy.run_path(path, run_name='__main__')
        finally:
            sys.argv, sys.excepthook = before
            if self.device.type == 'cuda':
                torch._dynamo.reset()  # it compiles one function for 8 models, and then no more
                torch.cuda.set_per_process_memory_fraction(1.0)  # memory_limit holds for the process
        return out.getvalue()

    @functools.cached_property
    def compiles(self) -> bool:
        """Whether torch.compile works on this device."""
        return choices.can_compile(self.device)[0]

    def new_folder(self) -> str:
        self._n += 1
        return os.path.join(self.folder, f'out-{os.getpid()}-{self._n}')

    def train(self, keys: dict, out_dir: str | None = None, run: Callable | None = None) -> list[float]:
        """
        The losses of train.py's steps on the tiny model. A key that is None is left out. run: (script, keys), what runs
        it; None: run().
        """
        out_dir = out_dir or self.new_folder()
        given = TINY | {'device': f'{self.device}', 'dtype': self.dtype, 'dataset': self.tokens} | keys
        given = {key: value for key, value in given.items() if value is not None} | {'out_dir': out_dir}
        (run or self.run)('train.py', given)
        return [step['loss'] for step in read_run(out_dir, '').steps]

    def train_on_cpu(self, keys: dict) -> list[float]:
        """The losses of the same steps on the CPU, in float32 and eager."""
        keys = {key: value for key, value in keys.items() if key not in OF_THE_DEVICE}
        known = repr(sorted(keys.items()))
        if known not in self._losses:
            self._losses[known] = self.train(keys | {'device': 'cpu', 'dtype': 'float32'})
        return self._losses[known]

    def compare(self, keys: dict, more: float = 0.0, falls: bool = True) -> Losses:
        """The losses with these keys beside the CPU's. more: is added to the dtype's tolerance."""
        found = self.train(keys)
        return Losses(found, self.train_on_cpu(keys), TOLERANCE[keys.get('dtype', self.dtype)] + more, falls)

    def base(self, **keys) -> str:
        """A folder with a tiny model that has learnt its text, trained on the CPU."""
        return self._once('base', keys, {'max_iters': TRAINED, 'eval_interval': TRAINED} | keys)

    def adapter(self, method: str, **keys) -> str:
        """A folder with an adapter of the base, trained on the CPU."""
        named = {'adapter': method} | keys
        return self._once('adapter', named, {'init_from': self.base()} | named)

    def _once(self, kind, named, keys):
        folder = os.path.join(self.folder, '-'.join([kind, *map(str, named.values())]))
        if not os.path.exists(os.path.join(folder, 'ckpt.pt')):
            self.train(keys | {'device': 'cpu', 'dtype': 'float32', 'always_save_checkpoint': True}, folder)
        return folder

    def draw(self, **keys) -> Text:
        """The text that sample.py draws with these keys, beyond block_size, here and on the CPU."""
        keys = {'num_samples': 2, 'max_new_tokens': 100, 'temperature': 0.0, 'start': 'A'} | keys
        here = self.run('sample.py', keys | {'device': f'{self.device}', 'dtype': self.dtype})
        cpu = self.run('sample.py', keys | {'device': 'cpu', 'dtype': 'float32', 'compile': False})
        return Text(here, cpu)

    def export(self, to: str, logits: Callable) -> Tensors:
        """Export what this device has trained. logits: (folder, ids) -> the logits of the exported model."""
        out_dir, dest = self.new_folder(), self.new_folder()
        self.train({'always_save_checkpoint': True}, out_dir)
        self.run('export.py', {'to': to, 'out_dir': out_dir, 'dest': dest})
        ids = torch.arange(60, 92)[None]
        with torch.no_grad():
            expected = own_logits(out_dir, ids)
            return Tensors([logits(dest, ids)], [expected], 1e-4)

    def refused(self, keys: dict, message: str) -> Refused:
        """Train with keys that cannot work, and hand back what the error says."""
        try:
            self.train(keys)
        except InputError as e:
            return Refused(str(e), message)
        return Refused('nothing', message)


def own_logits(source: str, ids: torch.Tensor) -> torch.Tensor:
    """The logits, (1, T, ids), of a model in any of the forms that this project reads, on the CPU."""
    model, _ = GPT.from_checkpoint(source)
    return model.eval().lm_head(model.hidden(ids))


def write_text(folder: str) -> None:
    """
    Write a data folder of bytes in which the next one can be learnt: it goes round in 40 letters. Now and then a text
    ends, and another begins anywhere. Beside it, in folder-many, the same ids are of a large vocabulary.
    """
    os.makedirs(folder)
    rng = np.random.default_rng(0)
    for split, n in (('train', 20_000), ('val', 4_000)):
        ends = rng.random(n) < 0.01
        ids = (np.arange(n) * 7 + np.cumsum(ends) * 11) % 40 + 60
        ids[ends] = Bytes.eot
        ids.astype('<u2').tofile(os.path.join(folder, f'{split}.bin'))
    data_folder.write_meta(folder, Bytes(), {'train': 20_000, 'val': 4_000}, 'letters that go round')
    with_many_ids = f'{folder}-many'
    shutil.copytree(folder, with_many_ids)
    many = Chars([chr(0x100 + i) for i in range(MANY_IDS)])
    data_folder.write_meta(with_many_ids, many, {'train': 20_000, 'val': 4_000}, 'the same, as so many characters')
