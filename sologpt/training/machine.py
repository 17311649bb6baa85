"""The machine of a run: its device, its processes, and what 'auto' found for them, each with the reason."""

import os

import torch

from model import GPTConfig
from sologpt.machine import choices, devices, processes
from sologpt.training.checks import check_dtype
from sologpt.training.resume import Resumed
from sologpt.training.step import Step, rows_of_matmuls


class Machine:
    """
    device                        the torch.device of this process
    torchrun, rank, world_size    whether torchrun started this process, its number, how many there are
    master                        whether it is the first process
    memory                        bytes that the run may take of the device
    compile, compile_reason       whether to use torch.compile, and why not
    cuda_graphs                   whether to replay each micro-step as CUDA graphs
    dtype, dtype_reason           of the matmuls, after choose_formats()
    attn_backend, attn_reason     the attention kernel, after choose_formats()
    """

    def __init__(self, config: dict):
        """Set up the device and meet the other processes. Raises InputError."""
        self.torchrun, self.rank, self.world_size = processes.find_processes()
        self.master = self.rank == 0
        self.device = devices.find_device(config['device'])
        if self.torchrun and self.device.type == 'cuda':
            self.device = devices.find_device(f'cuda:{os.environ.get("LOCAL_RANK", 0)}')
        devices.prepare_device(self.device, config['tf32'], config['accumulate'])
        self.memory = devices.usable_memory(self.device, config['memory_limit'])
        self.cuda_graphs = config['compile'] == 'cuda_graphs'
        self.compile, self.compile_reason = bool(config['compile']), 'as asked'
        if config['compile'] == 'auto':
            self.compile, self.compile_reason = choices.can_compile(self.device)
        self.backend = config['backend'] or ('nccl' if self.device.type == 'cuda' else 'gloo')
        if self.torchrun:
            processes.start_processes(self.device, self.backend)

    def choose_formats(self, config: dict, model_config: GPTConfig, run: Resumed, needs_mask: bool) -> None:
        """
        Find the dtype of the matmuls and the attention kernel for a model. What 'auto' found in an earlier session
        stays: measured again, it might come out otherwise. needs_mask: attention is given a mask, which not every
        kernel takes. Raises InputError.
        """
        dtype, attn_backend = config['dtype'], config['attn_backend']
        if dtype == 'auto':
            dtype = run.get('dtype', {}).get(self.device.type, 'auto')
        if attn_backend == 'auto':
            attn_backend = self.chosen_before(run).get('attn_backend', 'auto')
        width = model_config.n_embd
        found = choices.find_dtype(dtype, self.device, (rows_of_matmuls(config), width, 4 * width))
        # 'auto' tries things out, so the first process decides
        found, compiled = processes.of_master((found, (self.compile, self.compile_reason)))
        (self.dtype, self.dtype_reason), (self.compile, self.compile_reason) = found, compiled
        check_dtype(config, self.dtype, self.dtype_reason)
        T = config['block_size']
        shape = None if needs_mask else (8, model_config.n_head, T, model_config.head_dim)
        self.attn_backend, self.attn_reason = processes.of_master(
            choices.find_attn_backend(attn_backend, self.device, self.dtype, T, shape))

    def chosen_before(self, run: Resumed) -> dict:
        """What 'auto' found on a device of this name in an earlier session: keys and values."""
        return run.get('chosen', {}).get(devices.device_name(self.device), {})

    def to_save(self, step: Step, chose_batch_size: bool) -> dict:
        """What 'auto' found, for a checkpoint."""
        chosen = {'attn_backend': self.attn_backend} | ({'batch_size': step.batch_size} if chose_batch_size else {})
        return {'dtype': {self.device.type: self.dtype}, 'chosen': {devices.device_name(self.device): chosen}}

    def autocast(self):
        """The context of forward passes."""
        return devices.autocast(self.device, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """The loss scaling that float16 needs; for other dtypes it does nothing."""
        return torch.amp.GradScaler(self.device.type, init_scale=2.0 ** 15, enabled=self.dtype == 'float16')

    def end(self) -> None:
        """Leave the other processes."""
        if self.torchrun:
            processes.end_processes()


