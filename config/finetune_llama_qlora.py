# Finetune Llama 3.2 by QLoRA on a card of 12 GB: the base in 4 bits, LoRA beside all Linears. The size is a key.
#
#   python data/text/prepare.py my-text/ --tokenizer=meta-llama/Llama-3.2-1B --name=mine_llama3
#   python train.py config/finetune_llama_qlora.py --dataset=mine_llama3
#   python train.py config/finetune_llama_qlora.py --dataset=mine_llama3 --init_from=meta-llama/Llama-3.2-3B
#
# Meta asks for an agreement before a download: accept it on the hub, and run `hf auth login`.
# Foreseen on 12 GB with T=2048 and recomputed blocks (python bench.py --suite=plan config/finetune_llama_qlora.py
# --batch_size=1 --memory=12): 1B takes 1.9 GB with one sequence and 8.7 GB with 16; 3B takes 3.5 GB with one and 8.6 GB
# with 8. Time and loss: not yet measured.

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
