"""
Documents to token files, whatever their number: shuffled, encoded on all cores and written in shards.

    train.bin or train_000.bin, ...   raw little-endian uint16, or uint32 for more than 65,536 ids
    val.bin                           the same, of documents that are not in train
    meta.json                         tokenizer, dtype, source, tokens of the files that are finished
    progress.json                     what has been written, of which files, and where to go on

Documents go in blocks of some 32M characters, each shuffled by itself, so that memory does not grow with the text. The
tokens follow from the text, the tokenizer and the seed alone. After each block progress.json says how far they go: what
was written beyond is taken back by the next run of the same command, which goes on from there and ends with the same
bytes.
"""

import argparse
import collections
import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from configurator import InputError
from sologpt.tokens.data_folder import paths_of
from sologpt.tokens.sources import LONGEST
from sologpt.tokens.tokenizer import Bytes, Chars, by_name

BLOCK = 2 ** 25  # characters that are shuffled together
PER_DOCUMENT = 100  # characters, as which a document counts besides its own: what Python needs to hold it
TASK = 2 ** 16  # characters that a thread encodes at a time
SHARD = 100_000_000  # tokens


# which documents are for validation

# tokens: of val, beyond which it has none; 0: as many as fall to it. whole(n): tokens of both, when train has n

class FirstTokens:
    """So many tokens at the beginning; a later document that is the same as one of theirs is left out."""
    option, shuffle = '--val_tokens', True

    def __init__(self, tokens):
        self.tokens = tokens

    def divide(self, text):
        return [('first', text)]

    def whole(self, n):
        return n + self.tokens


class SomeDocuments:
    """A share of the documents, drawn by their text, so that the same text is always in the same split."""
    option, shuffle, tokens = '--val', True, 0

    def __init__(self, share):
        self.share = share

    def whole(self, n):
        return round(n / (1 - self.share))

    def divide(self, text):
        return [('val' if _digest(text) < self.share * 2 ** 64 else 'train', text)]


class Endings(SomeDocuments):
    """The last part of each document: of few, long ones."""
    shuffle = False

    def divide(self, text):
        end = int(len(text) * (1 - self.share))
        return [('train', text[:end]), ('val', text[end:])]


def by_number(source, share, few=100):
    """Endings of fewer than `few` documents, which are read for that; otherwise SomeDocuments."""
    documents = (part for document in source.again() for part in parts(document))
    n = sum(1 for _ in zip(range(few), documents, strict=False))
    return (Endings if n < few else SomeDocuments)(share)


def _digest(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')


# blocks of documents

def parts(document):
    """A document as it is encoded: none that is empty, none longer than LONGEST, none that UTF-8 cannot write."""
    try:
        document.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write; as tiktoken mends it
        document = document.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    start = 0
    while start < len(document):
        end = longest = start + LONGEST
        if longest < len(document):
            end = next((i for i in (document.rfind(mark, start, longest) + 1 for mark in '\n ') if i), longest)
        yield document[start:end]
        start = end


def _block(documents):
    """The next documents of an iterator, BLOCK characters of them."""
    block, size = [], 0
    for document in documents:
        for part in parts(document):
            block.append(part)
            size += len(part) + PER_DOCUMENT
        if size >= BLOCK:
            break
    return block


def _blocks(source):
    """(documents, where the source is after them), block by block."""
    documents = iter(source)
    while block := _block(documents):
        yield block, source.where()


def _tasks(block):
    """A block's documents in groups of TASK characters."""
    group, size = [], 0
    for document in block:
        group.append(document)
        size += len(document)
        if size >= TASK:
            yield group
            group, size = [], 0
    if group:
        yield group


def n_cores():
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _encode(documents, tokenizer, split, dtype):
    """[(split, digest, ids)] of some documents; runs in a thread."""
    encoded = []
    for document in documents:
        for name, part in split.divide(document):
            ids = tokenizer.encode_ordinary(part)
            if len(ids) and ids.max() >= tokenizer.vocab_size:
                raise InputError(f'the tokenizer gave the id {ids.max()}, but has only {tokenizer.vocab_size:,} ids')
            encoded.append((name, _digest(part), ids.astype(dtype)))
    return encoded


# what is written

class Shards:
    """
    The files of one split, to which tokens are appended, `size` to each. A file is written beside its name, with
    .partial after it; once full and committed it is published under its name, for good: training may read it from then
    on.
    """

    def __init__(self, folder, split, dtype, size, written, alone=False):
        """written: tokens that are there; what lies beyond will be written again. alone: there will be one file."""
        self.folder, self.split, self.dtype, self.size, self.written = folder, split, dtype, size, written
        self.alone, self.file, self.full, self.finished = alone, None, [], False
        self.before = sum(map(os.path.getsize, paths_of(folder, split))) // dtype.itemsize  # published earlier
        number, begun = divmod(written, size)
        for i in range(number):
            self._check(self._path(i), size)
        if begun:
            partial = self._path(number) + '.partial'
            if not os.path.exists(partial):  # published to go on later, or just before it could be written down
                there = self._path(number) if os.path.exists(self._path(number)) else self._only()
                self._check(there, begun)
                shutil.copyfile(there, partial + '.tmp')
                os.replace(partial + '.tmp', partial)
            self._check(partial, begun)
            self.file = open(partial, 'ab')
            self.file.truncate(begun * dtype.itemsize)

    def _check(self, path, tokens):
        if not os.path.exists(path) or os.path.getsize(path) < tokens * self.dtype.itemsize:
            raise InputError(f'{path} is not as progress.json says: prepare the data anew, with --restart')

    def _only(self):
        return os.path.join(self.folder, f'{self.split}.bin')

    def _path(self, number):
        return self._only() if self.alone else os.path.join(self.folder, f'{self.split}_{number:03d}.bin')

    def append(self, ids):
        while len(ids):
            number, begun = divmod(self.written, self.size)
            self.file = self.file or open(self._path(number) + '.partial', 'wb')
            part, ids = ids[:self.size - begun], ids[self.size - begun:]
            self.file.write(part.tobytes())
            self.written += len(part)
            if begun + len(part) == self.size:
                self._close()

    def _close(self):
        self.sync()
        self.file.close()
        self.file = None
        self.full.append((self.written - 1) // self.size)

    def sync(self):
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def publish(self):
        for number in self.full:
            os.replace(self._path(number) + '.partial', self._path(number))
        self.full = []

    def published(self):
        """Tokens in the files that are published."""
        return self.written if self.finished else max(self.before, self.written - self.written % self.size)

    def finish(self, exhausted):
        """exhausted: there will be no more tokens."""
        if self.file:
            self._close()
        paths = [self._path(i) for i in range(-(-self.written // self.size))]
        if self.full == [0] and exhausted:  # as nanoGPT has it
            os.replace(self._path(0) + '.partial', self._only())
            self.full, paths = [], [self._only()]
        self.publish()
        self.finished = True
        for path in set(files_of(self.folder, self.split)) - set(paths):
            os.remove(path)


def files_of(folder, split):
    """A split's files, finished or not."""
    return sorted(path for path in glob.glob(os.path.join(glob.escape(folder), f'{split}*'))
                  if re.fullmatch(rf'{split}(_\d+)?\.bin(\.partial(\.tmp)?)?', os.path.basename(path)))


class Writer:
    """A data folder to which encoded documents are added."""

    def __init__(self, folder, tokenizer, split, shard, source, progress):
        self.folder, self.tokenizer, self.split, self.source, self.progress = folder, tokenizer, split, source, progress
        self.dtype = dtype_of(tokenizer)
        self.seen = set(progress['seen'])  # digests of the documents that FirstTokens took
        alone = 0 < split.tokens <= shard
        self.splits = {
            'train': Shards(folder, 'train', self.dtype, shard, progress['tokens']['train']),
            'val': Shards(folder, 'val', self.dtype, split.tokens if alone else shard, progress['tokens']['val'],
                          alone)}
        self.save()

    def add(self, documents, most):
        """documents: what _encode gave. most: tokens of train, beyond which none are taken."""
        room = {'train': most - self.splits['train'].written,
                'val': self.split.tokens - self.splits['val'].written if self.split.tokens else 2 ** 62}
        parts = {name: [] for name in self.splits}
        for name, digest, ids in documents:
            if name == 'first':
                name = 'val' if room['val'] > 0 else 'train'
                if name == 'val':
                    self.seen.add(digest)
                elif digest in self.seen:
                    continue
            if self.tokenizer.eot is not None and (parts[name] or self.splits[name].written):
                ids = np.concatenate([np.array([self.tokenizer.eot], self.dtype), ids])
            parts[name].append(ids[:max(0, room[name])])
            room[name] -= len(ids)
        for name, arrays in parts.items():
            if arrays:
                self.splits[name].append(np.concatenate(arrays))

    def written(self):
        return sum(files.written for files in self.splits.values())

    def commit(self, position):
        """What has been added stays, and the source goes on at `position`."""
        for files in self.splits.values():
            files.sync()
            files.publish()
        self.progress |= {'position': position, 'block': self.progress['block'] + 1, 'seen': sorted(self.seen),
                          'fingerprint': self.source.fingerprint(position),
                          'tokens': {name: files.written for name, files in self.splits.items()}}
        self.save()

    def close(self):
        """Leave what has not been committed."""
        for files in self.splits.values():
            with contextlib.suppress(OSError):  # a full disk's
                if files.file:
                    files.file.close()

    def finish(self, exhausted):
        for files in self.splits.values():
            files.finish(exhausted)
        self.progress['done'] = {'exhausted': exhausted,
                                 'tokens': {name: files.written for name, files in self.splits.items()}}
        self.save()

    def save(self):
        # progress.json last: where it says that all is done, it is
        _write_meta(self.folder, self.tokenizer, {name: files.published() for name, files in self.splits.items()},
                    self.source.name)
        _write_json(os.path.join(self.folder, 'progress.json'), self.progress)


def dtype_of(tokenizer):
    """Of its ids in token files."""
    return np.dtype('<u2' if tokenizer.vocab_size <= 2 ** 16 else '<u4')


def _write_json(path, content):
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        json.dump(content, f, ensure_ascii=False, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)


def _write_meta(folder, tokenizer, tokens, source):
    _write_json(os.path.join(folder, 'meta.json'), {
        'tokenizer': tokenizer.to_dict(), 'vocab_size': tokenizer.vocab_size, 'dtype': dtype_of(tokenizer).name,
        'tokens': tokens, 'source': source})


# the whole

def prepare(folder, source, tokenizer, split, tokens=None, shard=SHARD, seed=1337, restart=False, expected=None):
    """
    Write a data folder, or go on with one that was begun by the same call.

    split: FirstTokens, SomeDocuments or Endings. tokens: of train, None: all there are; a folder that has fewer is gone
    on with. shard: tokens in a file. restart: remove what is there. expected: the tokens of the whole source, about.
    Raises InputError.
    """
    import filelock
    folder = os.path.relpath(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        with filelock.FileLock(os.path.join(folder, 'progress.lock'), timeout=0):
            _prepare(folder, source, tokenizer, split, tokens, shard, seed, restart, expected)
    except filelock.Timeout:
        raise InputError(f'{folder} is being prepared by another process: wait for it, or stop it') from None
    except OSError as e:  # those of reading are told where it is read
        raise InputError(f'{folder} cannot be written ({e.strerror}): what is finished is kept, and the same command '
                         f'goes on when it can') from None


def _prepare(folder, source, tokenizer, split, tokens, shard, seed, restart, expected):
    import tqdm
    progress = _begun(folder, source, restart, {
        'files': source.files if source.remote else _sha256([os.path.relpath(path, folder) for path in source.files]),
        '--field': source.field, '--tokenizer': _sha256(tokenizer.to_dict()),
        split.option: [type(split).__name__, vars(split)], '--shard_tokens': shard, '--seed': seed})
    most = tokens or 2 ** 62
    done = progress.pop('done', None)
    if done and (done['exhausted'] or done['tokens']['train'] >= most):
        for name, n in done['tokens'].items():
            if sum(map(os.path.getsize, paths_of(folder, name))) != n * dtype_of(tokenizer).itemsize:
                raise InputError(f'{folder} has not the {n:,} tokens of {name} that were prepared: prepare them anew, '
                                 f'with --restart')
        print(f'{folder} is prepared: {done["tokens"]["train"]:,} + {done["tokens"]["val"]:,} tokens')
        return
    # text has a token per byte, or with a BPE one in four
    of_bytes = source.n_bytes() and source.n_bytes() / (1 if isinstance(tokenizer, Bytes | Chars) else 4)
    expected = min((n for n in (tokens and split.whole(tokens), expected, of_bytes) if n), default=None)
    needed = ((expected or 0) - sum(progress['tokens'].values())) * dtype_of(tokenizer).itemsize
    if needed > (free := shutil.disk_usage(folder).free):
        raise InputError(f'{folder} needs {needed / 1e6:,.0f} MB more, but the disk has {free / 1e6:,.0f}: make room, '
                         f'or ask for fewer --tokens')
    writer = Writer(folder, tokenizer, split, shard, source, progress)
    if writer.written():
        print(f'{folder}: going on after {writer.written():,} tokens', flush=True)
    source.position = progress['position']
    pool = ThreadPoolExecutor(n_cores())
    bar = tqdm.tqdm(total=expected, initial=writer.written(), unit=' tokens', unit_scale=True, disable=None)
    ahead = collections.deque()  # blocks that are being encoded, while the next is read
    full = False

    def write_block():
        encoded, position = ahead.popleft()
        finished = writer.splits['train'].published()
        for documents in encoded:
            before = writer.written()
            writer.add(documents.result(), most)
            bar.update(writer.written() - before)
        if writer.splits['train'].written >= most:
            return True  # progress.json stays before this block, so that more tokens can be asked for
        writer.commit(position)
        if (now := writer.splits['train'].published()) > finished:
            bar.write(f'{folder}: {now:,} tokens to train on are finished')
        return False
    try:
        number = progress['block']
        for block, position in _blocks(source):
            if split.shuffle:
                block = [block[i] for i in np.random.default_rng((seed, number)).permutation(len(block))]
            ahead.append(([pool.submit(_encode, group, tokenizer, split, writer.dtype) for group in _tasks(block)],
                          position))
            number += 1
            if len(ahead) > 1 and (full := write_block()):
                break
        while ahead and not full:
            full = write_block()
        empty = [name for name, files in writer.splits.items() if not files.written]
        if empty:
            raise InputError(f'{source.name} has no text for {" and ".join(empty)}: give more, or another '
                             f'{split.option}, with --restart')
        writer.finish(exhausted=not full)
    except KeyboardInterrupt:
        bar.close()
        print(f'stopped; {sum(writer.progress["tokens"].values()):,} tokens are kept, and the same command goes on '
              f'from there')
        raise SystemExit(130) from None
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        writer.close()
    if tokens and not full:
        print(f'{source.name} has no more text than this')
    for name, files in writer.splits.items():
        paths = files_of(folder, name)
        print(f'{paths[0]}{f" to {os.path.basename(paths[-1])}" if len(paths) > 1 else ""}: {files.written:,} tokens')


def _sha256(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _begun(folder, source, restart, settings):
    """The progress of a folder, an empty one if there is none. Raises InputError for a folder with other data."""
    path = os.path.join(folder, 'progress.json')
    there = [found for split in ('train', 'val') for found in files_of(folder, split)]
    if restart or not there and not os.path.exists(path):
        for name in (*there, path):
            with contextlib.suppress(FileNotFoundError):
                os.remove(name)
        progress = {'settings': settings, 'position': [0, None], 'block': 0, 'seen': [],
                    'tokens': {'train': 0, 'val': 0}, 'fingerprint': source.fingerprint([0, None])}
        _write_json(path, progress)
        return progress
    try:
        with open(path, encoding='utf-8') as f:
            progress = json.load(f)
        saved = progress['settings']
    except FileNotFoundError:
        raise InputError(f'{folder} has data that was prepared otherwise: --restart removes it') from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{path} is damaged: prepare the data anew, with --restart') from None
    if not (any(progress['tokens'].values()) or 'done' in progress):  # nothing that would be lost
        return _begun(folder, source, True, settings)
    if source.remote and _unpinned(saved['files']) == _unpinned(source.files):
        source.files = settings['files'] = saved['files']  # as they were then, whatever has been published since
    other = [key for key in settings if settings[key] != saved.get(key)]
    if other:
        raise InputError(f'{folder} was prepared with other {" and ".join(other)}: give the same, or --restart, which '
                         f'removes what is there')
    if progress['fingerprint'] != source.fingerprint(progress['position']):
        raise InputError(f'{source.name} has changed since {folder} was prepared: --restart prepares it anew')
    return progress


def _unpinned(files):
    return [re.sub(r'@[0-9a-f]{40}/', '/', path) for path in files]


def write(folder, tokenizer, splits, source):
    """
    The same of texts that are at hand, all files or none: train.bin, val.bin and meta.json.

    splits: name -> iterable of texts, each of which is a document. source: a line saying what the text is.
    """
    folder = os.path.relpath(folder)
    os.makedirs(folder, exist_ok=True)
    counts, paths = {}, {split: os.path.join(folder, f'{split}.bin') for split in splits}
    try:
        for split, texts in splits.items():
            counts[split] = 0
            with open(paths[split] + '.tmp', 'wb') as f:
                for i, text in enumerate(texts):
                    between = [] if tokenizer.eot is None or not i else [tokenizer.eot]
                    for ids in (np.array(between), tokenizer.encode_ordinary(text)):
                        ids.astype(dtype_of(tokenizer)).tofile(f)
                        counts[split] += len(ids)
        for path in paths.values():
            os.replace(path + '.tmp', path)
    finally:
        for path in paths.values():
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + '.tmp')
    _write_meta(folder, tokenizer, counts, source)
    for split, n in counts.items():
        print(f'{paths[split]}: {n:,} tokens')


# command lines

def arguments(doc, tokenizer):
    """The parser of a preparation's command line, with the keys that all of them have. tokenizer: its default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--tokenizer', default=tokenizer,
                        help="bytes, chars, an encoding of tiktoken's (gpt2), or the path of FILE.tiktoken or of a "
                             "tokenizer.json (%(default)s)")
    parser.add_argument('--tokens', type=count, help='to train on, such as 100M (all there are); the same command with '
                                                     'more of them goes on')
    parser.add_argument('--shard_tokens', type=count, default=SHARD, help='in a file (100M)')
    parser.add_argument('--seed', type=natural, default=1337, help='of the order of documents (%(default)s)')
    parser.add_argument('--restart', action='store_true', help='remove what has been prepared, and begin anew')
    return parser


def count(text):
    """'100M' -> 100000000."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?)([kmbt]?)', text.lower())
    number = float(match[1]) * {'': 1, 'k': 1e3, 'm': 1e6, 'b': 1e9, 't': 1e12}[match[2]] if match else 0
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f'{text!r} is no number of tokens: write 5000, 100M or 1.5B')
    return int(number)


def natural(text):
    """'7' -> 7."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} must be 0, 1, 2, ...')
    return int(text)


def share(text):
    """'0.1' -> 0.1."""
    try:
        if 0 < float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f'{text!r} must be between 0 and 1')


def named_tokenizer(name, source):
    """What --tokenizer says; `chars` are those of the source's text."""
    if name != 'chars':
        return by_name(name)
    characters = set()
    for document in source.again():
        characters.update(*parts(document))
    return Chars(sorted(characters))
