"""
Going on with an earlier run: which of its keys a resumed run takes over, and which it does not.

A resumed run computes what the earlier one would have computed, so it takes over every key that was not given now. But
a checkpoint may come from anywhere: it never chooses what is executed, what is logged to an account, or how a machine
is used. Those keys are in NOT_INHERITED. The others are numbers, names of parts and recipes, which are checked like a
user's, and `dataset`, which may only be the name of a folder in data/.
"""

import os
from dataclasses import dataclass, field

from configurator import InputError, inherit
from model import ARCHITECTURES, GPTConfig
from sologpt.files import checkpoint

PARTS = (*ARCHITECTURES['gpt2'], 'n_kv_head', 'head_dim', 'n_inner', 'rope_base', 'smear')
# what the weights' shapes and meaning follow from
ARCHITECTURE = ('arch', 'n_layer', 'n_head', 'n_embd', 'block_size', *PARTS)
ADAPTER = ('adapter', 'adapter_from', 'adapter_r', 'adapter_targets', 'lora_alpha', 'use_rslora', 'base_format')
NOT_INHERITED = (
    'out_dir', 'init_from', 'eval_only', 'max_minutes', 'base',  # of this call
    'prepare_data',  # it runs a script
    'wandb_log', 'wandb_project', 'wandb_run_name',  # they concern an account
    'device', 'dtype', 'attn_backend', 'compile', 'memory_limit', 'backend', 'sharding', 'peak_flops')  # this machine's


@dataclass
class Resumed:
    """The checkpoint that a run goes on from."""
    path: str = ''
    saved: dict = field(default_factory=dict)  # its content; {} for a new run

    def __bool__(self):
        return bool(self.saved)

    def get(self, key: str, default=None):
        return self.saved.get(key, default)


def resume(namespace: dict, config: dict, given: list[str]) -> Resumed:
    """
    The checkpoint to go on from if init_from='resume', otherwise an empty Resumed.

    Completes `config`, and with it `namespace`, a script's globals(): the keys of the earlier run that were not given
    now; and the later of total_batch_size and gradient_accumulation_steps, if both were given. Raises InputError.
    """
    run = Resumed()
    if config['init_from'] == 'resume':
        path = os.path.join(config['out_dir'], 'ckpt.pt')
        # if each process reads only its share of the weights, they stay in the file until then
        run = Resumed(path, checkpoint.read_checkpoint(path, mmap=config['sharding'] != ''))
        _take_over(namespace, config, given, run)
        _check_something_is_left(config, run)
    if overruled := overruled_key(config, given):
        config[overruled] = namespace[overruled] = None
    return run


def overruled_key(config: dict, given: list[str]) -> str | None:
    """
    The key that does not count if both total_batch_size and gradient_accumulation_steps are set: the one that was set
    earlier. given: the keys that were set, in order.
    """
    sizes = ('total_batch_size', 'gradient_accumulation_steps')
    if None in (config[key] for key in sizes):
        return None
    latest = next((key for key in reversed(given) if key in sizes), sizes[0])
    return sizes[1 - sizes.index(latest)]


def _take_over(namespace, config, given, run):
    model_config = GPTConfig.from_saved(run.saved['model_args'])
    saved = run.get('config', {}) | {key: getattr(model_config, key) for key in ARCHITECTURE}
    if 'block_size' in run.get('config', {}):  # sequences may be shorter than those that the model can take in
        saved['block_size'] = run.saved['config']['block_size']
    for key in (*ARCHITECTURE, *ADAPTER):
        if key in given and config[key] not in (saved.get(key, ''), None):
            raise InputError(f'{run.path} has {key}={saved.get(key, "")}, but this run asks for {config[key]}: leave '
                             f'{key} out, or begin a new run in another out_dir')
    dataset = saved.get('dataset')
    is_path = isinstance(dataset, str) and (dataset in ('.', '..') or any(mark in dataset for mark in '/\\:'))
    if 'dataset' not in given and is_path:
        raise InputError(f'{run.path} names the dataset {dataset!r}, a path: a checkpoint may only name a folder in '
                         f'data/. If you trust it, give --dataset={dataset}')
    inherit(namespace, config, given, saved, run.path, except_keys=NOT_INHERITED)


def _check_something_is_left(config, run):
    minutes, max_iters = config['train_minutes'], config['max_iters']
    if config['eval_only']:
        return
    if minutes and run.get('train_seconds', 0.0) >= 60 * minutes:
        raise InputError(f'{run.path} has trained its train_minutes={minutes}: give more, or --train_minutes=0 for '
                         f'all of max_iters={max_iters}')
    if run.saved['iter_num'] >= max_iters:
        raise InputError(f'{run.path} is at iter {run.saved["iter_num"]} of max_iters={max_iters}: nothing left to do')
