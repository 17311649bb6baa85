"""AdamW (https://arxiv.org/abs/1711.05101), whose moments may be kept in fewer bits or elsewhere."""

import functools
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch.optim.adamw import adamw as adamw_update

from sologpt.matmuls.elements import to_bfloat16_stochastically
from sologpt.training.moments import MOMENTS


def adamw(model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float],
          faster: Sequence[torch.Tensor] = (), ratio: float = 1.0, keep: str = 'float32') -> torch.optim.AdamW:
    """
    AdamW for a model's trained parameters, one fused kernel per step where the device has it.

    Matrices and embeddings decay, vectors do not. The matrices in `faster` learn at `ratio` times the rate. keep: a
    name in MOMENTS.
    """
    trained = [p for p in model.parameters() if p.requires_grad]  # in the order of nanoGPT's checkpoints
    plain = keep == 'float32' and all(p.dtype == torch.float32 for p in trained)
    cls = torch.optim.AdamW if plain else functools.partial(AdamW, keep)
    apart = {id(p) for p in faster}
    return cls([
        {'params': [p for p in trained if p.dim() >= 2 and id(p) not in apart], 'peak_lr': learning_rate,
         'weight_decay': weight_decay},
        {'params': [p for p in trained if p.dim() < 2], 'peak_lr': learning_rate, 'weight_decay': 0.0},
        *([{'params': list(faster), 'peak_lr': learning_rate * ratio, 'weight_decay': weight_decay}] if faster else []),
    ], betas=betas, fused=can_fuse(model))


def can_fuse(model: nn.Module) -> bool:
    """Whether torch has a fused AdamW for the model's device."""
    return next(model.parameters()).device.type in ('cuda', 'cpu')


class AdamW(torch.optim.AdamW):
    """AdamW with moments of another kind, and for weights in bfloat16, whose updates are rounded stochastically."""

    def __init__(self, keep: str, groups: list[dict], **options):
        """keep: a name in MOMENTS."""
        super().__init__(groups, **options)
        self.moments = MOMENTS[keep]
        self._step_supports_amp_scaling = False  # torch's fused one does; for this one GradScaler skips steps itself

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            adamw_step(group, self.state, self.moments)


def adamw_step(group: dict, state: dict, moments: tuple) -> None:
    """Update a group's parameters. state: parameter -> its moments, which are made in the first step."""
    params = [p for p in group['params'] if p.grad is not None]
    first, second = moments
    for p in params:
        if not state[p]:
            state[p] |= {'step': torch.zeros((), device=p.device if group['fused'] else 'cpu'),
                         'exp_avg': first.new(p), 'exp_avg_sq': second.new(p)}
    # Parameters that have copies are updated one at a time, so that only one copy exists at once
    apart = [p for p in params if p.dtype != torch.float32 or first.copied]
    batches = [[p for p in params if p.dtype == torch.float32 and not first.copied], *([p] for p in apart)]
    beta1, beta2 = group['betas']
    for batch in filter(None, batches):
        weights, grads = [p.float() for p in batch], [p.grad.float() for p in batch]  # no copy if they are float32
        averages = [first.read(state[p]['exp_avg'], p) for p in batch]
        squares = [second.read(state[p]['exp_avg_sq'], p) for p in batch]
        adamw_update(weights, grads, averages, squares, [], [state[p]['step'] for p in batch],
                     fused=group['fused'], lr=group['lr'], beta1=beta1, beta2=beta2,
                     weight_decay=group['weight_decay'], eps=group['eps'], amsgrad=False, maximize=False)
        for p, weight, average, square in zip(batch, weights, averages, squares, strict=True):
            first.write(state[p]['exp_avg'], average)
            second.write(state[p]['exp_avg_sq'], square)
            if p.dtype != torch.float32:
                p.copy_(to_bfloat16_stochastically(weight))
