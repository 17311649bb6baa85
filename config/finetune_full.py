# Finetune all weights of a base on a small text: what the adapters in config/finetune_*.py are compared with.
#
# Needs: out-pystdlib (python train.py config/train_pystdlib.py), or --init_from= another base.
# 27 s of training, and nearly as long for evaluating, on 2 threads of an Intel Xeon (with AMX, bfloat16), 2026-11-21:
# 204,800 tokens, val loss 1.348 nats per byte (the base: 1.490), spread 0.006 over 3 seeds; 116.9 MB of weights,
# gradients and moments.

out_dir = 'out-full'
init_from = 'out-pystdlib'
dataset = 'pydoc'
prepare_data = True
eval_interval = 25
eval_iters = 30
log_interval = 25

gradient_accumulation_steps = 1
batch_size = 8
block_size = 128

learning_rate = 0.0001
max_iters = 200
warmup_iters = 20
