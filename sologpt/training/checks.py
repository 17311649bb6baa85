"""
Checks of a run's config before anything is built: ranges, choices, and pairs of keys that do not work together.

Each table is read from top to bottom; the first row that is violated ends the run with its message.
"""

from types import SimpleNamespace

from configurator import InputError
from sologpt.adapters.methods import METHODS
from sologpt.machine.devices import find_device
from sologpt.machine.processes import find_processes
from sologpt.matmuls.spec import parse_matmul
from sologpt.training.moments import MOMENTS
from sologpt.training.optimizers import parse_optimizer
from sologpt.training.pruning import parse_prune
from sologpt.training.schedules import parse_schedule
from sologpt.training.step import micro_batches, resolve_step

AT_LEAST = {
    'eval_interval': 1, 'eval_iters': 1, 'log_interval': 1, 'batch_size': 1, 'block_size': 1, 'max_iters': 1,
    'sample_tokens': 0, 'patience': 0, 'max_minutes': 0, 'train_minutes': 0, 'memory_limit': 0, 'learning_rate': 0,
    'embd_lr': 0, 'head_lr': 0, 'min_lr': 0, 'lr_decay_iters': 0, 'muon_lr': 0, 'muon_momentum': 0,
    'momentum_warmup': 0, 'weight_decay': 0, 'beta1': 0, 'beta2': 0, 'grad_clip': 0, 'warmup_iters': 0, 'adapter_r': 1,
    'loraplus_lr_ratio': 0, 'total_batch_size': 1, 'gradient_accumulation_steps': 1, 'seed': 0}
BELOW = {'beta1': 1, 'beta2': 1, 'muon_momentum': 1, 'seed': 2 ** 31}
CHOICES = {
    'weights_dtype': ('float32', 'bfloat16'), 'sharding': ('', 'fsdp'), 'base_format': ('float32', 'bfloat16', 'nf4'),
    'checkpoint_activations': (False, True, 'selective'), 'optimizer_state': tuple(MOMENTS),
    'accumulate': ('reduced', 'float32', 'float16'), 'compile': ('auto', True, False, 'cuda_graphs')}

# Rows of (test, message). The test gets c: the config's keys, and what check() adds to them. If it is true, the message
# is the error, with c's values filled in.
CONFLICTS = [
    (lambda c: c.prune and c.train_minutes,
     'prune follows max_iters, which train_minutes may not reach: give --train_minutes=0'),
    (lambda c: c.base and not (c.resuming and c.has_adapter),
     'base={base} says where the base of a resumed adapter is; otherwise init_from does'),
    (lambda c: c.memory_limit and c.device_type != 'cuda',
     'memory_limit={memory_limit} is for a GPU, not for {device_type}: leave it out'),
    (lambda c: c.compile == 'cuda_graphs' and (c.torchrun or c.batch_size == 'auto' or c.device_type != 'cuda'),
     'compile=cuda_graphs is for one process on a GPU, with a batch_size that is given: leave it out'),
    (lambda c: c.deterministic and c.device_type == 'mps', 'deterministic=True is for CUDA and CPUs: leave it out'),
    (lambda c: c.deterministic and c.train_minutes,
     'deterministic=True with train_minutes={train_minutes}: a clock is never the same; give --train_minutes=0'),
    (lambda c: c.deterministic and c.batch_size == 'auto',
     'deterministic=True with batch_size=auto, which is chosen by time: give a number'),
    (lambda c: c.deterministic and c.device_type == 'cuda' and c.torchrun,
     'deterministic=True is for one GPU: the order in which several add up is not fixed; leave it out'),
    (lambda c: c.deterministic and c.attn_backend == 'cudnn',
     "deterministic=True with attn_backend=cudnn, whose backward is not: use auto"),
    (lambda c: c.batch_size == 'auto' and c.total_batch_size is None,
     'batch_size=auto keeps the tokens of a step: give total_batch_size, not gradient_accumulation_steps'),
]
WITHOUT_ADAPTER = [
    (lambda c: c.base_format != 'float32', 'base_format={base_format} is for the base of an adapter: set adapter'),
]
WITH_ADAPTER = [
    (lambda c: c.init_from == 'scratch',
     "init_from='scratch': an adapter needs a base; set init_from to a trained model"),
    (lambda c: c.optimizer.startswith('muon'),
     "optimizer='{optimizer}' is for the matrices of a base: use adamw with an adapter"),
    (lambda c: c.prune, 'prune={prune}: with an adapter the weights are frozen; prune the base when it is trained'),
    (lambda c: c.checkpoint_activations == 'selective',
     "checkpoint_activations='selective': adapters change in place what it would keep; use True"),
    (lambda c: c.weights_dtype != 'float32',
     'weights_dtype={weights_dtype}: an adapter is in float32; use base_format'),
    (lambda c: c.recipe and c.recipe.latent,
     'matmul={matmul} rounds the weights in its forward, but with an adapter they stay as they are'),
    (lambda c: c.matmul and c.base_format == 'nf4',
     'matmul={matmul} with base_format=nf4, whose products are in dtype: leave one of them out'),
    (lambda c: c.document_mask and c.method and c.method.adds_tokens,
     'document_mask would need the virtual tokens of {adapter} before each document: leave it out, or use another '
     'adapter'),
]
WITH_SHARDING = [
    (lambda c: not c.torchrun, 'is for several processes: start train.py by torchrun --standalone --nproc_per_node=2 '
                               'train.py ..., or leave it out'),
    (lambda c: c.device_type not in ('cuda', 'cpu'),
     'is for GPUs of CUDA, and CPUs: leave it out on {device_type}'),
    (lambda c: c.optimizer_state != 'float32',
     'with optimizer_state={optimizer_state}: the shares of moments are in float32; give --optimizer_state=float32'),
    (lambda c: c.batch_size == 'auto', 'with batch_size=auto: a size is tried by one process alone; give a number'),
    (lambda c: c.weights_dtype != 'float32',
     'with weights_dtype={weights_dtype}: the shares are in float32, and gathered in dtype; leave weights_dtype out'),
    (lambda c: c.prune,
     'with prune={prune}: the smallest weights of a matrix are found where it is whole; leave it out'),
    (lambda c: c.has_adapter and c.base_format == 'nf4',
     'with base_format=nf4: a base in 4 bits would be whole in every process; use base_format=bfloat16, or leave '
     'sharding out'),
    (lambda c: c.method and c.method.begins_from_text,
     'with adapter={adapter}, which begins as what the whole model makes of a text; use another adapter, or leave '
     'sharding out'),
]
# The same, after the dtype of the matmuls was found: c has found_dtype and dtype_reason
WITH_DTYPE = [
    (lambda c: c.weights_dtype not in ('float32', c.found_dtype),
     'weights_dtype={weights_dtype} needs matmuls in it, but dtype is {found_dtype} ({dtype_reason})'),
    (lambda c: c.base_format == 'bfloat16' != c.found_dtype,
     'base_format=bfloat16 needs matmuls in it, but dtype is {found_dtype} ({dtype_reason})'),
]


def check(config: dict) -> None:
    """Raises InputError for a config that cannot run here."""
    _check_ranges(config)
    torchrun, _, world_size = find_processes()
    spec = parse_matmul(config['matmul'])
    has_adapter = bool(config['adapter'] or config['adapter_from'])
    c = SimpleNamespace(**config, recipe=spec and spec.recipe, has_adapter=has_adapter,
                        method=METHODS.get(config['adapter']),
                        resuming=config['init_from'] == 'resume', torchrun=torchrun,
                        device_type=find_device(config['device']).type)
    _refuse(CONFLICTS, c)
    _refuse(WITH_ADAPTER if has_adapter else WITHOUT_ADAPTER, c)
    if config['sharding']:
        _refuse(WITH_SHARDING, c, f'sharding={config["sharding"]} ')
    if config['batch_size'] == 'auto':
        micro_batches(config, world_size)
    else:
        resolve_step(config, world_size)


def check_dtype(config: dict, dtype: str, reason: str) -> None:
    """Raises InputError if weights are to be held in another format than `dtype`, in which matmuls will run."""
    _refuse(WITH_DTYPE, SimpleNamespace(**config, found_dtype=dtype, dtype_reason=reason))


def _check_ranges(config):
    if isinstance(config['batch_size'], str) and config['batch_size'] != 'auto':
        raise InputError(f'batch_size={config["batch_size"]!r} must be a number, or auto')
    for key, least in AT_LEAST.items():
        if config[key] not in (None, 'auto') and config[key] < least:
            raise InputError(f'{key}={config[key]} must be at least {least}')
    for key, limit in BELOW.items():
        if config[key] >= limit:
            raise InputError(f'{key}={config[key]} must be below {limit}')
    for key, known in CHOICES.items():
        if config[key] not in known:
            names = ' or '.join(str(k) for k in known if k != '')
            raise InputError(f'{key}={config[key]!r} is not known: use {names}')
    parse_optimizer(config['optimizer'])
    parse_schedule(config['schedule'])
    parse_prune(config['prune'])
    if config['peak_flops'] is not None and config['peak_flops'] <= 0:
        raise InputError(f'peak_flops={config["peak_flops"]} must be above 0')


def _refuse(conflicts, c, prefix=''):
    for refused, why in conflicts:
        if refused(c):
            raise InputError(prefix + why.format_map(vars(c)))
