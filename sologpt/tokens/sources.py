"""
Documents out of files and datasets: text, JSON lines, parquet, compressed or not, and what Hugging Face's hub has.

A Source reads file after file, in flat memory, and says in plain values where it is, so that it can go on from there.
"""

import glob
import hashlib
import io
import itertools
import json
import os
import re
import sysconfig
import time

from configurator import InputError
from sologpt.tokens.tokenizer import END_OF_TEXT

LONGEST = 2 ** 22  # bytes of a text that are one document at most: a longer one is cut at the end of a line
COMPRESSED = {'.gz': 'gzip', '.zst': 'zstd', '.bz2': 'bz2'}
PAUSES = (5, 20, 60, 180)  # seconds, after which the network is tried again


class TextFile:
    """
    A text, plain or compressed: one document, or several with <|endoftext|> between them.

    Every reader yields documents, from `position` on, and between them says in `position` where the next begins, in
    plain values that JSON can hold.
    """

    def __init__(self, path, field, position):
        self.path, self.position = path, position or 0  # in bytes of the text

    def __iter__(self):
        mark, start, buffer = END_OF_TEXT.encode(), 0, b''
        with _opened(self.path, self.position) as f:
            while True:
                # LONGEST bytes, and of the next as many as a mark or a character needs that begins in them
                end = buffer.find(mark, start, start + LONGEST + len(mark) - 1)
                after = end + len(mark)
                if end < 0 and len(buffer) - start < LONGEST + len(mark):
                    more = f.read(LONGEST)
                    if more:
                        start, buffer = 0, buffer[start:] + more
                        continue
                    end = after = len(buffer) if len(buffer) - start <= LONGEST else _cut(buffer, start)
                elif end < 0:
                    end = after = _cut(buffer, start)
                if after == start:
                    return
                document = self._decoded(buffer[start:end])
                self.position, start = self.position + after - start, after
                yield document

    def _decoded(self, document):
        try:
            return document.decode('utf-8')
        except UnicodeDecodeError as e:
            raise InputError(f'{self.path} is not UTF-8 text (byte {self.position + e.start:,}): convert it first, as '
                             f'with iconv') from None


def _cut(buffer, start):
    """Where the first LONGEST bytes from `start` are best cut, of more: after a line, a word, or else a character."""
    for mark in (b'\n', b' '):
        end = buffer.rfind(mark, start, start + LONGEST) + 1
        if end > start:
            return end
    end = start + LONGEST
    while end < len(buffer) and buffer[end] & 0xc0 == 0x80 and end > start + LONGEST - 4:
        end -= 1
    return end


class JsonLines:
    """Documents in a field of JSON objects, one to a line; plain or compressed."""

    def __init__(self, path, field, position):
        self.path, self.field, self.position = path, field, position or [0, 0]  # bytes, lines

    def __iter__(self):
        with _opened(self.path, self.position[0]) as f:
            for line in f:
                self.position = [self.position[0] + len(line), self.position[1] + 1]
                if not line.strip():
                    continue
                where = f'{self.path}, line {self.position[1]}'
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise InputError(f'{where} is no JSON ({e}): there must be one object to a line, and no array '
                                     f'around them') from None
                yield field_of(record, self.field, where)


def field_of(record, field, where):
    """The text in a field of a record; raises InputError where there is none."""
    if not isinstance(record, dict):
        raise InputError(f'{where} is a {type(record).__name__}, not an object with a field {field!r}')
    if field not in record:
        raise InputError(f'{where} has no field {field!r}: it has {", ".join(record)}; name the one with the text by '
                         f'--field=')
    if not isinstance(record[field], str | None):
        raise InputError(f'{where}: the field {field!r} is a {type(record[field]).__name__}, not text; name another by '
                         f'--field=')
    return record[field] or ''


def _opened(path, position):
    """A file's bytes from `position` on, decompressed; of a compressed file those before are read and dropped."""
    codec = COMPRESSED.get(os.path.splitext(path)[1].lower())
    if not codec:
        f = open(path, 'rb')
        f.seek(position)
        return f
    import pyarrow  # which, unlike Python's zstandard, notices a file that was cut off
    f = io.BufferedReader(pyarrow.input_stream(path, compression=codec), 2 ** 20)
    while position and (dropped := f.read(min(position, 2 ** 20))):
        position -= len(dropped)
    return f


class Rows:
    """Documents in a column of a file, here or on the web, that the `datasets` library reads: parquet and others."""
    kind = 'parquet'

    def __init__(self, path, field, position):
        self.path, self.field, self.resumed = path, field, position
        self.dataset = None

    @property
    def position(self):
        return self.dataset.state_dict() if self.dataset else self.resumed

    def __iter__(self):
        datasets = quiet_datasets()
        path = self.path if '://' in self.path else glob.escape(self.path)
        options = {'data_files': [path], 'split': 'train', 'streaming': True}
        if self.kind == 'parquet':  # reads this column alone, and of the file only from the group of rows it goes on at
            columns = datasets.load_dataset(self.kind, **options).column_names
            field_of(dict.fromkeys(columns), self.field, self.path)
            options |= {'columns': [self.field], 'batch_size': 1000}
        dataset = datasets.load_dataset(self.kind, **options)
        if self.kind == 'parquet':
            dataset = dataset.reshard()
        if self.resumed:
            dataset.load_state_dict(self.resumed)
        rows = iter(dataset)
        self.dataset = dataset
        try:
            for row in rows:
                yield field_of(row, self.field, self.path)
        except BaseException:  # left before its end: should the process end before Arrow's threads do, they abort it
            rows.close()  # (https://github.com/apache/arrow/issues/45214)
            time.sleep(0.2)
            raise


def rows_of(kind):
    """Rows of another kind of file, by the name that `datasets` has for it."""
    return type('Rows', (Rows,), {'kind': kind})


def quiet_datasets():
    """The `datasets` library, which takes a second to import, without its messages: errors are told here."""
    import datasets
    import huggingface_hub
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets


READERS = {'.jsonl': JsonLines, '.ndjson': JsonLines, '.json': JsonLines, '.parquet': Rows}  # of others: TextFile
IN_FOLDERS = ('.txt', '.md', '.jsonl', '.ndjson', '.parquet')  # what is read of a folder; others are named by a pattern


def _kind(path):
    """The suffix that says what a file holds: .txt of a.TXT.gz."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


class Source:
    """
    The documents of several files, one after the other, from `position` on; where the network fails, it is tried again
    after each of PAUSES. Raises InputError.
    """
    position = (0, None)  # file, position in it

    def __init__(self, files, field='text', reader=None, name=None):
        """files: paths or URLs; reader: of all of them (None: by the file's name); name: what it is, for meta.json."""
        self.files, self.field, self.reader = files, field, reader
        self.name = name or _written(', '.join(files[:3]) + (f' and {len(files) - 3:,} more' if len(files) > 3 else ''))
        self.remote = any('://' in path for path in files)

    def again(self):
        """The same, from the beginning."""
        return Source(self.files, self.field, self.reader, self.name)

    def fingerprint(self, position):
        """Another if a file changes that has been begun at that position."""
        number, within = position
        stats = []
        for path in () if self.remote else self.files[:number + (within is not None)]:
            try:
                stats.append((os.stat(path).st_size, os.stat(path).st_mtime_ns))
            except OSError as e:
                raise InputError(f'{path} cannot be read: {e.strerror}') from None
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def n_bytes(self):
        """Of its text, about; None of what lies elsewhere."""
        return None if self.remote else sum(
            os.path.getsize(path) * (3 if path.lower().endswith((*COMPRESSED, '.parquet')) else 1)
            for path in self.files)

    def __iter__(self):
        first, within = self.position
        for number in range(first, len(self.files)):
            path, failures = self.files[number], 0
            open_reader = self.reader or READERS.get(_kind(path), TextFile)
            while True:
                reader = open_reader(path, self.field, within)
                try:
                    for document in _told(reader, path):
                        self.position, failures = (number, reader), 0
                        yield document
                    break
                except NetworkError as e:
                    wait(e, failures, self.name, PAUSES)
                    within, failures = reader.position, failures + 1
            self.position, within = (number + 1, None), None

    def where(self):
        """`position`, as plain values."""
        number, within = self.position
        return [number, getattr(within, 'position', within)]


class NetworkError(Exception):
    """What is read from elsewhere cannot be read now."""


def _told(reader, path):
    """The documents of a reader; its errors become InputErrors, or NetworkErrors."""
    try:
        yield from reader
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f'{path} is not there (any more)') from None
    except (EOFError, ValueError) as e:  # as pyarrow's errors are
        raise InputError(f'{path} is damaged or cut off ({_line(e)}): get it again') from None
    except Exception as e:
        if '://' in path:  # every library under `datasets` has errors of its own for a network that fails
            raise NetworkError(f'{type(e).__name__}: {_line(e)}') from None
        if not isinstance(e, OSError):
            raise
        what = f'cannot be read: {e.strerror}' if e.strerror else f'is damaged or cut off ({_line(e)}): get it again'
        raise InputError(f'{path} {what}') from None


def _written(path):
    """A path as UTF-8 can write it."""
    return path.encode(errors='replace').decode()


def _line(error):
    return ' '.join(str(error).split())[:120]


def wait(error, failures, what, pauses):
    """The pause after so many failures before this one, or after the last of them InputError."""
    said = f'{what} cannot be reached ({error})'
    if failures == len(pauses):
        raise InputError(f'{said}: check the network and run the same command again, which goes on from here') from None
    print(f'{said}; trying again in {pauses[failures]} s', flush=True)
    time.sleep(pauses[failures])


def hub(path, config=None, field='text', name=None):
    """
    The Source of the split `train` of a dataset of Hugging Face's hub, or of the parquet files that a pattern names
    (`hf://datasets/...`, or a folder's). Nothing is downloaded but what is read. Raises InputError.
    """
    datasets = quiet_datasets()
    what = name or (f'{path}:{config}' if config else path)
    for failures in itertools.count():
        try:
            builder = (datasets.load_dataset_builder('parquet', data_files=path) if path.endswith('.parquet') else
                       datasets.load_dataset_builder(path, name=config))
            break
        except (FileNotFoundError, ValueError, RuntimeError) as e:  # not there, no such config, a script for data
            raise InputError(f'{what} cannot be read: {_line(e)}') from None
        except Exception as e:
            wait(f'{type(e).__name__}: {_line(e)}', failures, what, PAUSES[:2])  # nothing has been begun
    files = {str(split): list(map(str, paths)) for split, paths in (builder.config.data_files or {}).items()}
    if not files.get('train'):
        others = ', '.join(files.keys() - {'train'})
        raise InputError(f'{what} has no split train in files, only {others}' if others else
                         f'{what}: there is no {path}')
    return Source(files['train'], field, rows_of(builder.name), what)


def find(names, field='text'):
    """
    The Source of what a command line names: files, folders (their .txt, .md, .jsonl and .parquet, but for hidden ones),
    patterns in quotes ('src/**/*.py'), or one dataset of the hub as owner/name or owner/name:config. Raises InputError.
    """
    if len(names) == 1 and re.fullmatch(r'[\w-]+/[\w-]+(\.[\d.]+)?(:[\w.-]+)?', names[0]) and not (
            glob.glob(names[0]) or os.path.exists(names[0].partition('/')[0])):
        print(f'there is no file or folder {names[0]} here: looking for such a dataset on the hub', flush=True)
        path, _, config = names[0].partition(':')
        return hub(path, config or None, field, name=f'{names[0]} of the hub')
    files = []
    for name in names:
        if os.path.isdir(name):
            found, others = _texts_in(name)
            if not found:
                raise InputError(f'{name} has no .txt, .md, .jsonl or .parquet files: name others by a pattern, such '
                                 f"as '{os.path.join(name, '**', '*.py')}'")
            print(f'{name}: {len(found):,} files'
                  + (f', and {others:,} that are no .txt, .md, .jsonl or .parquet' if others else ''), flush=True)
        elif os.path.exists(name):
            if not os.path.isfile(name):
                raise InputError(f'{name} can be read only once: write it to a file first')
            found = [name]
        else:
            found = [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
            if not found:
                raise InputError(f'there is no {name}: name files, folders, patterns in quotes, or a dataset of the '
                                 f'hub (owner/name)')
        files += sorted(found)
    once = {}
    for path in files:
        once.setdefault(os.path.abspath(path), path)
    return Source(list(once.values()), field)


def _texts_in(folder):
    """(the text files in a folder and the folders in it, the number of others); hidden ones are left out."""
    def refuse(error):
        raise InputError(f'{error.filename} cannot be read: {error.strerror}') from None
    found, others = [], 0
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in files:
            if _kind(name) in IN_FOLDERS and name[0] != '.':
                found.append(os.path.join(place, name))
            elif name[0] != '.':
                others += 1
    return found, others


def installed_code():
    """The paths of Python's own source and of every installed package's, of copies of a file the first."""
    seen, paths = set(), []
    for place in sorted({sysconfig.get_path(name) for name in ('stdlib', 'purelib', 'platlib')}):
        for folder, folders, files in os.walk(place):
            folders.sort()
            for path in sorted(os.path.join(folder, f) for f in files if f.endswith('.py')):
                try:
                    with open(path, 'rb') as f:
                        content = f.read()
                    content.decode('utf-8')
                except (OSError, UnicodeDecodeError):  # tests of encodings, for the most part
                    continue
                digest = hashlib.sha256(content).digest()
                if digest not in seen:
                    seen.add(digest)
                    paths.append(path)
    return paths
