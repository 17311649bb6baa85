"""
Continue a text with a trained model; the text streams to the terminal as it is drawn.

  python sample.py --out_dir=out-quickstart --start="def main("
  python sample.py --init_from=gpt2 --start=FILE:prompt.txt --num_samples=4
  python sample.py --adapters=out-lora,out-vera --start="The "
"""

import codecs
import os
import sys
import time

import torch

from configurator import InputError, configure
from model import GPT
from sologpt.adapters import adapter_files
from sologpt.adapters.adapters import merge
from sologpt.adapters.bank import Bank
from sologpt.files import checkpoint
from sologpt.inference.compiled_step import CompiledStep
from sologpt.inference.generation import lists_of
from sologpt.machine import choices, devices
from sologpt.matmuls.attention import ATTENTION
from sologpt.matmuls.formats import Sparse24
from sologpt.matmuls.held import decode_base, hold_for_matmuls
from sologpt.matmuls.recipe_linear import convert, layers
from sologpt.matmuls.ternary import pack_ternary
from sologpt.tokens import data_folder

# ----------------------------------------------------------------------------------------------------------------------
# model
init_from = 'resume'  # 'resume' (out_dir), 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder with config.json
# ... and model.safetensors
out_dir = 'out'  # its best.pt if there is one, else its ckpt.pt; of a run that trained an adapter, that with its base
adapter = ''  # the folder of an adapter, peft's or a run's out_dir; the model is its base, if nothing else is given
adapters = ''  # several, separated by commas, low-rank ones: each row of the batch takes one of them
adapter_ids = ''  # which, row by row: 1,1,2 for the first, the first and the second, 0 for the base; '': in turn
dataset = ''  # take the tokenizer of data/<dataset>; '': the checkpoint's own
# text
start = '\n'  # the text to continue, or FILE:path
num_samples = 10  # drawn as one batch
max_new_tokens = 500  # in each sample
temperature = 0.8  # 0: always the likeliest token; 1: as the model has it; above: more random
top_k = 200  # draw among the k likeliest tokens; 0: all
top_p = 1.0  # draw among the likeliest tokens that together have this probability
window_step: int | None = None  # beyond block_size, by how many tokens the context moves at once: 1 computes it anew
# ... for every token, as nanoGPT does; None: 1 if the output is greedy, else block_size / 8, several times faster
seed = 1337
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'
compile: bool | str = 'auto'  # torch.compile the step from one token to the next, and on a GPU replay it as a CUDA
# ... graph, which takes a minute at first; 'auto': on a GPU where it works, from 10,000 new tokens on
# ----------------------------------------------------------------------------------------------------------------------
config, given = configure(globals())

for key in ('num_samples', 'max_new_tokens'):
    if config[key] < 1:
        raise InputError(f'{key}={config[key]} must be at least 1')
if temperature < 0 or not 0 < top_p <= 1:
    raise InputError(f'temperature={temperature} must be at least 0, and top_p={top_p} in (0, 1]')
device = devices.find_device(device)
devices.prepare(device)

# model and tokenizer
if adapter and adapters:
    raise InputError('adapter and adapters are both given: name all of them in adapters, or one in adapter')
if adapter_ids and not adapters:
    raise InputError('adapter_ids are numbers of adapters: give those')
folders = [folder.strip() for folder in adapters.split(',')] if adapters else [adapter] if adapter else []
source = init_from  # of the model, or of the adapters' base; None: as they say
if init_from != 'resume':
    if 'out_dir' in given and not folders:
        folders = [out_dir]
elif not folders and os.path.exists(os.path.join(out_dir, adapter_files.CONFIG)):
    folders, source = [out_dir], None
elif folders and 'out_dir' not in given:
    source = None
else:
    exported = os.path.isfile(os.path.join(out_dir, 'config.json'))
    source = checkpoint.find(out_dir) or (out_dir if exported else os.path.join(out_dir, 'ckpt.pt'))
if folders:
    loaded = [adapter_files.read(folder) for folder in folders]
    model, saved = adapter_files.load_base(loaded, source)
    source = source or loaded[0].base
else:
    model, saved = GPT.from_checkpoint(source, dropout=0.0)
text, recipe = data_folder.of_model(saved, dataset, model.config, source), saved.get('matmul', '')
if adapters:
    low_rank = [adapter_files.low_rank(model.config, *of_one) for of_one in zip(loaded, folders, strict=True)]
elif folders:
    adapter_files.put_to(model, loaded[0], folders[0])
    if loaded[0].config.method in ('lora', 'dora', 'vera'):  # no slower than the base
        merge(model)
decode_base(model)
model.eval().to(device)
dtype, _ = choices.find_dtype(dtype, device, (model.config.block_size, model.config.n_embd, 4 * model.config.n_embd))
attn_backend, _ = choices.find_attn_backend('auto', device, dtype, model.config.block_size)
for block in model.transformer.h:
    block.attn.attend = ATTENTION[attn_backend]
if recipe == 'ternary':
    convert(model, recipe, dtype, model.config.block_size, saved['config']['matmul_keep_last'])
    packed, before = pack_ternary(model)
    print(f'ternary weights: {packed / 1e6:.1f} MB, {before / 1e6:.1f} MB in bfloat16', file=sys.stderr)
elif recipe == 'sparse24':
    for layer in layers(model, saved['config']['matmul_keep_last'] or 0):
        layer.weight.data *= Sparse24().mask(layer.weight)
names = [''] * num_samples
if adapters:
    if adapter_ids:
        try:
            ids = [int(number) for number in adapter_ids.split(',')]
        except ValueError:
            ids = [-1]
        if not all(0 <= number <= len(folders) for number in ids):
            raise InputError(f'adapter_ids={adapter_ids!r} must be numbers from 0 to {len(folders)}, with commas '
                             f'between')
        if 'num_samples' in given and num_samples != len(ids):
            raise InputError(f'num_samples={num_samples}, but adapter_ids has {len(ids)} rows: leave one of them out')
    else:
        rows = num_samples if 'num_samples' in given else len(folders)
        ids = [1 + row % len(folders) for row in range(rows)]
    num_samples, names = len(ids), [f'[{(["the base"] + folders)[number]}]\n' for number in ids]
    bank = Bank(model, low_rank, devices.DTYPES[dtype])
    bank.select(ids)
hold_for_matmuls(model, dtype)
if compile == 'auto':
    compile = max_new_tokens >= 10_000 and choices.can_compile(device)[0]
elif isinstance(compile, str):
    raise InputError(f'compile={compile!r} must be auto, True or False')
step = CompiledStep(model) if compile else None

# prompt
if start.startswith('FILE:'):
    try:
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f'start={start}: {e}') from None
ids = text.encode(start) or ([text.eot] if text.eot is not None else [])
if not ids:
    raise InputError('start is empty, and this tokenizer has no token to begin a text with: give at least a character')
prompt = torch.tensor([ids], device=device).expand(num_samples, -1)
greedy = temperature == 0 or top_k == 1
context = model.config.block_size - model.n_virtual
if window_step is None:
    window_step = 1 if greedy else max(1, context // 8)
if not 1 <= window_step <= context:
    raise InputError(f'window_step={window_step} must be from 1 to block_size={context}')

# draw: all samples in one batch, of which the first streams to the terminal
generator = torch.Generator(device).manual_seed(seed)
decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # a token may end inside a character
print(names[0] + start, end='', flush=True)
new = []
with devices.autocast(device, dtype):
    if compile:  # before the clock starts
        list(model.stream(prompt, 1, temperature=0, window_step=window_step, step=step))
    began = time.perf_counter()
    drawing = model.stream(prompt, max_new_tokens, temperature, top_k, top_p, text.eot, window_step, generator, step)
    for tokens in lists_of(drawing):
        new.append(tokens)
        if tokens[0] != text.eot:
            print(decoder.decode(text.to_bytes(tokens[:1])), end='', flush=True)
        if all(token == text.eot for token in tokens):
            break
seconds = time.perf_counter() - began
print(decoder.decode(b'', final=True))
print('---------------')
for name, row in zip(names[1:], list(zip(*new, strict=True))[1:], strict=True):
    row = row[:row.index(text.eot)] if text.eot in row else row
    print(name + start + text.decode(row))
    print('---------------')
drawn = len(new) * num_samples
beyond = f'; beyond {context} tokens the context moves {window_step} at a time' * (len(ids) + len(new) > context)
compiled = f'; compiled in {step.seconds:.0f} s' if compile else ''
print(f'{drawn:,} tokens in {seconds:.2f} s: {drawn / seconds:.0f} tok/s ({dtype}){beyond}{compiled}', file=sys.stderr)
