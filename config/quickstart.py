# A first model in a minute and a half, on a laptop, without the network: Python's own standard library, byte by byte.
#
# Needs: nothing but Python; prepares data/pystdlib by itself.
# 65 s in all on 2 threads of an Intel Xeon (Sapphire Rapids, float32), 2026-11-21: 1.82M tokens in 60 s of training
# (30k tokens per second), val loss 1.206 nats per byte, 0.5 GB. The schedule follows the clock: a slower machine ends
# after the same minute with a worse model, a faster one sooner, with max_iters.

out_dir = 'out-quickstart'
dataset = 'pystdlib'
prepare_data = True
eval_interval = 500
eval_iters = 8
log_interval = 50
sample_tokens = 600

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

arch = 'modern'
n_layer = 4
n_head = 2
n_embd = 128
smear = True

optimizer = 'muon:4'
muon_lr = 0.03
muon_momentum = 0.9
learning_rate = 1e-2
embd_lr = 2e-3
weight_decay = 0.0
grad_clip = 0.0

max_iters = 1500
train_minutes = 1.0
warmup_iters = 0
schedule = 'wsd:0.7'
