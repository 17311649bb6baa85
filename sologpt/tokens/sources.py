"""
Documents out of many files: here, in a folder, or in a dataset of Hugging Face's hub.

A Source reads one file after the other in a constant amount of memory. It says in plain values where it is, so that a
later process can go on from there.
"""

import glob
import hashlib
import itertools
import os
import re
import sysconfig
import time
from collections.abc import Iterator

from configurator import InputError
from sologpt.tokens.readers import COMPRESSED, kind_of, quiet_datasets, reader_of, rows_of

PAUSES = (5, 20, 60, 180)  # seconds to wait before the network is tried again
IN_FOLDERS = ('.txt', '.md', '.jsonl', '.ndjson', '.parquet')  # what is read in a folder; other files need a pattern


class Source:
    """
    The documents of several files, one after the other. Iteration begins at `position`.

    If the network fails, it is tried again after each of PAUSES. Iteration raises InputError.
    """
    position = (0, None)  # the number of a file, and the position in it

    def __init__(self, files: list[str], field: str = 'text', reader: type | None = None, name: str | None = None):
        """
        files: paths or URLs. field: the field or column with the text, in files that have several.
        reader: the reader class for all files; None: by the name of each. name: what meta.json says the text is.
        """
        self.files, self.field, self.reader = files, field, reader
        self.name = name or _utf8(', '.join(files[:3]) + (f' and {len(files) - 3:,} more' if len(files) > 3 else ''))
        self.remote = any('://' in path for path in files)

    def again(self) -> 'Source':
        """A new Source with the same files, at their beginning."""
        return Source(self.files, self.field, self.reader, self.name)

    def fingerprint(self, position) -> str:
        """A hash that changes if a file changes that has been read, in whole or in part, up to `position`."""
        number, within = position
        stats = []
        for path in () if self.remote else self.files[:number + (within is not None)]:
            try:
                stats.append((os.stat(path).st_size, os.stat(path).st_mtime_ns))
            except OSError as e:
                raise InputError(f'{path} cannot be read: {e.strerror}') from None
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def n_bytes(self) -> int | None:
        """About how many bytes of text there are; None for remote files. A compressed file counts as three times."""
        return None if self.remote else sum(
            os.path.getsize(path) * (3 if path.lower().endswith((*COMPRESSED, '.parquet')) else 1)
            for path in self.files)

    def __iter__(self) -> Iterator[str]:
        first, within = self.position
        for number in range(first, len(self.files)):
            path, failures = self.files[number], 0
            open_reader = self.reader or reader_of(path)
            while True:
                reader = open_reader(path, self.field, within)
                try:
                    for document in _report_errors(reader, path):
                        self.position, failures = (number, reader), 0
                        yield document
                    break
                except NetworkError as e:
                    wait_for_network(e, failures, self.name, PAUSES)
                    within, failures = reader.position, failures + 1
            self.position, within = (number + 1, None), None

    def where(self) -> list:
        """`position` as plain values."""
        number, within = self.position
        return [number, getattr(within, 'position', within)]


# ---- errors ----------------------------------------------------------------------------------------------------------

class NetworkError(Exception):
    """Something on the web cannot be read at the moment."""


def _report_errors(reader, path):
    """Yield the documents of a reader. Its errors become InputErrors or NetworkErrors."""
    try:
        yield from reader
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f'{path} is not there (any more)') from None
    except (EOFError, ValueError) as e:  # pyarrow's errors are ValueErrors
        raise InputError(f'{path} is damaged or cut off ({_one_line(e)}): get it again') from None
    except Exception as e:
        if '://' in path:  # each library below `datasets` has its own errors for a network that fails
            raise NetworkError(f'{type(e).__name__}: {_one_line(e)}') from None
        if not isinstance(e, OSError):
            raise
        what = f'cannot be read: {e.strerror}' if e.strerror else \
            f'is damaged or cut off ({_one_line(e)}): get it again'
        raise InputError(f'{path} {what}') from None


def wait_for_network(error: object, failures: int, what: str, pauses: tuple) -> None:
    """
    Wait before the next attempt. failures: how many attempts failed before this one. what: what is being read.

    Raises InputError when all pauses, in seconds, have been used.
    """
    said = f'{what} cannot be reached ({error})'
    if failures == len(pauses):
        raise InputError(f'{said}: check the network and run the same command again, which goes on from here') from None
    print(f'{said}; trying again in {pauses[failures]} s', flush=True)
    time.sleep(pauses[failures])


def _utf8(path):
    """A path with '?' for what UTF-8 cannot write."""
    return path.encode(errors='replace').decode()


def _one_line(error):
    return ' '.join(str(error).split())[:120]


# ---- finding files ---------------------------------------------------------------------------------------------------

def find_source(names: list[str], field: str = 'text') -> Source:
    """
    The Source for the names on a command line. Raises InputError.

    names: files; folders, for all their .txt, .md, .jsonl and .parquet files that are not hidden; patterns in quotes
    ('src/**/*.py'); or one dataset of the hub as owner/name or owner/name:config.
    field: the field or column with the text.
    """
    if len(names) == 1 and _is_dataset_name(names[0]):
        print(f'there is no file or folder {names[0]} here: looking for such a dataset on the hub', flush=True)
        path, _, config = names[0].partition(':')
        return hub_source(path, config or None, field, name=f'{names[0]} of the hub')
    once = {}  # a file that is named twice is read once
    for path in itertools.chain.from_iterable(sorted(_files_named(name)) for name in names):
        once.setdefault(os.path.abspath(path), path)
    return Source(list(once.values()), field)


def _is_dataset_name(name):
    """Whether a name can only be a dataset of the hub: it looks like one, and no such file or folder exists."""
    looks_like_one = re.fullmatch(r'[\w-]+/[\w-]+(\.[\d.]+)?(:[\w.-]+)?', name)
    return looks_like_one and not (glob.glob(name) or os.path.exists(name.partition('/')[0]))


def _files_named(name):
    """The files that a name on the command line stands for: a file, a folder or a pattern."""
    if os.path.isdir(name):
        found, others = _texts_in(name)
        if not found:
            raise InputError(f'{name} has no .txt, .md, .jsonl or .parquet files: name others by a pattern, such as '
                             f"'{os.path.join(name, '**', '*.py')}'")
        print(f'{name}: {len(found):,} files'
              + (f', and {others:,} that are no .txt, .md, .jsonl or .parquet' if others else ''), flush=True)
        return found
    if os.path.exists(name):
        if not os.path.isfile(name):
            raise InputError(f'{name} can be read only once: write it to a file first')
        return [name]
    found = [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
    if not found:
        raise InputError(f'there is no {name}: name files, folders, patterns in quotes, or a dataset of the hub '
                         f'(owner/name)')
    return found


def _texts_in(folder):
    """(the text files in a folder and its subfolders, the number of other files). Hidden files are left out."""
    def refuse(error):
        raise InputError(f'{error.filename} cannot be read: {error.strerror}') from None
    found, others = [], 0
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in files:
            if kind_of(name) in IN_FOLDERS and name[0] != '.':
                found.append(os.path.join(place, name))
            elif name[0] != '.':
                others += 1
    return found, others


def hub_source(path: str, config: str | None = None, field: str = 'text', name: str | None = None) -> Source:
    """
    The Source for the split `train` of a dataset of Hugging Face's hub. Raises InputError.

    path: owner/name, or a pattern for parquet files (`hf://datasets/...` or in a folder). config: which part of the
    dataset. field: the column with the text. name: what messages and meta.json call it. Only what is read is loaded.
    """
    datasets = quiet_datasets()
    what = name or (f'{path}:{config}' if config else path)
    for failures in itertools.count():
        try:
            builder = (datasets.load_dataset_builder('parquet', data_files=path) if path.endswith('.parquet') else
                       datasets.load_dataset_builder(path, name=config))
            break
        except (FileNotFoundError, ValueError, RuntimeError) as e:  # not there, no such config, or it needs a script
            raise InputError(f'{what} cannot be read: {_one_line(e)}') from None
        except Exception as e:
            wait_for_network(f'{type(e).__name__}: {_one_line(e)}', failures, what, PAUSES[:2])  # nothing has begun
    files = {str(split): list(map(str, paths)) for split, paths in (builder.config.data_files or {}).items()}
    if not files.get('train'):
        others = ', '.join(files.keys() - {'train'})
        raise InputError(f'{what} has no split train in files, only {others}' if others else
                         f'{what}: there is no {path}')
    return Source(files['train'], field, rows_of(builder.name), what)


def installed_code() -> list[str]:
    """The paths of all source files of Python and of the installed packages. Of equal files, the first is listed."""
    seen, paths = set(), []
    for place in sorted({sysconfig.get_path(name) for name in ('stdlib', 'purelib', 'platlib')}):
        for folder, folders, files in os.walk(place):
            folders.sort()
            for path in sorted(os.path.join(folder, f) for f in files if f.endswith('.py')):
                digest = _digest_of_text(path)
                if digest and digest not in seen:
                    seen.add(digest)
                    paths.append(path)
    return paths


def _digest_of_text(path):
    """The hash of a file; None if it cannot be read or is not UTF-8, as some tests of encodings are not."""
    try:
        with open(path, 'rb') as f:
            content = f.read()
        content.decode('utf-8')
    except (OSError, UnicodeDecodeError):
        return None
    return hashlib.sha256(content).digest()
