"""
Muon (https://kellerjordan.github.io/posts/muon): for a matrix, the momentum is orthogonalised before it is applied.
"""

from collections import defaultdict

import torch
import torch.nn as nn

from sologpt.machine import sharding
from sologpt.matmuls.elements import to_bfloat16_stochastically
from sologpt.training.adamw import (
    ROWS_OPTIONS,
    CompiledAdamW,
    adamw_step,
    can_fuse,
    device_of,
    finish_copies,
    helps_to_compile,
)
from sologpt.training.moments import BLOCK, MOMENTS, Moments, in_rows, out_of_rows

# Polar Express (https://arxiv.org/abs/2505.16932): iteration i applies x -> a x + b x^3 + c x^5 with the i-th (a, b,
# c). It brings singular values between 0.001 and 1 as close to 1 as that many iterations can.
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
]


def muon(model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float], muon_lr: float,
         embd_lr: float | None = None, head_lr: float | None = None, momentum: float = 0.95, momentum_warmup: int = 300,
         iterations: int = 5, dtype: torch.dtype = torch.float32, keep: str = 'float32',
         compile: bool = False) -> 'Muon':
    """
    Muon for the blocks' matrices, with muon_lr and weight_decay. The rest has AdamW without decay: the embedding tables
    (embd_lr), an untied head (head_lr) and all else; a rate of None is learning_rate. keep: a name in MOMENTS. compile:
    whether updates are compiled, where that helps.
    """
    groups = {'matrices': {}, 'tables': {}, 'head': {}, 'vectors': {}}
    for name, p in model.named_parameters():
        kind = ('matrices' if name.startswith('transformer.h.') and p.dim() == 2 else
                'tables' if name.startswith(('transformer.wte', 'transformer.wpe')) else
                'head' if name.startswith('lm_head') else 'vectors')
        if p.requires_grad:
            groups[kind][name] = p
    # AdamW's usual eps, 1e-8, is as large as a rare token's gradient, which is a mean over half a million tokens
    compile = compile and helps_to_compile([p for group in groups.values() for p in group.values()], keep)
    adam = {'betas': betas, 'eps': 1e-10, 'weight_decay': 0.0, 'fused': can_fuse(model) and not compile}
    rates = {'tables': embd_lr, 'head': head_lr, 'vectors': None}
    return Muon([
        {'params': list(groups['matrices'].values()), 'peak_lr': muon_lr, 'weight_decay': weight_decay,
         'peak_momentum': momentum, 'momentum_warmup': momentum_warmup,
         # queries, keys and values are three matrices in one parameter
         'parts': [model.config.parts_of('.'.join(name.split('.')[3:5])) for name in groups['matrices']]},
        *({'params': list(groups[kind].values()), 'peak_lr': learning_rate if lr is None else lr, **adam}
          for kind, lr in rates.items())], iterations, dtype, keep, compile)


class Muon(torch.optim.Optimizer):
    """
    Groups with `parts` are Muon's, the others AdamW's.

    `parts` are the rows of the matrices that lie below each other in one parameter. Matrices of one shape, or of its
    transpose, are orthogonalised together. If processes share the parameters, each process orthogonalises some of them.
    An update is -lr sqrt(max(1, rows / columns)) times a matrix whose singular values are near 1.
    """

    def __init__(self, groups: list[dict], iterations: int, dtype: torch.dtype, keep: str, compile: bool):
        """iterations, dtype: of the orthogonalisation; keep: a name in MOMENTS; compile: the rest of an update."""
        super().__init__(groups, {'lr': 0.0})
        self.register_state_dict_pre_hook(finish_copies)
        self.iterations, self.dtype, self.moments = iterations, dtype, MOMENTS[keep]
        self.adamw, self.momentum, self.write = None, self._momentum, write_bfloat16
        if compile:
            self.adamw, self.momentum = CompiledAdamW(*self.moments), self._compiled_momentum
            self.momentum_of_rows = torch.compile(momentum_of_rows, dynamic=True, fullgraph=True, options=ROWS_OPTIONS)
            self.write = torch.compile(write_bfloat16, dynamic=True, fullgraph=True)

    @torch.no_grad()
    def step(self):
        self.moments[0].begin_step(device_of(self))
        for group in self.param_groups:
            if 'parts' in group:
                self._muon_step(group)
            else:
                adamw_step(group, self.state, self.moments, self.adamw)

    def _muon_step(self, group):
        shares = []  # (parameter, update, parts) of those that processes share
        batches = defaultdict(list)  # shape -> (weight, update, learning rate) of its matrices, none of them tall
        decay = 1 - group['lr'] * group['weight_decay']
        for p, parts in zip(group['params'], group['parts'], strict=True):
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]['momentum'] = self.moments[0].new(p)
            whole = self.momentum(p, group['momentum'])
            if sharding.is_share(p):
                shares.append((p, whole, parts))
                continue
            for matrices in zip(p.split(parts), whole.split(parts), strict=True):
                lr = group['lr'] * _for_shape(matrices[0])
                weight, update = (m.mT if m.size(0) > m.size(1) else m for m in matrices)
                batches[weight.shape].append((weight, update, lr))
        if shares:
            self._update_shares(shares, group['lr'], decay)
        for batch in batches.values():
            updates = orthogonalize(torch.stack([update for _, update, _ in batch]), self.iterations, self.dtype)
            for (weight, _, lr), update in zip(batch, updates, strict=True):
                if weight.dtype == torch.float32:
                    weight.mul_(decay).sub_(update, alpha=lr)
                else:
                    self.write(weight, update, torch.tensor(decay), torch.tensor(lr))

    def _momentum(self, p, momentum):
        """Nesterov's: the gradient, and the running mean after it."""
        first, _ = self.moments
        grad = p.grad.float()
        velocity = first.read(self.state[p]['momentum'], p).lerp_(grad, 1 - momentum)
        first.write(self.state[p]['momentum'], velocity)
        return grad.lerp(velocity, momentum)

    def _compiled_momentum(self, p, momentum):
        first, kept = self.moments[0], self.state[p]['momentum']
        parts = first.parts(kept)
        update = self.momentum_of_rows(first, in_rows(p.grad), parts, torch.tensor(momentum))
        first.put_back(kept, parts)
        return out_of_rows(update, p)

    def _update_shares(self, shares, lr, decay):
        shares.sort(key=lambda share: share[0].numel())  # so that processes side by side take the same time

        def orthogonal(i, update):
            parts, groups = update.split(shares[i][-1]), defaultdict(list)
            for number, matrix in enumerate(parts):
                groups[matrix.shape].append(number)
            for numbers in groups.values():
                for number, result in zip(numbers, self._orthogonal([parts[n] for n in numbers]), strict=True):
                    parts[number].copy_(result * _for_shape(result))
            return update
        for i, update in sharding.one_each([update for _, update, _ in shares], orthogonal):
            shares[i][0].to_local().mul_(decay).sub_(update, alpha=lr)

    def _orthogonal(self, matrices):
        """Matrices of one shape."""
        matrices = torch.stack(matrices)
        if matrices.size(1) > matrices.size(2):
            return orthogonalize(matrices.mT, self.iterations, self.dtype).mT
        return orthogonalize(matrices, self.iterations, self.dtype)

    def flops(self) -> float:
        """FLOPs of a step's orthogonalisations in each process."""
        total, n = 0, self.iterations
        for group in self.param_groups:
            for p, parts in zip(group['params'], group.get('parts', ()), strict=False):
                share = 1 / p.device_mesh.size() if sharding.is_share(p) else 1
                for part in parts:
                    rows, columns = sorted((part, p.size(1)))
                    if _on_small_side(p.device, self.dtype, rows, columns):
                        total += share * (2 * 2 * rows ** 2 * columns + (4 * n - 3) * 2 * rows ** 3)
                    else:
                        total += share * n * (2 * 2 * rows ** 2 * columns + 2 * rows ** 3)
        return total


def _for_shape(matrix):
    """The factor of the learning rate for a matrix with more rows than columns."""
    return max(1, matrix.size(0) / matrix.size(1)) ** 0.5


def momentum_of_rows(first: Moments, grad: torch.Tensor, kept: tuple[torch.Tensor, ...],
                     momentum: torch.Tensor) -> torch.Tensor:
    """Muon._momentum() of a gradient in rows. kept: the parts of the momentum. Returns float32, in rows."""
    assert grad.size(1) == BLOCK  # so that it is a constant in compiled code
    grad = grad.float()
    velocity = grad + momentum * (first.decode(*kept) - grad)
    first.encode(velocity, *kept)
    return grad + momentum * (velocity - grad)


def write_bfloat16(weight: torch.Tensor, update: torch.Tensor, decay: torch.Tensor, lr: torch.Tensor) -> None:
    """weight = decay weight - lr update, in bfloat16, rounded stochastically. decay, lr: float32, on the CPU."""
    weight.copy_(to_bfloat16_stochastically(weight.float() * decay - lr * update))


def orthogonalize(G: torch.Tensor, iterations: int, dtype: torch.dtype) -> torch.Tensor:
    """
    Approximately U V^T of each U S V^T in G, (n, rows, columns) with rows <= columns.

    Computed in `dtype` by matmuls alone: the odd polynomials of POLAR_EXPRESS act on the singular values.
    """
    X = (G / (1.02 * G.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)  # 2 %: rounding must not lead above 1
    steps = POLAR_EXPRESS[:iterations]
    if not _on_small_side(G.device, dtype, *G.shape[-2:]):
        for a, b, c in steps:
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
        return X
    # X = Q X0 all along, and A = X X^T follows from the A before it: only two products are with the wide matrix
    A, P, Q = X @ X.mT, None, None
    for a, b, c in steps:
        if P is not None:
            A = P @ A @ P
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else P @ Q
    return Q @ X


def _on_small_side(device, dtype, rows, columns):
    """Whether to iterate on the small, square side. Only in full float32, because errors in A are never corrected."""
    return rows < columns and dtype == torch.float32 and device.type == 'cpu'
