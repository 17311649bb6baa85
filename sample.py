"""
Continue a text with a trained model; the text streams to the terminal as it is drawn.

  python sample.py --out_dir=out-quickstart --start="def main("
  python sample.py --init_from=gpt2 --start=FILE:prompt.txt --num_samples=4
  python sample.py --adapters=out-lora,out-vera --start="The "
"""

import codecs
import itertools
import os
import sys
import time
from dataclasses import replace

import torch

from configurator import InputError, configure
from model import GPT, GPTConfig
from sologpt.adapters.adapter import merge, put_adapter
from sologpt.adapters.arithmetic import low_rank_matrices
from sologpt.adapters.bank import Bank
from sologpt.adapters.base import load_base
from sologpt.adapters.peft_files import CONFIG, read_adapter
from sologpt.files.checkpoint import find_checkpoint
from sologpt.files.models import read_model
from sologpt.inference.compiled_step import CompiledStep
from sologpt.inference.generation import lists_of
from sologpt.machine import choices, devices
from sologpt.matmuls.held import decode_base, hold_all_linears_in
from sologpt.matmuls.recipe_linear import block_linears, convert
from sologpt.matmuls.sparse24 import Sparse24
from sologpt.matmuls.spec import parse_matmul
from sologpt.matmuls.ternary import pack_ternary
from sologpt.tokens import data_folder

# ----------------------------------------------------------------------------------------------------------------------
# model
init_from = 'resume'  # 'resume' (out_dir), a model of the hub such as 'gpt2', or a folder with config.json and
# ... model.safetensors
out_dir = 'out'  # a run's folder: its best.pt if there is one, else its ckpt.pt; an adapter is loaded with its base
adapter = ''  # the folder of an adapter, one of peft's or a run's out_dir; the model is its base, unless init_from or
# ... out_dir names another
adapters = ''  # folders of several low-rank adapters, separated by commas: each row of the batch takes one of them
adapter_ids = ''  # the adapter of each row: 1,1,2 for the first, the first and the second, 0 for the base; '': in turn
dataset = ''  # take the tokenizer of data/<dataset>; '': the checkpoint's own
# text
start = '\n'  # the text to continue, or FILE:path
num_samples = 10  # how many continuations, drawn as one batch
max_new_tokens = 500  # in each sample
temperature = 0.8  # 0: always the likeliest token; 1: the model's own probabilities; above 1: more random
top_k = 200  # draw among the k likeliest tokens; 0: all
top_p = 1.0  # draw among the likeliest tokens that together have this probability
window_step: int | None = None  # beyond block_size, the context moves by this many tokens at once: 1 computes it anew
# ... for every token, as nanoGPT does; None: 1 if the text is greedy, else block_size / 8, several times faster
seed = 1337
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'
compile: bool | str = 'auto'  # compile the step from one token to the next, and on a GPU replay it as a CUDA graph; it
# ... takes a minute at first; 'auto': on a GPU where it works, from 10,000 new tokens on
# ----------------------------------------------------------------------------------------------------------------------
config, given = configure(globals())

for key in ('num_samples', 'max_new_tokens'):
    if config[key] < 1:
        raise InputError(f'{key}={config[key]} must be at least 1')
if temperature < 0 or not 0 < top_p <= 1:
    raise InputError(f'temperature={temperature} must be at least 0, and top_p={top_p} in (0, 1]')
if adapter and adapters:
    raise InputError('adapter and adapters are both given: name all of them in adapters, or one in adapter')
if adapter_ids and not adapters:
    raise InputError('adapter_ids are numbers of adapters: give those')
if isinstance(compile, str) and compile != 'auto':
    raise InputError(f'compile={compile!r} must be auto, True or False')


def find_origin():
    """(where the model lies, the folders of adapters). None: the model is the base that the first adapter names."""
    folders = [folder.strip() for folder in adapters.split(',')] if adapters else [adapter] if adapter else []
    if init_from != 'resume':
        return init_from, folders or ([out_dir] if 'out_dir' in given else [])
    if not folders and os.path.exists(os.path.join(out_dir, CONFIG)):
        return None, [out_dir]
    if folders and 'out_dir' not in given:
        return None, folders
    exported = os.path.isfile(os.path.join(out_dir, 'config.json'))
    return find_checkpoint(out_dir) or (out_dir if exported else os.path.join(out_dir, 'ckpt.pt')), folders


def load_model(source, loaded, place):
    """(the model or the base of the `loaded` adapters, what else its checkpoint holds, the dtype of matmuls)."""
    model_args, weights, saved = read_model(source)
    gpt = GPTConfig.from_saved(model_args, dropout=0.0)
    found, _ = choices.find_dtype(dtype, place, (gpt.block_size, gpt.n_embd, 4 * gpt.n_embd))
    attn_backend, _ = choices.find_attn_backend('auto', place, found, gpt.block_size)
    if loaded:
        return *load_base(loaded, source, attn_backend=attn_backend), found
    saved.pop('optimizer', None)  # it would keep the file open
    # Tables in float16 would put the residual stream in it, whose range is too small. Latent weights are in float32.
    kept = (torch.bfloat16,) if found == 'bfloat16' and not saved.get('matmul') else ()
    return GPT.from_weights(replace(gpt, attn_backend=attn_backend), weights, source, kept), saved, found


def follow_recipe(model, matmul, dtype):
    """Let the Linears compute as they did in training, if the recipe is part of the model. matmul: the spec's text."""
    spec = parse_matmul(matmul)
    if spec is None:
        return
    if spec.name == 'ternary':
        convert(model, spec, dtype, model.config.block_size, model.lm_head.weight.device)
        packed, before = pack_ternary(model)
        print(f'ternary weights: {packed / 1e6:.1f} MB, {before / 1e6:.1f} MB in bfloat16', file=sys.stderr)
    elif spec.name == 'sparse24':
        for layer in block_linears(model, spec.resolved(model.config.n_layer).keep_last):
            layer.weight.data *= Sparse24().mask(layer.weight)


def choose_adapters(n_adapters):
    """The number of each row's adapter: adapter_ids, or 1, 2, ... in turn."""
    if not adapter_ids:
        rows = num_samples if 'num_samples' in given else n_adapters
        return [1 + row % n_adapters for row in range(rows)]
    try:
        numbers = [int(number) for number in adapter_ids.split(',')]
    except ValueError:
        numbers = [-1]
    if not all(0 <= number <= n_adapters for number in numbers):
        raise InputError(f'adapter_ids={adapter_ids!r} must be numbers from 0 to {n_adapters}, with commas between')
    if 'num_samples' in given and num_samples != len(numbers):
        raise InputError(f'num_samples={num_samples}, but adapter_ids has {len(numbers)} rows: leave one of them out')
    return numbers


def read_start(start):
    """The text to continue: `start` itself, or the content of the file in FILE:path."""
    if not start.startswith('FILE:'):
        return start
    try:
        with open(start[5:], encoding='utf-8') as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f'start={start}: {e}') from None


def draw_first_to_terminal(drawing, text):
    """
    The ids of all rows, a list for each step, until `drawing` or the last text ends. The first row is printed as it is
    drawn.
    """
    drawn = []
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # a token may end inside a character
    for ids in lists_of(drawing):
        drawn.append(ids)
        if ids[0] not in text.ends:
            print(decoder.decode(text.to_bytes(ids[:1])), end='', flush=True)
        if all(token in text.ends for token in ids):
            break
    drawing.close()
    print(decoder.decode(b'', final=True))
    return drawn


# the model and its tokenizer
place = devices.find_device(device)
devices.prepare_device(place)
source, folders = find_origin()
loaded = [read_adapter(folder) for folder in folders]
source = source or loaded[0].base
if not source:
    raise InputError(f'{folders[0]} does not say where its base is: give its name or folder as init_from')
model, saved, matmul_dtype = load_model(source, loaded, place)
text = data_folder.tokenizer_of_model(saved, dataset, model.config.vocab_size, source)
model.config.n_ids = min(model.config.n_ids, text.vocab_size)  # the other ids are padding

# adapters: one becomes part of the model, of several each row of the batch has its own
if adapters:
    low_rank = [low_rank_matrices(model.config, *of_one) for of_one in zip(loaded, folders, strict=True)]
elif loaded:
    put_adapter(model, loaded[0], folders[0])
    if loaded[0].config.cls.mergeable:  # then it is as fast as its base
        merge(model)
decode_base(model)
model.eval().to(place)
follow_recipe(model, saved.get('matmul', ''), matmul_dtype)
rows, names = num_samples, [''] * num_samples
if adapters:
    numbers = choose_adapters(len(folders))
    rows, names = len(numbers), [f'[{(["the base"] + folders)[number]}]\n' for number in numbers]
    Bank(model, low_rank, devices.DTYPES[matmul_dtype]).select(numbers)
hold_all_linears_in(model, matmul_dtype)
compiles = max_new_tokens >= 10_000 and choices.can_compile(place)[0] if compile == 'auto' else compile
step = CompiledStep(model) if compiles else None

# the prompt
prompt_text = read_start(start)
prompt_ids = text.encode_prompt(prompt_text)
if not prompt_ids:
    raise InputError('start is empty, and this tokenizer has no token to begin a text with: give at least a character')
prompt = torch.tensor([prompt_ids], device=place).expand(rows, -1)
context = model.config.block_size - model.n_virtual
greedy = temperature == 0 or top_k == 1
moves_by = window_step if window_step is not None else 1 if greedy else max(1, context // 8)
if not 1 <= moves_by <= context:
    raise InputError(f'window_step={moves_by} must be from 1 to block_size={context}')

# draw all samples in one batch; the first one streams to the terminal
generator = torch.Generator(place).manual_seed(seed)
print(names[0] + prompt_text, end='', flush=True)
with devices.autocast(place, matmul_dtype):
    if step:  # it compiles before the clock starts
        list(model.stream(prompt, 1, temperature=0, window_step=moves_by, step=step))
    began = time.perf_counter()
    drawing = model.stream(prompt, max_new_tokens, temperature, top_k, top_p, text.ends, moves_by, generator, step)
    drawn = draw_first_to_terminal(drawing, text)
seconds = time.perf_counter() - began

# print the other samples, and the speed
print('---------------')
for name, ids in zip(names[1:], list(zip(*drawn, strict=True))[1:], strict=True):
    ids = itertools.takewhile(lambda token: token not in text.ends, ids)
    print(name + prompt_text + text.to_bytes(ids).decode('utf-8', errors='replace'))
    print('---------------')
n = len(drawn) * rows
is_beyond = len(prompt_ids) + len(drawn) > context
beyond = f'; beyond {context} tokens the context moves {moves_by} at a time' if is_beyond else ''
compiled = f'; compiled in {step.seconds:.0f} s' if step else ''
print(f'{n:,} tokens in {seconds:.2f} s: {n / seconds:.0f} tok/s ({matmul_dtype}){beyond}{compiled}', file=sys.stderr)
