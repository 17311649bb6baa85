"""Magnitude pruning on a schedule (https://arxiv.org/abs/1710.01878)."""

import math
import re

import torch

from configurator import InputError


def parse_prune(prune: float | str) -> tuple[float, float, float]:
    """
    (share of zeros, from, to) of 0.5 or '0.5:0.2-0.7'; from and to are shares of max_iters. '' is 0, no pruning. Raises
    InputError.
    """
    found = re.fullmatch(r'([\d.]+)(?::([\d.]+)-([\d.]+))?', str(prune) or '0')
    try:
        share, start, end = (float(number) for number in (found[1], found[2] or 0.2, found[3] or 0.7))
    except (TypeError, ValueError):
        raise InputError(f'prune={prune!r} must be a share such as 0.5, or 0.5:0.2-0.7 to prune from 0.2 to 0.7 of '
                         f'max_iters') from None
    if share >= 1:
        raise InputError(f'prune={prune}: the share of zeros must be below 1')
    if not start <= end <= 1:
        raise InputError(f'prune={prune}: it must begin before it ends, and end by 1')
    return share, start, end


class Pruning:
    """
    Zeros in matrices: from step `start` to step `end` their share rises to `share`, as 1 - (1 - t)^3. In every tenth
    step, and in step `end`, the smallest weights are chosen again; those that were chosen stay zero until then.
    """
    interval = 10

    def __init__(self, matrices: list[torch.Tensor], share: float, start: float, end: float, next_step: int = 0):
        """next_step: the step at which a resumed run goes on."""
        self.matrices, self.share, self.start, self.end = matrices, share, start, end
        # in a resumed run, the weights that had been chosen are zero
        self.masks = [w != 0 for w in matrices] if self.share_at(next_step - 1) else None

    @classmethod
    def from_config(cls, config: dict, matrices: list[torch.Tensor], next_step: int) -> 'Pruning':
        share, start, end = parse_prune(config['prune'])
        last = config['max_iters'] - 1
        return cls(matrices, share, start * last, end * last, next_step)

    def share_at(self, step: int) -> float:
        """The share of zeros after that step."""
        if step < self.start:
            return 0.0
        t = 1.0 if step >= self.end else (step - self.start) / (self.end - self.start)
        return self.share * (1 - (1 - t) ** 3)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Call it after the optimizer's step number `step`."""
        share = self.share_at(step)
        if share and (step % self.interval == 0 or step == math.ceil(self.end)):
            self.masks = [_largest(w.abs(), share) for w in self.matrices]
        if self.masks:
            for w, mask in zip(self.matrices, self.masks, strict=True):
                w.mul_(mask)


def _largest(size, share):
    """The mask of all but the `share` smallest."""
    mask = torch.ones_like(size, dtype=torch.bool)
    mask.view(-1)[size.flatten().topk(round(share * size.numel()), largest=False, sorted=False).indices] = False
    return mask
