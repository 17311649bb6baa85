"""
Token files to batches.

A split is `train.bin` or shards `train_000.bin`, `train_001.bin`, ...: raw little-endian uint16 or uint32. An epoch
cuts every file into windows of block_size tokens, from a fresh offset and in a fresh order, and draws each window once.
Which windows a batch holds follows from (seed, step, micro-step, process) alone, so a resumed run, or the same run on
another number of processes, reads the same tokens.
"""

import bisect
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from configurator import InputError
from sologpt.tokens.data_folder import paths_of


class Tokens:
    """The files of one split as one sequence of windows. Raises InputError for files that cannot be."""

    def __init__(self, data_dir, split, meta, block_size, n_ids=None):
        """meta: from tokenizer.read_meta. n_ids: ids from here up are refused (default: the tokenizer's vocabulary)."""
        paths = paths_of(data_dir, split)
        if not paths:
            own = os.path.exists(os.path.join(data_dir, 'prepare.py'))
            how = f'run python {data_dir}/prepare.py' if own else (
                f'run what prepares it, such as python data/text/prepare.py --name={os.path.basename(data_dir)}')
            raise InputError(f'no {split}.bin in {data_dir}: {how}')
        self.dtype = np.dtype('<u2' if meta['dtype'] == 'uint16' else '<u4')
        self.block_size, self.n_ids = block_size, n_ids or meta['vocab_size']
        self.paths, self.lengths = paths, []
        for path in paths:
            size = os.path.getsize(path)
            if size % self.dtype.itemsize:
                raise InputError(f'{path} has {size} bytes, not a multiple of {self.dtype.itemsize} ({meta["dtype"]}): '
                                 f'it is cut off or of another type; prepare the data again')
            self.lengths.append(size // self.dtype.itemsize)
        total, expected = sum(self.lengths), meta.get('tokens', {}).get(split)
        if expected and total > expected and os.path.exists(os.path.join(data_dir, 'progress.json')):
            total = expected  # a preparation that goes on has added some since
            starts = [0, *itertools.accumulate(self.lengths[:-1])]
            self.lengths = [min(n, total - start) for n, start in zip(self.lengths, starts, strict=True)
                            if start < total]
            del paths[len(self.lengths):]
        if expected is not None and total != expected:
            raise InputError(f'{data_dir}: {split} has {total:,} tokens but meta.json says {expected:,}: run the same '
                             f'preparation again, which goes on if it was stopped')
        if max(self.lengths) <= block_size:
            raise InputError(f'{paths[0]} has {self.lengths[0]:,} tokens, too few for block_size={block_size} '
                             f'(it takes block_size + 1): lower block_size or prepare more text')
        self._check_ids()
        # windows per file: the same in every epoch, whatever its offset
        self.windows = [max((n - block_size) // block_size, int(n > block_size)) for n in self.lengths]
        self.first_window = [0, *itertools.accumulate(self.windows)]
        self.n_tokens, self.n_windows = total, self.first_window[-1]

    def read(self, window, offset):
        """block_size + 1 tokens from the start of window number `window`, moved by `offset` in [0, 1)."""
        file = bisect.bisect_right(self.first_window, window) - 1
        n, length = self.windows[file], self.lengths[file]
        room = min(self.block_size, length - n * self.block_size)  # offsets at which n windows still fit
        start = (window - self.first_window[file]) * self.block_size + int(offset * room)
        # opened each time, which takes 4 us: a memmap takes 25, and its pages count as this process's memory
        with open(self.paths[file], 'rb', buffering=0) as f:
            f.seek(start * self.dtype.itemsize)
            return np.frombuffer(f.read((self.block_size + 1) * self.dtype.itemsize), dtype=self.dtype)

    def batch(self, windows, device):
        """
        (x, y), each (len(windows), block_size) int64, in memory that `device` copies from; windows: (number, offset)
        pairs.
        """
        rows = np.stack([self.read(window, offset) for window, offset in windows])
        if rows.max() >= self.n_ids:
            raise InputError(f'{os.path.dirname(self.paths[0])} has the token id {rows.max()}, but the vocabulary has '
                             f'{self.n_ids} ids: the data belongs to another tokenizer or model')
        rows = torch.from_numpy(rows.astype(np.int64))
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        return (x.pin_memory(), y.pin_memory()) if device.type == 'cuda' else (x, y)

    def _check_ids(self, most=2 ** 27):
        """Small data is checked whole, before the run begins; of larger data, every batch as it is read."""
        if sum(self.lengths) > most:
            return
        for path in self.paths:
            data = np.memmap(path, dtype=self.dtype, mode='r')
            largest = max(int(data[i:i + 2 ** 24].max()) for i in range(0, len(data), 2 ** 24)) if len(data) else 0
            if largest >= self.n_ids:
                raise InputError(f'{path} has the token id {largest}, but the vocabulary has {self.n_ids} ids: '
                                 f'the data belongs to another tokenizer or model')


def to_device(batch, device):
    return tuple(tensor.to(device, non_blocking=device.type == 'cuda') for tensor in batch)


class TrainBatches:
    """Batches without replacement, as a pure function of (seed, step, micro-step, process)."""

    def __init__(self, tokens, batch_size, micro_steps, seed, rank=0, world_size=1):
        """micro_steps: per process and step. The windows of a step are the same however they are divided."""
        self.tokens, self.batch_size, self.micro_steps, self.seed = tokens, batch_size, micro_steps, seed
        self.rank, self.world_size = rank, world_size
        self._epochs = {}
        self._thread, self._ahead = ThreadPoolExecutor(1), {}

    def get(self, step, micro_step, device):
        """x, y: (batch_size, block_size) int64. A thread reads the batch after this one: a disk may be slow."""
        number = step * self.micro_steps + micro_step
        batch = (self._ahead.get(number) or self._thread.submit(self._read, number, device)).result()
        self._ahead = {number + 1: self._thread.submit(self._read, number + 1, device)}
        return to_device(batch, device)

    def _read(self, number, device):
        first = (number * self.world_size + self.rank) * self.batch_size
        return self.tokens.batch([self._window(n) for n in range(first, first + self.batch_size)], device)

    def epoch(self, step):
        """Epochs begun and finished before `step`, as a fraction."""
        return step * self.micro_steps * self.world_size * self.batch_size / self.tokens.n_windows

    def _window(self, number):
        epoch, position = divmod(number, self.tokens.n_windows)
        if epoch not in self._epochs:
            rng = np.random.default_rng((self.seed, epoch))
            offset, order = rng.random(), rng.permutation(self.tokens.n_windows)
            self._epochs = {e: v for e, v in self._epochs.items() if e >= epoch - 1} | {epoch: (offset, order)}
        offset, order = self._epochs[epoch]
        return int(order[position]), offset


def eval_batches(tokens, batch_size, n_batches, device):
    """
    The same windows every time, evenly spread over the split: n_batches of batch_size, or as many full batches as
    there are windows for (one smaller batch if there is not even one).
    """
    n = min(batch_size * n_batches, tokens.n_windows)
    n -= n % batch_size if n > batch_size else 0
    windows = [(i * tokens.n_windows // n, 0.0) for i in range(n)]
    for i in range(0, n, batch_size):
        yield to_device(tokens.batch(windows[i:i + batch_size], device), device)
