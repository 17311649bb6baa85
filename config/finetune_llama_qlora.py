# Finetune Llama 3.2 by QLoRA on a card of 12 GB: the base in 4 bits, LoRA beside all Linears. The size is a key.
#
#   python data/text/prepare.py my-text/ --tokenizer=meta-llama/Llama-3.2-1B --name=mine_llama3
#   python train.py config/finetune_llama_qlora.py --dataset=mine_llama3
#   python train.py config/finetune_llama_qlora.py --dataset=mine_llama3 --init_from=meta-llama/Llama-3.2-3B
#
# Meta asks for an agreement before a download: accept it on the hub, and run `hf auth login`.
# PLANNED

out_dir = 'out-llama-qlora'
init_from = 'meta-llama/Llama-3.2-1B'  # or a folder that it was downloaded to
dataset = 'mine_llama3'
eval_interval = 50
eval_iters = 20
log_interval = 5
sample_tokens = 100

batch_size = 'auto'
total_batch_size = 16 * 2048
block_size = 2048
checkpoint_activations = True

adapter = 'lora'
base_format = 'nf4'
learning_rate = 3e-4
max_iters = 300
warmup_iters = 15
