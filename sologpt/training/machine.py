"""The machine of a run: its device, its processes, and what 'auto' found for them, each with the reason."""

import os

import torch

from configurator import InputError
from model import GPTConfig
from sologpt.machine import choices, devices, peaks, processes
from sologpt.matmuls.document_attention import find_document_attention
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
    peak, peak_source             FLOP/s that MFU is measured against, and its source, after choose_formats()
    """

    def __init__(self, config: dict):
        """Set up the device and meet the other processes. Raises InputError."""
        self.torchrun, self.rank, self.world_size = processes.find_processes()
        self.master = self.rank == 0
        self.device = devices.find_device(config['device'])
        if self.torchrun and self.device.type == 'cuda':
            self.device = devices.find_device(f'cuda:{os.environ.get("LOCAL_RANK", 0)}')
        self.cuda_graphs = config['compile'] == 'cuda_graphs'
        devices.prepare_device(self.device, config['tf32'], config['accumulate'], config['deterministic'],
                               self.cuda_graphs)
        self.memory = devices.usable_memory(self.device, config['memory_limit'])
        self.compile, self.compile_reason = bool(config['compile']), 'as asked'
        if config['compile'] == 'auto':
            self.compile, self.compile_reason = choices.can_compile(self.device)
        self.backend = config['backend'] or ('nccl' if self.device.type == 'cuda' else 'gloo')
        if self.torchrun:
            processes.start_processes(self.device, self.backend)

    def choose_formats(self, config: dict, model_config: GPTConfig, run: Resumed, needs_mask: bool) -> None:
        """
        Find the dtype of the matmuls, the peak in it, and the attention kernel for a model. What 'auto' found in an
        earlier session stays: measured again, it might come out otherwise. needs_mask: attention is given a mask, which
        not every kernel takes. The model is not on the device yet, so that the matrices to measure with fit. Raises
        InputError.
        """
        dtype = config['dtype']
        if dtype == 'auto':
            dtype = run.get('dtype', {}).get(self.device.type, 'auto')
        width = model_config.n_embd
        found = choices.find_dtype(dtype, self.device, (rows_of_matmuls(config), width, 4 * width))
        # 'auto' tries things out, so the first process decides
        found, compiled = processes.of_master((found, (self.compile, self.compile_reason)))
        (self.dtype, self.dtype_reason), (self.compile, self.compile_reason) = found, compiled
        check_dtype(config, self.dtype, self.dtype_reason)
        self.peak, self.peak_source = peaks.find_peak(self.device, self.dtype, config['peak_flops'], config['tf32'])
        self.attn_backend, self.attn_reason = processes.of_master(
            self._find_attention(config, model_config, run, needs_mask))

    def _find_attention(self, config, model_config, run, needs_mask):
        """(a backend, why). What was chosen before is chosen again, unless the run now asks for what it cannot do."""
        name, T, documents = config['attn_backend'], config['block_size'], config['document_mask']

        def misfit(name):
            return choices.attention_misfit(name, self.device, self.dtype, config['dropout'], documents, self.compile)
        if why := misfit(name):
            raise InputError(f'attn_backend={name} {why}: use auto')
        before = self.chosen_before(run).get('attn_backend', 'auto')
        if name == 'auto' and not misfit(before):
            name = before
        shape = (8, model_config.n_head, model_config.n_kv_head, T, model_config.head_dim)
        if name == 'auto' and documents and self.device.type == 'cuda':
            if why := misfit('flex'):
                return 'sdpa', f'flex {why}'
            return find_document_attention(self.device, devices.DTYPES[self.dtype], shape)
        needs_mask = needs_mask or any((model_config.window_of(i) or T) < T for i in range(model_config.n_layer))
        return choices.find_attn_backend(name, self.device, self.dtype, T, None if needs_mask else shape,
                                         config['dropout'])

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


