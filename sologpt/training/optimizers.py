"""
The optimizers and their parameter groups: AdamW and Muon.
"""

import functools
from collections import defaultdict

import torch
from torch.optim.adamw import adamw as adamw_update

from sologpt.machine import sharding
from sologpt.matmuls.formats import to_bfloat16_stochastically
from sologpt.training.moments import MOMENTS

# Polar Express (https://arxiv.org/abs/2505.16932): x -> a x + b x^3 + c x^5, with the (a, b, c) of the first, the
# second, ... iteration, brings singular values between 0.001 and 1 as close to 1 as so many iterations can.
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
]


def adamw(model, learning_rate, weight_decay, betas, faster=(), ratio=1.0, keep='float32'):
    """
    AdamW, one fused kernel per step where the device has it. Matrices and embeddings decay, vectors do not. `faster`
    matrices learn at `ratio` times the rate. keep: a name in MOMENTS.
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
    ], betas=betas, fused=_fused(model))


def muon(model, learning_rate, weight_decay, betas, muon_lr, embd_lr=None, head_lr=None, momentum=0.95,
         momentum_warmup=300, iterations=5, dtype=torch.float32, keep='float32'):
    """
    Muon, with muon_lr and weight_decay, for the blocks' matrices; AdamW without decay for the embedding tables
    (embd_lr), an untied head (head_lr) and what else there is; None is learning_rate. keep: a name in MOMENTS.
    """
    groups = {'matrices': {}, 'tables': {}, 'head': {}, 'vectors': {}}
    for name, p in model.named_parameters():
        kind = ('matrices' if name.startswith('transformer.h.') and p.dim() == 2 else
                'tables' if name.startswith(('transformer.wte', 'transformer.wpe')) else
                'head' if name.startswith('lm_head') else 'vectors')
        if p.requires_grad:
            groups[kind][name] = p
    # a rare token's gradient, a mean over half a million, is as small as AdamW's usual 1e-8
    adam = {'betas': betas, 'eps': 1e-10, 'weight_decay': 0.0, 'fused': _fused(model)}
    rates = {'tables': embd_lr, 'head': head_lr, 'vectors': None}
    return Muon([
        {'params': list(groups['matrices'].values()), 'peak_lr': muon_lr, 'weight_decay': weight_decay,
         'peak_momentum': momentum, 'momentum_warmup': momentum_warmup,
         # queries, keys and values are three matrices in one parameter
         'parts': [3 if name.endswith('c_attn.weight') else 1 for name in groups['matrices']]},
        *({'params': list(groups[kind].values()), 'peak_lr': learning_rate if lr is None else lr, **adam}
          for kind, lr in rates.items())], iterations, dtype, keep)


def _fused(model):
    return next(model.parameters()).device.type in ('cuda', 'cpu')


class AdamW(torch.optim.AdamW):
    """AdamW whose moments are kept otherwise, and for weights in bfloat16: their updates are rounded stochastically."""

    def __init__(self, keep, groups, **options):
        super().__init__(groups, **options)
        self.moments = MOMENTS[keep]
        self._step_supports_amp_scaling = False  # as torch's fused one does: here GradScaler skips a step by itself

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            _adamw_step(group, self.state, self.moments)


def _adamw_step(group, state, moments):
    params = [p for p in group['params'] if p.grad is not None]
    first, second = moments
    for p in params:
        if not state[p]:
            state[p] |= {'step': torch.zeros((), device=p.device if group['fused'] else 'cpu'),
                         'exp_avg': first.new(p), 'exp_avg_sq': second.new(p)}
    # by itself a parameter of which there are copies, for they are not to exist beside those of others
    apart = [p for p in params if p.dtype != torch.float32 or first.copied]
    batches = [[p for p in params if p.dtype == torch.float32 and not first.copied], *([p] for p in apart)]
    beta1, beta2 = group['betas']
    for batch in filter(None, batches):
        weights, grads = [p.float() for p in batch], [p.grad.float() for p in batch]  # float32's own are not copied
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


class Muon(torch.optim.Optimizer):
    """
    Momentum, orthogonalised before it is applied (https://kellerjordan.github.io/posts/muon), for matrices; groups
    without `parts` are AdamW's.

    A parameter with n parts is n matrices below each other. Matrices of one shape, or of its transpose, go through the
    orthogonalisation together; of parameters that processes share each does some. An update is -lr sqrt(max(1, rows /
    columns)) times a matrix with singular values near 1. dtype: that of the orthogonalisation.
    """

    def __init__(self, groups, iterations, dtype, keep):
        super().__init__(groups, {'lr': 0.0})
        self.iterations, self.dtype, self.moments = iterations, dtype, MOMENTS[keep]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if 'parts' in group:
                self._muon(group)
            else:
                _adamw_step(group, self.state, self.moments)

    def _muon(self, group):
        shares = []  # (parameter, update, learning rate, parts)
        batches = defaultdict(list)  # shape -> (weight, update, learning rate) of its matrices, none of them tall
        decay = 1 - group['lr'] * group['weight_decay']
        for p, parts in zip(group['params'], group['parts'], strict=True):
            if p.grad is None:
                continue
            first, _ = self.moments
            if not self.state[p]:
                self.state[p]['momentum'] = first.new(p)
            grad = p.grad.float()
            velocity = first.read(self.state[p]['momentum'], p).lerp_(grad, 1 - group['momentum'])
            first.write(self.state[p]['momentum'], velocity)
            update = grad.lerp(velocity, group['momentum'])  # Nesterov's
            lr = group['lr'] * max(1, p.size(0) / parts / p.size(1)) ** 0.5
            if sharding.is_share(p):
                shares.append((p, update, lr, parts))
                continue
            for matrices in zip(p.chunk(parts), update.chunk(parts), strict=True):
                weight, update = (m.mT if m.size(0) > m.size(1) else m for m in matrices)
                batches[weight.shape].append((weight, update, lr))
        if shares:
            self._muon_shares(shares, decay)
        for batch in batches.values():
            updates = orthogonalize(torch.stack([update for _, update, _ in batch]), self.iterations, self.dtype)
            for (weight, _, lr), update in zip(batch, updates, strict=True):
                if weight.dtype == torch.float32:
                    weight.mul_(decay).sub_(update, alpha=lr)
                else:
                    weight.copy_(to_bfloat16_stochastically(weight.float().mul_(decay).sub_(update, alpha=lr)))

    def _muon_shares(self, shares, decay):
        shares.sort(key=lambda share: share[0].numel())  # processes that work side by side are to take the same time

        def orthogonal(i, update):
            matrices = update.unflatten(0, (shares[i][-1], -1))
            if matrices.size(1) > matrices.size(2):
                return orthogonalize(matrices.mT, self.iterations, self.dtype).mT.flatten(0, 1)
            return orthogonalize(matrices, self.iterations, self.dtype).flatten(0, 1)
        for i, update in sharding.one_each([update for _, update, _, _ in shares], orthogonal):
            p, _, lr, _ = shares[i]
            p.to_local().mul_(decay).sub_(update, alpha=lr)

    def flops(self):
        """FLOPs of a step's orthogonalisations in each process; of shares each does its part."""
        total, n = 0, self.iterations
        for group in self.param_groups:
            for p, parts in zip(group['params'], group.get('parts', ()), strict=False):
                rows, columns = sorted((p.size(0) // parts, p.size(1)))
                parts = parts / p.device_mesh.size() if sharding.is_share(p) else parts
                if _by_small_side(p.device, self.dtype, rows, columns):
                    total += parts * (2 * 2 * rows ** 2 * columns + (4 * n - 3) * 2 * rows ** 3)
                else:
                    total += parts * n * (2 * 2 * rows ** 2 * columns + 2 * rows ** 3)
        return total


def orthogonalize(G, iterations, dtype):
    """
    Approximately U V^T of each U S V^T in G, (n, rows, columns) with rows <= columns, computed in `dtype` by matmuls
    alone: the odd polynomials of POLAR_EXPRESS act on the singular values.
    """
    X = (G / (1.02 * G.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)  # 2 %: rounding must not lead above 1
    steps = POLAR_EXPRESS[:iterations]
    if not _by_small_side(G.device, dtype, *G.shape[-2:]):
        for a, b, c in steps:
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
        return X
    A, P, Q = X @ X.mT, None, None
    for a, b, c in steps:
        if P is not None:
            A = P @ A @ P
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else P @ Q
    return Q @ X


def _by_small_side(device, dtype, rows, columns):
    """
    Whether only the first and the last product are with a wide matrix itself, and the others on its small side: X is
    Q X0, and A = X X^T follows from the last A. In full float32 alone, for rounding errors in A are never corrected.
    """
    return rows < columns and dtype == torch.float32 and device.type == 'cpu'


def load_state(optimizer, state):
    """
    Restore moments and step counts; the hyperparameters stay as they are now, and so does how moments are kept. `state`
    may come from nanoGPT.
    """
    current = optimizer.state_dict()['param_groups']
    sizes = [[len(g['params']) for g in groups] for groups in (current, state['param_groups'])]
    if sizes[0] != sizes[1]:
        raise ValueError(f'groups of {sizes[1]} parameters, here they are {sizes[0]}')
    moments = getattr(optimizer, 'moments', MOMENTS['float32'])
    params = [(p, group.get('fused')) for group in optimizer.param_groups for p in group['params']]
    for i, (p, fused) in enumerate(params):  # by hand, for torch would round and move all that it loads
        if i in state['state']:
            optimizer.state[p] = {
                key: torch.as_tensor(saved, dtype=torch.float32, device=p.device if fused else 'cpu') if key == 'step'
                else _kept_as(moments[key == 'exp_avg_sq'], MOMENTS['8bit'][key == 'exp_avg_sq'], saved, p)
                for key, saved in sharding.share(state['state'][i], p).items()}


def _kept_as(how, in_8_bits, saved, p):
    """A moment in the way of `how`, from whatever it was saved as."""
    kept = how.new(p)
    if kept.dtype == saved.dtype:
        return kept.copy_(saved)
    if saved.dtype == torch.uint8:
        return kept.copy_(in_8_bits.read(saved, p))
    how.write(kept, saved.to(p.device, torch.float32))
    return kept
