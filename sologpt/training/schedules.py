"""
Schedules of the learning rate and of Muon's momentum.
"""

import math

EARLY_MOMENTUM = 0.85  # Muon's, in the first step


def set_rates(optimizer, step, factor):
    """The learning rates of step `step`, `factor` of the highest; and Muon's momentum, which rises linearly."""
    for group in optimizer.param_groups:
        group['lr'] = group['peak_lr'] * factor
        if 'peak_momentum' in group:
            warm = min(1.0, step / group['momentum_warmup']) if group['momentum_warmup'] else 1.0
            early = min(EARLY_MOMENTUM, group['peak_momentum'])
            group['momentum'] = early + warm * (group['peak_momentum'] - early)


def cosine(step, warmup_iters, decay_iters, floor):
    """Share of the highest learning rate: linear warm-up, then half a cosine down to `floor` at decay_iters."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if step >= decay_iters:
        return floor
    progress = (step - warmup_iters) / (decay_iters - warmup_iters)
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (1 - floor)


def wsd(step, warmup_iters, decay_iters, floor, decay_part):
    """
    Share of the highest learning rate: linear warm-up, then 1, then in the last `decay_part` of decay_iters linearly
    down to `floor` (warm-up, stable, decay: https://arxiv.org/abs/2404.06395).
    """
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    left = max(0.0, 1 - step / decay_iters) if decay_iters else 0.0
    return floor + (1 - floor) * (min(1.0, left / decay_part) if decay_part else float(left > 0))
