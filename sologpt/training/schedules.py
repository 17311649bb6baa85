"""Schedules: the learning rate of each step, and Muon's momentum."""

import math
from collections.abc import Callable

import torch

from configurator import InputError

EARLY_MOMENTUM = 0.85  # Muon's, in the first step


def cosine(step: float, warmup_iters: int, decay_iters: int, floor: float) -> float:
    """The share of the highest rate: linear warm-up, then half a cosine down to `floor` at decay_iters."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if step >= decay_iters:
        return floor
    progress = (step - warmup_iters) / (decay_iters - warmup_iters)
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (1 - floor)


def wsd(step: float, warmup_iters: int, decay_iters: int, floor: float, decay_part: float) -> float:
    """
    The share of the highest rate: linear warm-up, then 1, then linearly down to `floor` in the last `decay_part` of
    decay_iters (warm-up, stable, decay: https://arxiv.org/abs/2404.06395).
    """
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    left = max(0.0, 1 - step / decay_iters) if decay_iters else 0.0
    return floor + (1 - floor) * (min(1.0, left / decay_part) if decay_part else float(left > 0))


def parse_schedule(text: str) -> tuple[str, float]:
    """('cosine' or 'wsd', the share of lr_decay_iters in which wsd decays) of 'cosine', 'wsd' or 'wsd:0.7'."""
    name, colon, part = text.partition(':')
    if name not in ('cosine', 'wsd') or name == 'cosine' and colon:
        raise InputError(f'schedule={text!r} is not known: use cosine, wsd, or wsd:0.7 with the share that decays')
    try:
        decay_part = float(part) if colon else 0.5
    except ValueError:
        decay_part = math.nan
    if not 0 <= decay_part <= 1:
        raise InputError(f'schedule={text!r}: the share of the steps that decays must be from 0 to 1')
    return name, decay_part


class Schedule:
    """
    The learning rate of a run. A run is placed in its schedule by its step, or by the clock if train_minutes is given
    and the clock is ahead.
    """

    def __init__(self, config: dict):
        self.kind, self.decay_part = parse_schedule(config['schedule'])
        self.constant = not config['decay_lr']
        self.learning_rate, self.max_iters = config['learning_rate'], config['max_iters']
        self.train_seconds, self.warmup_iters = 60 * config['train_minutes'], config['warmup_iters']
        self.decay_iters = self.max_iters if config['lr_decay_iters'] is None else config['lr_decay_iters']
        self.min_lr = config['min_lr']
        if self.min_lr is None:
            self.min_lr = self.learning_rate / 10 if self.kind == 'cosine' else 0.0

    def position(self, iter_num: int, seconds: Callable[[], float]) -> float:
        """Where the run is, from 0 to max_iters. seconds(): of training so far; asked only if the clock counts."""
        if not self.train_seconds:
            return iter_num
        return max(iter_num, self.max_iters * seconds() / self.train_seconds)

    def factor(self, position: float) -> float:
        """What the highest learning rate is multiplied by."""
        floor = self.min_lr / self.learning_rate if self.learning_rate else 0.0
        if self.constant:
            return 1.0
        if self.kind == 'wsd':
            return wsd(position, self.warmup_iters, self.decay_iters, floor, self.decay_part)
        return cosine(position, self.warmup_iters, self.decay_iters, floor)


def set_rates(optimizer: torch.optim.Optimizer, step: int, factor: float) -> None:
    """
    Set each group's learning rate to `factor` of its peak_lr, and Muon's momentum, which rises linearly in its first
    momentum_warmup steps.
    """
    for group in optimizer.param_groups:
        group['lr'] = group['peak_lr'] * factor
        if 'peak_momentum' in group:
            warm = min(1.0, step / group['momentum_warmup']) if group['momentum_warmup'] else 1.0
            early = min(EARLY_MOMENTUM, group['peak_momentum'])
            group['momentum'] = early + warm * (group['peak_momentum'] - early)
