"""
What a training run will take of a GPU's memory, foreseen by memory.py without one and without the weights: all of the
model trained, as the config has it; LoRA, and QLoRA, on it. And the largest micro-batch that fits in --memory GB.
--check=True runs the step as well, on the device there is, and says what it took.
"""

import functools
import itertools
import os

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from configurator import InputError, resolve
from model import ARCHITECTURES, GPT, GPTConfig
from sologpt.adapters.adapter_files import from_keys
from sologpt.adapters.adapters import attach, low_rank_Bs
from sologpt.bench import process
from sologpt.files.models import read_model
from sologpt.machine import devices
from sologpt.matmuls.held import hold_base, hold_in_bfloat16, hold_linears_in
from sologpt.matmuls.recipe_linear import convert
from sologpt.matmuls.recompute import RECOMPUTE
from sologpt.tokens import data_folder
from sologpt.training import optimizers, schedules
from sologpt.training.build import table_rows
from sologpt.training.forecast import SLACK, Forecast, divisors, nbytes
from sologpt.training.loss import TrainingLoss

SIZES = {  # of OpenAI's GPT-2: n_layer, n_head, n_embd
    'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280), 'gpt2-xl': (48, 25, 1600)}
COLUMNS = {'weights': 8, 'gradients': 9, 'optimizer': 9, 'activations': 11, 'logits, rest': 12, 'peak': 7}  # widths
LORA = {'adapter': 'lora', 'weights_dtype': 'float32', 'optimizer': 'adamw', 'matmul': ''}
ROWS = {'full': {'adapter': ''}, 'LoRA': LORA | {'base_format': 'float32'}, 'QLoRA': LORA | {'base_format': 'nf4'}}


def measure(config, train_args, picture):
    """The figures as plain values. Raises InputError."""
    if config['memory'] <= 0:
        raise InputError(f'memory={config["memory"]:g} must be above 0: the GB of a GPU, such as 12')
    options, given = resolve(os.path.join(process.ROOT, 'train.py'), train_args)
    order = [key for key in given if key in ('total_batch_size', 'gradient_accumulation_steps')]
    if order[-1:] == ['gradient_accumulation_steps']:  # as in train.py the one that was set last rules
        options['total_batch_size'] = None
    options['dtype'] = 'bfloat16' if options['dtype'] == 'auto' else options['dtype']
    device = None  # the plan's: a GPU
    if config['check']:
        device = devices.find_device(options['device'])
        devices.prepare(device)
    if options['compile'] == 'auto':
        options['compile'] = not device or device.type == 'cuda'
    shape = model_config(options)
    options['block_size'] = min(options['block_size'], shape.block_size)
    limit, sequences = 1e9 * config['memory'], _sequences(options)
    print(f'{shape.n_layer} layers x {shape.n_embd}, {shape.vocab_size:,} ids, T={options["block_size"]}, '
          f'{options["dtype"]}, {"compiled" if options["compile"] else "eager"}; GB\n{"":10} {"batch_size":>10} ' +
          ' '.join(f'{name:>{width}}' for name, width in COLUMNS.items()))
    rows = {options['adapter']: {}} if options['adapter'] not in ('', 'lora') else {}
    figures = {}
    for name, changes in (rows | ROWS).items():
        foreseen = forecast(options | changes, shape, device)
        largest = max(foreseen.fitting(limit, divisors(sequences)), default=None)
        asked = options['batch_size'] if options['batch_size'] != 'auto' else largest or 1
        steps = [_row(foreseen.at(size)) for size in dict.fromkeys((asked, largest or 1))]
        if device:
            steps[0]['measured'] = measured(options | changes, shape, device, asked) / 1e9
        figures[name] = {'largest': largest, 'steps': steps}
        for row in steps:
            print(f'{name:10} {row["batch_size"]:>10} ' + ' '.join(
                f'{row[column]:>{width}.2f}' for column, width in COLUMNS.items())
                + (f'; measured: {row["measured"]:.2f}' if 'measured' in row else ''))
        print(f'{"":10} ' + (
            f'the whole step fits in {config["memory"]:g} GB: --batch_size={largest}' if largest == sequences else
            f'the largest that fits in {config["memory"]:g} GB: --batch_size={largest} '
            f'--gradient_accumulation_steps={sequences // largest}' if largest else
            f'a single sequence does not fit in {config["memory"]:g} GB: try --checkpoint_activations=True or '
            f'--optimizer_state=8bit'), flush=True)
    print(f'(a step fits if {SLACK:g} times its peak does: the allocator loses some between its blocks)')
    return {'memory': config['memory'], 'model': {'n_layer': shape.n_layer, 'n_embd': shape.n_embd,
                                                  'vocab_size': shape.vocab_size}, 'rows': figures}


def _row(step):
    return {'batch_size': step.batch_size} | {
        column: getattr(step, 'temporary' if column == 'logits, rest' else column) / 1e9 for column in COLUMNS}


def _sequences(options):
    """In a step."""
    if options['total_batch_size']:
        sequences, rest = divmod(options['total_batch_size'], options['block_size'])
        if rest:
            raise InputError(f'total_batch_size={options["total_batch_size"]} is not made of sequences of block_size='
                             f'{options["block_size"]} tokens')
        return sequences
    if options['batch_size'] == 'auto':
        raise InputError('batch_size=auto needs total_batch_size, the tokens in a step')
    return options['batch_size'] * (options['gradient_accumulation_steps'] or 40)


def model_config(options):
    """Of the model that train.py would build of these options. Raises InputError."""
    source = options['init_from']
    if source == 'scratch' or source in SIZES:
        folder, meta = os.path.join('data', options['dataset'] or 'openwebtext'), data_folder.ASSUMED_META
        if data_folder.paths_of(folder, 'train'):
            meta = data_folder.read_meta(folder)
        elif source == 'scratch':
            print(f"there are no token files in {folder}: taken to be of GPT-2's vocabulary")
        keys = {key: options[key] for key in ('arch', 'n_layer', 'n_head', 'n_embd', 'block_size', 'dropout', 'smear',
                                              *ARCHITECTURES['gpt2'])}
        if source in SIZES:
            keys = dict(zip(('n_layer', 'n_head', 'n_embd'), SIZES[source], strict=True), arch='gpt2')
            meta = data_folder.ASSUMED_META
        return GPTConfig(**keys, vocab_size=table_rows(meta['vocab_size'], keys['arch']))
    model_args, _, _ = read_model(options['out_dir'] if source == 'resume' else source)
    return GPTConfig.from_saved(model_args, dropout=options['dropout'])


def build(options, shape):
    """The model that train.py makes of these options, with weights as they begin."""
    model = GPT(shape).train()
    if options['adapter']:
        hold_base(model, options['base_format'], options['dtype'])
        if options['base_format'] == 'float32' and not options['matmul']:
            hold_linears_in(model, options['dtype'])
        attach(model, from_keys(options))
    if options['checkpoint_activations']:  # 'selective' is not for adapters
        for block in model.transformer.h:
            block.recompute = RECOMPUTE[bool(options['adapter']) or options['checkpoint_activations']]
    if options['document_mask']:
        model.config.document_eot = 0
    if options['weights_dtype'] == 'bfloat16':
        hold_in_bfloat16(model)
    return model


def make_optimizer(options, model):
    betas, keep = (options['beta1'], options['beta2']), options['optimizer_state']
    if options['optimizer'] == 'muon':
        return optimizers.muon(model, 0.0, 0.0, betas, 0.0, iterations=options['muon_iterations'], keep=keep,
                          dtype=torch.bfloat16 if options['dtype'] == 'bfloat16' else torch.float32)
    return optimizers.adamw(model, 0.0, 0.0, betas, low_rank_Bs(model), options['loraplus_lr_ratio'], keep)


def forecast(options, shape, device=None):
    """A Forecast of these options of train.py, on a GPU or on `device`."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(options, shape)
    if options['matmul']:
        convert(model, options['matmul'], options['dtype'], options['block_size'], options['matmul_keep_last'],
                gemms=options['matmul_gemms'])
    return Forecast(model, functools.partial(make_optimizer, options), options['block_size'], options['dtype'],
                    options['compile'], offloaded=options['optimizer_state'] == 'cpu',
                    gpu=device is None or device.type == 'cuda')


def measured(options, shape, device, batch_size):
    """The most bytes that torch's allocator holds in a step of two such micro-batches, which another has prepared."""
    model = build(options, shape).to(device)
    if options['matmul']:
        convert(model, options['matmul'], options['dtype'], options['block_size'], options['matmul_keep_last'],
                gemms=options['matmul_gemms'])
    return measured_step(model, make_optimizer(options, model), batch_size, options['block_size'], options['dtype'],
                         options['compile'])


def measured_step(model, optimizer, batch_size, block_size, dtype, compile=False):
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
