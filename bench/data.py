"""
Text to token files: tokens per second of the whole, in turn with tiktoken's encode_ordinary_batch on the same documents
and cores; time and memory for a gigabyte, as parquet and as one text; then what it takes to read batches of them. The
text is the source of the installed Python packages, over and over.
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

import corpus
import sources
from bench.process import python
from configurator import InputError
from tokenizer import by_name

SAMPLE = 0.1  # of the text that both encode in turn
SHARDS = 40  # that the tokens go to, or about
STEPS = [('a step of 50 ms on a GPU', 16, 1024, 50.0), ('a step of config/speedrun_cpu.py', 16, 64, 33.6)]
N_BATCHES = 10_000


def measure(config, train_args, picture):
    """The figures as plain values. Raises InputError."""
    if train_args:
        raise InputError(f'{" ".join(train_args)}: this suite trains nothing')
    n_bytes = int(config['gigabytes'] * 1e9)
    if n_bytes < 1:
        raise InputError(f'gigabytes={config["gigabytes"]} must be above 0')
    tokenizer = by_name(config['tokenizer'])
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: os.path.join(folder, name) for name in ('sample', 'parquet', 'text')}
        text, sample = write_text(paths, n_bytes)
        figures = [throughput(paths['sample'], sample, tokenizer, config['runs'])]
        del sample
        for name, pattern in (('parquet', paths['parquet'] + '/*.parquet'), ('text', paths['text'] + '/all.txt')):
            dest, shard = os.path.join(folder, f'{name}-tokens'), max(1000, n_bytes // 4 // SHARDS)
            _, seconds, memory = python(['-c', f'from bench import data; data.prepare({dest!r}, {pattern!r}, '
                                               f'{config["tokenizer"]!r}, {shard})'])
            with open(os.path.join(dest, 'meta.json'), encoding='utf-8') as f:
                tokens = sum(json.load(f)['tokens'].values())
            figures.append({'what': f'prepare, {name}', 'bytes': text, 'tokens': tokens, 'seconds': seconds,
                            'memory': memory})
            print(f'{text / 1e9:.2f} GB of {name}: {tokens / 1e6:.1f}M tokens in {seconds:.1f} s, '
                  f'{memory / 1e9:.2f} GB of memory')
        for what, batch_size, block_size, step_ms in STEPS:
            out, _, _ = python(['-c', f'from bench import data; data.read_batches({dest!r}, {batch_size}, '
                                      f'{block_size}, {N_BATCHES})'])
            figures.append({'what': what, 'step_ms': step_ms, **json.loads(out)})
            row = figures[-1]
            print(f'{what}: {batch_size} x {block_size} tokens of {row["files"]} files in {row["ms"]:.3f} ms, '
                  f'{row["ms"] / step_ms:.2%}; memory grew by {row["grown"] / 1e6:.1f} MB in {N_BATCHES:,} batches')
    return figures


def write_text(paths, n_bytes):
    """The same documents as parquet and as one text, and a sample of them; (bytes written, the sample)."""
    import pyarrow
    import pyarrow.parquet
    for path in paths.values():
        os.makedirs(path)
    documents, sample, written, part = [], [], 0, 0

    def flush(name):
        table = pyarrow.table({'text': documents})
        pyarrow.parquet.write_table(table, os.path.join(paths[name], f'{part:03d}.parquet'), row_group_size=1000)
    with open(os.path.join(paths['text'], 'all.txt'), 'w', encoding='utf-8', newline='') as f:
        # the source of the packages again and again, each document with a number, so that none is another's copy
        for number, document in enumerate(itertools.cycle(sources.Source(sources.installed_code()))):
            document = f'# {number}\n{document}'
            documents.append(document)
            f.write(document)
            written += len(document.encode())
            if not sample and written >= SAMPLE * n_bytes:
                sample = list(documents)
                flush('sample')
            if written >= n_bytes or len(documents) == 20_000:
                flush('parquet')
                documents, part = [], part + 1
            if written >= n_bytes:
                return written, sample


def throughput(folder, sample, tokenizer, runs):
    """Tokens per second of the whole preparation, and of tiktoken alone with so many threads as there are cores."""
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
                           corpus.SomeDocuments(0.01))
        seconds['prepare'].append(time.perf_counter() - start)
    rates = {name: n_tokens / statistics.median(s[1:]) for name, s in seconds.items()}
    print(f'{n_tokens / 1e6:.1f}M tokens with {corpus.n_cores()} cores: prepare {rates["prepare"] / 1e6:.2f}M tok/s, '
          f'encode_ordinary_batch alone {rates["tiktoken"] / 1e6:.2f}M: {rates["prepare"] / rates["tiktoken"]:.0%}')
    return {'what': 'throughput', 'tokens': n_tokens, 'cores': corpus.n_cores(), 'tokens_per_s': rates,
            'runs': {name: [n_tokens / t for t in s[1:]] for name, s in seconds.items()}}


def prepare(dest, pattern, tokenizer, shard):
    source = sources.hub(pattern) if pattern.endswith('.parquet') else sources.find([pattern])
    corpus.prepare(dest, source, by_name(tokenizer), corpus.SomeDocuments(0.01), shard=shard)


def read_batches(folder, batch_size, block_size, n):
    """Prints the median ms of a batch, and by how much n of them let the process grow."""
    import resource

    import torch

    from loader import Tokens, TrainBatches
    from tokenizer import read_meta
    tokens = Tokens(folder, 'train', read_meta(folder), block_size)
    batches, device = TrainBatches(tokens, batch_size, 1, seed=1), torch.device('cpu')
    times, before = [], None
    for step in range(n + 100):
        start = time.perf_counter()
        batches.get(step, 0, device)
        times.append(time.perf_counter() - start)
        if step == 100:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json.dumps({'ms': 1e3 * float(np.median(times)), 'batch_size': batch_size, 'block_size': block_size,
                      'files': len(tokens.paths), 'epochs': batches.epoch(n), 'grown': grown}))
