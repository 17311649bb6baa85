# GPT-2 (124M parameters) from scratch: nanoGPT's recipe.
#
# Needs: python data/openwebtext/prepare.py (or --dataset=fineweb_edu), and GPUs: 8 of them, or patience.
# 491,520 tokens per step on any number of processes. Time and loss: not yet measured here.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

out_dir = 'out-gpt2'
dataset = 'openwebtext'
batch_size = 12
block_size = 1024
total_batch_size = 12 * 1024 * 40

n_layer = 12
n_head = 12
n_embd = 768

learning_rate = 6e-4
max_iters = 600000  # 300 billion tokens
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'
