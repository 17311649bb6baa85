# A small character-level model of Shakespeare: nanoGPT's config of this name, value for value.
#
# Needs: data/shakespeare_char (python data/shakespeare_char/prepare.py). A GPU; time and loss there not yet measured.
# On a CPU, a smaller model (nanoGPT's README command), 2 threads of an AMD EPYC (Zen 5), 2026-11-21:
#   python train.py config/train_shakespeare_char.py --eval_iters=20 --log_interval=100 --block_size=64 \
#     --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0
# 1.54M tokens in 31 s of training (50k tokens per second, bfloat16), val loss 1.896.

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
eval_interval = 250  # often, because it will overfit
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # keep the best, not the newest

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # higher than usual, for a step has few tokens
warmup_iters = 100

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
