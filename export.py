"""
A model or an adapter in another form.

  python export.py --to=hf --out_dir=out-gpt --dest=out-hf                   # for transformers and what reads its files
  python export.py --to=opt --adapters=out-lora-a,out-lora-b --dest=out-opt  # a GPT-2, their base, and both beside it
  python export.py --to=onnx --out_dir=out-quickstart --dest=out-onnx
  python export.py --to=merged --adapters=out-lora --dest=out-merged        # one model, as fast as its base
  python export.py --to=peft --adapters=out-lora,out-vera --weights=0.7,0.3 --dest=both     # one, the sum of two

hf       arch=gpt2 as GPT2LMHeadModel, arch=modern as ApertusForCausalLM; with its tokenizer and a model card
opt      arch=gpt2 as OPTForCausalLM, which inference servers serve with many LoRA adapters
         hf and opt write adapters beside the model, each as one of Hugging Face's peft in a folder of its own
nanogpt  arch=gpt2 as a ckpt.pt of nanoGPT, from which it resumes
onnx     model.onnx: input_ids, (batch, length) int64 -> logits, (batch, length, ids); onnxruntime and TensorRT read it
torch    model.pt2, the same as an archive of torch.export, which runs without this project
merged   adapters added to the weights of their base: a checkpoint for sample.py, and for train.py as init_from
         nanogpt, onnx and torch merge adapters as well
peft     adapters as one of peft: a single one as it is, several low-rank ones as a LoRA of their sum
"""

import json
import logging
import math
import os
import pickle
import shutil
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import InputError, configure
from model import GPT, GPTConfig
from sologpt.adapters import adapter_files
from sologpt.adapters.adapters import merge
from sologpt.files import checkpoint, hf_files
from sologpt.files.models import read_model
from sologpt.machine import devices
from sologpt.matmuls.formats import Sparse24
from sologpt.matmuls.held import decode_base
from sologpt.tokens import data_folder, tokenizer_files

# ----------------------------------------------------------------------------------------------------------------------
to = ''  # hf, opt, nanogpt, onnx, torch, merged or peft
dest = ''  # the folder to write: a new one, or an empty one
out_dir: str | None = None  # the model, or the adapters' base: an out_dir, or a name or folder as for init_from; None:
# ... where the first adapter says, without adapters 'out'
adapters = ''  # folders of adapters, peft's or out_dirs of runs, separated by commas
weights = ''  # what each of them is multiplied by, -1 to subtract it; '': 1 each
dtype = 'float32'  # of a model's weights: float32, bfloat16 or float16
dataset = ''  # take the tokenizer of data/<dataset>; '': the checkpoint's own
# ----------------------------------------------------------------------------------------------------------------------
config, given = configure(globals())

TARGETS = ('hf', 'opt', 'nanogpt', 'onnx', 'torch', 'merged', 'peft')
BESIDE = ('hf', 'opt')  # adapters stay adapters
if to not in TARGETS:
    raise InputError(f'to={to!r} is not known: use {", ".join(TARGETS)}')
if not adapters and to in ('merged', 'peft'):
    raise InputError('adapters is empty: give the folder of an adapter, or several with commas between')
if dtype not in devices.DTYPES:
    raise InputError(f'dtype={dtype!r} is not known: use {", ".join(devices.DTYPES)}')
folders = [folder.strip() for folder in adapters.split(',')] if adapters else []
try:
    factors = [float(weight) for weight in weights.split(',')] if weights else [1.0] * len(folders)
except ValueError:
    factors = [math.nan]
if not all(map(math.isfinite, factors)):
    raise InputError(f'weights={weights!r} must be numbers, separated by commas')
if len(factors) != len(folders):
    raise InputError(f'weights={weights!r} has {len(factors)} of them, and adapters {len(folders)}')
if weights and to in BESIDE:
    raise InputError(f'weights={weights}: with to={to} adapters are not added up; use --to=merged first')
if not dest:
    raise InputError('dest is empty: name the folder to write')
if os.path.lexists(dest) and not (os.path.isdir(dest) and not os.listdir(dest)):
    raise InputError(f'dest={dest} is there already: choose a new or an empty folder')

# the model: its GPTConfig, its weights by name, and what else its checkpoint says
loaded = [adapter_files.read(folder) for folder in folders]
own_names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
merged = [f'{name} ({adapter.config.method}, times {factor:g})'
          for name, adapter, factor in zip(own_names, loaded, factors, strict=True)]
if loaded:
    model, saved = adapter_files.load_base(loaded, out_dir, or_merged=to == 'merged')
    source = out_dir or loaded[0].base
    for adapter, factor, folder in zip(loaded, factors, folders, strict=True) if to not in (*BESIDE, 'peft') else ():
        if adapter.config.method == 'dora' and (factor != 1 or len(loaded) > 1):
            raise InputError(f'{folder} is a dora, which is no sum with the weights: merge it alone, by weight 1')
        adapter_files.put_to(model, adapter, folder)
        merge(model, factor)
    decode_base(model)
    gpt, tensors = model.config, model.state_dict()
else:
    source = out_dir or 'out'
    model_args, tensors, saved = read_model(source)
    gpt = GPTConfig.from_saved(model_args)
    checkpoint.check_weights(GPT.skeleton(gpt), tensors, source)
recipe = saved.get('matmul', '')
if recipe == 'ternary':
    raise InputError(f'{source} was trained with matmul=ternary, whose Linears normalise what they take in: only '
                     f'sample.py runs it')
if recipe == 'sparse24':
    for i in range(gpt.n_layer - (saved['config']['matmul_keep_last'] or 0)):
        for linear in hf_files.LINEARS:
            name = f'transformer.h.{i}.{linear}.weight'
            tensors[name] = tensors[name] * Sparse24().mask(tensors[name])


def to_peft(folder):
    adapter = loaded[0]
    if factors != [1.0]:
        adapter = adapter_files.stack(gpt, loaded, factors, folders)
    else:
        adapter_files.put_to(model, adapter, folders[0])  # to see whether it fits
    adapter_files.write(folder, adapter, gpt)
    return f'{described(adapter)}, {sum(tensor.numel() for tensor in adapter.tensors.values()):,} numbers'


def described(adapter):
    size = f'{adapter.config.num_virtual_tokens} virtual tokens' if adapter.config.method in ('prompt', 'prefix') else \
        f'r={adapter.config.r}'
    return f'{adapter.config.method}, {size}'


def to_merged(folder):
    passed_on = ('config', 'tokenizer', 'data', 'merged_from')
    checkpoint.save(folder, {
        **{key: value for key, value in saved.items() if key in passed_on}, 'merged': saved.get('merged', []) + merged,
        'model': {name: checkpoint.cast(name, tensor, devices.DTYPES[dtype]) for name, tensor in tensors.items()},
        'model_args': gpt.to_save(), 'iter_num': 0}, best=False)
    return f'{model.n_params():,} parameters in {dtype}'


def to_hf(folder):
    name = hf_files.family_of(gpt, to)
    family = hf_files.FAMILIES[name]
    if len(set(own_names)) < len(own_names):
        raise InputError(f'adapters={adapters}: each is written to a folder named as its own is, and two have one name')
    text = data_folder.of_model(saved, dataset, gpt, source)
    beside = [adapter_files.for_family(gpt, adapter, family, of_folder)
              for adapter, of_folder in zip(loaded, folders, strict=True)]
    hf_files.write(folder, name, gpt, tensors, devices.DTYPES[dtype], text.eot)
    tokenizer_files.write_folder(folder, text, gpt.block_size)
    with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as f:
        f.write(model_card(family, text))
    # weights of other names or shapes are another base, of which only GPT-2's adapters are read again
    base_hash = adapter_files.fingerprint(GPT.from_pretrained(folder)) if beside and family.transposed else ''
    words = f'{family.cls} in {dtype}, {gpt.n_ids:,} ids'
    for adapter, own_name in zip(beside, own_names, strict=True):
        adapter.base, adapter.base_hash, adapter.base_format = dest, base_hash, 'float32'
        adapter_files.write(os.path.join(folder, own_name), adapter, gpt, family.transposed)
        words += f'\n{os.path.join(dest, own_name)}: {described(adapter)}'
    return words


def model_card(family, text):
    """README.md of the folder: what the checkpoint says of the model. Rows of which nothing is known are left out."""
    name, keys, data = os.path.basename(os.path.abspath(dest)), saved.get('config', {}), saved.get('data', {})
    began = keys.get('init_from')
    facts = {
        'architecture': f'{family.cls}: {gpt.n_layer} layers, {gpt.n_head} heads, {gpt.n_embd} wide, {gpt.block_size} '
                        f'positions, {gpt.activation}; weights in {dtype}',
        'tokenizer': f'{text.to_dict()["kind"].replace("json", "tokenizer.json")}, {gpt.n_ids:,} ids',
        'began as': began if began not in ('scratch', 'resume') else None,
        'data': ': '.join(filter(None, (data.get('name') or keys.get('dataset'), data.get('source')))),
        'trained on': 'tokens' in saved and f'{saved["tokens"]:,} tokens in {saved["iter_num"]:,} iterations',
        'validation loss': saved.get('best_iter') and f'{saved["best_val_loss"]:.4f} nats per token, at iteration '
                                                      f'{saved["best_iter"]:,}',
        'merged in': ', '.join(saved.get('merged', [])),
        'adapters beside it': ', '.join(own_names),
    }
    if family.activations.get(gpt.activation) == 'xielu':
        facts['activation'] = 'ReLU squared, as xIELU with beta = 0; the optional package `xielu` ignores that beta'
    of_training = f"""
The config of its training:

```json
{json.dumps(keys, indent=1)}
```
""" if keys else ''
    table = '\n'.join(f'| {key} | {value} |' for key, value in facts.items() if value)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [soloGPT]
---
# {name}

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = AutoModelForCausalLM.from_pretrained({name!r})
ids = tokenizer('The ', return_tensors='pt')
print(tokenizer.decode(model.generate(**ids, max_new_tokens={min(100, gpt.block_size // 2)})[0]))
```
{of_training}"""


def to_nanogpt(folder):
    for key, value in {**hf_files.FAMILIES['gpt2'].parts, 'activation': 'gelu', 'tied': True}.items():
        if getattr(gpt, key) != value:
            raise InputError(f'the model has {key}={getattr(gpt, key)!r}, nanoGPT only {value!r}: train with '
                             f'{"--arch=gpt2" if gpt.arch != "gpt2" else f"--{key}={value}"}')
    text = data_folder.of_model(saved, dataset, gpt, source)
    keys = {'dataset': os.path.basename(os.path.abspath(dest)), **saved.get('config', {})}
    # AdamW with nanoGPT's groups; the moments are those of the run, if it was AdamW's and these are still its weights
    named = {name: nn.Parameter(torch.empty_like(tensor, device='meta')) for name, tensor in tensors.items()
             if name != 'lm_head.weight'}  # the table by its second name
    decay = keys.get('weight_decay')
    optimizer = torch.optim.AdamW([
        {'params': [p for p in named.values() if p.dim() >= 2], 'weight_decay': 0.1 if decay is None else decay},
        {'params': [p for p in named.values() if p.dim() < 2], 'weight_decay': 0.0},
    ], lr=keys.get('learning_rate', 6e-4), betas=(keys.get('beta1', 0.9), keys.get('beta2', 0.95))).state_dict()
    of_run = {} if loaded else saved
    if keys.get('optimizer', 'adamw') == 'adamw':
        optimizer['state'] = of_run.get('optimizer', {}).get('state', {})
    checkpoint.save(folder, {
        'model': {name: checkpoint.cast(name, tensor, devices.DTYPES[dtype]) for name, tensor in tensors.items()},
        'model_args': {key: getattr(gpt, key) for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias',
                                                          'vocab_size', 'dropout')},
        'optimizer': optimizer, 'iter_num': of_run.get('iter_num', 0),
        'best_val_loss': of_run.get('best_val_loss', 1e9), 'config': keys}, best=False)
    words = f"nanoGPT's ckpt.pt, {'with' if optimizer['state'] else 'without'} the moments of AdamW"
    kind = text.to_dict()['kind']
    if text.to_dict().get('name') == 'gpt2':
        return words
    if kind not in ('chars', 'bytes'):
        return f'{words}; its sample.py has no tokenizer of the kind {kind}'
    # nanoGPT knows characters by the meta.pkl of its data folder; of bytes it can print those of ASCII
    chars = text.chars if kind == 'chars' else [chr(i) for i in range(128)]
    itos = dict(enumerate(chars)) | {i: '\ufffd' for i in range(len(chars), text.vocab_size)}
    with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
        pickle.dump({'vocab_size': text.vocab_size, 'itos': itos, 'stoi': {c: i for i, c in enumerate(chars)}}, f)
    return f"{words}; its sample.py reads meta.pkl in nanoGPT's folder data/{keys['dataset']}: copy it there"


class Logits(nn.Module):
    """A GPT as a function of input_ids, (batch, length), alone: logits of all positions, (batch, length, ids)."""

    def __init__(self, gpt_model):
        super().__init__()
        self.gpt = gpt_model
        head = gpt_model.lm_head.weight = nn.Parameter(gpt_model.lm_head.weight[:gpt_model.config.n_ids].clone())
        if gpt_model.config.tied:
            gpt_model.transformer.wte.weight = head
        for block in gpt_model.transformer.h:  # without a cache: the same function for every length, 1 included
            block.attn.attend = lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, input_ids):
        return self.gpt.lm_head(self.gpt.hidden(input_ids))


def as_function(folder):
    """(the model as Logits, an example of its input, which dimensions of that vary); writes the tokenizer as well."""
    if gpt.block_size < 2:
        raise InputError(f'{source} has block_size=1: a program of any length needs at least 2')
    text = data_folder.of_model(saved, dataset, gpt, source)
    built = GPT.skeleton(gpt)
    built.to(devices.DTYPES[dtype]).load_state_dict({
        name: checkpoint.cast(name, tensor, devices.DTYPES[dtype]) for name, tensor in tensors.items()}, assign=True)
    tokenizer_files.write_folder(folder, text, gpt.block_size)
    length = torch.export.Dim('length', max=gpt.block_size)
    return (Logits(built).eval().requires_grad_(False), (torch.zeros(2, 2, dtype=torch.int64),),
            {'input_ids': {0: torch.export.Dim('batch'), 1: length}})


def to_torch(folder):
    built, example, varies = as_function(folder)
    torch.export.save(torch.export.export(built, example, dynamic_shapes=varies), os.path.join(folder, 'model.pt2'))
    return f'model.pt2 of torch {torch.__version__}, in {dtype}'


def to_onnx(folder):
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError('to=onnx needs pip install onnx onnxscript (and, for it to be checked, onnxruntime)') from None
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)  # it would name what it can and need not translate
    built, example, varies = as_function(folder)
    path = os.path.join(folder, 'model.onnx')
    with warnings.catch_warnings(action='ignore'):  # of torch's about itself
        translated = torch.onnx.export(built, example, dynamic_shapes=varies, input_names=['input_ids'],
                                       output_names=['logits'], dynamo=True, verbose=False)
    translated.save(path, external_data=built.gpt.n_params() > 2.5e7)  # the weights in model.onnx.data
    try:
        import onnxruntime
        session, worst = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider']), 0.0
        for shape in ((1, 1), (1, min(gpt.block_size, 128)), (3, 2)):
            ids = torch.randint(gpt.n_ids, shape, generator=torch.Generator().manual_seed(0))
            found, = session.run(['logits'], {'input_ids': ids.numpy()})
            worst = max(worst, (torch.from_numpy(found).float() - built(ids).float()).abs().max().item())
    except ImportError:
        return f'model.onnx in {dtype}; not checked, for onnxruntime is not installed'
    except Exception as e:  # it has errors of many classes, and no bfloat16 on a CPU
        return f'model.onnx in {dtype}; not checked, for onnxruntime cannot run it here: {str(e)[:100]}'
    return f"model.onnx in {dtype}; onnxruntime's logits differ by at most {worst:.1e}"


write = {'hf': to_hf, 'opt': to_hf, 'nanogpt': to_nanogpt, 'onnx': to_onnx, 'torch': to_torch, 'merged': to_merged,
         'peft': to_peft}[to]
partial = os.path.normpath(dest) + '.partial'  # becomes dest when it is complete
try:
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    os.makedirs(partial)
    said = write(partial)
    if os.path.isdir(dest):
        os.rmdir(dest)
    os.replace(partial, dest)
except OSError as e:
    raise InputError(f'dest={dest!r} cannot be written: {e.strerror or e}') from None
finally:
    shutil.rmtree(partial, ignore_errors=True)
print(f'{dest}: {said}')
