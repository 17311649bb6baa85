"""The step of a run: how its tokens are divided into micro-batches and processes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn

from configurator import InputError
from sologpt.machine import clock, processes
from sologpt.training.forecast import Forecast
from sologpt.training.micro_batch import divisors, fastest
from sologpt.training.resume import Resumed

EVAL_SEQUENCES = 12  # in a batch of an evaluation, where batch_size is 'auto'


@dataclass
class Step:
    """A step: batch_size sequences x block_size tokens x micro_steps x world_size processes."""
    batch_size: int  # sequences in a micro-batch
    block_size: int
    micro_steps: int  # in each process
    world_size: int
    eval_batch_size: int  # sequences in a batch of an evaluation
    eval_batches: int  # of each split in an evaluation
    reason: str = ''  # how 'auto' chose batch_size

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches in a step, all processes together."""
        return self.micro_steps * self.world_size

    @property
    def tokens(self) -> int:
        return self.batch_size * self.block_size * self.gradient_accumulation_steps


def rows_of_matmuls(config: dict) -> int:
    """
    Tokens in a micro-batch, as a Linear has them in its rows. If batch_size is still to be chosen: in a single
    sequence, because a kernel that takes one takes several.
    """
    sequences = 1 if config['batch_size'] == 'auto' else config['batch_size']
    return sequences * config['block_size']


def resolve_step(config: dict, world_size: int, batch_size: int | None = None,
                 reason: str = '') -> Step:
    """
    The Step of a config. batch_size: the micro-batch if the config's is 'auto'. Raises InputError if the tokens cannot
    be divided so.
    """
    block_size, total = config['block_size'], config['total_batch_size']
    chosen = batch_size is not None
    batch_size = batch_size if chosen else config['batch_size']
    micro_batch = batch_size * block_size
    if total is None:
        accumulated = config['gradient_accumulation_steps'] or 40  # nanoGPT's default
    else:
        accumulated, rest = divmod(total, micro_batch)
        if rest:
            raise InputError(f'total_batch_size={total} tokens cannot be made of micro-batches of batch_size x '
                             f'block_size = {micro_batch} tokens: change one of them')
    if accumulated < 1 or accumulated % world_size:
        raise InputError(f'gradient_accumulation_steps={accumulated} cannot be divided among {world_size} processes: '
                         f'make it a multiple of {world_size}')
    eval_batch_size, eval_batches = batch_size, config['eval_iters']
    if chosen:  # an evaluation reads the same tokens, whatever was chosen
        eval_batch_size = next(size for size in divisors(EVAL_SEQUENCES) if size <= batch_size)
        eval_batches *= EVAL_SEQUENCES // eval_batch_size
    return Step(batch_size, block_size, accumulated // world_size, world_size, eval_batch_size, eval_batches, reason)


def micro_batches(config: dict, world_size: int) -> list[int]:
    """The sizes of micro-batch that make up the step of batch_size='auto', the largest first. Raises InputError."""
    total, block_size = config['total_batch_size'], config['block_size']
    if total % (block_size * world_size):
        raise InputError(f'total_batch_size={total} tokens cannot be made of sequences of block_size={block_size} in '
                         f'{world_size} processes: change one of them')
    return divisors(total // block_size // world_size)


def choose_step(config: dict, machine, run: Resumed, loss_of: nn.Module, optimizer: torch.optim.Optimizer, n_ids: int,
                forecast: Callable[[], Forecast]) -> Step:
    """
    The Step of a run. For batch_size='auto' it has the fastest micro-batch that fits, unless the run has chosen one
    before on such a device.

    loss_of: the TrainingLoss; n_ids: ids that may occur; forecast: makes the Forecast of the run. Raises InputError.
    """
    if config['batch_size'] != 'auto':
        return resolve_step(config, machine.world_size)
    size, reason = machine.chosen_before(run).get('batch_size'), 'as chosen before'
    sizes = micro_batches(config, machine.world_size)
    if size is None and machine.master:
        def seconds(batch_size):
            return _micro_step_seconds(batch_size, config['block_size'], machine, loss_of, optimizer, n_ids)
        size, reason = fastest(sizes, seconds, forecast(), machine.memory, machine.device)
    return resolve_step(config, machine.world_size, processes.of_master(size), reason)


def _micro_step_seconds(batch_size, block_size, machine, loss_of, optimizer, n_ids):
    ids = torch.randint(n_ids, (batch_size, block_size), device=machine.device)

    def run():
        with machine.autocast():
            loss = loss_of(ids, ids)
        loss.backward()
    try:
        return clock.shortest_seconds(run, machine.device)
    finally:
        optimizer.zero_grad(set_to_none=True)
