"""
A model or an adapter in another form.

  python export.py --to=merged --adapters=out-lora --dest=out-merged        # one model, as fast as its base
  python export.py --to=peft --adapters=out-a,out-b --weights=0.7,0.3 --dest=both     # one adapter, the sum of two
  python export.py --to=merged --out_dir=out-merged --adapters=out-lora --weights=-1 --dest=out-base-again

peft    adapters as one of Hugging Face's peft: a single one as it is, several low-rank ones as a LoRA of their sum
merged  adapters added to the weights of their base: a checkpoint for sample.py, and for train.py as init_from
"""

import os

import adapter_files
import checkpoint
import hardware
from adapters import merge
from configurator import InputError, configure

# ----------------------------------------------------------------------------------------------------------------------
to = ''  # peft or merged
dest = ''  # the folder to write, which must not hold a model or an adapter yet
adapters = ''  # folders of adapters, peft's or out_dirs of runs, separated by commas
weights = ''  # what each of them is multiplied by, -1 to subtract it; '': 1 each
out_dir: str | None = None  # their base: an out_dir, or a name or folder as for init_from; None: where the first says
dtype = 'float32'  # of the weights of a merged model: float32, bfloat16 or float16
# ----------------------------------------------------------------------------------------------------------------------
config, given = configure(globals())

if to not in ('peft', 'merged'):
    raise InputError(f'to={to!r} is not known: use peft or merged')
if not adapters:
    raise InputError('adapters is empty: give the folder of an adapter, or several with commas between')
if dtype not in hardware.DTYPES:
    raise InputError(f'dtype={dtype!r} is not known: use {", ".join(hardware.DTYPES)}')
folders = adapters.split(',')
try:
    factors = [float(weight) for weight in weights.split(',')] if weights else [1.0] * len(folders)
except ValueError:
    raise InputError(f'weights={weights!r} must be numbers, separated by commas') from None
if len(factors) != len(folders):
    raise InputError(f'weights={weights!r} are {len(factors)}, adapters {len(folders)}')
if not dest:
    raise InputError('dest is empty: name the folder to write')
for name in ('ckpt.pt', 'best.pt', adapter_files.CONFIG, adapter_files.WEIGHTS):
    if os.path.exists(os.path.join(dest, name)):
        raise InputError(f'{dest} has a {name} already: choose another dest')

loaded = [adapter_files.read(folder) for folder in folders]
model, saved = adapter_files.load_base(loaded, out_dir, or_merged=to == 'merged')
if to == 'peft':
    adapter = loaded[0]
    if factors != [1.0]:
        adapter = adapter_files.stack(model.config, loaded, factors, folders)
    else:
        adapter_files.put_to(model, adapter, folders[0])  # to see whether it fits
    adapter_files.write(dest, adapter, model.config)
    print(f'{dest}: {adapter.config.method}, r={adapter.config.r}, '
          f'{sum(tensor.numel() for tensor in adapter.tensors.values()):,} numbers')
else:
    for adapter, factor, folder in zip(loaded, factors, folders, strict=True):
        if adapter.config.method == 'dora' and (factor != 1 or len(loaded) > 1):
            raise InputError(f'{folder} is a dora, which is no sum with the weights: merge it alone, by weight 1')
        adapter_files.put_to(model, adapter, folder)
        merge(model, factor)
    checkpoint.check_writable(dest)
    checkpoint.save(dest, {
        **{key: value for key, value in saved.items() if key in ('config', 'tokenizer', 'merged_from')},
        'model': model.to(hardware.DTYPES[dtype]).state_dict(), 'model_args': model.config.to_save(), 'iter_num': 0,
    }, best=False)
    print(f'{dest}: {model.n_params():,} parameters in {dtype}')
