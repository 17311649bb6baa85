"""
Measure: one suite at a time, each a file in bench/. What is not a key of this script goes to train.py.

  python bench.py --suite=race --peer=../nanoGPT config/speedrun_cpu.py
  python bench.py --suite=sweep config/train_gpt2.py --dataset=shakespeare
  python bench.py --suite=ablation config/speedrun_cpu.py --dataset=shakespeare_char
  python bench.py --suite=speed --peer=../nanoGPT
  python bench.py --suite=matmul --widths=768,1024,2048,4096
  python bench.py --suite=formats config/speedrun_cpu.py --dataset=shakespeare_char
  python bench.py --suite=adapters config/finetune_lora.py
  python bench.py --suite=export
  python bench.py --suite=data --tokenizer=gpt2
  python bench.py --suite=plan config/train_fineweb_124m.py --memory=12
  python bench.py --suite=gpu --peer=../nanoGPT

race      how long this trainer takes to the val loss that another reaches at its end, the other being any that follows
          nanoGPT's command line and log, such as nanoGPT: seconds, iterations, tokens and their ratios, over seeds. It
          is read at this trainer's evaluations: a short --eval_interval shows it closely
sweep     the same step in micro-batches of 1, 2, 4, ... sequences: time, tokens per second, MFU, memory; the best flags
ablation  a config, and the same without one of its parts: val loss and time, over seeds
speed     this trainer and another on the same token files: ms per iteration, tokens per second of training and sampling
matmul    a Linear by each recipe of train.py's key `matmul`, at several widths: time, errors, memory kept for backward
formats   a config by each recipe and number format: val loss, time and memory, over seeds
adapters  a finetuning by each kind of adapter and by all weights, at the best of several learning rates: val loss, time
          and memory, over seeds; a step of each with 124M parameters; what it costs to serve a batch of many adapters
export    GPT-2's smallest size to each form that export.py has: time and memory
data      text to token files, beside the tokenizer alone; its memory; and what it takes to read batches
plan      what a config will take of a GPU's memory, without one: all weights trained, LoRA and QLoRA; and the largest
          micro-batch that fits
gpu       a GPU in one go, beside nanoGPT: training, memory, a race, sampling, and others of these suites; called again
          it goes on with what is missing
"""

import importlib
import os
import shlex
import time

from configurator import InputError, configure
from sologpt.bench import process
from sologpt.machine import devices

# ----------------------------------------------------------------------------------------------------------------------
suite = ''  # race, sweep, ablation, speed, matmul, formats, adapters, export, data, plan or gpu
runs = 3  # of each program or config, in turn, with seeds 1, 2, ...
dest = ''  # the figures as JSON, and a picture beside it where the suite draws one; '': results/<suite>.json
# race, speed and gpu
peer = ''  # the folder of the other trainer
# race
peer_args = 'config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=145 --eval_interval=2000 \
--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 \
--lr_decay_iters=2000 --dropout=0.0'  # what the peer's train.py is called with: nanoGPT's README command for a CPU
# sweep and adapters
steps = 5  # training steps of each micro-batch, or of each adapter with 124M parameters
# matmul, formats, adapters and gpu
recipes = ''  # these rows alone, separated by commas, or all of a recipe's, or of a part of gpu; '': all
# matmul
widths = '768,1024,2048,4096'  # of a square Linear; the largest take longest
tokens = 2048  # rows of its input
# data
tokenizer = 'gpt2'  # an encoding of tiktoken's, or the path of FILE.tiktoken
gigabytes = 1.0  # of text whose preparation's memory is measured
# plan
memory = 12.0  # GB of the GPU
check = False  # also run the step here, with random weights and tokens, and measure what it takes
# gpu
minutes = 9.0  # what does not fit in them is left to the next call
small = False  # try all of it at a tiny size, on any device: no measurement
restart = False  # measure again what dest has
# ----------------------------------------------------------------------------------------------------------------------
for_train = []
config, given = configure(globals(), pass_on=for_train)

SUITES = ('race', 'sweep', 'ablation', 'speed', 'matmul', 'formats', 'adapters', 'export', 'data', 'plan', 'gpu')
if suite not in SUITES:
    raise InputError(f'suite={suite!r}: use {", ".join(SUITES)}')
no_measurement = '_small' if small else '_foreseen' if suite == 'plan' and not check else ''  # and not to be committed
dest = config['dest'] = dest or os.path.join('results', f'{suite}{no_measurement}.json')
if not os.path.isdir(os.path.dirname(dest) or '.'):
    raise InputError(f'dest={dest}: there is no such folder')
for key in ('runs', 'steps', 'tokens'):
    if config[key] < 1:
        raise InputError(f'{key}={config[key]} must be at least 1')
command = shlex.join(['python', 'bench.py', *(f'--{key}={config[key]}' for key in given), *for_train])
measured = {'command': command, 'date': time.strftime('%Y-%m-%d'), **devices.versions()}
picture = os.path.splitext(dest)[0] + '.png'
measured['figures'] = importlib.import_module(f'sologpt.bench.{suite}').measure(config, for_train, picture)
process.write_json(dest, measured)
print(f'written to {dest}')
