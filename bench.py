"""
Measure what is fast on this machine: one suite at a time. Each is a file in sologpt/bench/. Keys that this script does
not have, and config files, go to train.py.

  python bench.py --suite=race --peer=../nanoGPT config/speedrun_cpu.py
  python bench.py --suite=sweep config/train_gpt2.py --dataset=shakespeare
  python bench.py --suite=ablation config/speedrun_cpu.py --dataset=shakespeare_char
  python bench.py --suite=speed --peer=../nanoGPT
  python bench.py --suite=matmul --widths=768,1024,2048,4096
  python bench.py --suite=formats config/speedrun_cpu.py --dataset=shakespeare_char
  python bench.py --suite=adapters config/finetune_lora.py
  python bench.py --suite=finetuning --init_from=../SmolLM2-135M --dataset=mine --batch_size=4 --block_size=512
  python bench.py --suite=export
  python bench.py --suite=data --tokenizer=gpt2
  python bench.py --suite=plan config/train_fineweb_124m.py --memory=12
  python bench.py --suite=dryrun config/train_gpt2.py --card="RTX 4070" --peer=../nanoGPT
  python bench.py --suite=gpu --quick=True
  python bench.py --suite=gpu --peer=../nanoGPT

race      seconds, iterations and tokens to the val loss that a peer, such as nanoGPT, reaches at its end, over seeds
sweep     one step in micro-batches of 1, 2, 4, ... sequences: time, MFU, memory; the best flags
ablation  a config, and the same without one of its parts: val loss and time, over seeds
speed     this trainer and a peer on the same token files: speed of training and of sampling
matmul    a Linear by each recipe of train.py's key `matmul`, at several widths: time, errors, memory kept for backward
formats   a config by each recipe and number format: val loss, time and memory, over seeds
adapters  a finetuning by each kind of adapter and by all weights: val loss, time and memory, over seeds; serving
finetuning  a step of finetuning, here and in transformers with peft: time and memory
export    a model of GPT-2's smallest size to each form that export.py has: time and memory
data      text to token files, beside the tokenizer alone; its memory; what it takes to read batches
plan      the GPU memory that a config will take, without a GPU; the largest micro-batch that fits
dryrun    the kernels and the memory of a config's step on a card that is not there; modelled times, beside nanoGPT's
gpu       a GPU in one go, beside nanoGPT: training, memory, a race, sampling, parts of other suites; it can be resumed
          --quick=True: whether everything works on it, in two minutes, without a peer

A peer is any trainer that follows nanoGPT's command line and console log. The race is read at this trainer's
evaluations: a short --eval_interval shows it closely.
"""

import importlib
import os
import shlex
import time

from configurator import InputError, configure
from sologpt.bench import process
from sologpt.machine import devices

# ----------------------------------------------------------------------------------------------------------------------
suite = ''  # race, sweep, ablation, speed, matmul, formats, adapters, finetuning, export, data, plan, dryrun or gpu
runs = 3  # runs of each program or config, in turn, with seeds 1, 2, ...
dest = ''  # the JSON file of the figures; a picture goes beside it where the suite draws one; '': results/<suite>.json
# race, speed, dryrun and gpu
peer = ''  # the folder of the other trainer
# race
peer_args = 'config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=145 --eval_interval=2000 \
--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 \
--lr_decay_iters=2000 --dropout=0.0'  # the arguments of the peer's train.py: nanoGPT's README command for a CPU
# sweep, adapters and finetuning
steps = 5  # training steps of each micro-batch, of each adapter with 124M parameters, or of each side
# matmul, formats, adapters, finetuning and gpu
recipes = ''  # only these rows, separated by commas: names of rows, of a recipe, or of a part of gpu; '': all
# matmul
widths = '768,1024,2048,4096'  # widths of a square Linear; the largest take longest
tokens = 2048  # rows of its input
# data
tokenizer = 'gpt2'  # an encoding of tiktoken's, or the path of FILE.tiktoken
gigabytes = 1.0  # size of the text whose preparation is measured
# plan
memory = 12.0  # GB of the GPU
check = False  # also run the step here, with random weights and tokens, and measure what it takes
# dryrun
card = 'RTX 4070'  # T4, RTX 3060, RTX 4060 Ti, RTX 4070, RTX 4090, A100, H100 or RTX 5090
# gpu
minutes = 9.0  # rows that do not fit in this time are left to the next call
small = False  # try all of it at a tiny size, on any device; this measures nothing
quick = False  # measure nothing, but try every path once at a tiny size, and say which of them work
restart = False  # measure again what dest has
# ----------------------------------------------------------------------------------------------------------------------
for_train = []
config, given = configure(globals(), pass_on=for_train)

SUITES = ('race', 'sweep', 'ablation', 'speed', 'matmul', 'formats', 'adapters', 'finetuning', 'export', 'data', 'plan',
          'dryrun', 'gpu')
if suite not in SUITES:
    raise InputError(f'suite={suite!r}: use --suite= with {", ".join(SUITES)}')
if quick and suite != 'gpu':
    raise InputError(f'quick=True is for --suite=gpu, not for {suite}')
for key in ('runs', 'steps', 'tokens'):
    if config[key] < 1:
        raise InputError(f'{key}={config[key]} must be at least 1')
# what measures nothing lies apart from results/<suite>.json, and is not to be committed
suffix = '_modelled' if suite == 'dryrun' else '_foreseen' if suite == 'plan' and not check else ''
suffix = '_quick' if quick else '_small' if small else suffix
config['dest'] = dest or os.path.join('results', f'{suite}{suffix}.json')
if not os.path.isdir(os.path.dirname(config['dest']) or '.'):
    raise InputError(f'dest={config["dest"]}: there is no such folder')
picture = os.path.splitext(config['dest'])[0] + '.png'
command = shlex.join(['python', 'bench.py', *(f'--{key}={config[key]}' for key in given), *for_train])

measured = {'command': command, 'date': time.strftime('%Y-%m-%d'), **devices.versions()}
module = importlib.import_module(f'sologpt.bench.{suite}{"_quick" if quick else ""}')
measured['figures'] = module.measure(config, for_train, picture)
process.write_json(config['dest'], measured)
print(f'written to {config["dest"]}')
if suite == 'gpu' and not quick:
    table = importlib.import_module('sologpt.bench.gpu_table').to_markdown(measured)
    table_file = os.path.splitext(config['dest'])[0] + '.md'
    with open(table_file, 'w', encoding='utf-8') as f:
        f.write(table)
    print(f'written to {table_file}:\n\n{table}')
