"""Reading what runs have logged: log.jsonl, and the console output of nanoGPT."""

import ast
import json
import math
import os
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from configurator import InputError

NANOGPTS_PEAK, NANOGPTS_SOURCE = 312e12, 'A100, as nanoGPT has it for any GPU'
NANOGPTS_STEP = {'batch_size': 12, 'block_size': 1024, 'gradient_accumulation_steps': 40}  # its defaults
NUMBER = r'(-?[\d.]+|nan|inf)'
STEP = re.compile(rf'\biter (\d+): loss {NUMBER}, time {NUMBER}ms(?:, mfu {NUMBER}%)?(?:.*, mem {NUMBER}GB)?')
EVALUATION = re.compile(rf'\bstep (\d+): train loss {NUMBER}, val loss {NUMBER}')


def read_log(path: str) -> list:
    """The records of a log.jsonl. A line that a crash cut off is left out."""
    records = []
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


@dataclass
class Run:
    """A run, from whichever kind of log. report.py says what the records hold."""
    name: str
    header: dict  # log.jsonl's first record
    steps: list[dict]  # records of steps, by iter
    evals: list[dict]  # records of evaluations, by iter, with tokens and seconds
    seconds_logged: bool = True  # False: the seconds of evals are estimated

    @property
    def config(self) -> dict:
        """The final config, as far as it is logged."""
        return self.header.get('config', {})

    @property
    def vocab_size(self) -> int | None:
        """The ids of the data's tokenizer; None if not logged."""
        return self.header.get('data', {}).get('vocab_size')

    @property
    def bytes_per_token(self) -> float | None:
        """The bytes of text in a token of the data, on average; None if not logged."""
        return self.header.get('data', {}).get('bytes_per_token')

    def median(self, key: str) -> float | None:
        """
        The median of a value over the steps that neither warm up nor are next to an evaluation, if there are such
        steps; None if not logged.
        """
        evaluated = {e['iter'] for e in self.evals}
        quiet = [s for s in self.steps[1:] if s['iter'] not in evaluated] or self.steps[1:] or self.steps
        logged = [s[key] for s in quiet if s.get(key) is not None]
        return statistics.median(logged) if logged else None

    def max_memory(self) -> float | None:
        """The most memory that a logged step has taken, in GB; None if not logged."""
        return max((step['memory_gb'] for step in self.steps if step.get('memory_gb')), default=None)

    def get(self, key: str) -> Any:
        """The value of the header or the config, or the median over the steps; None if not logged."""
        return self.header.get(key) or self.config.get(key) or self.median(key)

    def derived(self, compute: Callable, *keys: str) -> Any:
        """compute(the value of each key), or None if one of them is not logged."""
        known = [self.get(key) for key in keys]
        return None if None in known else compute(*known)

    def curve(self, axis: str) -> tuple[list, list]:
        """The evaluations as (positions on the axis, val losses). axis: 'iter', 'tokens' or 'seconds'."""
        placed = [e for e in self.evals if e.get(axis) is not None]
        return [e[axis] for e in placed], [e['val_loss'] for e in placed]

    def val_loss_at(self, axis: str, x: float) -> float | None:
        """
        The val loss at a position on the axis, interpolated linearly between the neighbouring evaluations.

        None outside of them. None also before the first evaluation of a trained model, because a straight line from the
        loss of the untrained model is far above the truth.
        """
        xs, losses = ([at for at, position in zip(values, self.curve(axis)[0], strict=True) if position > 0]
                      for values in self.curve(axis))
        return float(np.interp(x, xs, losses)) if xs and xs[0] <= x <= xs[-1] else None

    def place(self, axis: str) -> np.ndarray | None:
        """The positions of the logged steps on the axis, by those of the evaluations; None if not known."""
        rate = {'iter': 1, 'tokens': self.header.get('tokens_per_iter'),
                'seconds': self.derived(lambda ms: ms / 1000, 'time_ms')}[axis]
        known = {0: 0} | {e['iter']: e[axis] for e in self.evals if e.get(axis) is not None}
        iters, last = np.array([s['iter'] for s in self.steps]), max(known)
        return rate and np.interp(iters, list(known), list(known.values())) + np.maximum(iters - last, 0) * rate


def read_console(path: str) -> list[dict]:
    """
    The records of a console log of nanoGPT or train.py, as log.jsonl has them. The first is the header.

    nanoGPT computes MFU by the peak of an A100, whatever the GPU. Its MFU is a running mean, which every evaluation
    pulls down for some lines. The FLOPs per token are recovered from it (with torchrun: those of one process). Its
    parameter count leaves out position embeddings.
    """
    with open(path, encoding='utf-8', errors='replace') as f:
        text = f.read()
    # nanoGPT prints its config file, then `Overriding: key = value`; train.py everything as key=value before `device:`
    config = dict(re.findall(r'^(?:Overriding: )?([a-z]\w*) *= *(.+?)(?:\s+#.*)?$', text, re.M))
    if described := re.search(r'^config: (.*?)^device: (.+?); torch \S+; (\w+)', text, re.M | re.S):
        config = dict(re.findall(r"(\w+)=('[^']*'|\S+)", described[1]))
    config = {key: _value(value) for key, value in config.items()}
    header = {'config': config} | ({'device': described[2], 'dtype': described[3]} if described else {})
    if found := re.search(r'tokens per iteration will be: ([\d,]+)', text):
        header['tokens_per_iter'] = int(found[1].replace(',', ''))
    made_of = NANOGPTS_STEP | {k: config[k] for k in NANOGPTS_STEP if isinstance(config.get(k), int)}
    if math.prod(made_of.values()) == header.get('tokens_per_iter'):
        config |= made_of
    if found := re.search(r'number of parameters: ([\d.]+)M', text):
        header['parameters'] = round(float(found[1]) * 1e6)
    elif found := re.search(r'([\d,]+) parameters, [\d,]+ trained; (\S+) MFLOPs per token', text):
        header |= {'parameters': int(found[1].replace(',', '')), 'flops_per_token': float(found[2]) * 1e6}
    found = re.search(r'^peak for MFU: (\S+) TFLOP/s \((.*)\)', text, re.M)
    header['peak_flops'], header['peak_source'] = \
        (float(found[1]) * 1e12, found[2]) if found else (NANOGPTS_PEAK, NANOGPTS_SOURCE)

    records = [header]
    for line in text.splitlines():
        if found := STEP.search(line):
            n, loss, ms, mfu, memory = (float(g) if g else None for g in found.groups())
            records.append({'iter': int(n), 'loss': loss, 'time_ms': ms, 'memory_gb': memory,
                            'mfu': mfu / 100 if mfu is not None and mfu >= 0 else None})  # -100 %: warming up
        elif found := EVALUATION.search(line):
            n, train_loss, val_loss = map(float, found.groups())
            records.append({'iter': int(n), 'train_loss': train_loss, 'val_loss': val_loss})
    return records


def _value(text):
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (bool, int, float, str, type(None))) else text


def read_run(path: str, name: str) -> Run:
    """
    The Run that is logged at `path`: an out_dir, a log.jsonl, or a console log. Raises InputError if there is no log,
    or no training step in it.
    """
    file = os.path.join(path, 'log.jsonl') if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise InputError(f'no log {file}: give out_dirs of train.py, log.jsonl files, or console logs')
    records = [r for r in read_log(file) if isinstance(r, dict)] or read_console(file)
    header = {} if 'iter' in records[0] else dict(records[0])
    by_iter = [{r['iter']: r for r in records if key in r and 'iter' in r} for key in ('loss', 'val_loss')]
    steps, evals = ([found[n] for n in sorted(found)] for found in by_iter)  # of repeated ones, the last counts
    if not steps:
        raise InputError(f'{file}: no training step in it (neither `iter N: loss ...` lines nor such records)')
    header.setdefault('processes', 1)
    run = Run(name, header, steps, [dict(e) for e in evals if math.isfinite(e['val_loss'])])
    if not header.get('flops_per_token'):
        header['flops_per_token'] = run.derived(lambda mfu, peak, ms, tokens: mfu * peak * ms / 1000 / tokens,
                                                'mfu', 'peak_flops', 'time_ms', 'tokens_per_iter')
    run.seconds_logged = all('seconds' in e for e in run.evals)
    for e in run.evals:
        e.setdefault('tokens', run.derived(lambda tokens, n=e['iter']: tokens * n, 'tokens_per_iter'))
        e.setdefault('seconds', run.derived(lambda ms, n=e['iter']: ms / 1000 * n, 'time_ms'))
    return run
