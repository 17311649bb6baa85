"""The header of a run: the facts that stay the same, for the console and for the first record of log.jsonl."""

import torch
import torch.nn as nn

from sologpt.machine import devices
from sologpt.matmuls.recipe_linear import relative_time
from sologpt.matmuls.spec import parse_matmul
from sologpt.training.build import Built
from sologpt.training.data import Data
from sologpt.training.machine import Machine
from sologpt.training.muon import Muon
from sologpt.training.optimizers import weight_decay_of
from sologpt.training.report import Header
from sologpt.training.schedules import Schedule
from sologpt.training.step import Step


def make_header(built: Built, data: Data, machine: Machine, step: Step, schedule: Schedule,
                optimizer: torch.optim.Optimizer) -> Header:
    """The Header of a run, which has been built."""
    config, model = built.config, built.model
    flops_per_token = model.flops_per_token(config['block_size'])
    peak, peak_source = machine.peak, machine.peak_source
    if config['matmul']:
        peak_source += f"; {machine.dtype}'s, whatever {config['matmul']} could reach"
    resolved = config | {
        'batch_size': step.batch_size, 'gradient_accumulation_steps': step.gradient_accumulation_steps,
        'lr_decay_iters': schedule.decay_iters, 'min_lr': schedule.min_lr, 'weight_decay': weight_decay_of(config),
        'dtype': machine.dtype, 'attn_backend': machine.attn_backend,
        'compile': 'cuda_graphs' if machine.cuda_graphs else machine.compile,
        'backend': machine.backend if machine.torchrun else None}
    record = {
        'device': devices.device_name(machine.device), 'dtype': machine.dtype, 'torch': torch.__version__,
        'parameters': built.n_params, 'trained': built.n_trained, 'training_bytes': training_bytes(model),
        'flops_per_token': flops_per_token, 'peak_flops': peak, 'peak_source': peak_source,
        'tokens_per_iter': step.tokens, 'processes': machine.world_size, 'batch_size': step.batch_size,
        'block_size': step.block_size, 'gradient_accumulation_steps': step.gradient_accumulation_steps,
        'matmul': _matmul_words(built, machine, step), 'data': {
            'name': data.name, 'source': data.meta.get('source', ''), 'train_tokens': data.train.n_tokens,
            'val_tokens': data.val.n_tokens, 'vocab_size': data.n_ids,
            'bytes_per_token': data.bytes_per_token()}}
    return Header(resolved, record, _lines(config, record, built, data, machine, step, optimizer))


def _matmul_words(built, machine, step):
    """What computes the matmuls of the blocks, and what it gains, because low precision is not faster everywhere."""
    spec, width = parse_matmul(built.config['matmul']), built.model.config.n_embd
    words = built.matmul_how
    if spec and machine.master and not built.config['eval_only']:
        rows = step.batch_size * step.block_size
        gain = relative_time(spec, machine.device, machine.dtype, rows, width, 4 * width, machine.compile)
        words += f'; a Linear takes {gain:.2f} x its time in {machine.dtype}, forward and backward'
    if spec and spec.until < 1:
        words += f'; in {machine.dtype} from {spec.until:.0%} of the run on'
    return words


def _lines(config, record, built, data, machine, step, optimizer):
    epochs = config['max_iters'] * step.tokens / step.block_size / data.train.n_windows
    lines = [
        f'device: {record["device"]}; torch {record["torch"]}; {machine.dtype} ({machine.dtype_reason}); attention '
        f'{machine.attn_backend}{", within documents" if config["document_mask"] else ""} ({machine.attn_reason}); '
        f'{"compiled (takes a minute)" if machine.compile else f"eager ({machine.compile_reason})"}',
        f'matmuls of the blocks: {record["matmul"]}']
    if built.adapter:
        lines.append(
            f'adapter: {config["adapter"]}, {built.n_trained / built.n_params:.2%} of the parameters, on a base in '
            f"{config['base_format']}; weights, gradients and AdamW's moments take "
            f'{record["training_bytes"] / 1e6:,.1f} MB, in full finetuning {built.full_bytes / 1e6:,.1f}')
    if config['sharding']:
        share = sum(p.to_local().numel() for p in built.model.parameters()) / built.model.n_params()
        lines.append(f'sharding: {config["sharding"]}, here {share:.1%} of the weights, their gradients and moments')
    muon_adds = ''
    if isinstance(optimizer, Muon):
        share = optimizer.flops() / (record['flops_per_token'] * step.tokens / machine.world_size)
        muon_adds = f'; Muon adds {100 * share:.1f} % per step'
    return lines + [
        f'peak for MFU: {record["peak_flops"] / 1e12:.4g} TFLOP/s ({record["peak_source"]})',
        f'data: {data.folder}, {data.train.n_tokens:,} + {data.val.n_tokens:,} tokens, vocabulary {data.n_ids}',
        f'model: {built.source}, {built.n_params:,} parameters, {built.n_trained:,} trained; '
        f'{record["flops_per_token"] / 1e6:.4g} MFLOPs per token{muon_adds}',
        f'tokens per iteration will be: {step.tokens:,} = {step.batch_size} sequences x {step.block_size} tokens x '
        f'{step.micro_steps} accumulated x {step.world_size} processes; {config["max_iters"]:,} iterations are '
        f'{epochs:.2f} epochs',
        *([f'batch_size: {step.reason}'] if step.reason else [])]


def training_bytes(model: nn.Module) -> int:
    """Bytes of weights, gradients and AdamW's moments: all that training holds, without activations."""
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return weights + sum(p.numel() * (p.element_size() + 8) for p in model.parameters() if p.requires_grad)
