"""What it costs to serve a batch in which each row has a low-rank adapter of its own, beside the base alone."""

import functools
import os
import statistics
import tempfile
import time
from dataclasses import replace

import torch

from model import GPT, GPTConfig
from sologpt.adapters.adapter import Adapter, attach, tensors_of
from sologpt.adapters.arithmetic import low_rank_matrices
from sologpt.adapters.bank import Bank
from sologpt.adapters.config import AdapterConfig
from sologpt.adapters.peft_files import WEIGHTS, read_adapter, write_adapter
from sologpt.bench.adapter_rows import RANK, find_machine
from sologpt.bench.timing import median_seconds_in_turn
from sologpt.inference.generation import stream
from sologpt.machine import choices, devices

BATCH, PROMPT = 8, 64  # rows that are served, and tokens of their prompts
DECODED, READ = 20, 10  # positions decoded, and prompts read: times are medians over them


def serving(train_args: list[str], shape: dict) -> dict:
    """Seconds of decoding, of reading prompts, and of loading and swapping an adapter. Raises InputError."""
    _, device, dtype = find_machine(train_args, shape['block_size'], shape['n_embd'])
    torch.manual_seed(0)
    base = GPT(GPTConfig(**shape)).eval().to(device)
    adapters, load_s, file_bytes = _load_adapters(base.config)
    figures = {'rows': BATCH, 'r': RANK, 'file_bytes': file_bytes, 'load_s': load_s, 'dtypes': {}}
    print(f'\nan adapter of rank {RANK}: {file_bytes / 1e6:.2f} MB, loaded in {1000 * load_s:.1f} ms\n'
          f'{BATCH} rows, ms {"":9} {"base":>9} {"adapters":>9} {"ratio":>6}')
    for name in dict.fromkeys((dtype, 'float32')):
        found = figures['dtypes'][name] = _serve(base, adapters, device, name)
        for what, row in found.items():
            if what != 'swap_s':
                print(f'{name:9} {what:10} {1000 * row["base_s"]:9.1f} {1000 * row["adapters_s"]:9.1f} '
                      f'{row["ratio"]:6.2f}')
        print(f'{name:9} an adapter swapped in {1000 * found["swap_s"]:.1f} ms', flush=True)
    return figures


def _load_adapters(model_config):
    """(low-rank matrices of BATCH random adapters, read from files; the median seconds of that; a file's bytes)."""
    settings, loaded, seconds = AdapterConfig('lora', r=RANK), [], []
    with torch.device('meta'):
        skeleton = GPT(model_config)
    attach(skeleton, settings)
    shapes = {name: tensor.shape for name, tensor in tensors_of(skeleton).items()}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(BATCH):
            tensors = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
            write_adapter(folder, Adapter(settings, tensors), model_config)
            start = time.perf_counter()
            loaded.append(low_rank_matrices(model_config, read_adapter(folder), folder))
            seconds.append(time.perf_counter() - start)
        return loaded, statistics.median(seconds), os.path.getsize(os.path.join(folder, WEIGHTS))


def _serve(base, adapters, device, dtype):
    attn_backend, _ = choices.find_attn_backend('auto', device, dtype, base.config.block_size)
    alone, with_bank = (_same_weights(base, attn_backend) for _ in range(2))
    bank = Bank(with_bank, adapters, devices.DTYPES[dtype])
    slots, models = list(range(1, BATCH + 1)), {'base_s': alone, 'adapters_s': with_bank}
    bank.select(slots)
    prompt = torch.randint(base.config.vocab_size, (BATCH, PROMPT), device=device)
    figures = {}
    with torch.no_grad(), devices.autocast(device, dtype):
        # a stream's first position is the prompt's, which warms up; each that follows is one step with a cache
        streams = {name: functools.partial(next, stream(model, prompt, DECODED + 2, temperature=0))
                   for name, model in models.items()}
        reads = {name: functools.partial(model, prompt) for name, model in models.items()}
        for what, runs, times in (('T=1', streams, DECODED), (f'T={PROMPT}', reads, READ)):
            seconds = median_seconds_in_turn(runs, times, device)
            figures[what] = seconds | {'ratio': seconds['adapters_s'] / seconds['base_s']}

    def swap():
        bank.load(1, adapters[-1])
        bank.select(slots)
    return figures | median_seconds_in_turn({'swap_s': swap}, DECODED, device)


def _same_weights(base, attn_backend):
    """A model of its own with the very same weights, and this attention kernel."""
    model = GPT(replace(base.config, attn_backend=attn_backend)).eval()
    model.load_state_dict(base.state_dict(keep_vars=True), assign=True)
    return model
