"""
AdamW (https://arxiv.org/abs/1711.05101), whose moments may be kept in fewer bits or elsewhere.

torch has one kernel for moments and weights in float32. Other kinds take some 40 eager kernels, and each passes over
the memory. Compiled, they are one kernel again, which reads and writes everything once.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch.optim.adamw import adamw as adamw_update

from sologpt.matmuls.elements import to_bfloat16_stochastically
from sologpt.training.moments import BLOCK, MOMENTS, Moments, in_rows, put_back


def adamw(model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float],
          faster: Sequence[torch.Tensor] = (), ratio: float = 1.0, keep: str = 'float32',
          compile: bool = False) -> torch.optim.AdamW:
    """
    AdamW for a model's trained parameters, one fused kernel per step where the device has it.

    Matrices and embeddings decay, vectors do not. The matrices in `faster` learn at `ratio` times the rate. keep: a
    name in MOMENTS. compile: whether updates are compiled, where that helps.
    """
    trained = [p for p in model.parameters() if p.requires_grad]  # in the order of nanoGPT's checkpoints
    plain = keep == 'float32' and all(p.dtype == torch.float32 for p in trained)
    compile = compile and helps_to_compile(trained, keep)
    cls = torch.optim.AdamW if plain else functools.partial(AdamW, keep, compile)
    apart = {id(p) for p in faster}
    return cls([
        {'params': [p for p in trained if p.dim() >= 2 and id(p) not in apart], 'peak_lr': learning_rate,
         'weight_decay': weight_decay},
        {'params': [p for p in trained if p.dim() < 2], 'peak_lr': learning_rate, 'weight_decay': 0.0},
        *([{'params': list(faster), 'peak_lr': learning_rate * ratio, 'weight_decay': weight_decay}] if faster else []),
    ], betas=betas, fused=can_fuse(model) and not compile)


def can_fuse(model: nn.Module) -> bool:
    """Whether torch has a fused AdamW for the model's device."""
    return next(model.parameters()).device.type in ('cuda', 'cpu')


def helps_to_compile(params: Sequence[torch.Tensor], keep: str) -> bool:
    """Whether an update has more to do than torch's fused kernel. If moments are elsewhere, the copies take longest."""
    return keep == '8bit' or keep == 'float32' and any(p.dtype != torch.float32 for p in params)


class AdamW(torch.optim.AdamW):
    """AdamW with moments of another kind, and for weights in bfloat16, whose updates are rounded stochastically."""

    def __init__(self, keep: str, compile: bool, groups: list[dict], **options):
        """keep: a name in MOMENTS."""
        super().__init__(groups, **options)
        self.moments = MOMENTS[keep]
        self.compiled = CompiledAdamW(*self.moments) if compile else None
        self._step_supports_amp_scaling = False  # torch's fused one does; for this one GradScaler skips steps itself
        self.register_state_dict_pre_hook(finish_copies)

    @torch.no_grad()
    def step(self):
        self.moments[0].begin_step(device_of(self))
        for group in self.param_groups:
            adamw_step(group, self.state, self.moments, self.compiled)


def device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    """The device of an optimizer's parameters."""
    return next(p.device for group in optimizer.param_groups for p in group['params'])


def finish_copies(optimizer: torch.optim.Optimizer) -> None:
    """Let moments arrive where they are kept: a checkpoint, for example, is written from there."""
    optimizer.moments[0].finish_copies(device_of(optimizer))


def adamw_step(group: dict, state: dict, moments: tuple, compiled: 'CompiledAdamW | None' = None) -> None:
    """Update a group's parameters. state: parameter -> its moments, which are made in the first step."""
    params = [p for p in group['params'] if p.grad is not None]
    first, second = moments
    for p in params:
        if not state[p]:
            state[p] |= {'step': torch.zeros((), device=p.device if group['fused'] else 'cpu'),
                         'exp_avg': first.new(p), 'exp_avg_sq': second.new(p)}
    if compiled:
        for p in params:
            compiled(p, group, state[p])
        return
    options = {'fused': group['fused'], 'lr': group['lr'], 'beta1': group['betas'][0], 'beta2': group['betas'][1],
               'weight_decay': group['weight_decay'], 'eps': group['eps'], 'amsgrad': False, 'maximize': False}
    # Parameters that have copies are updated one at a time, so that only one copy exists at once
    apart = [p for p in params if p.dtype != torch.float32 or first.copied]
    batches = [[p for p in params if p.dtype == torch.float32 and not first.copied], *([p] for p in apart)]
    for batch in filter(None, batches):
        weights, grads, steps = list(batch), [p.grad for p in batch], [state[p]['step'] for p in batch]
        averages = [first.read(state[p]['exp_avg'], p) for p in batch]
        squares = [second.read(state[p]['exp_avg_sq'], p) for p in batch]
        if batch[0].dtype == torch.float32:
            adamw_update(weights, grads, averages, squares, [], steps, **options)
        else:
            update_bfloat16(weights[0], grads[0], averages[0], squares[0], steps[0], options)
        for p, average, square in zip(batch, averages, squares, strict=True):
            first.write(state[p]['exp_avg'], average)
            second.write(state[p]['exp_avg_sq'], square)


def update_bfloat16(weight: torch.Tensor, grad: torch.Tensor, average: torch.Tensor, square: torch.Tensor,
                    step: torch.Tensor, options: dict) -> None:
    """AdamW for a parameter in bfloat16, in place. average, square: its moments. options: adamw_update()'s."""
    # a CPU takes some rows at a time, so that what is computed in float32 stays in its cache
    rows = max(1, 2 ** 19 // weight[0].numel()) if weight.device.type == 'cpu' else len(weight)
    for w, g, m, v in zip(*(t.split(rows) for t in (weight.detach(), grad, average, square)), strict=True):
        updated, counted = w.float(), step.clone()
        adamw_update([updated], [g.float()], [m], [v], [], [counted], **options)
        w.copy_(to_bfloat16_stochastically(updated))
    step += 1


# By default Inductor gives 8 rows of 256 to 32 threads, whose registers do not suffice. With this it tries several ways
ROWS_OPTIONS = {'max_autotune_pointwise': True}


class CompiledAdamW:
    """
    AdamW for one parameter at a time, as one kernel. It is compiled once for all sizes, rates and steps.

    Its random numbers are the compiler's own, which follow from the device's seed.
    """

    def __init__(self, first: Moments, second: Moments):
        self.first, self.second = first, second
        self.update = torch.compile(update_rows, dynamic=True, fullgraph=True, options=ROWS_OPTIONS)

    def __call__(self, p: torch.Tensor, group: dict, state: dict[str, torch.Tensor]) -> None:
        state['step'] += 1
        step, (beta1, beta2), lr = state['step'].item(), group['betas'], group['lr']
        # numbers that change, or that differ between groups: compiled code reads them from tensors
        numbers = lr * group['weight_decay'], lr / (1 - beta1 ** step), (1 - beta2 ** step) ** 0.5, group['eps'], \
            1 - beta1, 1 - beta2
        weight, average = in_rows(p), self.first.parts(state['exp_avg'])
        square = self.second.parts(state['exp_avg_sq'])
        self.update(self.first, self.second, weight, in_rows(p.grad), average, square,
                    [torch.tensor(number) for number in numbers])
        self.first.put_back(state['exp_avg'], average)
        self.second.put_back(state['exp_avg_sq'], square)
        put_back(p, weight)


def update_rows(first: Moments, second: Moments, weight: torch.Tensor, grad: torch.Tensor,
                average: tuple[torch.Tensor, ...], square: tuple[torch.Tensor, ...],
                numbers: Sequence[torch.Tensor]) -> None:
    """
    AdamW for a parameter in rows, in place.

    weight, grad: (rows, BLOCK); average, square: parts of the moments; numbers: 0-dimensional, float32, on the CPU.
    """
    assert weight.size(1) == BLOCK  # so that it is a constant in compiled code
    decay, rate, correction, eps, new1, new2 = numbers
    w, g = weight.float(), grad.float()
    m, v = first.decode(*average), second.decode(*square)
    m = m + new1 * (g - m)
    v = v + new2 * (g * g - v)
    w = w - decay * w
    w = w - rate * m / (v.sqrt() / correction + eps)
    weight.copy_(w if weight.dtype == torch.float32 else to_bfloat16_stochastically(w))
    first.encode(m, *average)
    second.encode(v, *square)
