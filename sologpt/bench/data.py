"""
Text to token files: tokens per second of the whole, in turn with tiktoken's encode_ordinary_batch on the same documents
and cores; time and memory for a gigabyte, as parquet and as one text; then what it takes to read batches of them, and
how much longer a step of a small model takes when attention keeps to documents. The text is the source of the installed
Python packages, over and over.
"""

import contextlib
import io
import itertools
import json
import os
import statistics
import tempfile
import time

import numpy as np

from configurator import InputError
from sologpt.bench.process import python
from sologpt.tokens import corpus, sources
from sologpt.tokens.tokenizer import by_name

SAMPLE = 10  # each tenth document is encoded by both in turn
SHARDS = 40  # that the tokens go to, or about
# what, sequences, tokens in each, ms of a step
STEPS = [('a step of 50 ms on a GPU', 16, 1024, 50.0), ('a step of config/speedrun_cpu.py', 16, 64, 33.6)]
N_BATCHES, N_STEPS = 10_000, 200
# of the model whose attention keeps to documents: GPTConfig's keys; sequences, tokens in each
SIZE, BATCHES = dict(arch='modern', n_layer=4, n_head=4, n_embd=256, vocab_size=256), [(8, 256), (2, 1024)]


def measure(config, train_args, picture):
    """The figures as plain values. Raises InputError."""
    if train_args:
        raise InputError(f'{" ".join(train_args)}: this suite trains nothing')
    n_bytes = int(config['gigabytes'] * 1e9)
    if n_bytes < 1:
        raise InputError(f'gigabytes={config["gigabytes"]} must be above 0')
    by_name(config['tokenizer'])  # before anything else takes time
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: os.path.join(folder, name) for name in ('sample', 'parquet', 'text')}
        # in processes of their own: what this one has used counts as memory of all that it starts
        text = json.loads(_run('write_text', paths, n_bytes)[0])
        out = _run('throughput', paths['sample'], config['tokenizer'], config['runs'])[0].splitlines()
        print(out[0], flush=True)
        figures = [json.loads(out[1])]
        for name, pattern in (('parquet', paths['parquet'] + '/*.parquet'), ('text', paths['text'] + '/all.txt')):
            dest, shard = os.path.join(folder, f'{name}-tokens'), max(1000, n_bytes // 4 // SHARDS)
            _, seconds, memory = _run('prepare', dest, pattern, config['tokenizer'], shard)
            with open(os.path.join(dest, 'meta.json'), encoding='utf-8') as f:
                tokens = sum(json.load(f)['tokens'].values())
            figures.append({'what': f'prepare, {name}', 'bytes': text, 'tokens': tokens, 'seconds': seconds,
                            'memory': memory})
            print(f'{text / 1e9:.2f} GB of {name}: {tokens / 1e6:.1f}M tokens in {seconds:.1f} s, '
                  f'{tokens / seconds / 1e6:.2f}M tok/s, {memory / 1e9:.2f} GB of memory', flush=True)
        os.sync()  # what is still being written to the disk would disturb
        for what, batch_size, block_size, step_ms in STEPS:
            out = _run('read_batches', dest, batch_size, block_size, step_ms, N_BATCHES, N_STEPS)[0]
            figures.append({'what': what, 'step_ms': step_ms, **json.loads(out)})
            row = figures[-1]
            print(f'{what}: {batch_size} x {block_size} tokens of {row["files"]} files take {row["ms"]:.3f} ms, '
                  f'{row["ms"] / step_ms:.2%} of it, if nothing else is done meanwhile; a step waits '
                  f'{row["waited_ms"]:.3f} ms, {row["waited_ms"] / step_ms:.2%}; memory grew by '
                  f'{row["grown"] / 1e6:.1f} MB in {N_BATCHES:,} batches', flush=True)
    for row in json.loads(_run('masked_steps', SIZE, BATCHES, 5 * config['runs'])[0]):
        figures.append({'what': 'document_mask', **row})
        print(f'document_mask: {row["batch_size"]} x {row["block_size"]} tokens by {row["attention"]} attention in '
              f'{row["dtype"]}: {row["ms"]:.0f} ms without, {row["ratio"]:.2f} of it with')
    return figures


def _run(function, *args):
    return python(['-c', f'from sologpt.bench import data; data.{function}(*{args!r})'])


def write_text(paths, n_bytes):
    """The same documents as parquet and as one text, and a sample of them; prints how many bytes they are."""
    import pyarrow
    import pyarrow.parquet
    for path in paths.values():
        os.makedirs(path)
    documents, sample, written, part = [], [], 0, 0

    def write(name, rows):
        table = pyarrow.table({'text': rows})
        pyarrow.parquet.write_table(table, os.path.join(paths[name], f'{part:03d}.parquet'), row_group_size=1000)
    with open(os.path.join(paths['text'], 'all.txt'), 'w', encoding='utf-8', newline='') as f:
        # again and again, each document with a number, so that none is another's copy
        for number, document in enumerate(itertools.cycle(sources.Source(sources.installed_code()))):
            document = f'# {number}\n{document}'
            documents.append(document)
            f.write(document)
            written += len(document.encode())
            if number % SAMPLE == 0:
                sample.append(document)
            if written >= n_bytes or len(documents) == 20_000:
                write('parquet', documents)
                documents, part = [], part + 1
            if written >= n_bytes:
                break
    write('sample', sample)
    print(written)


def throughput(folder, tokenizer, runs):
    """
    Prints tokens per second of the whole preparation, and of tiktoken alone with so many threads as there are cores.
    """
    sample, tokenizer = list(sources.hub(f'{folder}/*.parquet')), by_name(tokenizer)
    seconds = {'prepare': [], 'tiktoken': []}
    for run in range(runs + 1):  # the first warms up
        start = time.perf_counter()
        ids = tokenizer.encoding.encode_ordinary_batch(sample, num_threads=corpus.n_cores())
        seconds['tiktoken'].append(time.perf_counter() - start)
        n_tokens = sum(map(len, ids))
        del ids
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            corpus.prepare(os.path.join(folder, str(run)), sources.hub(f'{folder}/*.parquet'), tokenizer,
                           corpus.SomeDocuments(0.1))
        seconds['prepare'].append(time.perf_counter() - start)
    rates = {name: n_tokens / statistics.median(s[1:]) for name, s in seconds.items()}
    print(f'{n_tokens / 1e6:.1f}M tokens with {corpus.n_cores()} cores: prepare {rates["prepare"] / 1e6:.2f}M tok/s, '
          f'encode_ordinary_batch alone {rates["tiktoken"] / 1e6:.2f}M: {rates["prepare"] / rates["tiktoken"]:.0%}')
    print(json.dumps({'what': 'throughput', 'tokens': n_tokens, 'cores': corpus.n_cores(), 'tokens_per_s': rates,
                      'runs': {name: [n_tokens / t for t in s[1:]] for name, s in seconds.items()}}))


def prepare(dest, pattern, tokenizer, shard):
    source = sources.hub(pattern) if pattern.endswith('.parquet') else sources.find([pattern])
    corpus.prepare(dest, source, by_name(tokenizer), corpus.SomeDocuments(0.1), shard=shard)


def read_batches(folder, batch_size, block_size, step_ms, n, n_steps, device='cpu'):
    """
    Prints the median ms of a batch read at once after another, of the wait for one when a step lies between them, and
    by how much n of them let the process grow.
    """
    import torch

    from sologpt.machine import devices
    from sologpt.tokens.data_folder import read_meta
    from sologpt.tokens.loader import Tokens, TrainBatches
    tokens = Tokens(folder, 'train', read_meta(folder), block_size)
    batches, device = TrainBatches(tokens, batch_size, 1, seed=1), torch.device(device)
    cpu = torch.device('cpu')

    def read(steps, between):
        times = []
        for step in steps:
            start = time.perf_counter()
            batches.get(step, 0, device)
            times.append(1e3 * (time.perf_counter() - start))
            time.sleep(between)
        return float(np.median(times))

    waited_ms = read(range(n_steps), step_ms / 1e3)
    before = devices.peak_memory_gb(cpu)
    ms = read(range(n_steps, n_steps + n), 0)
    print(json.dumps({'ms': ms, 'waited_ms': waited_ms, 'batch_size': batch_size, 'block_size': block_size,
                      'files': len(tokens.paths), 'epochs': batches.epoch(n),
                      'grown': 1e9 * (devices.peak_memory_gb(cpu) - before)}))


def masked_steps(size, batches, pairs):
    """Prints, of each kind of step, the median ms without document_mask, and the ratio of the time with it to that."""
    import torch

    from model import GPT, GPTConfig
    from sologpt.machine import choices, clock, devices
    device, rows = devices.find_device('auto'), []
    dtype, _ = choices.find_dtype('auto', device, (2048, size['n_embd'], 4 * size['n_embd']))
    for batch_size, block_size in batches:
        for attention in ('sdpa', 'math'):
            torch.manual_seed(1)
            models = [GPT(GPTConfig(block_size=block_size, attn_backend=attention, document_eot=eot, **size)).to(device)
                      for eot in (None, 0)]
            ids = torch.randint(1, size['vocab_size'], (batch_size, block_size), device=device)
            ids[torch.rand(ids.shape, device=device) < 4 / block_size] = 0  # five documents in a row, or about
            times = [[], []]
            for _ in range(pairs + 2):
                for model, taken in zip(models, times, strict=True):
                    clock.synchronize(device)
                    start = time.perf_counter()
                    with devices.autocast(device, dtype):
                        model(ids, ids)[1].backward()
                    clock.synchronize(device)
                    taken.append(time.perf_counter() - start)
                    model.zero_grad()
            plain, masked = (np.array(taken[2:]) for taken in times)
            rows.append({'batch_size': batch_size, 'block_size': block_size, 'attention': attention, 'dtype': dtype,
                         'ms': 1e3 * float(np.median(plain)), 'ratio': float(np.median(masked / plain))})
    print(json.dumps(rows))
