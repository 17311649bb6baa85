"""
Token files that grow: the files of one split, and the data folder that has two of them.

Tokens are appended to FILE.bin.partial. A full file is published under its own name, and from then on it never changes,
so that training may read it while more is being prepared.
"""

import contextlib
import os
import shutil

import numpy as np

from configurator import InputError
from sologpt.tokens.blocks import Encoded
from sologpt.tokens.data_folder import token_dtype, token_files, token_files_in_progress, write_json, write_meta
from sologpt.tokens.sources import Source
from sologpt.tokens.splits import FirstTokens, SomeDocuments
from sologpt.tokens.tokenizer import Tokenizer

UNLIMITED = 2 ** 62  # tokens


class Shards:
    """The files of one split, with `size` tokens in each. `written` is how many tokens there are in all of them."""

    def __init__(self, folder: str, split: str, dtype: np.dtype, size: int, written: int, alone: bool = False):
        """
        Go on after the first `written` tokens; what the files have beyond them will be written again.

        alone: there will be only one file, which is named without a number. Raises InputError if files are missing.
        """
        self.folder, self.split, self.dtype, self.size, self.written = folder, split, dtype, size, written
        self.alone, self.file, self.full, self.finished = alone, None, [], False
        self.before = sum(map(os.path.getsize, token_files(folder, split))) // dtype.itemsize  # published earlier
        number, begun = divmod(written, size)
        for i in range(number):
            self._check(self._path(i), size)
        if begun:
            self._reopen(number, begun)

    def _reopen(self, number, begun):
        """Open file `number` to append to its first `begun` tokens."""
        partial = self._path(number) + '.partial'
        if not os.path.exists(partial):  # it was published as the last one, or before progress.json could say so
            published = self._path(number) if os.path.exists(self._path(number)) else self._only_path()
            self._check(published, begun)
            shutil.copyfile(published, partial + '.tmp')
            os.replace(partial + '.tmp', partial)
        self._check(partial, begun)
        self.file = open(partial, 'ab')
        self.file.truncate(begun * self.dtype.itemsize)

    def _check(self, path, tokens):
        if not os.path.exists(path) or os.path.getsize(path) < tokens * self.dtype.itemsize:
            raise InputError(f'{path} is not as progress.json says: prepare the data anew, with --restart')

    def _only_path(self):
        return os.path.join(self.folder, f'{self.split}.bin')

    def _path(self, number):
        return self._only_path() if self.alone else os.path.join(self.folder, f'{self.split}_{number:03d}.bin')

    def append(self, ids: np.ndarray) -> None:
        while len(ids):
            number, begun = divmod(self.written, self.size)
            self.file = self.file or open(self._path(number) + '.partial', 'wb')
            part, ids = ids[:self.size - begun], ids[self.size - begun:]
            self.file.write(part.tobytes())
            self.written += len(part)
            if begun + len(part) == self.size:
                self._close_file()

    def _close_file(self):
        self.sync()
        self.file.close()
        self.file = None
        self.full.append((self.written - 1) // self.size)

    def sync(self) -> None:
        """Make sure that what was appended is on the disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def publish(self) -> None:
        """Give the full files their own names."""
        for number in self.full:
            os.replace(self._path(number) + '.partial', self._path(number))
        self.full = []

    def published(self) -> int:
        """The number of tokens in the published files."""
        return self.written if self.finished else max(self.before, self.written - self.written % self.size)

    def finish(self, exhausted: bool) -> None:
        """Publish everything. exhausted: there will be no more tokens, so that a single file needs no number."""
        if self.file:
            self._close_file()
        paths = [self._path(i) for i in range(-(-self.written // self.size))]
        if self.full == [0] and exhausted:  # nanoGPT's name
            os.replace(self._path(0) + '.partial', self._only_path())
            self.full, paths = [], [self._only_path()]
        self.publish()
        self.finished = True
        for path in set(token_files_in_progress(self.folder, self.split)) - set(paths):
            os.remove(path)


class Writer:
    """A data folder to which encoded documents are added. progress: see progress.py."""

    def __init__(self, folder: str, tokenizer: Tokenizer, split: FirstTokens | SomeDocuments, shard_tokens: int,
                 source: Source, progress: dict):
        self.folder, self.tokenizer, self.split, self.source, self.progress = folder, tokenizer, split, source, progress
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.seen = set(progress['seen'])  # digests of the documents that FirstTokens took for validation
        alone = 0 < split.tokens <= shard_tokens
        tokens = progress['tokens']
        self.splits = {
            'train': Shards(folder, 'train', self.dtype, shard_tokens, tokens['train']),
            'val': Shards(folder, 'val', self.dtype, split.tokens if alone else shard_tokens, tokens['val'], alone)}
        self.save()

    def add(self, documents: list[Encoded], most: int) -> None:
        """Append documents to their splits. most: the number of tokens after which train takes no more."""
        room = {'train': most - self.splits['train'].written,
                'val': self.split.tokens - self.splits['val'].written if self.split.tokens else UNLIMITED}
        parts = {name: [] for name in self.splits}
        for name, digest, ids in documents:
            if name == 'first':
                name = 'val' if room['val'] > 0 else 'train'
                if name == 'val':
                    self.seen.add(digest)
                elif digest in self.seen:
                    continue
            before = self.tokenizer.before_document(is_first=not parts[name] and not self.splits[name].written)
            if before:
                ids = np.concatenate([np.array(before, self.dtype), ids])
            parts[name].append(ids[:max(0, room[name])])
            room[name] -= len(ids)
        for name, arrays in parts.items():
            if arrays:
                self.splits[name].append(np.concatenate(arrays))

    def written(self) -> int:
        """The number of tokens in both splits."""
        return sum(files.written for files in self.splits.values())

    def commit(self, position: list) -> None:
        """Keep what has been added. From now on the preparation continues at `position` of the source."""
        for files in self.splits.values():
            files.sync()
            files.publish()
        self.progress |= {'position': position, 'block': self.progress['block'] + 1, 'seen': sorted(self.seen),
                          'fingerprint': self.source.fingerprint(position), 'tokens': self._tokens()}
        self.save()

    def close(self) -> None:
        """Close the files; what has not been committed is given up."""
        for files in self.splits.values():
            with contextlib.suppress(OSError):  # the disk may be full
                if files.file:
                    files.file.close()

    def finish(self, exhausted: bool) -> None:
        """Publish everything. exhausted: the source has no more text."""
        for files in self.splits.values():
            files.finish(exhausted)
        self.progress['done'] = {'exhausted': exhausted, 'tokens': self._tokens()}
        self.save()

    def save(self) -> None:
        """Write meta.json, then progress.json: when the latter says that all is done, it is."""
        published = {name: files.published() for name, files in self.splits.items()}
        write_meta(self.folder, self.tokenizer, published, self.source.name)
        write_json(os.path.join(self.folder, 'progress.json'), self.progress)

    def _tokens(self):
        return {name: files.written for name, files in self.splits.items()}
