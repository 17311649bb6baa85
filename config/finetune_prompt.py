# Finetune a base on a small text by prompt tuning: 16 embeddings before every text are all that is trained.
#
# Needs: out-pystdlib (python train.py config/train_pystdlib.py), or --init_from= another base.
# 22 s of training, and nearly as long for evaluating, on 2 threads of an Intel Xeon (with AMX, bfloat16), 2026-11-21:
# 204,800 tokens, val loss 1.421 nats per byte (the base has 1.499), spread 0.002 over 3 seeds; 15.6 MB of weights,
# gradients and moments.

out_dir = 'out-prompt'
init_from = 'out-pystdlib'
dataset = 'pydoc'
prepare_data = True
eval_interval = 25
eval_iters = 30
log_interval = 25

gradient_accumulation_steps = 1
batch_size = 8
block_size = 128

adapter = 'prompt'
learning_rate = 0.3
max_iters = 200
warmup_iters = 20
