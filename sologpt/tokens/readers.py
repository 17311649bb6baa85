"""
Documents out of one file: text, JSON lines or parquet, compressed or not.

A reader is made by reader(path, field, position). Iterating over it yields documents, from `position` on; None is the
beginning. Between two documents its attribute `position` says where the next one begins, in plain values that JSON can
hold. It raises InputError, or what the library that reads the file raises: sources.py turns that into an InputError.
"""

import glob
import io
import json
import os
import time
from collections.abc import Iterator

from configurator import InputError
from sologpt.tokens.tokenizer_kinds import END_OF_TEXT

LONGEST = 2 ** 22  # the most bytes of text in one document: a longer text is cut at the end of a line
COMPRESSED = {'.gz': 'gzip', '.zst': 'zstd', '.bz2': 'bz2'}


class TextFile:
    """A text, plain or compressed: one document, or several with <|endoftext|> between them. `field` is not used."""

    def __init__(self, path: str, field: str, position: int | None):
        self.path, self.position = path, position or 0  # in bytes of the text

    def __iter__(self) -> Iterator[str]:
        mark, start, buffer = END_OF_TEXT.encode(), 0, b''
        with _open_at(self.path, self.position) as f:
            while True:
                # search LONGEST bytes, and the few after them that a mark or a character may need that begins in them
                end = buffer.find(mark, start, start + LONGEST + len(mark) - 1)
                after = end + len(mark)
                if end < 0 and len(buffer) - start < LONGEST + len(mark):
                    more = f.read(LONGEST)
                    if more:
                        start, buffer = 0, buffer[start:] + more
                        continue
                    end = after = len(buffer) if len(buffer) - start <= LONGEST else _cut_bytes(buffer, start)
                elif end < 0:
                    end = after = _cut_bytes(buffer, start)
                if after == start:
                    return
                document = self._decode(buffer[start:end])
                self.position, start = self.position + after - start, after
                yield document

    def _decode(self, document):
        try:
            return document.decode('utf-8')
        except UnicodeDecodeError as e:
            raise InputError(f'{self.path} is not UTF-8 text (byte {self.position + e.start:,}): convert it first, for '
                             f'example with iconv') from None


class JsonLines:
    """Documents in one field of JSON objects, one object per line, plain or compressed."""

    def __init__(self, path: str, field: str, position: list | None):
        self.path, self.field, self.position = path, field, position or [0, 0]  # bytes, lines

    def __iter__(self) -> Iterator[str]:
        with _open_at(self.path, self.position[0]) as f:
            for line in f:
                self.position = [self.position[0] + len(line), self.position[1] + 1]
                if not line.strip():
                    continue
                where = f'{self.path}, line {self.position[1]}'
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise InputError(f'{where} is no JSON ({e}): there must be one object per line, and no array '
                                     f'around them') from None
                yield text_in(record, self.field, where)


class Rows:
    """Documents in one column of a file, here or on the web, that the `datasets` library reads, such as parquet."""
    kind = 'parquet'  # the library's name for this kind of file

    def __init__(self, path: str, field: str, position: dict | None):
        self.path, self.field, self.resumed = path, field, position
        self.dataset = None

    @property
    def position(self):
        return self.dataset.state_dict() if self.dataset else self.resumed

    def __iter__(self) -> Iterator[str]:
        datasets = quiet_datasets()
        path = self.path if '://' in self.path else glob.escape(self.path)
        options = {'data_files': [path], 'split': 'train', 'streaming': True}
        if self.kind == 'parquet':  # read this column alone, and only from the row group that holds the position
            columns = datasets.load_dataset(self.kind, **options).column_names
            text_in(dict.fromkeys(columns), self.field, self.path)
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
                yield text_in(row, self.field, self.path)
        except BaseException:  # left before its end: if the process ends before Arrow's threads do, they abort it
            rows.close()  # (https://github.com/apache/arrow/issues/45214)
            time.sleep(0.2)
            raise


def rows_of(kind: str) -> type[Rows]:
    """The Rows class for another kind of file. kind: the name that `datasets` has for it."""
    return type('Rows', (Rows,), {'kind': kind})


def quiet_datasets():
    """The `datasets` library, with its messages turned off: sources.py reports errors. The import takes a second."""
    import datasets
    import huggingface_hub
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets


READERS = {'.jsonl': JsonLines, '.ndjson': JsonLines, '.json': JsonLines, '.parquet': Rows}  # all others: TextFile


def reader_of(path: str) -> type:
    """The reader class for a file, by its name."""
    return READERS.get(kind_of(path), TextFile)


def kind_of(path: str) -> str:
    """The suffix that says what a file holds: '.txt' for a.TXT.gz."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


def text_in(record: object, field: str, where: str) -> str:
    """The text in one field of a record. Raises InputError, which names `where`, if there is none."""
    if not isinstance(record, dict):
        raise InputError(f'{where} is a {type(record).__name__}, not an object with a field {field!r}')
    if field not in record:
        raise InputError(f'{where} has no field {field!r}: it has {", ".join(record)}; name the one with the text by '
                         f'--field=')
    if not isinstance(record[field], str | None):
        raise InputError(f'{where}: the field {field!r} is a {type(record[field]).__name__}, not text; name another by '
                         f'--field=')
    return record[field] or ''


def _open_at(path, position):
    """A file's bytes from `position` on, decompressed. A compressed file is read from its beginning for that."""
    codec = COMPRESSED.get(os.path.splitext(path)[1].lower())
    if not codec:
        f = open(path, 'rb')
        f.seek(position)
        return f
    import pyarrow  # unlike Python's zstandard, it notices a file that was cut off
    f = io.BufferedReader(pyarrow.input_stream(path, compression=codec), 2 ** 20)
    while position and (dropped := f.read(min(position, 2 ** 20))):
        position -= len(dropped)
    return f


# ---- long texts ------------------------------------------------------------------------------------------------------

def _cut_bytes(buffer, start):
    """Where to cut more than LONGEST bytes that begin at `start`: after a line, or a word, or at least a character."""
    for mark in (b'\n', b' '):
        end = buffer.rfind(mark, start, start + LONGEST) + 1
        if end > start:
            return end
    end = start + LONGEST
    while end < len(buffer) and buffer[end] & 0xc0 == 0x80 and end > start + LONGEST - 4:
        end -= 1
    return end


def document_parts(document: str) -> Iterator[str]:
    """
    A document in the form in which it is encoded: parts of at most LONGEST characters, cut after a line or a word.

    An empty document has no part. Half of a surrogate pair, which JSON can write but UTF-8 cannot, becomes U+FFFD.
    """
    try:
        document.encode()
    except UnicodeEncodeError:
        document = document.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')  # as tiktoken does
    start = 0
    while start < len(document):
        end = longest = start + LONGEST
        if longest < len(document):
            end = next((i for i in (document.rfind(mark, start, longest) + 1 for mark in '\n ') if i), longest)
        yield document[start:end]
        start = end
