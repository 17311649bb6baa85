# Evaluate OpenAI's gpt2-medium (350M parameters: 24 layers, 1024 wide).
#
# Needs: data/openwebtext prepared with GPT-2's tokenizer (or --dataset=shakespeare), and the network once, for the
# weights. Time and loss: not yet measured here.

init_from = 'gpt2-medium'
dataset = 'openwebtext'
eval_only = True
batch_size = 8
eval_iters = 500  # more than in training, for a good estimate
