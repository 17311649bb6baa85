# A GPT of GPT-2's size (12 layers, 768 wide: 124M weights that are multiplied, and an embedding table of 39M) on
# FineWeb-Edu, in micro-batches for a card of 12 GB, by the modern recipe: rotary positions, QK-norm, ReLU squared,
# heads of 128, an untied head, Muon, and a constant rate that then falls to zero. Rates and steps are after modded-
# nanogpt's train_gpt_simple.py, a model of nearly these parts, which reaches 3.28 on FineWeb in 3250 to 3375 steps of
# 524,288 tokens. For a shorter run set max_iters, or train_minutes: the schedule follows.
#
#   python data/fineweb_edu/prepare.py --tokens=2B
#   python train.py config/train_fineweb_124m.py
#
# Needs: a GPU. --batch_size=auto takes the micro-batch that is fastest on yours; the tokens of a step stay the same.
# python bench.py --suite=plan config/train_fineweb_124m.py --memory=12 says what fits. Time, memory and loss: not yet
# measured here.

out_dir = 'out-fineweb-124m'
dataset = 'fineweb_edu'
eval_interval = 250
eval_iters = 200
log_interval = 10

batch_size = 8
block_size = 1024
total_batch_size = 512 * 1024

arch = 'modern'
n_layer = 12
n_head = 6
n_embd = 768

optimizer = 'muon'
muon_lr = 0.025
muon_momentum = 0.95
momentum_warmup = 300
learning_rate = 3e-3
embd_lr = 6e-3
weight_decay = 0.025
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0

max_iters = 3250
warmup_iters = 0
schedule = 'wsd:0.7'
