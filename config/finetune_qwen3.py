# Finetune Qwen3 by LoRA on a card of 12 GB: a base of 0.6B parameters in bfloat16, or of 1.7B by key.
#
#   python data/text/prepare.py my-text/ --tokenizer=Qwen/Qwen3-0.6B --name=mine_qwen3
#   python train.py config/finetune_qwen3.py --dataset=mine_qwen3
#   python train.py config/finetune_qwen3.py --dataset=mine_qwen3 --init_from=Qwen/Qwen3-1.7B
#
# PLANNED

out_dir = 'out-qwen3'
init_from = 'Qwen/Qwen3-0.6B'  # or a folder that it was downloaded to
dataset = 'mine_qwen3'
eval_interval = 50
eval_iters = 20
log_interval = 5
sample_tokens = 100

batch_size = 'auto'
total_batch_size = 16 * 2048
block_size = 2048
checkpoint_activations = True

adapter = 'lora'
base_format = 'bfloat16'
learning_rate = 3e-4
max_iters = 300
warmup_iters = 15
