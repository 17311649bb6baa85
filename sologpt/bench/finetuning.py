"""
A step of finetuning here, beside the same step in transformers with peft.

  python bench.py --suite=finetuning --init_from=FOLDER --dataset=NAME --batch_size=4 --block_size=512

Both sides have the same base, dtype (bfloat16), tokens, micro-batch, optimizer (AdamW) and clipping of gradients. The
low-rank adapters have the same rank on the same Linears. The learning rate is 0, which takes as long: so both sides
log the same losses, as far as bfloat16 allows.

Each measurement is a process of its own, and the rows take turns. Here that is train.py. There are several ways to use
the peer. Each is tried first, and the fastest is measured. The peer is not compiled; here `full` is. A side that fails
is recorded as failed.

Time is the median step without the first one, and then the median over the runs. Memory is the most that a process has
held: of a GPU, as torch's allocator has it; on a CPU all of it, without what the imports alone take.
"""

import importlib.metadata
import importlib.util
import json
import os
import statistics
from collections.abc import Callable

import torch

from configurator import InputError
from sologpt.bench import process
from sologpt.bench.rows import MEMORY_COLUMN, Column, Rows, choose_rows, print_rows, train_row
from sologpt.bench.timing import timed
from sologpt.machine import devices
from sologpt.tokens.loader import TrainBatches
from sologpt.training.data import open_data

RANK, ALPHA, TRIAL_STEPS = 16, 32.0, 2
ROWS = {  # name -> train.py's keys
    'lora': {'adapter': 'lora', 'base_format': 'bfloat16'},
    'qlora': {'adapter': 'lora', 'base_format': 'nf4'},
    'full': {'adapter': '', 'weights_dtype': 'float32', 'compile': True},
}
SAME = {'dtype': 'bfloat16', 'adapter_from': '', 'adapter_r': RANK, 'adapter_targets': None, 'lora_alpha': ALPHA,
        'learning_rate': 0, 'total_batch_size': None, 'gradient_accumulation_steps': 1, 'grad_clip': 1.0,
        'eval_iters': 1, 'log_interval': 1, 'always_save_checkpoint': False, 'wandb_log': False, 'peak_flops': 1e12}
PEERS = {  # name -> ways to do the same with the peer, as build_peer() takes them
    'lora': {'float32 adapter': {}, 'float32 adapter, autocast': {'autocast': True},
             'bfloat16 adapter': {'adapter_dtype': 'bfloat16'}},
    'qlora': {'bitsandbytes': {'nf4': True}},
    'full': {'bfloat16 weights': {'adapter': False},
             'float32 weights, autocast': {'adapter': False, 'weights_dtype': 'float32', 'autocast': True}},
}
PACKAGES = ('transformers', 'peft', 'bitsandbytes')


def measure(config: dict, train_args: list[str], picture: str) -> dict:
    """The figures of each row, here and there. Draws no picture. Raises InputError."""
    for package in PACKAGES[:2]:
        if not importlib.util.find_spec(package):
            raise InputError(f'this suite measures {package} too: pip install {" ".join(PACKAGES[:2])}')
    train_config, _ = process.resolve_train(train_args)
    if not os.path.exists(os.path.join(train_config['init_from'], 'config.json')):
        raise InputError(f'init_from={train_config["init_from"]!r}: give a folder with config.json and '
                         f'model.safetensors, which both sides can read')
    names, device = list(choose_rows(ROWS, config['recipes'], [])), devices.find_device(train_config['device'])
    ways = {name: choose_way(train_args, name) for name in names}
    sides = {(name, side): [] for name in names for side in ('here', 'peer')}
    imports = 0.0 if device.type == 'cuda' else process.run_python([process.TRAIN, '--help'])[2] / 1e9
    for number in range(1, config['runs'] + 1):
        for (name, side), runs in sides.items():
            runs.append(attempt(train_here, train_args, name, config['steps'], imports) if side == 'here' else
                        attempt(run_peer, train_args, PEERS[name][ways[name]['chosen']], config['steps']))
        print(f'run {number} of {config["runs"]}', flush=True)
    rows = {name: figures_of(sides[name, 'here'], sides[name, 'peer']) | {'peer_ways': ways[name]} for name in names}
    print()
    show(rows)
    versions = {package: importlib.metadata.version(package) for package in PACKAGES
                if importlib.util.find_spec(package)}
    return {'base': train_config['init_from'], 'batch_size': train_config['batch_size'],
            'block_size': train_config['block_size'], 'r': RANK, 'device': devices.device_name(device),
            'peer': versions, 'rows': rows}


def attempt(run: Callable[..., dict], *args) -> dict:
    """What run(*args) returns, or {'failed': reason}."""
    try:
        return run(*args)
    except InputError as e:
        return {'failed': str(e).splitlines()[0]}


def choose_way(train_args: list[str], name: str) -> dict:
    """Try each way to do a row with the peer: {'chosen': the fastest, 'tried': way -> figures}."""
    tried = {way: attempt(run_peer, train_args, how, TRIAL_STEPS) for way, how in PEERS[name].items()}
    return {'chosen': min(tried, key=lambda way: tried[way].get('ms_per_step', float('inf'))), 'tried': tried}


def figures_of(here: list[dict], peer: list[dict]) -> dict:
    """
    The figures of a row: those of both sides, and the ratios.

    speed_ratio: the median of the peer's time divided by that here, of runs that followed each other. memory_ratio: the
    memory here divided by the peer's.
    """
    row = {'here': _median(here), 'peer': _median(peer)}
    if not any('failed' in side for side in row.values()):
        row['speed_ratio'] = statistics.median(b['ms_per_step'] / a['ms_per_step']
                                               for a, b in zip(here, peer, strict=True))
        row['memory_ratio'] = row['here']['memory_gb'] / row['peer']['memory_gb']
    return row


def _median(runs):
    if failed := [run for run in runs if 'failed' in run]:
        return failed[0]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def show(rows: Rows) -> None:
    """Print a line for each side of each row, or why the side failed. The ratios stand in the lines of this project."""
    lines = {}
    for name, row in rows.items():
        lines[f'{name}, here'] = row['here'] | {key: row.get(key) for key in ('speed_ratio', 'memory_ratio')}
        lines[f'{name}, peer'] = row['peer'] | {'speed_ratio': None, 'memory_ratio': None}
    print_rows(lines, [Column('ms/step', '{ms_per_step:,.1f}'), _ratio('times as fast', 'speed_ratio'), MEMORY_COLUMN,
                       _ratio('of peer', 'memory_ratio'), Column('loss', '{loss:.4f}')])
    for name, row in rows.items():
        print(f'{name}, peer: {row["peer_ways"]["chosen"]}, the fastest of {", ".join(row["peer_ways"]["tried"])}')


def _ratio(title, key):
    return Column(title, lambda line: '' if line[key] is None else f'{line[key]:.2f}')


# ---- here ------------------------------------------------------------------------------------------------------------

def train_here(train_args: list[str], name: str, steps: int, imports: float = 0.0) -> dict:
    """ms_per_step, memory_gb beyond that of the imports, and the mean loss of a row here. Raises InputError."""
    run = train_row(name, train_args, SAME | ROWS[name] | {'max_iters': steps + 1, 'eval_interval': steps + 1})
    return {'ms_per_step': run.get('time_ms'), 'memory_gb': run.max_memory() - imports,
            'loss': statistics.mean(step['loss'] for step in run.steps)}


# ---- the peer, in a process of its own -------------------------------------------------------------------------------

def run_peer(train_args: list[str], how: dict, steps: int) -> dict:
    """The same figures of the peer as train_here() has of this project. Raises InputError."""
    printed, _, _ = process.run_python(['-c', f'import os\nfrom sologpt.bench import finetuning\n'
                                              f'os.chdir({os.getcwd()!r})\n'
                                              f'finetuning.train_peer({train_args!r}, {how!r}, {steps})'])
    return json.loads(printed.splitlines()[-1])


def train_peer(train_args: list[str], how: dict, steps: int) -> None:
    """
    Train the base of train.py's arguments with transformers and peft, and print the figures as JSON.

    Times `steps` steps after one that warms up. how: options of build_peer(), and autocast, which computes matmuls in
    bfloat16 whatever the weights are in. Raises InputError.
    """
    import peft  # noqa: F401
    import transformers
    transformers.logging.set_verbosity_error()
    config, _ = process.resolve_train(train_args)
    device, options = devices.find_device(config['device']), dict(how)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.pop('autocast', False))
    data = open_data(config, True, None)
    data.open_tokens(config['block_size'], data.meta['vocab_size'])
    batches = TrainBatches(data.train, config['batch_size'], 1, config['seed'])
    before = devices.peak_memory_gb(device)
    torch.manual_seed(config['seed'])
    model = build_peer(config['init_from'], device, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=device.type in ('cpu', 'cuda'))
    losses = []

    def step():
        ids, _ = batches.get(len(losses), 0, device)
        with autocast:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = [timed(step, device) for _ in range(steps + 1)]
    print(json.dumps({'ms_per_step': 1000 * statistics.median(seconds[1:]),
                      'memory_gb': devices.peak_memory_gb(device) - before, 'loss': statistics.mean(losses)}))


def build_peer(folder: str, device: torch.device, adapter: bool = True, weights_dtype: str = 'bfloat16',
               adapter_dtype: str = 'float32', nf4: bool = False) -> torch.nn.Module:
    """
    transformers' model of a folder, in training mode, by default with peft's LoRA on all Linears of the blocks.

    adapter: whether an adapter is trained instead of all weights. weights_dtype: of the model. adapter_dtype: of A and
    B; float32 is what peft makes of it by itself. nf4: the base is in bitsandbytes' NF4.
    """
    import peft
    import transformers
    quantized = {'quantization_config': transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.bfloat16)} if nf4 else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=devices.DTYPES[weights_dtype], attn_implementation='sdpa', device_map=device, **quantized)
    if adapter:
        settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules='all-linear', task_type='CAUSAL_LM')
        model = peft.get_peft_model(model, settings, autocast_adapter_dtype=adapter_dtype == 'float32')
    return model.train()
