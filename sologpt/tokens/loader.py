"""
Token files to batches.

    tokens = Tokens('data/mine', 'train', read_meta('data/mine'), block_size=1024)
    batches = TrainBatches(tokens, batch_size=12, micro_steps=4, seed=1)
    x, y = batches.get(step, micro_step, device)

An epoch cuts every file into windows of block_size tokens, at a new offset and in a new order, and draws each window
once. Which windows a batch has depends only on (seed, step, micro-step, process). So a resumed run reads the same
tokens, and so does the same run on another number of processes.
"""

import bisect
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from configurator import InputError
from sologpt.tokens.data_folder import token_files

Batch = tuple[torch.Tensor, torch.Tensor]  # x, y: (batch_size, block_size) int64. y[:, i] is the token after x[:, i]


class Tokens:
    """
    The files of one split as a sequence of windows, numbered from 0 to n_windows - 1.

    n_windows does not depend on the offset at which the files are cut. n_tokens: the tokens of all files. A window lies
    in one file. The files may grow while they are read: tokens beyond those that meta.json counts are not used.
    """

    def __init__(self, data_dir: str, split: str, meta: dict, block_size: int, n_ids: int | None = None):
        """
        meta: see data_folder.read_meta. block_size: tokens in a window. n_ids: ids from here on are refused; None: the
        ids of the folder's tokenizer. Raises InputError for files that are missing, damaged, too short or of other ids.
        """
        self.data_dir, self.split, self.block_size = data_dir, split, block_size
        self.dtype = np.dtype(meta['dtype']).newbyteorder('<')
        self.n_ids = n_ids or meta['vocab_size']
        self.paths = token_files(data_dir, split)
        if not self.paths:
            raise InputError(f'no {split}.bin in {data_dir}: {_how_to_prepare(data_dir)}')
        self.lengths = [self._length(path, meta['dtype']) for path in self.paths]
        self.n_tokens = self._use_only(meta.get('tokens', {}).get(split))
        if max(self.lengths) <= block_size:
            raise InputError(f'{self.paths[0]} has {self.lengths[0]:,} tokens, too few for block_size={block_size} '
                             f'(it takes block_size + 1): lower block_size or prepare more text')
        self._check_ids()
        self.windows = [max((n - block_size) // block_size, int(n > block_size)) for n in self.lengths]  # of each file
        self.first_window = [0, *itertools.accumulate(self.windows)]
        self.n_windows = self.first_window[-1]

    def read(self, window: int, offset: float) -> np.ndarray:
        """The block_size + 1 tokens from the start of a window on. offset: in [0, 1), how far all windows are moved."""
        file = bisect.bisect_right(self.first_window, window) - 1
        n, length = self.windows[file], self.lengths[file]
        room = min(self.block_size, length - n * self.block_size)  # offsets at which n windows still fit
        start = (window - self.first_window[file]) * self.block_size + int(offset * room)
        # opened each time, which takes 4 us: a memmap takes 25, and its pages count as this process's memory
        with open(self.paths[file], 'rb', buffering=0) as f:
            f.seek(start * self.dtype.itemsize)
            return np.frombuffer(f.read((self.block_size + 1) * self.dtype.itemsize), dtype=self.dtype)

    def batch(self, windows: list[tuple[int, float]], device: torch.device) -> Batch:
        """
        The Batch of some windows, (number, offset) each, in memory from which it can be copied to `device`.

        Raises InputError for an id that is n_ids or more.
        """
        rows = np.stack([self.read(window, offset) for window, offset in windows])
        if rows.max() >= self.n_ids:
            raise self._id_error(os.path.dirname(self.paths[0]), rows.max())
        rows = torch.from_numpy(rows.astype(np.int64))
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        return (x.pin_memory(), y.pin_memory()) if device.type == 'cuda' else (x, y)

    def _length(self, path, dtype_name):
        size = os.path.getsize(path)
        if size % self.dtype.itemsize:
            raise InputError(f'{path} has {size} bytes, not a multiple of {self.dtype.itemsize} ({dtype_name}): it is '
                             f'cut off or of another type; prepare the data again')
        return size // self.dtype.itemsize

    def _use_only(self, expected):
        """
        The number of tokens to use: those that meta.json counts, `expected`, or all if it counts none.

        There may be more if a preparation has added some since meta.json was read; then the files are shortened here.
        """
        total = sum(self.lengths)
        if expected and total > expected and os.path.exists(os.path.join(self.data_dir, 'progress.json')):
            total = expected
            starts = [0, *itertools.accumulate(self.lengths[:-1])]
            self.lengths = [min(n, total - start) for n, start in zip(self.lengths, starts, strict=True)
                            if start < total]
            del self.paths[len(self.lengths):]
        if expected is not None and total != expected:
            raise InputError(f'{self.data_dir}: {self.split} has {total:,} tokens but meta.json says {expected:,}: run '
                             f'the same preparation again, which goes on if it was stopped')
        return total

    def _check_ids(self, most=2 ** 27):
        """Check all ids of small data, before the run begins. Those of larger data are checked batch by batch."""
        if sum(self.lengths) > most:
            return
        for path in self.paths:
            data = np.memmap(path, dtype=self.dtype, mode='r')
            largest = max(int(data[i:i + 2 ** 24].max()) for i in range(0, len(data), 2 ** 24)) if len(data) else 0
            if largest >= self.n_ids:
                raise self._id_error(path, largest)

    def _id_error(self, where, token_id):
        return InputError(f'{where} has the token id {token_id}, but the vocabulary has {self.n_ids} ids: the data '
                          f'belongs to another tokenizer or model')


def _how_to_prepare(data_dir):
    if os.path.exists(os.path.join(data_dir, 'prepare.py')):
        return f'run python {data_dir}/prepare.py'
    return f'prepare it, for example by python data/text/prepare.py FILE --name={os.path.basename(data_dir)}'


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A Batch on `device`. On a GPU the copy may still be going on; what is computed there waits for it."""
    return tuple(tensor.to(device, non_blocking=device.type == 'cuda') for tensor in batch)


class TrainBatches:
    """
    Batches that draw every window of an epoch once, as a pure function of (seed, step, micro-step, process).

    The windows of a step are micro_steps * world_size * batch_size neighbours in the order of their epoch. How they are
    divided into micro-steps and processes does not change which they are. The last step of an epoch takes what it needs
    from the next one.
    """

    def __init__(self, tokens: Tokens, batch_size: int, micro_steps: int, seed: int, rank: int = 0,
                 world_size: int = 1):
        """micro_steps: of each process in each step. rank: the number of this process, of world_size in all."""
        self.tokens, self.batch_size, self.micro_steps, self.seed = tokens, batch_size, micro_steps, seed
        self.rank, self.world_size = rank, world_size
        self._epochs = {}
        self._thread, self._ahead = ThreadPoolExecutor(1), {}

    def get(self, step: int, micro_step: int, device: torch.device) -> Batch:
        """The Batch of a micro-step. A thread then reads the next one ahead, because a disk may be slow."""
        number = step * self.micro_steps + micro_step
        batch = (self._ahead.get(number) or self._thread.submit(self._read, number, device)).result()
        self._ahead = {number + 1: self._thread.submit(self._read, number + 1, device)}
        return to_device(batch, device)

    def epoch(self, step: int) -> float:
        """How many epochs have been drawn before `step`, as a fraction."""
        return step * self.micro_steps * self.world_size * self.batch_size / self.tokens.n_windows

    def _read(self, number, device):
        first = (number * self.world_size + self.rank) * self.batch_size
        return self.tokens.batch([self._window(n) for n in range(first, first + self.batch_size)], device)

    def _window(self, number):
        """(window, offset) of the number-th one that the run draws."""
        epoch, position = divmod(number, self.tokens.n_windows)
        if epoch not in self._epochs:
            rng = np.random.default_rng((self.seed, epoch))
            offset, order = rng.random(), rng.permutation(self.tokens.n_windows)
            self._epochs = {e: v for e, v in self._epochs.items() if e >= epoch - 1} | {epoch: (offset, order)}
        offset, order = self._epochs[epoch]
        return int(order[position]), offset


def eval_batches(tokens: Tokens, batch_size: int, n_batches: int, device: torch.device) -> Iterator[Batch]:
    """
    The same windows every time, evenly spread over the split.

    Yields n_batches Batches, or as many full ones as there are windows for, and one smaller one if there are not even
    batch_size windows. Uses no random state.
    """
    n = min(batch_size * n_batches, tokens.n_windows)
    n -= n % batch_size if n > batch_size else 0
    windows = [(i * tokens.n_windows // n, 0.0) for i in range(n)]
    for i in range(0, n, batch_size):
        yield to_device(tokens.batch(windows[i:i + batch_size], device), device)
