"""
Train or finetune a GPT on one GPU, on several, or on a CPU.

  python train.py config/quickstart.py
  python train.py config/train_shakespeare_char.py --batch_size=32
  torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
"""

from dataclasses import replace

import torch

from configurator import configure
from sologpt.adapters.adapter import tensors_of
from sologpt.adapters.peft_files import write_adapter
from sologpt.files import checkpoint
from sologpt.files.former_keys import FORMER_KEYS
from sologpt.machine import devices, processes
from sologpt.machine import sharding as shards
from sologpt.matmuls.recipe_linear import block_linears, restore
from sologpt.matmuls.spec import parse_matmul
from sologpt.tokens.loader import TrainBatches, eval_batches
from sologpt.training.build import build_model, forecast_of
from sologpt.training.checks import check
from sologpt.training.data import open_data
from sologpt.training.final_sample import FinalSample
from sologpt.training.header import make_header
from sologpt.training.loss import TrainingLoss
from sologpt.training.machine import Machine
from sologpt.training.micro_batch import MemoryAdvice
from sologpt.training.optimizers import build_optimizer, restore_optimizer
from sologpt.training.out_dir import OutDir
from sologpt.training.progress import Progress
from sologpt.training.pruning import Pruning
from sologpt.training.report import Report
from sologpt.training.resume import resume
from sologpt.training.schedules import Schedule, set_rates
from sologpt.training.step import choose_step
from sologpt.training.stopping import FiniteWatch, Stop

# ----------------------------------------------------------------------------------------------------------------------
# output
out_dir = 'out'  # checkpoints and log.jsonl are written here
init_from = 'scratch'  # 'scratch', 'resume' (out_dir/ckpt.pt), a model of the hub such as 'gpt2', or a folder: an
# ... earlier run's out_dir, or one with config.json and model.safetensors
eval_interval = 2000  # steps between evaluations
eval_iters = 200  # batches of each split that an evaluation reads
eval_only = False  # evaluate once and exit
always_save_checkpoint = True  # save at every evaluation; False: only when the validation loss is the lowest so far
log_interval = 1  # steps between log lines
sample_tokens = 0  # at the end, print a sample of this many tokens
sample_start: str | None = None  # how that sample begins; None: with the first tokens of the validation text
# Weights & Biases
wandb_log = False  # log to Weights & Biases, beside log.jsonl
wandb_project = 'soloGPT'
wandb_run_name = 'gpt2'
# data
dataset: str | None = None  # the folder data/<dataset>; None: openwebtext if it is there, as in nanoGPT, else pystdlib
prepare_data = False  # run data/<dataset>/prepare.py if its token files are missing
batch_size: int | str = 12  # sequences in a micro-batch; 'auto': the fastest that fits, for a given total_batch_size
block_size = 1024  # tokens in a sequence
total_batch_size: int | None = None  # tokens in a step; gradient_accumulation_steps follows from it
gradient_accumulation_steps: int | None = None  # micro-batches in a step, over all processes; None: what
# ... total_batch_size asks for, or 40
# model
arch = 'gpt2'  # 'gpt2' (LayerNorm, learned positions, GELU, tied head), 'modern' (RMSNorm, also of the embedding, the
# ... queries and the keys; rotary positions; ReLU squared; an untied head; projections that begin at zero) or 'llama'
# ... (RMSNorm with a gain, rotary positions, SwiGLU, an untied head)
n_layer = 12
n_head = 12
n_embd = 768
n_kv_head: int | None = None  # heads of keys and values, each for n_head / n_kv_head heads of queries; None: n_head
head_dim: int | None = None  # the width of a head; None: n_embd / n_head
n_inner: int | None = None  # the width within the MLP; None: 4 n_embd, with swiglu two thirds of that
dropout = 0.0  # 0 for pretraining, 0.1 or more for finetuning
bias: bool | str = False  # in LayerNorms and Linears; 'qkv': only of queries, keys and values
smear = False  # each embedding takes in a gated part of the one before it
document_mask = False  # attention and smear stay within a document, that is, between two ends of text; learned
# ... positions still count from the start of the sequence
# parts of the model (None: what arch says)
norm: str | None = None  # 'layernorm', 'rmsnorm' or 'rmsnorm_gain'
positions: str | None = None  # 'learned' or 'rotary'
rope_base = 10000.0  # of rotary positions; larger for longer texts
qk_norm: bool | str | None = None  # normalise queries and keys; 'gain': with a gain
activation: str | None = None  # 'gelu', 'gelu_new', 'relu2' or 'swiglu'
tied: bool | None = None  # the head is the embedding table
zero_init: bool | None = None  # projections into the residual stream, and an untied head, begin at zero
embd_norm: bool | None = None  # normalise the embedding
# finetuning of an adapter beside a frozen base, which init_from names
adapter = ''  # '': train all weights; otherwise lora, dora, vera, bottleneck, prompt or prefix
adapter_from = ''  # go on from the adapter in this folder: an earlier run's out_dir, or one of peft's
adapter_r: int | None = None  # the rank, None: 16, or 256 with vera; the width of a bottleneck, None: 64; the number of
# ... virtual tokens of prompt and prefix, None: 16
adapter_targets: str | None = None  # the Linears: ends of names, such as attn.c_attn,mlp.c_fc, or q_proj,v_proj with
# ... arch=llama, or a regular expression for whole names; None: all of the blocks, with bottleneck the projections into
# ... the residual stream
adapter_dropout = 0.0  # dropout of the input of A, with lora, dora and vera
lora_alpha = 32.0  # B A x is multiplied by lora_alpha / adapter_r
use_rslora = False  # multiply by lora_alpha / sqrt(adapter_r) instead
loraplus_lr_ratio = 1.0  # the learning rate of B divided by that of A
base_format = 'float32'  # the format of the base's matrices: 'float32', 'bfloat16', or 'nf4' (4 bits: QLoRA)
base: str | None = None  # when an adapter is resumed: where its base is now, if it has moved
# optimizer
optimizer = 'adamw'  # or 'muon': Muon for the matrices in the blocks, AdamW for the rest; 'muon:4' orthogonalises in 4
# ... iterations (1 to 6) instead of 5
learning_rate = 6e-4  # the highest rate of AdamW
max_iters = 600000  # steps
max_minutes = 0.0  # stop after this many minutes of wall-clock time, to be resumed; 0: no limit
train_minutes = 0.0  # if the machine cannot do max_iters in this many minutes of training, the schedule follows the
# ... clock and ends with them; 0: as long as it takes
patience = 0  # stop after this many evaluations without a lower validation loss; 0: never
weight_decay: float | None = None  # of matrices; None: 0.1, with an adapter 0
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # the largest norm of the gradient; 0: no clipping
prune: float | str = 0.0  # the share of weights that become zero in each matrix of the blocks, smallest first: 0.5,
# ... or '0.5:0.2-0.7' to prune from 0.2 to 0.7 of max_iters, which is also the default
# with optimizer='muon'
muon_lr = 0.02  # the highest rate of Muon
muon_momentum = 0.95
momentum_warmup = 300  # steps in which Muon's momentum rises from 0.85
embd_lr: float | None = None  # the highest rate of the embeddings; None: learning_rate
head_lr: float | None = None  # the highest rate of an untied head; None: learning_rate
# learning rate
schedule = 'cosine'  # or 'wsd': warm-up, constant, then linearly down to min_lr in the last half of lr_decay_iters;
# ... 'wsd:0.7': in the last 70 %
decay_lr = True  # False: constant throughout
warmup_iters = 2000  # steps of linear warm-up
lr_decay_iters: int | None = None  # steps until min_lr; None: max_iters
min_lr: float | None = None  # None: learning_rate / 10, with wsd 0; other rates fall in proportion
# number formats
matmul = ''  # the recipe for the matmuls of the blocks' Linears. '': in dtype. Otherwise fp8, fp8_row, fp8_block,
# ... mxfp8, mxfp6_e2m3, mxfp6_e3m2, mxfp4, nvfp4, fp4_dge, int8, ternary, sparse24, block_dropout:RATE or
# ... strassen:LEVELS; native where the hardware has it, else emulated. Options follow a colon: 'nvfp4:keep_last=2'
# ... keeps the last 2 blocks in dtype, 'fp8:until=0.9' ends with 0.9 of max_iters, 'mxfp4:gemms=dgrad+wgrad' leaves
# ... out the forward
weights_dtype = 'float32'  # of matrices and tables. 'bfloat16' takes half the memory, also for gradients; updates are
# ... rounded stochastically, so that small ones count
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # of matmuls: 'float32', 'bfloat16' or 'float16' (with loss scaling)
tf32 = True  # on a GPU, float32 matmuls may round their inputs to TF32
accumulate = 'reduced'  # on a GPU, how 16-bit matmuls are summed. 'reduced': partial sums of a split matmul in 16 bits
# ... (torch's default); 'float32': all sums in float32; 'float16': all sums of float16 matmuls in float16, which is
# ... fast on GeForce cards, but loses digits and overflows beyond 65504
checkpoint_activations: bool | str = False  # True: keep only each block's input for the backward (a third more FLOPs);
# ... 'selective': also the results of matmuls and attention
optimizer_state = 'float32'  # the optimizer's moments; '8bit': a quarter of the memory; 'cpu': in the CPU's memory,
# ... copied in each step
memory_limit = 0.0  # GB of the GPU's memory that the run may take; 0: all that is free
attn_backend = 'auto'  # 'sdpa' (one of torch's fused kernels; on a GPU flash, if it is there), 'cudnn', 'flash', 'flex'
# ... (for document_mask) or 'math' (matmul, softmax, matmul); 'auto': measured
compile: bool | str = 'auto'  # torch.compile; 'auto': on a GPU where it works; 'cuda_graphs': also replay each
# ... micro-step as CUDA graphs, which helps models of a few million parameters
peak_flops: float | None = None  # FLOP/s that MFU is measured against; None: the datasheet's, or measured
backend: str | None = None  # torch.distributed's, with torchrun; None: nccl on GPUs, gloo on CPUs
sharding = ''  # with torchrun. '': each process holds the whole model; 'fsdp': only its share of the weights, gradients
# ... and moments, for models that do not fit one GPU
seed = 1337  # of initial weights, data order and dropout
deterministic = False  # on a GPU, add up in the same order every time: the same run gives the same weights, and takes
# ... longer. On a CPU it is always so
# ----------------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), former=FORMER_KEYS)
run = resume(globals(), config, given)  # takes over the keys of an earlier run; after this line no key changes
check(config)

# set-up
machine = Machine(config)
stop = Stop(max_minutes, machine.master)
folder = OutDir(out_dir) if machine.master and not eval_only else None
data = open_data(config, machine.master, run.get('tokenizer'))
final_sample = FinalSample(config, data) if sample_tokens else None
built = build_model(config, given, data, machine, run)
model = built.model
recipe = parse_matmul(built.config['matmul'])
opt = build_optimizer(model, built.config, machine.dtype, machine.compile)
scaler = machine.scaler()
progress = Progress.from_saved(run.saved, patience)
restore_optimizer(opt, scaler, run)
pruning = Pruning.from_config(config, [layer.weight for layer in block_linears(model)], progress.iter_num)
loss_of = TrainingLoss(model, machine.compile, sharded=bool(sharding), cuda_graphs=machine.cuda_graphs)


def forecast():
    return forecast_of(model, built.config, machine.dtype, machine.compile, machine.device.type != 'cpu')


step = choose_step(config, machine, run, loss_of, opt, data.n_ids, forecast)
replicated = machine.torchrun and not sharding
train_loss = shards.replicate(loss_of, machine.device) if replicated else loss_of
batches = TrainBatches(data.train, step.batch_size, step.micro_steps, seed, machine.rank, machine.world_size)
rates = Schedule(config)
header = make_header(built, data, machine, step, rates, opt)
report = Report(built.config, given, header, machine, progress, folder, resuming=bool(run))
clock = report.clock
watch = FiniteWatch(machine.device, report, out_dir)
autocast = machine.autocast()
memory_advice = MemoryAdvice(step.batch_size, step.gradient_accumulation_steps, machine.memory, forecast)


def training_seconds():
    return processes.of_master(progress.train_seconds + clock.seconds())


@torch.no_grad()
def evaluate():
    """The mean loss of each split over the same tokens every time; the first process's, because all decide by it."""
    model.eval()
    losses = {}
    for split, tokens in (('train', data.train), ('val', data.val)) if machine.master or sharding else ():
        total, n = 0.0, 0
        for x, y in eval_batches(tokens, step.eval_batch_size, step.eval_batches, machine.device):
            with autocast, memory_advice:
                total, n = total + loss_of(x, y), n + 1
        losses[split] = (total / n).item()
    model.train()
    return processes.of_master(losses)


def save(best):
    """Write out_dir/ckpt.pt, and best.pt if it is the best so far; of an adapter also the files that peft reads."""
    weights = tensors_of(model) if built.adapter else model.state_dict(keep_vars=True)
    weights, moments = shards.gather_whole(weights), shards.gather_whole(opt.state_dict())
    of_adapter = {'adapter': built.adapter.to_save()} if built.adapter else {}
    if not machine.master:
        return
    report.saving()
    if built.adapter and (best or progress.best_iter == 0):  # the newest, as long as none is better than the base
        write_adapter(out_dir, replace(built.adapter, tensors=weights), model.config)
    checkpoint.save_checkpoint(out_dir, {
        'model': weights, 'model_args': model.config.to_save(), **of_adapter, 'optimizer': moments,
        'scaler': scaler.state_dict(), **progress.to_save(clock.total),
        'config': built.config, 'matmul': str(recipe or ''), **machine.to_save(step, batch_size == 'auto'),
        'tokens': progress.iter_num * step.tokens, **data.to_save(), **built.carried}, best)


# the first Ctrl-C (or SIGTERM) stops the run at the end of a step, with a checkpoint; the second one at once
stop.listen()
if machine.cuda_graphs:  # gradients stay in one place: the graphs' own are overwritten by the next micro-batch's
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
first_iter = progress.iter_num
x, y = batches.get(first_iter, 0, machine.device)
# ----------------------------------------------------------------------------------------------------------------------
# TRAINING SECTION BEGIN
while True:
    # the learning rate, and the recipe's end
    position = rates.position(progress.iter_num, training_seconds)
    lr_factor = rates.factor(position)
    set_rates(opt, progress.iter_num, lr_factor)
    if recipe and recipe.until < 1 and position >= recipe.until * max_iters:
        restore(model)
        recipe = None

    # evaluate and save
    interrupted = stop.by_signal()
    if interrupted:
        if not eval_only and progress.iter_num > first_iter:
            watch.check(progress.iter_num)
            save(best=False)
            report.stopped(progress)
        break
    finished = position >= max_iters or stop.out_of_time()
    if eval_only or (finished or progress.iter_num % eval_interval == 0) and progress.iter_num != progress.last_eval:
        clock.stop()
        losses, progress.last_eval = evaluate(), progress.iter_num
        watch.check(progress.iter_num, losses['val'])
        report.evaluation(progress, losses, learning_rate * lr_factor)
        if not eval_only:
            best = progress.add_evaluation(losses['val'])
            if progress.iter_num > 0 and (best or always_save_checkpoint):
                save(best)
    if finished or eval_only or patience and progress.evals_since_best >= patience:
        break

    # forward, backward, update
    clock.start()
    # dropout follows from the step and the process, so that a resumed run needs no saved random state
    devices.seed_device(machine.device, (seed << 32) + progress.iter_num * machine.world_size + machine.rank)
    step_loss, grad_norm = torch.zeros((), device=machine.device), None
    with memory_advice:
        for micro_step in range(step.micro_steps):
            if replicated:  # gradients are averaged over the processes once, after the last micro-batch
                train_loss.require_backward_grad_sync = micro_step == step.micro_steps - 1
            if machine.cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with autocast:
                loss = train_loss(x, y)
            # the next batch, while the device computes
            ahead, micro = divmod(micro_step + 1, step.micro_steps)
            x, y = batches.get(progress.iter_num + ahead, micro, machine.device)
            scaler.scale(loss / step.micro_steps).backward()
            step_loss += loss.detach() / step.micro_steps
        if grad_clip:
            scaler.unscale_(opt)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
            if sharding:
                grad_norm = grad_norm.full_tensor()
        if weights_dtype != 'float32' or optimizer_state == '8bit':  # stochastic rounding, the same in every process
            devices.seed_device(machine.device, (seed << 32) + 2 ** 31 + progress.iter_num)
        scaler.step(opt)
        scaler.update()
        pruning.step(progress.iter_num)
        opt.zero_grad(set_to_none=not machine.cuda_graphs)
    finite = step_loss.isfinite()
    if grad_clip and not scaler.is_enabled():  # a scaler skips steps whose gradients are not finite
        finite &= grad_norm.isfinite()
    watch.add(finite, progress.iter_num)

    # log
    if progress.iter_num % log_interval == 0 or progress.iter_num == first_iter:
        step_loss = processes.mean(step_loss)
        watch.check(progress.iter_num)
        report.step(progress, step_loss, learning_rate * lr_factor, grad_norm)
    progress.iter_num += 1
# TRAINING SECTION END
# ----------------------------------------------------------------------------------------------------------------------
report.summary(progress)
if final_sample and not interrupted and (machine.master or sharding):  # processes that share the model draw together
    report.sample(final_sample.draw(model, data, machine))
report.close()
if folder:
    folder.release()
machine.end()
