# Shakespeare's characters on a CPU, in a tenth of the time: the model of nanoGPT's README command for a CPU (4 layers,
# 128 wide, 64 tokens) by the modern architecture, Muon and a schedule that ends at zero.
#
# Needs: data/shakespeare_char (python data/shakespeare_char/prepare.py).
# 13 s in all on 2 threads of an Intel Xeon (Sapphire Rapids, float32), 2026-11-21: 133,120 tokens in 4.6 s of training
# (29k tokens per second), val loss 1.873 (the mean of 3 seeds), 0.4 GB. nanoGPT takes 45 s of training there to 1.90.

out_dir = 'out-speedrun-cpu'
dataset = 'shakespeare_char'
eval_interval = 130
eval_iters = 108  # the whole validation text
log_interval = 10
sample_tokens = 300

gradient_accumulation_steps = 1
batch_size = 16
block_size = 64

arch = 'modern'
n_layer = 4
n_head = 2
n_embd = 128
smear = True

optimizer = 'muon:4'
muon_lr = 0.045
muon_momentum = 0.85  # constant: a longer memory than the run is no help
learning_rate = 1e-2  # of the head and the gate, by AdamW
embd_lr = 2e-3
weight_decay = 0.0
grad_clip = 0.0

max_iters = 130
warmup_iters = 0
schedule = 'wsd:0.8'
