"""
Show that two checkouts of this project compute the same bits. Run it before and after a change of structure.

  git worktree add ../before COMMIT
  python tests/same_bits.py --old=../before    # about two minutes; --only=lora,fsdp: these runs alone

Each run takes 20 steps of a tiny model on the CPU. Two runs of the new checkout are compared with the old one's run:
  new      from the beginning
  resumed  from the checkpoint that the old checkout wrote at step 10
Every logged loss, gradient norm and learning rate must be equal, and every tensor of ckpt.pt (weights and optimizer
state) and of the adapter's file, bit for bit. Prints a line per run; the exit status is 1 if anything differs.
"""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from configurator import InputError, configure  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
old = ''  # the folder of the checkout to compare with
new = ''  # the folder of the other checkout; '': the one that this script is in
only = ''  # names of runs, separated by commas; '': all
# ----------------------------------------------------------------------------------------------------------------------
configure(globals())

# nothing is measured: dtype, attention, compilation and the peak are given
MACHINE = dict(device='cpu', dtype='float32', attn_backend='math', compile=False, peak_flops=1e12)
RUN = dict(dataset='words', n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4, gradient_accumulation_steps=2,
           max_iters=20, eval_interval=5, eval_iters=3, warmup_iters=3, learning_rate=5e-3, **MACHINE)
LORA = dict(init_from='base', adapter='lora', adapter_r=4)
RUNS: dict[str, dict] = {  # as train.py takes the options today; Checkout.flags() translates them for an older one
    'gpt2': dict(attn_backend='sdpa', dropout=0.2, gradient_accumulation_steps=3),
    'muon': dict(arch='modern', smear=True, document_mask=True, optimizer='muon:4', schedule='wsd:0.7'),
    'lora': dict(LORA, adapter_dropout=0.1, loraplus_lr_ratio=4.0),
    'qlora': dict(LORA, base_format='nf4'),
    'dora': dict(LORA, adapter='dora'),
    'prefix': dict(LORA, adapter='prefix', block_size=28),
    'int8': dict(n_embd=64, matmul='int8:gemms=fwd'),
    'ternary': dict(n_embd=64, matmul='ternary'),
    'mxfp4': dict(n_embd=64, matmul='mxfp4:keep_last=1,until=0.75'),
    'bfloat16': dict(dtype='bfloat16', weights_dtype='bfloat16', prune='0.5:0.2-0.7'),
    '8bit': dict(optimizer_state='8bit'),
    'ddp': dict(dropout=0.2),
    'fsdp': dict(sharding='fsdp', arch='modern', optimizer='muon'),
}
PROCESSES = {'ddp': 2, 'fsdp': 2}  # by torchrun, with gloo

# train.py, and a copy of its out_dir as it is after the checkpoint of step 10
KEEP_A_COPY = '''import builtins, os, runpy, shutil, sys
out_dir, copy, *sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
def print_and_copy(*words, print_line=print, **options):
    print_line(*words, **options)
    if words and str(words[0]).startswith('iter 10:'):
        shutil.copytree(out_dir, copy)
builtins.print = print_and_copy
runpy.run_path(sys.argv[0], run_name='__main__')
'''


class Checkout:
    """A folder with train.py, and the keys that it has. Raises InputError if there is no train.py."""

    def __init__(self, folder: str) -> None:
        self.train = os.path.abspath(os.path.join(folder, 'train.py'))
        if not folder or not os.path.isfile(self.train):
            raise InputError(f'there is no train.py in {folder!r}: give the folder of a checkout as --old=FOLDER')
        self.keys = set(re.findall(r'^(\w+) = ', run_python(self.train, '--help'), re.M))

    def flags(self, options: Mapping) -> list[str]:
        """The options as flags of this checkout. If it still has the older keys, these are written out."""
        flags = dict(options)
        if 'matmul_until' in self.keys and 'matmul' in flags:
            flags['matmul'], *specs = re.split('[:,]', flags['matmul'])
            flags |= {f'matmul_{key}': value for key, value in (spec.split('=') for spec in specs)}
        if 'prune_start' in self.keys and 'prune' in flags:
            flags['prune'], flags['prune_start'], flags['prune_end'] = re.split('[:-]', flags['prune'])
        for older, key in (('muon_iterations', 'optimizer'), ('decay_part', 'schedule')):
            if older in self.keys and ':' in flags.get(key, ''):
                flags[key], flags[older] = flags[key].split(':')
        if 'num_virtual_tokens' in self.keys and flags.get('adapter') == 'prefix':
            flags['num_virtual_tokens'] = flags.pop('adapter_r')
        return [f'--{key}={value}' for key, value in flags.items()]

    def run(self, out_dir: str, options: Mapping, processes: int = 1, copy: str = '') -> None:
        """Run train.py. copy: the folder for a copy of out_dir at step 10. Raises InputError if the run fails."""
        start = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] * (processes > 1)
        start += ['keep_a_copy.py', out_dir, copy] if copy else []
        run_python(*start, self.train, *self.flags(options), f'--out_dir={out_dir}')


def run_python(*arguments: str) -> str:
    """What Python prints, run in the current folder with one thread. Raises InputError, with its error, if it fails."""
    one_thread = os.environ | {'OMP_NUM_THREADS': '1'}
    ran = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=one_thread)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f'exit status {ran.returncode}']
        raise InputError(next((line for line in lines if re.search(r'\b\w*error: ', line, re.I)), lines[-1]))
    return ran.stdout


def write_data(folder: str) -> None:
    """A data folder of bytes: documents of random words, each ended by byte 0, the tokenizer's end of text."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, rng.integers(2, 8)).astype('u1')) for _ in range(60)]
    documents = [b' '.join(words[i] for i in rng.integers(0, 60, rng.integers(3, 30))) for _ in range(400)]
    tokens = np.frombuffer(b'\0'.join(documents), dtype='u1').astype('<u2')
    os.makedirs(folder)
    for split, ids in (('train', tokens[:-4000]), ('val', tokens[-4000:])):
        ids.tofile(os.path.join(folder, f'{split}.bin'))
    meta = {'tokenizer': {'kind': 'bytes'}, 'vocab_size': 256, 'dtype': 'uint16', 'source': 'random words',
            'tokens': {'train': len(tokens) - 4000, 'val': 4000}}
    pathlib.Path(folder, 'meta.json').write_text(json.dumps(meta), encoding='utf-8')


def logged_values(out_dir: str) -> dict[str, object]:
    """Name -> what log.jsonl says that does not depend on the time, in the log's order."""
    records = map(json.loads, pathlib.Path(out_dir, 'log.jsonl').read_text(encoding='utf-8').splitlines())
    return {f'{key} {"before" if "val_loss" in record else "in"} step {record["iter"]}': record[key]
            for record in records for key in ('train_loss', 'val_loss', 'loss', 'grad_norm', 'lr') if key in record}


def saved_values(out_dir: str) -> dict[str, object]:
    """Name -> tensor or number, of ckpt.pt and of the adapter's file."""
    saved = torch.load(os.path.join(out_dir, 'ckpt.pt'), map_location='cpu', weights_only=True)
    adapter = os.path.join(out_dir, 'adapter_model.safetensors')
    saved['adapter file'] = load_file(adapter) if os.path.exists(adapter) else {}
    tensors = {f'{part}: {name}': saved[part][name] for part in ('model', 'adapter file') for name in saved[part]}
    return tensors | {f'optimizer: {key} of parameter {number}': value
                      for number, state in saved['optimizer']['state'].items() for key, value in state.items()}


def difference(one: object, two: object) -> float | None:
    """None if both have the same bits, else their largest difference; infinity if dtype or shape differ."""
    one, two = (x if isinstance(x, torch.Tensor) else torch.tensor(x or 0, dtype=torch.float64) for x in (one, two))
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return float('inf')
    if torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, two))):
        return None
    return (one.double() - two.double()).abs().max().item()


def first_difference(one: Mapping, two: Mapping) -> str:
    """'' if the values are the same, else the name of the first that differs, and by how much they differ."""
    for name in [*one, *two]:
        if name not in one or name not in two:
            return f'{name} is only in the {"new" if name in two else "old"} one'
    found = {name: by for name in one if (by := difference(one[name], two[name])) is not None}
    most = max(found.values(), default=0)
    return f'{[*found][0]} is the first of {len(found)} that differ, by at most {most:.3g}' if found else ''


def compare_run(name: str, before: Checkout, after: Checkout) -> list[str]:
    """Train in both checkouts, and resume the old one's checkpoint in the new one. Returns what differs, in lines."""
    options, processes, found = RUN | RUNS[name], PROCESSES.get(name, 1), []
    resume = {key: options[key] for key in (*MACHINE, 'sharding') if key in options} | {'init_from': 'resume'}
    before.run(f'old-{name}', options, processes, copy=f'resumed-{name}')
    for label, of_run in (('new', options), ('resumed', resume)):
        try:
            after.run(f'{label}-{name}', of_run, processes)
            for file, values in (('log.jsonl', logged_values), ('checkpoint', saved_values)):
                if differs := first_difference(values(f'old-{name}'), values(f'{label}-{name}')):
                    found.append(f'{label}: {file}: {differs}')
        except (InputError, OSError) as e:
            found.append(f'{label}: {e}')
    return found


names = [name.strip() for name in only.split(',')] if only else list(RUNS)
if unknown := set(names) - set(RUNS):
    raise InputError(f'only={only}: there is no run {min(unknown)!r}; use {", ".join(RUNS)}')
before, after = Checkout(old), Checkout(new or ROOT)
started, n_same = time.perf_counter(), 0
with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    write_data(os.path.join('data', 'words'))
    pathlib.Path('keep_a_copy.py').write_text(KEEP_A_COPY, encoding='utf-8')
    if any('adapter' in RUNS[name] for name in names):
        before.run('base', RUN)
    for name in names:
        found = compare_run(name, before, after)
        n_same += not found
        print(f'{name:<10}{"differs" if found else "same"}', *found, sep='\n    ', flush=True)
print(f'{n_same} of {len(names)} runs are the same, {time.perf_counter() - started:.0f} s')
sys.exit(n_same < len(names))
