# Finetune SmolLM2 on a small text by LoRA beside all Linears. The size is a key: SmolLM2-135M, -360M or -1.7B.
#
#   python data/pydoc/prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M --name=pydoc_smollm2 --size=0
#   python train.py config/finetune_smollm2.py
#   python train.py config/finetune_smollm2.py --init_from=HuggingFaceTB/SmolLM2-1.7B --base_format=nf4
#
# MEASURED

out_dir = 'out-smollm2'
init_from = 'HuggingFaceTB/SmolLM2-135M'  # or a folder that it was downloaded to
dataset = 'pydoc_smollm2'
eval_interval = 25
eval_iters = 4
log_interval = 5
sample_tokens = 60

batch_size = 4
gradient_accumulation_steps = 1
block_size = 512

adapter = 'lora'
learning_rate = 1e-3
max_iters = 100
warmup_iters = 10
