"""
What a run reports: lines on the console, the same as JSON in out_dir/log.jsonl, and to W&B when asked.

The first line of log.jsonl is the header: config, device, dtype, parameters, FLOPs, peak, data.
The others have `iter` and

    after a step         loss, lr, time_ms, tokens_per_s, mfu, grad_norm, memory_gb, tokens
    after an evaluation  train_loss, val_loss, lr, tokens, seconds

MFU is a fraction; seconds are those spent in training steps so far. runs.py reads the file.
"""

import gc
import json
import os
import statistics
from dataclasses import dataclass

import torch

from configurator import InputError, describe, report_errors
from sologpt.machine import clock, devices
from sologpt.training.machine import Machine
from sologpt.training.out_dir import OutDir
from sologpt.training.progress import Progress
from sologpt.training.runs import read_log


@dataclass
class Header:
    """What stays the same in a run: the console's header and the first record of log.jsonl."""
    config: dict  # with every derived key filled in
    record: dict  # for log.jsonl, without the config
    lines: list[str]  # for the console, after the config

    @property
    def tokens_per_iter(self) -> int:
        return self.record['tokens_per_iter']

    def mfu(self, tokens_per_second: float) -> float:
        """The share of all processes' peak that is used for the model's own FLOPs."""
        peak = self.record['peak_flops'] * self.record['processes']
        return self.record['flops_per_token'] * tokens_per_second / peak


class Report:
    def __init__(self, config: dict, given: list[str], header: Header, machine: Machine, progress: Progress,
                 out_dir: OutDir | None = None, resuming: bool = False):
        """
        Print the header and open the log. out_dir: an OutDir, or None if nothing is to be logged to files. Raises
        InputError, before anything is moved.
        """
        self.header, self.machine, self.config = header, machine, config
        self.clock = clock.StepClock(machine.device)
        self.first_iter = self.lap_start = progress.iter_num
        self.laps, self.log = [], None
        self._say(describe(header.config, given), *header.lines)
        if machine.master and out_dir:
            options = config['wandb_log'] and {
                'project': config['wandb_project'], 'name': config['wandb_run_name'], 'config': header.config,
                'id': progress.wandb_id, 'resume': 'allow' if progress.wandb_id else None}
            self.log = RunLog(out_dir, {'config': header.config, **header.record},
                              progress.iter_num if resuming else None, options)
            progress.wandb_id = self.log.wandb_id or progress.wandb_id

    def _say(self, *lines):
        if self.machine.master:
            print('\n'.join(lines), flush=True)

    def evaluation(self, progress: Progress, losses: dict[str, float], lr: float) -> None:
        """losses: of 'train' and 'val', in nats per token."""
        self._say(f'step {progress.iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
        if self.log:
            self.log.write({
                'iter': progress.iter_num, 'train_loss': losses['train'], 'val_loss': losses['val'], 'lr': lr,
                'tokens': progress.iter_num * self.header.tokens_per_iter,
                'seconds': progress.train_seconds + self.clock.total})

    def step(self, progress: Progress, loss: torch.Tensor, lr: float, grad_norm: torch.Tensor | None) -> None:
        """
        After a step: its line, unless log_interval says otherwise. loss: the mean of the step; grad_norm: before
        clipping. Waits for the device.
        """
        iter_num, tokens = progress.iter_num, self.header.tokens_per_iter
        seconds = self.clock.lap() / (iter_num + 1 - self.lap_start)
        self.lap_start = iter_num + 1
        if iter_num > self.first_iter:
            self.laps.append(seconds)
        else:  # the first step warms up and compiles
            # what exists now stays: the garbage collector need not go through it, which takes up to half a second
            gc.collect()
            gc.freeze()
            self.clock.forget()
        if not self.machine.master or iter_num % self.config['log_interval']:
            return
        speed = tokens / seconds
        mfu, memory = self.header.mfu(speed), devices.peak_memory_gb(self.machine.device)
        self._say(f'iter {iter_num}: loss {loss.item():.4f}, time {seconds * 1000:.2f}ms, mfu {mfu * 100:.2f}%, '
                  f'tok/s {speed / 1000:.1f}k, lr {lr:.1e}, mem {memory:.1f}GB, '
                  f'eta {clock.duration(self._seconds_left(progress, seconds))}')
        self.log.write({'iter': iter_num, 'loss': loss.item(), 'lr': lr, 'time_ms': seconds * 1000,
                        'tokens_per_s': speed, 'mfu': mfu, 'grad_norm': None if grad_norm is None else grad_norm.item(),
                        'memory_gb': memory, 'tokens': (iter_num + 1) * tokens})

    def _seconds_left(self, progress, seconds):
        left = (self.config['max_iters'] - progress.iter_num - 1) * seconds
        if self.config['train_minutes']:
            by_clock = 60 * self.config['train_minutes'] - progress.train_seconds - self.clock.total
            left = min(left, max(0.0, by_clock))
        return left

    def saving(self) -> None:
        self._say(f'saving checkpoint to {self.config["out_dir"]}')

    def stopped(self, progress: Progress) -> None:
        """A signal ended the run."""
        self._say(f'stopped at iter {progress.iter_num}; go on with --init_from=resume '
                  f'--out_dir={self.config["out_dir"]}')

    def summary(self, progress: Progress) -> None:
        """The last line, if there were steps after the first."""
        self.clock.stop()
        if not self.laps:
            return
        seconds, steps = statistics.median(self.laps), progress.iter_num - self.first_iter
        speed = self.header.tokens_per_iter / seconds
        self._say(f'{steps:,} iterations, {steps * self.header.tokens_per_iter:,} tokens, {self.clock.total:.1f} s of '
                  f'training: median {seconds * 1000:.2f} ms per iteration, {speed / 1000:.1f}k tok/s, mfu '
                  f'{self.header.mfu(speed) * 100:.1f}%; lowest val loss {progress.best_val_loss:.4f} at iter '
                  f'{progress.best_iter}')

    def sample(self, text: str) -> None:
        self._say(f'{"-" * 40} a sample {"-" * 40}\n{text}')

    def close(self, failed: bool = False) -> None:
        if self.log:
            self.log.close(failed)


class RunLog:
    """out_dir/log.jsonl, and a run of W&B beside it."""

    def __init__(self, out_dir: OutDir, header: dict, resume_at: int | None = None, wandb_options: dict | None = None):
        """
        A new log, with what an earlier run left in out_dir, an OutDir, set aside. Or, resumed at step resume_at, the
        old log without what will be done again. wandb_options: what wandb.init takes; `wandb_id` is then the run's id.
        Raises InputError, before anything is moved.
        """
        self.wandb_run = _start_wandb(wandb_options) if wandb_options else None
        self.wandb_id = self.wandb_run and self.wandb_run.id
        path, kept = os.path.join(out_dir.path, 'log.jsonl'), []
        if resume_at is None:
            if found := out_dir.set_aside():
                print(f'kept the earlier {", ".join(found)} in {out_dir.path} as *.old')
        elif os.path.exists(path):
            kept = [record for record in read_log(path) if _precedes(record, resume_at)]
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(record) + '\n' for record in kept or [header])
        os.replace(path + '.tmp', path)
        self.file = open(path, 'a', encoding='utf-8')

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(record) + '\n')
        self.file.flush()
        if self.wandb_run:
            nanogpts = {'train_loss': 'train/loss', 'val_loss': 'val/loss'}  # its names in W&B
            self.wandb_run.log({nanogpts.get(k, k): v for k, v in record.items()})

    def close(self, failed: bool = False) -> None:
        self.file.close()
        if self.wandb_run:
            self.wandb_run.finish(exit_code=int(failed))


def _precedes(record, step):
    """Whether a run that goes on before `step` has done this already. An evaluation comes before the step it names."""
    return 'iter' not in record or record['iter'] < step or record['iter'] == step and 'val_loss' in record


def _start_wandb(options):
    try:
        import wandb
        run = wandb.init(**options)
        report_errors()  # W&B replaces the hook that prints an InputError in one line
        return run
    except Exception as e:  # not installed, not logged in, no network
        raise InputError(f'wandb_log=True, but W&B does not start ({e}): pip install wandb and wandb login, or set '
                         f'WANDB_MODE=offline') from None
