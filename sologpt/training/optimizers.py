"""The optimizer of a run: chosen and built from train.py's keys, and restored from a checkpoint."""

import torch
import torch.nn as nn

from configurator import InputError
from sologpt.adapters.adapter import low_rank_Bs
from sologpt.machine import sharding
from sologpt.training.adamw import adamw
from sologpt.training.moments import MOMENTS
from sologpt.training.muon import POLAR_EXPRESS, muon
from sologpt.training.resume import Resumed


def parse_optimizer(text: str) -> tuple[str, int]:
    """('adamw' or 'muon', Muon's iterations) of 'adamw', 'muon' or 'muon:4'. Raises InputError."""
    name, colon, iterations = text.partition(':')
    if name not in ('adamw', 'muon') or colon and not (name == 'muon' and iterations.isdecimal()):
        raise InputError(f'optimizer={text!r} is not known: use adamw, muon, or muon:4 with the number of iterations')
    n = int(iterations) if colon else 5
    if not 1 <= n <= len(POLAR_EXPRESS):
        raise InputError(f'optimizer={text}: Muon takes 1 to {len(POLAR_EXPRESS)} iterations')
    return name, n


def weight_decay_of(config: dict) -> float:
    """train.py's weight_decay; None means 0.1, and 0 with an adapter."""
    if config['weight_decay'] is None:
        return 0.0 if config['adapter'] or config['adapter_from'] else 0.1
    return config['weight_decay']


def build_optimizer(model: nn.Module, config: dict, dtype: str, compile: bool = False) -> torch.optim.Optimizer:
    """
    The optimizer of a run for a model's trained parameters. dtype: of the matmuls. compile: whether updates are
    compiled, where that helps.
    """
    kind, iterations = parse_optimizer(config['optimizer'])
    rate, decay, keep = config['learning_rate'], weight_decay_of(config), config['optimizer_state']
    betas = config['beta1'], config['beta2']
    if kind == 'muon':
        return muon(model, rate, decay, betas, config['muon_lr'], config['embd_lr'], config['head_lr'],
                    config['muon_momentum'], config['momentum_warmup'], iterations,
                    torch.bfloat16 if dtype == 'bfloat16' else torch.float32, keep, compile)
    return adamw(model, rate, decay, betas, low_rank_Bs(model), config['loraplus_lr_ratio'], keep, compile)


def restore_optimizer(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, run: Resumed) -> None:
    """Give both their state of the checkpoint, and then let go of its memory. Raises InputError."""
    if not run:
        return
    try:
        load_state(optimizer, run.saved['optimizer'])
    except (KeyError, ValueError) as e:
        raise InputError(f"{run.path}: the optimizer's state does not fit this model: {e}") from None
    if run.get('scaler') and scaler.is_enabled():
        scaler.load_state_dict(run.saved['scaler'])
    for key in ('model', 'optimizer'):
        run.saved.pop(key)


def load_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """
    Restore moments and step counts from a state_dict, nanoGPT's included. The hyperparameters stay as they are now,
    and so does how moments are kept. Raises ValueError if the groups are others.
    """
    current = optimizer.state_dict()['param_groups']
    sizes = [[len(g['params']) for g in groups] for groups in (current, state['param_groups'])]
    if sizes[0] != sizes[1]:
        raise ValueError(f'groups of {sizes[1]} parameters, here they are {sizes[0]}')
    moments = getattr(optimizer, 'moments', MOMENTS['float32'])
    params = [(p, group.get('fused')) for group in optimizer.param_groups for p in group['params']]
    for i, (p, fused) in enumerate(params):  # not by torch's method, which would round and move what it loads
        if i in state['state']:
            device = p.device if fused else 'cpu'
            optimizer.state[p] = {
                key: torch.as_tensor(saved, dtype=torch.float32, device=device) if key == 'step'
                else _kept_as(moments[key == 'exp_avg_sq'], MOMENTS['8bit'][key == 'exp_avg_sq'], saved, p)
                for key, saved in sharding.share_state(state['state'][i], p).items()}


def _kept_as(how, in_8_bits, saved, p):
    """A moment as `how` keeps it, whatever it was saved as."""
    kept = how.new(p)
    if kept.dtype == saved.dtype:
        return kept.copy_(saved)
    if saved.dtype == torch.uint8:
        return kept.copy_(in_8_bits.read(saved, p))
    how.write(kept, saved.to(p.device, torch.float32))
    return kept
