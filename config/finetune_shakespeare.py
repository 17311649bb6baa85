# Finetune OpenAI's GPT-2 XL on Shakespeare: nanoGPT's config of this name.
#
# Needs: data/shakespeare (python data/shakespeare/prepare.py), the network once (6.4 GB of weights), and a GPU with
# room for 1.56 billion parameters and Adam's state (25 GB and activations); --init_from=gpt2 takes a twelfth of that.
# Time and loss: not yet measured here.

out_dir = 'out-shakespeare'
dataset = 'shakespeare'
init_from = 'gpt2-xl'
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # only if the validation loss improves

# 1 sequence x 32 accumulated x 1024 tokens = 32,768 tokens per step; Shakespeare is 9.2 of them
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
dropout = 0.0

learning_rate = 3e-5
decay_lr = False

wandb_project = 'shakespeare'
wandb_run_name = 'ft-gpt2-xl'
