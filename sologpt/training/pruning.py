"""
Magnitude pruning on a schedule.
"""

import math

import torch


class Pruning:
    """
    Magnitude pruning on a schedule (https://arxiv.org/abs/1710.01878): from step `start` to step `end` the share of
    zeros in each matrix rises to `share`, as 1 - (1 - t)^3. In every tenth step, and in step `end`, the smallest
    weights are chosen anew, and what has been chosen stays zero until then.
    """
    interval = 10

    def __init__(self, matrices, share, start, end, next_step=0):
        self.matrices, self.share, self.start, self.end = matrices, share, start, end
        # of a resumed run what had been chosen is zero
        self.masks = [w != 0 for w in matrices] if self.share_at(next_step - 1) else None

    def share_at(self, step):
        if step < self.start:
            return 0.0
        t = 1.0 if step >= self.end else (step - self.start) / (self.end - self.start)
        return self.share * (1 - (1 - t) ** 3)

    @torch.no_grad()
    def step(self, step):
        """To be called after the optimizer's step `step`."""
        share = self.share_at(step)
        if share and (step % self.interval == 0 or step == math.ceil(self.end)):
            self.masks = [self._largest(w.abs(), share) for w in self.matrices]
        if self.masks:
            for w, mask in zip(self.matrices, self.masks, strict=True):
                w.mul_(mask)

    @staticmethod
    def _largest(size, share):
        mask = torch.ones_like(size, dtype=torch.bool)
        mask.view(-1)[size.flatten().topk(round(share * size.numel()), largest=False, sorted=False).indices] = False
        return mask
