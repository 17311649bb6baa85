"""
A training step on a card that is not there: which kernels it launches, what they move and multiply, the memory of
torch's allocator, where the program waits for the device. A roofline gives modelled milliseconds. With --peer the same
of nanoGPT, at the same shape.

The program runs as it is, on the null GPU (sologpt/nullgpu). Nothing here is measured on a GPU.
"""

import os
import tempfile
from collections import Counter
from dataclasses import replace

from configurator import InputError
from sologpt.bench import process
from sologpt.bench.gpu_session import write_random_tokens
from sologpt.bench.peer import check_peer, link_tokens
from sologpt.bench.roofline import by_kind, by_name, list_work
from sologpt.nullgpu.build import build_library
from sologpt.nullgpu.cards import Card, find_card
from sologpt.nullgpu.events import Event, Memcpy, Op
from sologpt.nullgpu.run import DryRun, run_script, waits
from sologpt.tokens import data_folder

# a step of two micro-steps: the second adds to gradients that exist, as all but the first do
STEPS = {'max_iters': 6, 'gradient_accumulation_steps': 2, 'eval_iters': 1, 'eval_interval': 10 ** 6,
         'always_save_checkpoint': False, 'wandb_log': False, 'device': 'cuda'}
OWN_STEPS = {'total_batch_size': None, 'sample_tokens': 0, 'prepare_data': False, 'max_minutes': 0.0,
             'train_minutes': 0.0}
SHAPE = ('n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'dropout', 'bias')  # what both trainers have
ROOMY = 80  # GiB of a card for what does not fit the real one
PRINTED = 10  # the most expensive launches
STEP = 4  # the fifth step: by then all is compiled, and CUDA graphs are captured


def measure(config: dict, train_args: list[str], picture: str) -> dict:
    """The modelled figures of this trainer's step on config['card'], and of the peer's. Raises InputError."""
    card, options = find_card(config['card']), process.resolve_train(train_args)[0]
    if options['batch_size'] == 'auto':
        raise InputError('batch_size=auto is chosen by timing, which means nothing here: give a number')
    peer = check_peer(config['peer']) if config['peer'] else None
    build_library()
    figures = {'modelled': 'a roofline over the launches of a dry run; nothing was measured on a GPU',
               'card': card.name, 'bandwidth_gb_per_s': card.bandwidth, 'rows': {}}
    print(f'modelled, not measured: {card.name}, {card.bandwidth} GB/s')
    with tempfile.TemporaryDirectory() as folder:
        data = _tokens(options['dataset'], peer or '', folder)
        own = STEPS | OWN_STEPS | {'dataset': data, 'out_dir': os.path.join(folder, 'out')}
        script = os.path.join(process.ROOT, 'train.py')
        dry = _dry_run(card, os.getcwd(), script, [*train_args, *process.flags(own)])
        figures['rows']['here'] = _describe_run('here', dry, card)
        if peer:
            keys = _peer_keys(options, card) | {'dataset': data, 'out_dir': os.path.join(folder, 'out-peer')}
            dry = _dry_run(card, peer, 'train.py', process.flags(keys))
            figures['rows']['peer'] = _describe_run('peer', dry, card)
    return figures


def _tokens(dataset, peer, folder):
    """A folder of token files for both trainers: the dataset's, or random ones of GPT-2's vocabulary."""
    if dataset and data_folder.token_files(os.path.join('data', dataset), 'train'):
        return link_tokens(dataset, peer, folder)
    print("random tokens of GPT-2's vocabulary")
    data = os.path.join(folder, 'tokens')
    write_random_tokens(data, 'tokens')
    return data


def _peer_keys(options, card):
    dtype = options['dtype']
    if dtype == 'auto':
        dtype = 'bfloat16' if card.capability >= 80 else 'float16'
    return STEPS | {key: options[key] for key in SHAPE} | {'dtype': dtype, 'compile': bool(options['compile'])}


def _dry_run(card, folder, script, args):
    """The DryRun of a script. If its step does not fit the card, of the same card with more memory."""
    dry = run_script(card, folder, script, args)
    if dry.out_of_memory and card.memory < ROOMY:
        dry = run_script(replace(card, memory=ROOMY), folder, script, args)
    if dry.returncode or len(dry.training_steps()) <= STEP:
        lines = dry.stderr.strip().splitlines() or ['no message']
        last = next((line for line in lines if line.startswith('error: ')), lines[-1]).removeprefix('error: ')
        refused = f'; refused: {dry.refusals[-1]}' if dry.refusals else ''
        raise InputError(f'{last}{refused}\n  in: {os.path.basename(script)} {" ".join(args)}')
    return dry


def _describe_run(name: str, dry: DryRun, card: Card) -> dict:
    """Print and return the figures of a run on `card`, which may have been given more memory."""
    step = dry.training_steps()[STEP]
    parts = {'micro_step': step.micro_steps[1], 'update': step.update}
    whole = [event for part in [*step.micro_steps, step.update] for event in part]
    figures = {part: _describe_part(f'{name}: {part.replace("_", "-")}', events, card)
               for part, events in parts.items()}
    attention = Counter(event.name.split('.')[1] for event in parts['micro_step']
                        if isinstance(event, Op) and event.kind == 'attention')
    fits = dry.card.memory == card.memory
    figures |= {'fits': fits, 'peak_gb': dry.peak / 1e9, 'waits_in_step': len(waits(whole)),
                'attention': dict(attention), 'refusals': dry.refusals}
    print(f'{name}: peak of the allocator {dry.peak / 1e9:.2f} GB; the program waits {len(waits(whole))} times in a '
          f'step of 2 micro-steps\n{name}: attention ' +
          (', '.join(f'{kernel} x {n}' for kernel, n in attention.items()) or 'by matmuls') +
          ('' if fits else f'\n{name}: does not fit in {card.memory:g} GiB; so this was a card with {ROOMY}') +
          ''.join(f'\n{name}: refused: {refusal}' for refusal in dry.refusals), flush=True)
    return figures


def _describe_part(title: str, events: list[Event], card: Card) -> dict:
    work = list_work(events)
    sums, named = by_kind(work, card), by_name(work, card)
    copied = {direction: sum(e.bytes for e in events if isinstance(e, Memcpy) and e.direction == direction) / 1e9
              for direction in ('host_to_device', 'device_to_host')}
    print(f'\n{title + ", modelled":40} {"launches":>9} {"GB":>8} {"TFLOP":>8} {"ms":>9}')
    for kind, total in sums.items():
        if total.launches:
            print(f'  {kind:38} {_columns(total)}')
    print(f'  copied to the device {copied["host_to_device"]:.4f} GB, from it {copied["device_to_host"]:.4f} GB; '
          f'the program waits {len(waits(events))} times')
    for kind, kernel, total in named[:PRINTED]:
        print(f'    {(kind + " " + kernel)[:72]:72} {_columns(total)}')
    return {'by_kind': {kind: total.to_json() for kind, total in sums.items()},
            'copied_gb': copied, 'waits': len(waits(events)),
            'by_name': [{'kind': kind, 'name': kernel} | total.to_json() for kind, kernel, total in named]}


def _columns(total):
    return f'{total.launches:9} {total.gigabytes:8.2f} {total.tflop:8.3f} {total.milliseconds:9.3f}'
