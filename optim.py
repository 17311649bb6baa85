"""The optimizer, its parameter groups, and the learning-rate schedule."""

import math

import torch


def parameter_groups(model, weight_decay):
    """Matrices (embeddings included) decay, vectors (biases, norms) do not; in the order of nanoGPT's checkpoints."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{'params': [p for p in trained if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in trained if p.dim() < 2], 'weight_decay': 0.0}]


def adamw(model, weight_decay, betas):
    """AdamW with one fused kernel per step where the device has it; the learning rate is set at every step."""
    device_type = next(model.parameters()).device.type
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.0, betas=betas,
                             fused=device_type in ('cuda', 'cpu'))


def load_state(optimizer, state):
    """Restore moments and step counts; the hyperparameters stay as they are now. `state` may come from nanoGPT."""
    current = optimizer.state_dict()['param_groups']
    sizes = [[len(g['params']) for g in groups] for groups in (current, state['param_groups'])]
    if sizes[0] != sizes[1]:
        raise ValueError(f'groups of {sizes[1]} parameters, here they are {sizes[0]}')
    optimizer.load_state_dict({'state': state['state'], 'param_groups': current})


def cosine(step, learning_rate, min_lr, warmup_iters, decay_iters):
    """Linear warm-up over warmup_iters steps, then half a cosine down to min_lr at decay_iters, then min_lr."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= decay_iters:
        return min_lr
    progress = (step - warmup_iters) / (decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
