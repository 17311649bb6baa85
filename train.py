"""
Train or finetune a GPT on one GPU, on several, or on a CPU.

  python train.py config/quickstart.py
  python train.py config/train_shakespeare_char.py --batch_size=32
  torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
"""

import gc
import glob
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch

from configurator import InputError, configure, describe, inherit
from model import ARCHITECTURES, GPT, GPTConfig
from sologpt.adapters import adapter_files
from sologpt.adapters.adapters import attach, low_rank_Bs, training_bytes
from sologpt.files import checkpoint
from sologpt.machine import choices, devices, peaks, processes
from sologpt.machine import clock as timing
from sologpt.machine import sharding as shares
from sologpt.matmuls.attention import ATTENTION
from sologpt.matmuls.held import hold_base, hold_in_bfloat16, hold_linears_in
from sologpt.matmuls.recipe_linear import convert, layers, relative_time, restore
from sologpt.matmuls.recipes import RECIPES
from sologpt.matmuls.recompute import RECOMPUTE
from sologpt.tokens import data_folder, tokenizer
from sologpt.tokens.loader import Tokens, TrainBatches, eval_batches
from sologpt.training import moments, optimizers, pruning, schedules
from sologpt.training.build import table_rows
from sologpt.training.forecast import Forecast, divisors, fastest, out_of_memory_advice
from sologpt.training.loss import TrainingLoss
from sologpt.training.report import RunLog

# ----------------------------------------------------------------------------------------------------------------------
# output
out_dir = 'out'  # checkpoints and log.jsonl are written here
init_from = 'scratch'  # 'scratch', 'resume' (out_dir/ckpt.pt), 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a
# ... folder: an earlier run's out_dir, or one with config.json and model.safetensors
eval_interval = 2000  # steps between evaluations
eval_iters = 200  # batches of each split that an evaluation reads
eval_only = False  # evaluate once and exit
always_save_checkpoint = True  # at every evaluation; False: only when the validation loss is the lowest so far
log_interval = 1  # steps between log lines
sample_tokens = 0  # at the end, print a sample of so many tokens
sample_start: str | None = None  # what that sample begins with; None: the first tokens of the validation text
# Weights & Biases
wandb_log = False  # besides log.jsonl
wandb_project = 'soloGPT'
wandb_run_name = 'gpt2'
# data
dataset: str | None = None  # the folder data/<dataset>; None: openwebtext if it is there, as in nanoGPT, else pystdlib
prepare_data = False  # run data/<dataset>/prepare.py if its token files are missing
batch_size: int | str = 12  # sequences in a micro-batch; 'auto': the fastest that fits, of a step of total_batch_size
block_size = 1024  # tokens in a sequence
total_batch_size: int | None = None  # tokens in a step; gradient_accumulation_steps follows
gradient_accumulation_steps: int | None = None  # micro-batches in a step, all processes together; None: from
# ... total_batch_size, or 40
# model
arch = 'gpt2'  # 'gpt2' (LayerNorm, learned positions, GELU, tied head) or 'modern' (RMSNorm also of embedding, queries
# ... and keys, rotary positions, ReLU squared, untied head, projections that begin at zero)
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining, 0.1 or more for finetuning
bias = False  # in LayerNorms and Linears
smear = False  # each embedding takes in a gated part of the one before it
document_mask = False  # attention, and smear, only within a document: text between two ends of text; learned positions
# ... stay those in the sequence
# parts of the model, to depart from arch (None: as arch has it)
norm: str | None = None  # 'layernorm' or 'rmsnorm'
positions: str | None = None  # 'learned' or 'rotary'
qk_norm: bool | None = None  # queries and keys normalised
activation: str | None = None  # 'gelu', 'gelu_new' or 'relu2'
tied: bool | None = None  # the head is the embedding table
zero_init: bool | None = None  # projections into the residual stream, and an untied head, begin at zero
embd_norm: bool | None = None  # the embedding normalised
# finetuning of a small part beside a base, which init_from names and which stays as it is
adapter = ''  # '': all weights are trained. Otherwise lora, dora, vera, bottleneck, prompt or prefix
adapter_from = ''  # go on from the adapter in this folder, an earlier run's out_dir or one of peft's
adapter_r: int | None = None  # rank, None: 16, with vera 256; width of bottleneck, None: 64
adapter_targets: str | None = None  # the Linears: ends of names, such as attn.c_attn,mlp.c_fc, or a regular expression
# ... for names such as transformer.h.0.attn.c_attn; None: all of the blocks, with bottleneck those into the residual
# ... stream
adapter_dropout = 0.0  # of what goes into A, with lora, dora and vera
lora_alpha = 32.0  # what B A x is multiplied by is alpha / r,
use_rslora = False  # or, True: alpha / sqrt(r)
loraplus_lr_ratio = 1.0  # by which B learns faster than A
num_virtual_tokens = 16  # of prompt and prefix, which begin as the first tokens of the training text
base_format = 'float32'  # of the base's matrices: 'nf4' (4 bits: QLoRA) or 'bfloat16'
base: str | None = None  # to resume an adapter whose base is no longer where it was: where it is now
# optimizer
optimizer = 'adamw'  # or 'muon': Muon for the matrices in the blocks, AdamW for the rest
learning_rate = 6e-4  # the highest of AdamW
max_iters = 600000  # steps
max_minutes = 0.0  # stop after so many minutes of wall-clock time, to be resumed; 0: no limit
train_minutes = 0.0  # where the machine cannot do max_iters in so many minutes of training, the schedule follows the
# ... clock and ends with them; 0: as long as it takes
patience = 0  # stop after so many evaluations without a lower validation loss; 0: never
weight_decay: float | None = None  # of matrices; None: 0.1, with an adapter 0
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: any
prune = 0.0  # share of zeros in each matrix of the blocks at the end: the smallest weights, more and more of them
prune_start = 0.2  # of max_iters: until here none
prune_end = 0.7  # of max_iters: from here on all
# with optimizer='muon'
muon_lr = 0.02  # the highest of Muon
muon_momentum = 0.95
momentum_warmup = 300  # steps in which Muon's momentum rises from 0.85
muon_iterations = 5  # of the orthogonalisation, 1 to 6
embd_lr: float | None = None  # the highest of the embeddings; None: learning_rate
head_lr: float | None = None  # the highest of an untied head; None: learning_rate
# learning rate
schedule = 'cosine'  # or 'wsd': warm-up, constant, then linearly to min_lr
decay_part = 0.5  # of lr_decay_iters in which wsd decays
decay_lr = True  # False: constant throughout
warmup_iters = 2000  # steps of linear warm-up
lr_decay_iters: int | None = None  # steps until min_lr; None: max_iters
min_lr: float | None = None  # None: learning_rate / 10, with wsd 0; other rates fall in proportion
# matmuls of the blocks' Linears: forward, dgrad (of the input) and wgrad (of the weights)
matmul = ''  # '': in dtype. Otherwise a recipe: fp8, fp8_row, fp8_block, mxfp8, mxfp6_e2m3, mxfp6_e3m2, mxfp4, nvfp4,
# ... fp4_dge, int8, ternary, sparse24, block_dropout or strassen; native where the hardware has it, else emulated
matmul_gemms = 'fwd,dgrad,wgrad'  # which of the three follow the recipe; the others are in dtype
matmul_keep_last: int | None = None  # how many of the last blocks stay in dtype; None: with nvfp4 15 %, else 0
matmul_until: float | None = None  # of max_iters: from here on in dtype; None: with sparse24 0.7, else 1
block_dropout = 0.1  # with matmul='block_dropout': share of the blocks of a Linear's input that is dropped
block_dropout_size = 128  # tokens, and dimensions, of such a block
strassen_levels = 1  # with matmul='strassen': each saves 1/8 of the products, at two to five times the error
weights_dtype = 'float32'  # of matrices and tables; 'bfloat16' is half the memory, also of gradients, which are then
# ... summed over micro-batches in bfloat16; updates are rounded stochastically, so that small ones count
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # of matmuls: 'float32', 'bfloat16' or 'float16' (with loss scaling)
tf32 = True  # on a GPU, float32 matmuls may round their inputs to TF32
reduced_precision_reduction = True  # on a GPU, 16-bit matmuls in several parts may add them in 16 bits (torch's
# ... default): a little faster, and errors grow with the width
allow_fp16_accumulation = False  # on a GPU, float16 matmuls add up in float16: fast on GeForce cards, but sums of
# ... thousands lose digits, and beyond 65504 they overflow
fp8_fast_accum = True  # on Hopper, fp8's forward matmuls add up in about 14 bits; the backward's never do
checkpoint_activations: bool | str = False  # of the blocks, keep for the backward: True: only the input (a third more
# ... FLOPs); 'selective': also what matmuls and attention make
optimizer_state = 'float32'  # the optimizer's moments: '8bit' is a quarter of the memory; 'cpu': in the CPU's memory,
# ... copied in each step
memory_limit = 0.0  # GB of the GPU's memory that the run may take; 0: all that is free
attn_backend = 'auto'  # 'sdpa' (torch's choice), 'cudnn', 'flash' or 'math' (matmul, softmax, matmul); 'auto': measured
compile: bool | str = 'auto'  # torch.compile; 'auto': on a GPU where it works
cuda_graphs = False  # on a GPU, compiled: replay each micro-step as CUDA graphs, which helps where kernels take longer
# ... to launch than to run: models of a few million parameters
peak_flops: float | None = None  # FLOP/s that MFU is measured against; None: the datasheet's, or measured
backend: str | None = None  # torch.distributed's, with torchrun; None: nccl on GPUs, gloo on CPUs
sharding = ''  # with torchrun, '': each process holds the whole model; 'fsdp': its share of the weights, gradients and
# ... moments alone, for models that do not fit one GPU
seed = 1337  # of initial weights, data order and dropout
# ----------------------------------------------------------------------------------------------------------------------
config, given = configure(globals())

# a resumed run keeps the config it was saved with, but for what is given now and what belongs to the machine
resuming = init_from == 'resume'
PARTS = (*ARCHITECTURES['gpt2'], 'smear')
ARCHITECTURE = ('arch', 'n_layer', 'n_head', 'n_embd', 'block_size', *PARTS)
ADAPTER = ('adapter', 'adapter_from', 'adapter_r', 'adapter_targets', 'lora_alpha', 'use_rslora', 'num_virtual_tokens',
           'base_format')
if resuming:
    ckpt_path = os.path.join(out_dir, 'ckpt.pt')
    resumed = checkpoint.load(ckpt_path, mmap=sharding != '')  # of which each process then reads its share
    model_config = GPTConfig.from_saved(resumed['model_args'])
    saved = resumed.get('config', {}) | {key: getattr(model_config, key) for key in ARCHITECTURE}
    if 'adapter' in resumed:  # whose sequences may be shorter than those of its base
        saved['block_size'] = resumed['config']['block_size']
    for key in (*ARCHITECTURE, *ADAPTER):
        if key in given and config[key] not in (saved.get(key, ''), None):
            raise InputError(f'{ckpt_path} has {key}={saved.get(key, "")}, but this run asks for {config[key]}: leave '
                             f'{key} out, or begin a new run in another out_dir')
    inherit(globals(), config, given, saved, ckpt_path, except_keys=(
        'out_dir', 'init_from', 'eval_only', 'max_minutes', 'device', 'dtype', 'attn_backend', 'compile', 'cuda_graphs',
        'memory_limit', 'backend', 'sharding', 'peak_flops', 'base'))
    if train_minutes and resumed.get('train_seconds', 0.0) >= 60 * train_minutes and not eval_only:
        raise InputError(f'{ckpt_path} has trained its train_minutes={train_minutes}: give more, or --train_minutes=0 '
                         f'for all of max_iters={max_iters}')
    if resumed['iter_num'] >= max_iters and not eval_only:
        raise InputError(f'{ckpt_path} is at iter {resumed["iter_num"]} of max_iters={max_iters}: nothing left to do')

# values
if isinstance(batch_size, str) and batch_size != 'auto':
    raise InputError(f'batch_size={batch_size!r} must be a number, or auto')
for key, least in {'eval_interval': 1, 'eval_iters': 1, 'log_interval': 1, 'batch_size': 1, 'block_size': 1,
                   'max_iters': 1, 'sample_tokens': 0, 'patience': 0, 'max_minutes': 0, 'train_minutes': 0,
                   'memory_limit': 0, 'learning_rate': 0, 'embd_lr': 0, 'head_lr': 0, 'muon_lr': 0, 'muon_momentum': 0,
                   'momentum_warmup': 0, 'muon_iterations': 1, 'weight_decay': 0, 'beta1': 0, 'beta2': 0,
                   'grad_clip': 0, 'warmup_iters': 0, 'decay_part': 0, 'matmul_until': 0, 'prune': 0,
                   'prune_start': 0, 'adapter_r': 1, 'loraplus_lr_ratio': 0, 'num_virtual_tokens': 1,
                   'seed': 0}.items():
    if config[key] not in (None, 'auto') and config[key] < least:
        raise InputError(f'{key}={config[key]} must be at least {least}')
for key, known in {'optimizer': ('adamw', 'muon'), 'schedule': ('cosine', 'wsd'),
                   'weights_dtype': ('float32', 'bfloat16'), 'sharding': ('', 'fsdp'),
                   'checkpoint_activations': (False, True, 'selective'),
                   'optimizer_state': tuple(moments.MOMENTS)}.items():
    if config[key] not in known:
        raise InputError(f'{key}={config[key]!r} is not known: use {" or ".join(str(k) for k in known if k != "")}')
if muon_iterations > len(optimizers.POLAR_EXPRESS):
    raise InputError(f'muon_iterations={muon_iterations} must be at most {len(optimizers.POLAR_EXPRESS)}')
for key in ('decay_part', 'matmul_until', 'prune_end'):
    if config[key] is not None and config[key] > 1:
        raise InputError(f'{key}={config[key]} must be at most 1')
if prune and train_minutes:
    raise InputError('prune follows max_iters, which train_minutes may not reach: give --train_minutes=0')
if matmul == 'ternary' and matmul_until not in (None, 1.0):
    raise InputError('matmul_until: ternary weights are the model, there is no other to go back to; leave it out')
if adapter or adapter_from:
    latent = matmul in RECIPES and RECIPES[matmul].latent
    for refused, why in (
            (init_from == 'scratch', "init_from='scratch': an adapter needs a base; set init_from to a trained model"),
            (optimizer == 'muon', "optimizer='muon' is for the matrices of a base: use adamw with an adapter"),
            (prune, f'prune={prune}: with an adapter the weights are frozen; prune the base when it is trained'),
            (checkpoint_activations == 'selective', "checkpoint_activations='selective': adapters change in place what "
                                                    'it would keep; use True'),
            (weights_dtype != 'float32', f'weights_dtype={weights_dtype}: an adapter is in float32; use base_format'),
            (latent, f'matmul={matmul} rounds the weights in its forward, but with an adapter they stay as they are'),
            (matmul and base_format == 'nf4', f'matmul={matmul} with base_format=nf4, whose products are in dtype: '
                                              f'leave one of them out')):
        if refused:
            raise InputError(why)
elif base_format != 'float32':
    raise InputError(f'base_format={base_format} is for the base of an adapter: set adapter')
if base and not (resuming and adapter):
    raise InputError(f'base={base} says where the base of a resumed adapter is; otherwise init_from does')
if prune_start > prune_end:
    raise InputError(f'prune_start={prune_start} must not be above prune_end={prune_end}')
for key, below in {'beta1': 1, 'beta2': 1, 'muon_momentum': 1, 'prune': 1, 'seed': 2 ** 31}.items():
    if config[key] >= below:
        raise InputError(f'{key}={config[key]} must be below {below}')
if peak_flops is not None and peak_flops <= 0:
    raise InputError(f'peak_flops={peak_flops} must be above 0')

# processes: one, or torchrun's
torchrun, rank, world_size = processes.find_processes()
master = rank == 0
device = devices.find_device(device)
if torchrun and device.type == 'cuda':
    device = devices.find_device(f'cuda:{os.environ.get("LOCAL_RANK", 0)}')
if sharding:
    for refused, why in (
            (not torchrun, 'is for several processes: start train.py by torchrun --standalone --nproc_per_node=2 '
                           'train.py ..., or leave it out'),
            (device.type not in ('cuda', 'cpu'), f'is for GPUs of CUDA, and CPUs: leave it out on {device.type}'),
            (optimizer_state != 'float32', f'with optimizer_state={optimizer_state}: the shares of moments are in '
                                           f'float32; give --optimizer_state=float32'),
            (batch_size == 'auto', 'with batch_size=auto: a size is tried by one process alone; give a number'),
            (weights_dtype != 'float32', f'with weights_dtype={weights_dtype}: the shares are in float32, and gathered '
                                         f'in dtype; leave weights_dtype out'),
            (prune, f'with prune={prune}: the smallest weights of a matrix are found where it is whole; leave it out')):
        if refused:
            raise InputError(f'sharding={sharding} {why}')

# the step: of total_batch_size and gradient_accumulation_steps the one that is set, or was set last, rules
if total_batch_size is not None and gradient_accumulation_steps is not None:
    order = [key for key in given if key in ('total_batch_size', 'gradient_accumulation_steps')]
    if order[-1:] == ['gradient_accumulation_steps']:
        total_batch_size = config['total_batch_size'] = None
    else:
        gradient_accumulation_steps = config['gradient_accumulation_steps'] = None
choose_batch_size = batch_size == 'auto'
if choose_batch_size:
    if total_batch_size is None:
        raise InputError("batch_size=auto keeps the tokens of a step: give total_batch_size, not "
                         "gradient_accumulation_steps")
    if total_batch_size % (block_size * world_size):
        raise InputError(f'total_batch_size={total_batch_size} tokens cannot be made of sequences of block_size='
                         f'{block_size} in {world_size} processes: change one of them')
    # until there is a model to try others
    batch_size = next(size for size in divisors(total_batch_size // block_size // world_size) if size <= 8)
tokens_per_micro_batch = batch_size * block_size
if total_batch_size is not None:
    gradient_accumulation_steps, rest = divmod(total_batch_size, tokens_per_micro_batch)
    if rest or total_batch_size < 1:
        raise InputError(f'total_batch_size={total_batch_size} tokens cannot be made of micro-batches of batch_size x '
                         f'block_size = {tokens_per_micro_batch} tokens: change one of them')
elif gradient_accumulation_steps is None:
    gradient_accumulation_steps = 40  # nanoGPT's default
if gradient_accumulation_steps < 1 or gradient_accumulation_steps % world_size:
    raise InputError(f'gradient_accumulation_steps={gradient_accumulation_steps} cannot be divided among '
                     f'{world_size} processes: make it a multiple of {world_size}')
micro_steps = gradient_accumulation_steps // world_size  # per process
tokens_per_iter = gradient_accumulation_steps * tokens_per_micro_batch
if weight_decay is None:
    weight_decay = 0.0 if adapter or adapter_from else 0.1
lr_decay_iters = max_iters if lr_decay_iters is None else lr_decay_iters
if min_lr is None:
    min_lr = learning_rate / 10 if schedule == 'cosine' else 0.0

# machine
started = time.perf_counter()
devices.prepare(device, tf32, reduced_precision_reduction, allow_fp16_accumulation)
if memory_limit and device.type != 'cuda':
    raise InputError(f'memory_limit={memory_limit} is for a GPU, not for {device.type}: leave it out')
memory_there = devices.memory_limit(device, memory_limit)
compile_reason = 'as asked'
if compile == 'auto':
    compile, compile_reason = choices.can_compile(device)
elif isinstance(compile, str):
    raise InputError(f'compile={compile!r} must be auto, True or False')
if cuda_graphs and (torchrun or choose_batch_size or not compile or device.type != 'cuda'):
    raise InputError('cuda_graphs is for one process on a GPU, compiled, with a batch_size that is given: leave it out')
if document_mask and attn_backend in choices.GPU_ATTENTION:
    raise InputError(f'attn_backend={attn_backend} has no document_mask: use auto')
if torchrun:
    backend = backend or ('nccl' if device.type == 'cuda' else 'gloo')
    processes.start(device, backend)
if master and not eval_only:
    checkpoint.check_writable(out_dir)

# data
if dataset is None:
    dataset = config['dataset'] = 'openwebtext' if data_folder.paths_of('data/openwebtext', 'train') else 'pystdlib'
data_dir = os.path.join('data', dataset)
if prepare_data and master and not glob.glob(os.path.join(glob.escape(data_dir), 'train*.bin')):
    print(f'preparing {data_dir} ...', flush=True)
    if subprocess.run([sys.executable, os.path.join(data_dir, 'prepare.py')]).returncode:
        raise InputError(f'python {data_dir}/prepare.py failed')
processes.wait()
if not os.path.isdir(data_dir):
    there = ', '.join(sorted(os.path.basename(os.path.dirname(f)) for f in glob.glob('data/*/'))) or 'nothing'
    raise InputError(f'no data in {data_dir}: set dataset to a folder in data/, where there is {there}')
meta = data_folder.read_meta(data_dir)
if resuming and not tokenizer.agree(resumed.get('tokenizer'), meta['tokenizer']):
    raise InputError(f'{ckpt_path} was trained with another tokenizer than that of {data_dir}')

# model
torch.manual_seed(seed)
trained = None  # the adapter, as it is saved
if resuming and 'adapter' in resumed:
    trained = adapter_files.Adapter.from_saved(resumed['adapter'], resumed['model'])
    init_from = base or trained.base
elif adapter_from:
    trained = adapter_files.read(adapter_from)
    if adapter not in ('', trained.config.method):
        raise InputError(f'adapter={adapter}, but {adapter_from} is a {trained.config.method}: leave one of them out')
    if 'base_format' not in given:
        base_format = config['base_format'] = trained.base_format
elif adapter:
    trained = adapter_files.Adapter(adapter_files.from_keys(config), {}, base_format=base_format)
if trained:
    if 'adapter_dropout' in given:
        trained.config.dropout = adapter_dropout
    own = adapter_files.to_keys(trained.config)
    for key, value in own.items() if adapter_from and not resuming else ():
        if key in given and config[key] not in (None, '', value):
            raise InputError(f'{adapter_from} has {key}={value}, but this run asks for {config[key]}: leave {key} out')
    config |= own
    adapter = own['adapter']
    for refused, why in (
            (base_format == 'nf4', 'base_format=nf4: a base in 4 bits would be whole in every process; use '
                                   'base_format=bfloat16'),
            (adapter in ('prompt', 'prefix'), f'adapter={adapter}, which begins as what the whole model makes of a '
                                              f'text; use another adapter')) if sharding else ():
        if refused:
            raise InputError(f'sharding={sharding} with {why}, or leave sharding out')
    base_path = checkpoint.find(init_from)
    if base_path and not eval_only and os.path.realpath(out_dir) == os.path.realpath(os.path.dirname(base_path)):
        raise InputError(f'out_dir={out_dir} is where the base is, which the adapter needs: choose another out_dir')
if resuming and not trained:
    model = GPT.skeleton(GPTConfig.from_saved(resumed['model_args'], dropout=dropout))
    checkpoint.load_weights(model, resumed['model'], ckpt_path)
elif init_from == 'scratch':
    model = GPT(GPTConfig(arch=arch, n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size,
                          vocab_size=table_rows(meta['vocab_size'], arch), n_ids=meta['vocab_size'], dropout=dropout,
                          **{key: config[key] for key in PARTS}))
else:
    if init_from.startswith('gpt2') and not os.path.isdir(init_from) and meta['vocab_size'] != tokenizer.GPT2_VOCAB:
        raise InputError(f"{init_from} needs tokens of GPT-2's tokenizer, {data_dir} has {meta['vocab_size']} ids: use "
                         f"another dataset, or prepare it with gpt2")
    if not (eval_only or checkpoint.find(init_from)) and os.path.realpath(out_dir) == os.path.realpath(init_from):
        raise InputError(f'out_dir={out_dir} is the folder of the model that the run begins from: choose another')
    model, of_base = GPT.from_checkpoint(init_from, dropout=dropout)
    if not tokenizer.agree(of_base.get('tokenizer'), meta['tokenizer']):
        raise InputError(f'{init_from} was trained with another tokenizer than that of {data_dir}')
    recipe = of_base.get('matmul', '')
    if recipe in RECIPES and RECIPES[recipe].latent and matmul != recipe:
        raise InputError(f'{init_from} was trained with matmul={recipe}, which is part of the model: '
                         f'{"it can have no adapter" if trained else f"give --matmul={recipe}"}')
    for key in ARCHITECTURE:
        if key in given and key != 'block_size' and config[key] != getattr(model.config, key):
            raise InputError(f'{init_from} has {key}={getattr(model.config, key)}, but this run asks for '
                             f'{config[key]}: give --{key}={getattr(model.config, key)}')
    if block_size > model.config.block_size:
        raise InputError(f'block_size={block_size}, but {init_from} has {model.config.block_size} positions: give '
                         f'--block_size={model.config.block_size}')
    if not trained:
        model.crop_block_size(block_size)
n_params, full_bytes = model.n_params(), 16 * model.n_params()

# number format of the matmuls; on a CPU 'auto' depends on the model's width
if dtype == 'auto' and resuming and resumed.get('dtype', {}).get(device.type):
    dtype = resumed['dtype'][device.type]  # what 'auto' found then: measured again, it might come out otherwise
chosen = resumed.get('chosen', {}).get(devices.device_name(device), {}) if resuming else {}
if attn_backend == 'auto':
    attn_backend = chosen.get('attn_backend', 'auto')
width = model.config.n_embd
dtype, dtype_reason = choices.find_dtype(dtype, device, (tokens_per_micro_batch, width, 4 * width))
# 'auto' tries things out: the first process decides
dtype, dtype_reason, compile, compile_reason = processes.of_master((dtype, dtype_reason, compile, compile_reason))
if weights_dtype != 'float32' and dtype != weights_dtype:
    raise InputError(f'weights_dtype={weights_dtype} needs matmuls in it, but dtype is {dtype} ({dtype_reason})')
if base_format == 'bfloat16' and dtype != 'bfloat16':
    raise InputError(f'base_format=bfloat16 needs matmuls in it, but dtype is {dtype} ({dtype_reason})')
attn_backend, attn_reason = processes.of_master(choices.find_attn_backend(
    attn_backend, device, dtype, block_size, None if document_mask or adapter == 'prefix' else  # these need a mask
    (8, model.config.n_head, block_size, width // model.config.n_head)))

# a base, and an adapter beside it
if trained:
    trained.base, found = init_from, adapter_files.fingerprint(model)
    adapter_files.check_base(trained, found, init_from)
    trained.base_hash, trained.base_format = found, base_format
    hold_base(model, base_format, dtype)
    if base_format == 'float32' and not matmul:  # a recipe rounds float32 weights by itself
        hold_linears_in(model, dtype)
    if trained.tensors:
        adapter_files.put_to(model, trained, ckpt_path if resuming else adapter_from)
    else:
        attach(model, trained.config)
    n_params += sum(p.numel() for p in model.parameters() if p.requires_grad)
    if block_size + model.n_virtual > model.config.block_size:
        raise InputError(f'block_size={block_size} and {model.n_virtual} virtual tokens are more than the '
                         f'{model.config.block_size} positions of {init_from}: use --block_size='
                         f'{model.config.block_size - model.n_virtual}')
    devices.give_back_memory()
for block in model.transformer.h:
    block.attn.attend, block.recompute = ATTENTION[attn_backend], RECOMPUTE[checkpoint_activations]
if document_mask:
    eot = tokenizer.eot_of(meta['tokenizer'])
    if eot is None:
        raise InputError(f'document_mask: the tokenizer of {data_dir} has no end of text: leave document_mask out, or '
                         f'use another dataset')
    if model.n_virtual:
        raise InputError('document_mask would need the virtual tokens of prompt and prefix before each document: '
                         'leave it out, or use another adapter')
    model.config.document_eot = eot
if weights_dtype == 'bfloat16':
    hold_in_bfloat16(model)
if sharding:  # a recipe rounds float32 weights, and of an adapter's some are not for matmuls
    shares.shard(model, device, None if matmul or trained else devices.DTYPES[dtype], compile)
else:
    with out_of_memory_advice(1, 1, memory_there, None):
        model.to(device)
matmul_how, matmul_now = f'in {dtype}', matmul
if matmul_until is None:
    matmul_until = RECIPES[matmul].until if matmul in RECIPES else 1.0
if matmul:
    options = {'gemms': matmul_gemms, 'rate': block_dropout, 'block': block_dropout_size, 'levels': strassen_levels,
               'fast_accum': fp8_fast_accum}
    matmul_how = convert(model, matmul, dtype, tokens_per_micro_batch, matmul_keep_last, **options)
    if master and not eval_only:  # low precision is faster on some machines, and slower on others: say which this is
        gain = relative_time(matmul, device, dtype, tokens_per_micro_batch, width, 4 * width, compile, **options)
        matmul_how += f'; a Linear takes {gain:.2f} of the time in {dtype}, forward and backward'
    if matmul_until < 1:
        matmul_how += f'; in {dtype} from {matmul_until:.0%} of the run on'
if model.config.vocab_size < meta['vocab_size'] and meta is not data_folder.ASSUMED_META:
    raise InputError(f'{data_dir} has {meta["vocab_size"]} ids, the model only {model.config.vocab_size}')
config |= {key: getattr(model.config, key) for key in ARCHITECTURE if key != 'block_size'}

if sample_tokens:
    text = tokenizer.from_dict(meta['tokenizer'])
    sample_ids = text.encode(sample_start) if sample_start else None
n_ids = min(meta['vocab_size'], model.config.vocab_size)
train_tokens, val_tokens = (Tokens(data_dir, split, meta, block_size, n_ids) for split in ('train', 'val'))
if model.n_virtual and not trained.tensors:
    first = torch.from_numpy(train_tokens.read(0, 0.0).astype('int64')).to(device)
    with devices.autocast(device, dtype):
        model.eval().begin_from(first[torch.arange(model.n_virtual) % len(first)][None])
    model.train()

by_muon = optimizer == 'muon'


def make_optimizer(model):
    if by_muon:
        return optimizers.muon(model, learning_rate, weight_decay, (beta1, beta2), muon_lr, embd_lr, head_lr,
                               muon_momentum, momentum_warmup, muon_iterations,
                          torch.bfloat16 if dtype == 'bfloat16' else torch.float32, optimizer_state)
    return optimizers.adamw(model, learning_rate, weight_decay, (beta1, beta2), low_rank_Bs(model), loraplus_lr_ratio,
                       optimizer_state)


optimizer = make_optimizer(model)
lowest = min_lr / learning_rate if learning_rate else 0.0
scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 15, enabled=dtype == 'float16')
iter_num, best_val_loss, best_iter = 0, math.inf, 0
last_eval, evals_since_best, past_seconds, wandb_id = -1, 0, 0.0, None
if resuming:
    iter_num, best_val_loss = resumed['iter_num'], float(resumed.get('best_val_loss', math.inf))
    best_iter, last_eval = resumed.get('best_iter', iter_num), resumed.get('last_eval', -1)
    evals_since_best = resumed.get('evals_since_best', 0)
    if patience and evals_since_best >= patience:  # it had lost its patience, and is asked to go on
        evals_since_best = 0
    past_seconds, wandb_id = resumed.get('train_seconds', 0.0), resumed.get('wandb_id')
    try:
        optimizers.load_state(optimizer, resumed['optimizer'])
    except (KeyError, ValueError) as e:
        raise InputError(f"{ckpt_path}: the optimizer's state does not fit this model: {e}") from None
    if resumed.get('scaler') and scaler.is_enabled():
        scaler.load_state_dict(resumed['scaler'])
    del resumed  # its memory
pruning = pruning.Pruning([layer.weight for layer in layers(model)], prune, prune_start * (max_iters - 1),
                        prune_end * (max_iters - 1), iter_num)

raw_model, replicated = model, torchrun and not sharding
mode = {'mode': 'reduce-overhead'} if cuda_graphs else {}
model = raw_loss = TrainingLoss(model, compile, sharded=bool(sharding), **mode)
autocast = devices.autocast(device, dtype)


def forecast():
    return Forecast(raw_model, make_optimizer, block_size, dtype, bool(compile), optimizer_state == 'cpu',
                    device.type != 'cpu')


def micro_step_seconds(batch_size):
    ids = torch.randint(n_ids, (batch_size, block_size), device=device)

    def run():
        with autocast:
            loss = raw_loss(ids, ids)
        loss.backward()
    try:
        return timing.shortest_seconds(run, device)
    finally:
        optimizer.zero_grad(set_to_none=True)


batch_size_reason, eval_batch_size = '', batch_size
if choose_batch_size:
    if 'batch_size' in chosen:
        batch_size, batch_size_reason = chosen['batch_size'], 'as chosen before'
    elif master:
        batch_size, batch_size_reason = fastest(divisors(total_batch_size // block_size // world_size),
                                                micro_step_seconds, forecast(), memory_there, device)
    batch_size = processes.of_master(batch_size)
    gradient_accumulation_steps = total_batch_size // block_size // batch_size
    micro_steps = gradient_accumulation_steps // world_size
    # an evaluation reads the same, whatever was chosen: batches of 12 sequences, in smaller ones where 12 do not fit
    eval_batch_size = next(size for size in divisors(12) if size <= batch_size)
    eval_iters *= 12 // eval_batch_size
chosen = {'attn_backend': attn_backend} | ({'batch_size': batch_size} if choose_batch_size else {})
if replicated:
    model = shares.replicate(model, device)
batches = TrainBatches(train_tokens, batch_size, micro_steps, seed, rank, world_size)

# header
flops_per_token = raw_model.flops_per_token(block_size)
peak, peak_source = peaks.peak_flops(device, dtype, peak_flops, tf32)
if matmul:
    peak_source += f"; {dtype}'s, whatever {matmul} could reach"
n_trained = sum(p.numel() for p in raw_model.parameters() if p.requires_grad)
resolved = config | {key: globals()[key] for key in (
    'batch_size', 'gradient_accumulation_steps', 'lr_decay_iters', 'min_lr', 'weight_decay', 'matmul_until', 'dtype',
    'attn_backend', 'compile', 'backend')}
adapter_how = ''
if trained:
    adapter_how = (
        f'adapter: {adapter}, {n_trained / n_params:.2%} of the parameters, on a base in {base_format}; weights, '
        f"gradients and AdamW's moments take {training_bytes(raw_model) / 1e6:,.1f} MB, in full finetuning "
        f'{full_bytes / 1e6:,.1f}\n')
sharded_how = ''
if sharding:
    share = sum(p.to_local().numel() for p in raw_model.parameters()) / raw_model.n_params()
    sharded_how = f'sharding: {sharding}, here {share:.1%} of the weights, their gradients and moments\n'
muon_adds = ''
if isinstance(optimizer, optimizers.Muon):
    share = optimizer.flops() / (flops_per_token * tokens_per_iter / world_size)
    muon_adds = f'; Muon adds {100 * share:.1f} % per step'
if master:
    print(f'{describe(resolved, given)}\n'
          f'device: {devices.device_name(device)}; torch {torch.__version__}; {dtype} ({dtype_reason}); attention '
          f'{attn_backend}{", within documents" if document_mask else ""} ({attn_reason}); '
          f'{"compiled (takes a minute)" if compile else f"eager ({compile_reason})"}\n'
          f'matmuls of the blocks: {matmul_how}\n{adapter_how}{sharded_how}'
          f'peak for MFU: {peak / 1e12:.4g} TFLOP/s ({peak_source})\n'
          f'data: {data_dir}, {train_tokens.n_tokens:,} + {val_tokens.n_tokens:,} tokens, vocabulary {n_ids}\n'
          f'model: {init_from}, {n_params:,} parameters, {n_trained:,} trained; '
          f'{flops_per_token / 1e6:.4g} MFLOPs per token{muon_adds}\n'
          f'tokens per iteration will be: {tokens_per_iter:,} = {batch_size} sequences x {block_size} tokens x '
          f'{micro_steps} accumulated x {world_size} processes; {max_iters:,} iterations are '
          f'{batches.epoch(max_iters):.2f} epochs'
          + (f'\nbatch_size: {batch_size_reason}' if batch_size_reason else ''), flush=True)

log = None
if master and not eval_only:
    log = RunLog(out_dir, {
        'config': resolved, 'device': devices.device_name(device), 'dtype': dtype, 'torch': torch.__version__,
        'parameters': n_params, 'trained': n_trained, 'training_bytes': training_bytes(raw_model),
        'flops_per_token': flops_per_token, 'peak_flops': peak, 'peak_source': peak_source,
        'tokens_per_iter': tokens_per_iter, 'processes': world_size,
    }, resume_at=iter_num if resuming else None, wandb_options={
        'project': wandb_project, 'name': wandb_run_name, 'config': resolved, 'id': wandb_id,
        'resume': 'allow' if wandb_id else None} if wandb_log else None)
    wandb_id = log.wandb_id or wandb_id


@torch.no_grad()
def evaluate():
    """Mean loss over the same tokens every time, of each split: the first process's, for all decide by it."""
    raw_model.eval()
    losses = {}
    for split, tokens in (('train', train_tokens), ('val', val_tokens)) if master or sharding else ():
        total, n = 0.0, 0
        for x, y in eval_batches(tokens, eval_batch_size, eval_iters, device):
            with autocast, out_of_memory_advice(eval_batch_size, gradient_accumulation_steps, memory_there, forecast):
                total, n = total + raw_loss(x, y), n + 1
        losses[split] = (total / n).item()
    raw_model.train()
    return processes.of_master(losses)


def save(best):
    weights, of_adapter = raw_model.state_dict(keep_vars=True), {}
    if trained:
        weights, of_adapter = adapter_files.tensors_of(raw_model), {'adapter': trained.to_save()}
    weights, moments = shares.whole(weights), shares.whole(optimizer.state_dict())
    if not master:
        return
    print(f'saving checkpoint to {out_dir}')
    if trained:
        if best or best_iter == 0:  # the best, or as long as none is better than the base, the newest
            adapter_files.write(out_dir, replace(trained, tensors=weights), raw_model.config)
    checkpoint.save(out_dir, {
        **of_adapter, 'model': weights, 'optimizer': moments, 'scaler': scaler.state_dict(),
        'model_args': raw_model.config.to_save(), 'config': config, 'tokenizer': meta['tokenizer'],
        'dtype': {device.type: dtype}, 'chosen': {devices.device_name(device): chosen}, 'iter_num': iter_num,
        'best_val_loss': best_val_loss, 'best_iter': best_iter, 'last_eval': last_eval,
        'evals_since_best': evals_since_best, 'train_seconds': past_seconds + clock.total,
        'tokens': iter_num * tokens_per_iter, 'data': {'name': dataset, 'source': meta.get('source', '')},
        'wandb_id': wandb_id, 'matmul': matmul_now}, best)


def check_finite(val_loss=0.0):
    """
    Raises InputError if a loss or gradient was not, of any process, before anything worse is saved. Waits for the
    device.
    """
    first = processes.least(first_bad).item()
    bad = iter_num if not math.isfinite(val_loss) else int(first) if math.isfinite(first) else None
    if bad is not None:
        if log:
            log.close(failed=True)
        raise InputError(f'the loss or its gradient is not finite at iter {bad}: stopped; a checkpoint in {out_dir} is '
                         f'from before. Try a lower learning_rate, a longer warm-up, or dtype=float32')


# the first Ctrl-C (or SIGTERM) stops the run at the end of a step, with a checkpoint; the second at once
interrupted = False


def interrupt(signum, frame):
    global interrupted
    interrupted = True
    signal.signal(signum, signal.SIG_DFL)
    if master:
        print('\nstopping after this step (once more: at once)', flush=True)


signal.signal(signal.SIGINT, interrupt)
signal.signal(signal.SIGTERM, interrupt)

if cuda_graphs:  # whose own gradients are overwritten by the next micro-batch's
    for p in raw_model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
clock = timing.StepClock(device)
first_bad = torch.full((), math.inf, device=device)  # the first step whose loss or gradient was not finite
first_iter, laps, lap_start = iter_num, [], iter_num
x, y = batches.get(iter_num, 0, device)
# ----------------------------------------------------------------------------------------------------------------------
# TRAINING SECTION BEGIN
while True:
    at = iter_num  # where the schedule is
    if train_minutes:
        at = max(at, max_iters * processes.of_master(past_seconds + clock.seconds()) / (60 * train_minutes))
    if not decay_lr:
        lr_factor = 1.0
    elif schedule == 'wsd':
        lr_factor = schedules.wsd(at, warmup_iters, lr_decay_iters, lowest, decay_part)
    else:
        lr_factor = schedules.cosine(at, warmup_iters, lr_decay_iters, lowest)
    lr = learning_rate * lr_factor
    schedules.set_rates(optimizer, iter_num, lr_factor)

    if matmul_now and matmul_until < 1 and at >= matmul_until * max_iters:
        restore(raw_model)
        matmul_now = ''

    # evaluate and save
    stopped = processes.any_process(interrupted)
    if stopped:
        if not eval_only and iter_num > first_iter:
            check_finite()
            save(best=False)
            if master:
                print(f'stopped at iter {iter_num}; go on with --init_from=resume --out_dir={out_dir}')
        break
    out_of_time = max_minutes and processes.any_process(time.perf_counter() - started > 60 * max_minutes)
    finished = at >= max_iters or out_of_time
    if eval_only or (finished or iter_num % eval_interval == 0) and iter_num != last_eval:
        clock.stop()
        losses, last_eval = evaluate(), iter_num
        check_finite(losses['val'])
        if master:
            print(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}', flush=True)
        if log:
            log.write({'iter': iter_num, 'train_loss': losses['train'], 'val_loss': losses['val'], 'lr': lr,
                       'tokens': iter_num * tokens_per_iter, 'seconds': past_seconds + clock.total})
        if not eval_only:
            best = losses['val'] < best_val_loss
            if best:
                best_val_loss, best_iter = losses['val'], iter_num
            evals_since_best = 0 if best else evals_since_best + 1
            if iter_num > 0 and (best or always_save_checkpoint):
                save(best)
    if finished or eval_only or patience and evals_since_best >= patience:
        break

    # forward, backward, update
    clock.start()
    # dropout follows from the step and the process, so that a resumed run needs no saved random state
    devices.seed(device, (seed << 32) + iter_num * world_size + rank)
    step_loss = torch.zeros((), device=device)
    with out_of_memory_advice(batch_size, gradient_accumulation_steps, memory_there, forecast):
        for micro_step in range(micro_steps):
            if replicated:  # gradients are averaged over the processes once, after the last micro-batch
                model.require_backward_grad_sync = micro_step == micro_steps - 1
            if cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with autocast:
                loss = model(x, y)
            # the next batch, while the device computes
            x, y = batches.get(iter_num + (micro_step + 1) // micro_steps, (micro_step + 1) % micro_steps, device)
            scaler.scale(loss / micro_steps).backward()
            step_loss += loss.detach() / micro_steps
        if grad_clip:
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip)
            if sharding:
                grad_norm = grad_norm.full_tensor()
        if weights_dtype != 'float32' or optimizer_state == '8bit':  # stochastic rounding, the same in every process
            devices.seed(device, (seed << 32) + 2 ** 31 + iter_num)
        scaler.step(optimizer)
        scaler.update()
        pruning.step(iter_num)
        optimizer.zero_grad(set_to_none=not cuda_graphs)
    finite = step_loss.isfinite()
    if grad_clip and not scaler.is_enabled():  # a scaler skips steps whose gradients are not finite
        finite &= grad_norm.isfinite()
    first_bad = torch.where(finite, first_bad, first_bad.clamp(max=iter_num))
    # TRAINING SECTION END: what follows only reports

    if iter_num % log_interval == 0 or iter_num == first_iter:
        step_loss = processes.mean(step_loss)
        check_finite()
        seconds = clock.lap() / (iter_num + 1 - lap_start)
        lap_start = iter_num + 1
        if iter_num > first_iter:
            laps.append(seconds)
        else:  # the first step warms up and compiles
            # what there is now stays: collecting garbage need not go through it, which takes up to half a second
            gc.collect()
            gc.freeze()
            clock.forget()
        speed = tokens_per_iter / seconds
        mfu = flops_per_token * speed / (peak * world_size)
        memory = devices.peak_memory_gb(device)
        eta = (max_iters - iter_num - 1) * seconds
        if train_minutes:
            eta = min(eta, max(0.0, 60 * train_minutes - past_seconds - clock.total))
        if master and iter_num % log_interval == 0:
            print(f'iter {iter_num}: loss {step_loss.item():.4f}, time {seconds * 1000:.2f}ms, mfu {mfu * 100:.2f}%, '
                  f'tok/s {speed / 1000:.1f}k, lr {lr:.1e}, mem {memory:.1f}GB, '
                  f'eta {timing.duration(eta)}', flush=True)
            log.write({'iter': iter_num, 'loss': step_loss.item(), 'lr': lr, 'time_ms': seconds * 1000,
                       'tokens_per_s': speed, 'mfu': mfu, 'grad_norm': grad_norm.item() if grad_clip else None,
                       'memory_gb': memory, 'tokens': (iter_num + 1) * tokens_per_iter})
    iter_num += 1

# ----------------------------------------------------------------------------------------------------------------------
clock.stop()
if master and laps:
    seconds = statistics.median(laps)
    print(f'{iter_num - first_iter:,} iterations, {(iter_num - first_iter) * tokens_per_iter:,} tokens, '
          f'{clock.total:.1f} s of training: median {seconds * 1000:.2f} ms per iteration, '
          f'{tokens_per_iter / seconds / 1000:.1f}k tok/s, mfu '
          f'{flops_per_token * tokens_per_iter / seconds / (peak * world_size) * 100:.1f}%; '
          f'lowest val loss {best_val_loss:.4f} at iter {best_iter}')
if (master or sharding) and sample_tokens and not stopped:
    raw_model.eval()
    if sample_ids is None:
        sample_ids = next(eval_batches(val_tokens, 1, 1, device))[0][0, :16].tolist()
    if sharding:  # all processes draw the same
        devices.seed(device, seed)
    with autocast:
        ids = raw_model.generate(torch.tensor([sample_ids], device=device), sample_tokens, temperature=0.8, top_k=200,
                                 eot=text.eot, window_step=max(1, block_size // 8))
    if master:
        print(f'{"-" * 40} a sample {"-" * 40}\n{text.decode([i for i in ids[0].tolist() if i != text.eot])}')
if log:
    log.close()
if torchrun:
    processes.end()
