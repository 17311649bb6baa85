"""
Text to token files. The text is the source of the installed Python packages, over and over. It is measured

- how many tokens per second are prepared, in turn with tiktoken's encode_ordinary_batch on the same documents and cores
- the time and the memory of preparing a gigabyte, as parquet and as one text
- what it takes to read batches of the token files
- how much longer a step of a small model takes when attention keeps to documents

Only the functions that need torch import it, because it would count as memory of the preparation.
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
from sologpt.bench.process import read_json, refuse_training, run_python
from sologpt.tokens import sources
from sologpt.tokens.blocks import n_cores
from sologpt.tokens.corpus import Options, prepare_corpus
from sologpt.tokens.splits import SomeDocuments
from sologpt.tokens.tokenizer import tokenizer_by_name

SAMPLE = 10  # each tenth document is encoded by both in turn
SHARDS = 40  # about how many files the tokens go to
# what, sequences, tokens in each, ms of a step
STEPS = [('a step of 50 ms on a GPU', 16, 1024, 50.0), ('a step of config/speedrun_cpu.py', 16, 64, 33.6)]
N_BATCHES, N_STEPS = 10_000, 200
# the model whose attention keeps to documents, by GPTConfig's keys; sequences, tokens in each
SIZE, BATCHES = dict(arch='modern', n_layer=4, n_head=4, n_embd=256, vocab_size=256), [(8, 256), (2, 1024)]


def measure(config: dict, train_args: list[str], picture: str) -> list[dict]:
    """The figures. Raises InputError."""
    refuse_training(train_args)
    n_bytes = int(config['gigabytes'] * 1e9)
    if n_bytes < 1:
        raise InputError(f'gigabytes={config["gigabytes"]} must be above 0')
    tokenizer_by_name(config['tokenizer'])  # a wrong name is refused before anything takes time
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: os.path.join(folder, name) for name in ('sample', 'parquet', 'text')}
        # in processes of their own: what this one has used counts as memory of all that it starts
        text_bytes = json.loads(_run('write_text', paths, n_bytes)[0])
        out = _run('throughput', paths['sample'], config['tokenizer'], config['runs'])[0].splitlines()
        print(out[0], flush=True)
        figures = [json.loads(out[1])]
        shard = max(1000, n_bytes // 4 // SHARDS)
        for name, pattern in (('parquet', paths['parquet'] + '/*.parquet'), ('text', paths['text'] + '/all.txt')):
            dest = os.path.join(folder, f'{name}-tokens')
            figures.append(_measure_preparation(name, dest, pattern, config['tokenizer'], shard, text_bytes))
        os.sync()  # what is still being written to the disk would disturb
        figures += [_measure_reading(dest, *step) for step in STEPS]
    for row in json.loads(_run('masked_steps', SIZE, BATCHES, 5 * config['runs'])[0]):
        figures.append({'what': 'document_mask', **row})
        print(f'document_mask: {row["batch_size"]} x {row["block_size"]} tokens by {row["attention"]} attention in '
              f'{row["dtype"]}: {row["ms"]:.0f} ms without, {row["ratio"]:.2f} of it with')
    return figures


def _run(function, *args):
    return run_python(['-c', f'from sologpt.bench import data; data.{function}(*{args!r})'])


def _measure_preparation(name, dest, pattern, tokenizer, shard, text_bytes):
    _, seconds, memory = _run('prepare', dest, pattern, tokenizer, shard)
    tokens = sum(read_json(os.path.join(dest, 'meta.json'))['tokens'].values())
    print(f'{text_bytes / 1e9:.2f} GB of {name}: {tokens / 1e6:.1f}M tokens in {seconds:.1f} s, '
          f'{tokens / seconds / 1e6:.2f}M tok/s, {memory / 1e9:.2f} GB of memory', flush=True)
    return {'what': f'prepare, {name}', 'bytes': text_bytes, 'tokens': tokens, 'seconds': seconds, 'memory': memory}


def _measure_reading(folder, what, batch_size, block_size, step_ms):
    row = json.loads(_run('read_batches', folder, batch_size, block_size, step_ms, N_BATCHES, N_STEPS)[0])
    print(f'{what}: {batch_size} x {block_size} tokens of {row["files"]} files take {row["ms"]:.3f} ms, '
          f'{row["ms"] / step_ms:.2%} of it, if nothing else is done meanwhile; a step waits '
          f'{row["waited_ms"]:.3f} ms, {row["waited_ms"] / step_ms:.2%}; memory grew by '
          f'{row["grown"] / 1e6:.1f} MB in {N_BATCHES:,} batches', flush=True)
    return {'what': what, 'step_ms': step_ms, **row}


def write_text(paths: dict[str, str], n_bytes: int) -> None:
    """Write the same documents as parquet and as one text, and a sample of them. Prints how many bytes they are."""
    import pyarrow
    import pyarrow.parquet
    for path in paths.values():
        os.makedirs(path)
    documents, sample, written, part = [], [], 0, 0

    def write(name, rows):
        table = pyarrow.table({'text': rows})
        pyarrow.parquet.write_table(table, os.path.join(paths[name], f'{part:03d}.parquet'), row_group_size=1000)
    with open(os.path.join(paths['text'], 'all.txt'), 'w', encoding='utf-8', newline='') as f:
        # over and over, each document with a number, so that no document is a copy of another
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


def throughput(folder: str, tokenizer: str, runs: int) -> None:
    """Print tokens per second of the whole preparation, and of tiktoken alone with as many threads as cores."""
    sample, tokenizer = list(sources.hub_source(f'{folder}/*.parquet')), tokenizer_by_name(tokenizer)
    seconds = {'prepare': [], 'tiktoken': []}
    for run in range(runs + 1):  # the first warms up
        start = time.perf_counter()
        ids = tokenizer.encoding.encode_ordinary_batch(sample, num_threads=n_cores())
        seconds['tiktoken'].append(time.perf_counter() - start)
        n_tokens = sum(map(len, ids))
        del ids
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            prepare_corpus(os.path.join(folder, str(run)), sources.hub_source(f'{folder}/*.parquet'), tokenizer,
                           SomeDocuments(0.1))
        seconds['prepare'].append(time.perf_counter() - start)
    rates = {name: n_tokens / statistics.median(s[1:]) for name, s in seconds.items()}
    print(f'{n_tokens / 1e6:.1f}M tokens with {n_cores()} cores: prepare {rates["prepare"] / 1e6:.2f}M tok/s, '
          f'encode_ordinary_batch alone {rates["tiktoken"] / 1e6:.2f}M: {rates["prepare"] / rates["tiktoken"]:.0%}')
    print(json.dumps({'what': 'throughput', 'tokens': n_tokens, 'cores': n_cores(), 'tokens_per_s': rates,
                      'runs': {name: [n_tokens / t for t in s[1:]] for name, s in seconds.items()}}))


def prepare(dest: str, pattern: str, tokenizer: str, shard: int) -> None:
    """Write token files of the texts that match the pattern. shard: tokens in a file."""
    source = sources.hub_source(pattern) if pattern.endswith('.parquet') else sources.find_source([pattern])
    prepare_corpus(dest, source, tokenizer_by_name(tokenizer), SomeDocuments(0.1), Options(shard_tokens=shard))


def read_batches(folder: str, batch_size: int, block_size: int, step_ms: float, n: int, n_steps: int,
                 device: str = 'cpu') -> None:
    """
    Print the median ms of a batch that is read at once after another, the median wait for one when a step lies between
    them, and how much the memory of the process grows with n batches.
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


def masked_steps(size: dict, batches: list[tuple[int, int]], pairs: int) -> None:
    """Print, for each kind of step, the median ms without document_mask, and the ratio of its time with it."""
    import torch

    from model import GPT, GPTConfig
    from sologpt.bench.timing import timed
    from sologpt.machine import choices, devices
    device, rows = devices.find_device('auto'), []
    dtype, _ = choices.find_dtype('auto', device, (2048, size['n_embd'], 4 * size['n_embd']))
    for batch_size, block_size in batches:
        for attention in ('sdpa', 'math'):
            torch.manual_seed(1)
            models = [GPT(GPTConfig(block_size=block_size, attn_backend=attention, document_eot=eot, **size)).to(device)
                      for eot in (None, 0)]
            ids = torch.randint(1, size['vocab_size'], (batch_size, block_size), device=device)
            ids[torch.rand(ids.shape, device=device) < 4 / block_size] = 0  # about five documents in a row
            times = [[], []]
            for _ in range(pairs + 2):
                for model, seconds in zip(models, times, strict=True):
                    seconds.append(timed(lambda model=model, ids=ids: _forward_and_backward(model, ids, dtype), device))
                    model.zero_grad()
            plain, masked = (np.array(seconds[2:]) for seconds in times)
            rows.append({'batch_size': batch_size, 'block_size': block_size, 'attention': attention, 'dtype': dtype,
                         'ms': 1e3 * float(np.median(plain)), 'ratio': float(np.median(masked / plain))})
    print(json.dumps(rows))


def _forward_and_backward(model, ids, dtype):
    from sologpt.machine import devices
    with devices.autocast(ids.device, dtype):
        model(ids, ids)[1].backward()
