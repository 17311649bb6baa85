# A Llama of GPT-2's size, from scratch on FineWeb-Edu: 12 layers, 768 wide, 12 heads of queries that share 4 heads of
# keys and values, SwiGLU 2048 wide. export.py writes it as LlamaForCausalLM, and as a GGUF file.
#
#   python data/fineweb_edu/prepare.py --tokens=2B
#   python train.py config/train_llama_124m.py
#
# Needs: a GPU. --batch_size=auto takes the micro-batch that is fastest on yours. config/train_fineweb_124m.py learns
# faster: its parts are newer. Time, memory and loss: not yet measured here.

out_dir = 'out-llama-124m'
dataset = 'fineweb_edu'
eval_interval = 250
eval_iters = 200
log_interval = 10

batch_size = 8
block_size = 1024
total_batch_size = 512 * 1024

arch = 'llama'
n_layer = 12
n_head = 12
n_kv_head = 4
n_embd = 768
n_inner = 2048
tied = True

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
weight_decay = 0.025
beta1 = 0.8
beta2 = 0.95

max_iters = 3250
warmup_iters = 0
schedule = 'wsd:0.7'
