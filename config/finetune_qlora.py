# Finetune a base on a small text by QLoRA: LoRA beside a base in 4 bits.
#
# Needs: out-pystdlib (python train.py config/train_pystdlib.py), or --init_from= another base.
# 31 s of training, and nearly as long for evaluating, on 2 threads of an Intel Xeon (with AMX, bfloat16), 2026-11-21:
# 204,800 tokens, val loss 1.363 nats per byte (the base has 1.497), spread 0.003 over 3 seeds; 6.5 MB of weights,
# gradients and moments.

out_dir = 'out-qlora'
init_from = 'out-pystdlib'
dataset = 'pydoc'
prepare_data = True
eval_interval = 25
eval_iters = 30
log_interval = 25

gradient_accumulation_steps = 1
batch_size = 8
block_size = 128

adapter = 'lora'
base_format = 'nf4'
adapter_r = 5
learning_rate = 0.001
max_iters = 200
warmup_iters = 20
