"""
Write a model or an adapter in another form.

  python export.py --to=hf --out_dir=out-gpt --dest=out-hf                   # for transformers and what reads its files
  python export.py --to=opt --adapters=out-lora-a,out-lora-b --dest=out-opt  # their base, a GPT-2, and both beside it
  python export.py --to=onnx --out_dir=out-quickstart --dest=out-onnx
  python export.py --to=merged --adapters=out-lora --dest=out-merged         # one model, as fast as its base
  python export.py --to=gguf --adapters=out-lora --dtype=q8_0 --dest=out-gguf  # for llama.cpp, Ollama and LM Studio
  python export.py --to=peft --adapters=out-lora,out-vera --weights=0.7,0.3 --dest=both     # the sum of two as one

hf       a model of arch=gpt2 as GPT2LMHeadModel, of arch=modern as ApertusForCausalLM, of arch=llama as what it was
         read from, or as LlamaForCausalLM; with its tokenizer and a model card
opt      a model of arch=gpt2 as OPTForCausalLM, which inference servers serve with many LoRA adapters
         hf and opt write adapters beside the model, each as one of Hugging Face's peft in a folder of its own
nanogpt  a model of arch=gpt2 as a ckpt.pt of nanoGPT, from which nanoGPT resumes
onnx     model.onnx: input_ids, (batch, length) int64 -> logits, (batch, length, ids); onnxruntime and TensorRT run it
torch    model.pt2, the same as an archive of torch.export, which runs without this project
gguf     a model of arch=llama as model.gguf, with its tokenizer and chat template
merged   adapters added to the weights of their base: a checkpoint for sample.py, and for train.py as init_from
         nanogpt, onnx, torch and gguf merge adapters as well
peft     adapters as one of peft: a single one as it is, several low-rank ones as a LoRA of their sum
"""

from configurator import InputError, configure
from sologpt.exports.destination import check_destination, new_folder
from sologpt.exports.gguf import write_gguf
from sologpt.exports.hf import write_hf
from sologpt.exports.merged import write_merged
from sologpt.exports.nanogpt import write_nanogpt
from sologpt.exports.onnx_program import write_onnx_program
from sologpt.exports.peft import write_peft
from sologpt.exports.source import read_adapters, read_exported_model
from sologpt.exports.torch_program import write_torch_program
from sologpt.machine.devices import DTYPES

# ----------------------------------------------------------------------------------------------------------------------
to = ''  # hf, opt, nanogpt, onnx, torch, gguf, merged or peft
dest = ''  # the folder to write: a new one, or an empty one
out_dir: str | None = None  # the model, or the base of the adapters: an out_dir, or a name or folder as for init_from;
# ... None: where the first adapter says, without adapters 'out'
adapters = ''  # folders of adapters, peft's or out_dirs of runs, separated by commas
weights = ''  # what each adapter is multiplied by, -1 to subtract it, separated by commas; '': 1 each
dtype: str | None = None  # of a model's weights: float32, bfloat16, float16 or, with gguf, q8_0; None: that of the
# ... files that the model began from, else float32
dataset = ''  # take the tokenizer of data/<dataset>; '': the checkpoint's own
# ----------------------------------------------------------------------------------------------------------------------
config, given = configure(globals())

TARGETS = ('hf', 'opt', 'nanogpt', 'onnx', 'torch', 'gguf', 'merged', 'peft')
KEEP_ADAPTERS = ('hf', 'opt', 'peft')  # the other targets merge them
if to not in TARGETS:
    raise InputError(f'to={to!r} is not known: use {", ".join(TARGETS)}')
if not adapters and to in ('merged', 'peft'):
    raise InputError('adapters is empty: give the folder of an adapter, or several with commas between')
known_dtypes = [*DTYPES, 'q8_0'] if to == 'gguf' else [*DTYPES]
if dtype not in (None, *known_dtypes):
    raise InputError(f'dtype={dtype!r} is not known: use {", ".join(known_dtypes)}')
if weights and to in ('hf', 'opt'):
    raise InputError(f'weights={weights}: with to={to} adapters are not added up; use --to=merged first')
check_destination(dest)

# what is exported
loaded = read_adapters(adapters, weights)
exported = read_exported_model(out_dir, loaded, merges=to not in KEEP_ADAPTERS, onto_merged=to == 'merged')
stored = dtype or exported.usual_dtype

# the target
with new_folder(dest) as folder:
    if to in ('hf', 'opt'):
        said = write_hf(exported, folder, to, dest, stored, dataset)
    elif to == 'nanogpt':
        said = write_nanogpt(exported, folder, dest, stored, dataset)
    elif to == 'onnx':
        said = write_onnx_program(exported, folder, stored, dataset)
    elif to == 'torch':
        said = write_torch_program(exported, folder, stored, dataset)
    elif to == 'gguf':
        said = write_gguf(exported, folder, dest, stored, dataset)
    elif to == 'merged':
        said = write_merged(exported, folder, stored)
    else:
        said = write_peft(exported, folder)
print(f'{dest}: {said}')
