"""
The GPU memory that a training run will take, and the largest micro-batch that fits in --memory GB. It is foreseen
without a GPU and without the weights, for three ways to train: all weights as the config has it, LoRA, and QLoRA.
init_from may also be a folder with nothing but a config.json, or a model in LLAMA_SIZES, with its owner or without.

--check=True also runs the step on this machine's device, and says what it took.
"""

import itertools
import os
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.adapters.adapter import Adapter, model_class
from sologpt.adapters.config import AdapterConfig
from sologpt.bench import process
from sologpt.bench.sweep import tokens_of_step
from sologpt.files.checkpoint import find_checkpoint
from sologpt.files.hf_models import read_hf_config
from sologpt.files.models import read_model
from sologpt.machine import devices
from sologpt.tokens import data_folder
from sologpt.training import schedules
from sologpt.training.build import forecast_of, new_model_config, prepare_model, with_loss_chunk
from sologpt.training.forecast import SLACK, Forecast
from sologpt.training.liveness import nbytes
from sologpt.training.loss import TrainingLoss
from sologpt.training.micro_batch import divisors
from sologpt.training.optimizers import build_optimizer

GPT2_SIZES = {  # of OpenAI's GPT-2: n_layer, n_head, n_embd
    'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280), 'gpt2-xl': (48, 25, 1600)}


def _llama(n_layer, n_head, n_kv_head, n_embd, n_inner, vocab_size, block_size, **parts):
    return dict(arch='llama', n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, n_inner=n_inner,
                vocab_size=vocab_size, block_size=block_size, **{'tied': True, **parts})


QWEN3 = dict(head_dim=128, qk_norm='gain')
LLAMA_SIZES = {  # by the name of the repository, without its owner
    'SmolLM2-135M': _llama(30, 9, 3, 576, 1536, 49152, 8192),
    'SmolLM2-360M': _llama(32, 15, 5, 960, 2560, 49152, 8192),
    'SmolLM2-1.7B': _llama(24, 32, 32, 2048, 8192, 49152, 8192),
    'TinyLlama-1.1B': _llama(22, 32, 4, 2048, 5632, 32000, 2048, tied=False),
    'Llama-3.2-1B': _llama(16, 32, 8, 2048, 8192, 128256, 131072),
    'Llama-3.2-3B': _llama(28, 24, 8, 3072, 8192, 128256, 131072),
    'Qwen2.5-3B': _llama(36, 16, 2, 2048, 11008, 151936, 32768, bias='qkv'),
    'Qwen3-0.6B': _llama(28, 16, 8, 1024, 3072, 151936, 40960, **QWEN3),
    'Qwen3-1.7B': _llama(28, 16, 8, 2048, 6144, 151936, 40960, **QWEN3)}
COLUMNS = {'weights': 8, 'gradients': 9, 'optimizer': 9, 'activations': 11, 'logits, rest': 12, 'peak': 7}  # widths
LORA = {'adapter': 'lora', 'weights_dtype': 'float32', 'optimizer': 'adamw', 'matmul': ''}
RATES = {'learning_rate': 0.0, 'muon_lr': 0.0, 'embd_lr': None, 'head_lr': None, 'weight_decay': 0.0}
ROWS = {'full': {'adapter': ''}, 'LoRA': LORA | {'base_format': 'float32'}, 'QLoRA': LORA | {'base_format': 'nf4'}}


def measure(config: dict, train_args: list[str], picture: str) -> dict:
    """The figures of each row: the largest micro-batch that fits, and the memory of steps, in GB. Raises InputError."""
    if config['memory'] <= 0:
        raise InputError(f'memory={config["memory"]:g} must be above 0: the GB of a GPU, such as 12')
    options, given = process.resolve_train(train_args)
    device = None  # the plan's: a GPU
    if config['check']:
        device = devices.find_device(options['device'])
        devices.prepare_device(device)
    options['dtype'] = 'bfloat16' if options['dtype'] == 'auto' else options['dtype']
    if options['compile'] == 'auto':
        options['compile'] = not device or device.type == 'cuda'
    shape = with_loss_chunk(model_config(options), 1e9 * config['memory'])
    options['block_size'] = min(options['block_size'], shape.block_size)
    sequences = _sequences(options, given)
    print(f'{shape.n_layer} layers x {shape.n_embd}, {shape.vocab_size:,} ids, T={options["block_size"]}, '
          f'{options["dtype"]}, {"compiled" if options["compile"] else "eager"}; GB\n{"":10} {"batch_size":>10} ' +
          ' '.join(f'{name:>{width}}' for name, width in COLUMNS.items()))
    own = {options['adapter']: {}} if options['adapter'] not in ('', 'lora') else {}
    figures = {}
    for name, changes in (own | ROWS).items():
        figures[name] = _plan_row(options | changes, shape, device, sequences, config['memory'])
        _show(name, figures[name], sequences, config['memory'])
    print(f'(a step fits if {SLACK:g} times its peak does: the allocator loses some between its blocks)')
    return {'memory': config['memory'], 'model': {'n_layer': shape.n_layer, 'n_embd': shape.n_embd,
                                                  'vocab_size': shape.vocab_size}, 'rows': figures}


def _plan_row(options, shape, device, sequences, memory):
    """The largest micro-batch that fits in `memory` GB, and the steps of the one that is asked for and of that one."""
    foreseen = forecast(options, shape, device)
    largest = max(foreseen.fitting(1e9 * memory, divisors(sequences)), default=None)
    asked = options['batch_size'] if options['batch_size'] != 'auto' else largest or 1
    steps = [_step_figures(foreseen.at(size)) for size in dict.fromkeys((asked, largest or 1))]
    if device:
        steps[0]['measured'] = measured(options, shape, device, asked) / 1e9
    return {'largest': largest, 'steps': steps}


def _step_figures(step):
    return {'batch_size': step.batch_size} | {
        column: getattr(step, 'temporary' if column == 'logits, rest' else column) / 1e9 for column in COLUMNS}


def _show(name, row, sequences, memory):
    for step in row['steps']:
        print(f'{name:10} {step["batch_size"]:>10} ' +
              ' '.join(f'{step[column]:>{width}.2f}' for column, width in COLUMNS.items()) +
              (f'; measured: {step["measured"]:.2f}' if 'measured' in step else ''))
    largest = row['largest']
    if not largest:
        advice = (f'a single sequence does not fit in {memory:g} GB: try --checkpoint_activations=True or '
                  f'--optimizer_state=8bit')
    elif largest == sequences:
        advice = f'the whole step fits in {memory:g} GB: --batch_size={largest}'
    else:
        advice = (f'the largest that fits in {memory:g} GB: --batch_size={largest} '
                  f'--gradient_accumulation_steps={sequences // largest}')
    print(f'{"":10} {advice}', flush=True)


def _sequences(options, given):
    """In a step. Raises InputError."""
    tokens, block_size = tokens_of_step(options, given)
    sequences, rest = divmod(tokens, block_size)
    if rest:
        raise InputError(f'total_batch_size={tokens} is not made of sequences of block_size={block_size} tokens')
    return sequences


def model_config(options: dict) -> GPTConfig:
    """The GPTConfig of the model that train.py would build of these keys. Raises InputError."""
    source = options['init_from']
    name = source.rsplit('/', 1)[-1]
    if name in LLAMA_SIZES and not os.path.isdir(source):
        return GPTConfig(**LLAMA_SIZES[name])
    if source == 'scratch' or source in GPT2_SIZES:
        folder, meta = os.path.join('data', options['dataset'] or 'openwebtext'), data_folder.ASSUMED_META
        if data_folder.token_files(folder, 'train'):
            meta = data_folder.read_meta(folder)
        elif source == 'scratch':
            print(f"there are no token files in {folder}: taken to be of GPT-2's vocabulary")
        if source in GPT2_SIZES:
            options = options | dict(zip(('n_layer', 'n_head', 'n_embd'), GPT2_SIZES[source], strict=True), arch='gpt2')
            meta = data_folder.ASSUMED_META
        return new_model_config(options, meta['vocab_size'])
    if os.path.isfile(os.path.join(source, 'config.json')) and not find_checkpoint(source):
        return GPTConfig(**read_hf_config(source))
    model_args, _, _ = read_model(options['out_dir'] if source == 'resume' else source)
    return GPTConfig.from_saved(model_args)


def build(options: dict, shape: GPTConfig, device: torch.device) -> GPT:
    """The model that train.py makes of these keys for `device`, with new weights."""
    again = options['checkpoint_activations']  # 'selective' is not for adapters
    shape = replace(shape, dropout=options['dropout'], document_eot=0 if options['document_mask'] else None,
                    checkpoint_activations=bool(again) if options['adapter'] else again)
    adapter = Adapter(AdapterConfig.from_keys(options), {}) if options['adapter'] else None
    model = model_class(adapter and adapter.config)(shape).train()
    prepare_model(model, options, adapter, options['dtype'], device)
    return model


def forecast(options: dict, shape: GPTConfig, device: torch.device | None = None) -> Forecast:
    """The Forecast of train.py with these keys, on `device`; None means a GPU."""
    # a recipe asks a GPU what it has; a CPU's emulation takes as much memory
    stand_in = torch.device('cpu' if options['matmul'] else 'cuda')
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(options, shape, device or stand_in)
    gpu = device is None or device.type == 'cuda'
    return forecast_of(model, options | RATES, options['dtype'], bool(options['compile']), gpu)


def measured(options: dict, shape: GPTConfig, device: torch.device, batch_size: int) -> int:
    """The most bytes that torch's allocator holds in a step of two such micro-batches, after a first step."""
    model = build(options, shape, device).to(device)
    optimizer = build_optimizer(model, options | RATES, options['dtype'])
    return measured_step(model, optimizer, batch_size, options['block_size'], options['dtype'],
                         bool(options['compile']))


def measured_step(model: GPT, optimizer: torch.optim.Optimizer, batch_size: int, block_size: int, dtype: str,
                  compile: bool = False) -> int:
    """measured(), of a model and its optimizer."""
    loss_of = TrainingLoss(model, compile)
    device = next(model.parameters()).device
    schedules.set_rates(optimizer, 0, 0.0)
    ids = torch.randint(model.config.vocab_size, (batch_size, block_size), device=device)

    def step(micro_steps):
        for _ in range(micro_steps):
            with devices.autocast(device, dtype):
                loss = loss_of(ids, ids)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    step(1)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        step(2)
        return torch.cuda.max_memory_allocated(device)
    held = nbytes([ids, *model.parameters(), *model.buffers(),
                   *(t for state in optimizer.state.values() for t in state.values())])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(2)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return held + max(itertools.accumulate(event.nbytes() for event in events if event.name() == '[memory]'))
