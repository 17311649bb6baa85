# A small GPT (12 layers, 384 wide: 41M weights that are multiplied, and an embedding table of 19M) on FineWeb-Edu, in
# micro-batches for a card of 12 GB: the recipe of train_fineweb_124m.py, with its rates and heads of 128, for 0.8
# billion tokens.
#
#   python data/fineweb_edu/prepare.py --tokens=800M
#   python train.py config/train_fineweb_40m.py
#
# Needs: a GPU. --batch_size=auto takes the micro-batch that is fastest on yours; the tokens of a step stay the same.
# python bench.py --suite=plan config/train_fineweb_40m.py --memory=12 says what fits. Time, memory and loss: not yet
# measured here.

out_dir = 'out-fineweb-40m'
dataset = 'fineweb_edu'
eval_interval = 250
eval_iters = 200
log_interval = 10

batch_size = 16
block_size = 1024
total_batch_size = 512 * 1024

arch = 'modern'
n_layer = 12
n_head = 3
n_embd = 384

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

max_iters = 1500
warmup_iters = 0
schedule = 'wsd:0.7'
