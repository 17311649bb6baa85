"""
Documents to a data folder: shuffled, encoded on all cores, and written in shards.

    train.bin or train_000.bin, ...   token files: see data_folder.py
    val.bin or val_000.bin, ...       the same, from documents that are not in train
    meta.json                         what these files hold
    progress.json                     how far the preparation has come: see progress.py

The tokens depend on nothing but the text, the tokenizer, the split and the seed. A preparation can be stopped at any
moment. The next run of the same command goes on after the last finished block, and ends with the same bytes.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from configurator import InputError
from sologpt.tokens.blocks import encode_blocks
from sologpt.tokens.data_folder import token_dtype, token_files, token_files_in_progress, write_meta
from sologpt.tokens.progress import open_progress, settings_of
from sologpt.tokens.readers import document_parts
from sologpt.tokens.shards import UNLIMITED, Writer
from sologpt.tokens.sources import Source
from sologpt.tokens.splits import FirstTokens, SomeDocuments, parse_count
from sologpt.tokens.tokenizer import Bytes, Chars, Tokenizer, tokenizer_by_name


@dataclass
class Options:
    """What all preparations can be asked for. Counts may be text, such as '100M'. Raises InputError."""
    tokens: int | str | None = None  # tokens to train on; None: all there are
    shard_tokens: int | str = 100_000_000  # tokens in a file
    seed: int = 1337  # of the order of documents
    restart: bool = False  # remove what is there, and begin anew

    def __post_init__(self):
        if self.tokens is not None:
            self.tokens = parse_count(self.tokens, 'tokens')
        self.shard_tokens = parse_count(self.shard_tokens, 'shard_tokens')
        if self.seed < 0:
            raise InputError(f'--seed={self.seed} must be 0, 1, 2, ...')


# ---- many documents --------------------------------------------------------------------------------------------------

def prepare_corpus(folder: str | os.PathLike, source: Source, tokenizer: Tokenizer, split: FirstTokens | SomeDocuments,
                   options: Options | None = None, expected: float | None = None) -> None:
    """
    Write a data folder, or continue one that the same call has begun.

    If the folder has fewer tokens than options.tokens, more are added. expected: about how many tokens the whole source
    has, for the progress bar and the check of the disk. Raises InputError.
    """
    import filelock
    folder = os.path.relpath(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        with filelock.FileLock(os.path.join(folder, 'progress.lock'), timeout=0):
            _prepare_locked(folder, source, tokenizer, split, options or Options(), expected)
    except filelock.Timeout:
        raise InputError(f'{folder} is being prepared by another process: wait for it, or stop it') from None
    except OSError as e:  # of writing: errors of reading are InputErrors by now
        raise InputError(f'{folder} cannot be written ({e.strerror}): what is finished is kept, and the same command '
                         f'goes on when it can') from None


def _prepare_locked(folder, source, tokenizer, split, options, expected):
    dtype = token_dtype(tokenizer.vocab_size)
    settings = settings_of(folder, source, tokenizer, split, options.shard_tokens, options.seed)
    progress = open_progress(folder, source, settings, options.restart)
    most = options.tokens or UNLIMITED
    done = progress.pop('done', None)
    if done and (done['exhausted'] or done['tokens']['train'] >= most):
        _check_done(folder, done['tokens'], dtype)
        print(f'{folder} is prepared: {done["tokens"]["train"]:,} + {done["tokens"]["val"]:,} tokens')
        return
    expected = _total_tokens(source, tokenizer, split, options.tokens, expected)
    _check_disk(folder, ((expected or 0) - sum(progress['tokens'].values())) * dtype.itemsize)
    writer = Writer(folder, tokenizer, split, options.shard_tokens, source, progress)
    if writer.written():
        print(f'{folder}: going on after {writer.written():,} tokens', flush=True)
    source.position = progress['position']
    try:
        full = _write_blocks(writer, options.seed, most, expected)
        empty = [name for name, files in writer.splits.items() if not files.written]
        if empty:
            raise InputError(f'{source.name} has no text for {" and ".join(empty)}: give more, or another '
                             f'{split.option}, with --restart')
        writer.finish(exhausted=not full)
    except KeyboardInterrupt:
        print(f'stopped; {sum(writer.progress["tokens"].values()):,} tokens are kept, and the same command goes on '
              f'from there')
        raise SystemExit(130) from None
    finally:
        writer.close()
    if options.tokens and not full:
        print(f'{source.name} has no more text than this')
    for name, files in writer.splits.items():
        paths = token_files_in_progress(folder, name)
        last = f' to {os.path.basename(paths[-1])}' if len(paths) > 1 else ''
        print(f'{paths[0]}{last}: {files.written:,} tokens')


def _check_done(folder, tokens, dtype):
    """Raise InputError if the files of a finished preparation no longer have its tokens."""
    for name, n in tokens.items():
        if sum(map(os.path.getsize, token_files(folder, name))) != n * dtype.itemsize:
            raise InputError(f'{folder} no longer has the {n:,} tokens of {name} that were prepared: prepare them '
                             f'anew, with --restart')


def _total_tokens(source, tokenizer, split, tokens, expected):
    """About how many tokens will be written, or None. tokens: of train, as asked for; expected: as the script says."""
    per_token = 1 if isinstance(tokenizer, Bytes | Chars) else 4  # bytes of text; 4 is typical of a BPE
    of_bytes = source.n_bytes() and source.n_bytes() / per_token
    return min((n for n in (tokens and split.total_tokens(tokens), expected, of_bytes) if n), default=None)


def _check_disk(folder, needed):
    """Raise InputError if the disk does not have the needed bytes."""
    if needed > (free := shutil.disk_usage(folder).free):
        raise InputError(f'{folder} needs {needed / 1e6:,.0f} MB more, but the disk has {free / 1e6:,.0f}: make room, '
                         f'or ask for fewer --tokens')


def _write_blocks(writer, seed, most, expected):
    """
    Write the source block by block. Returns whether train has become full before the source ended.

    The block in which train becomes full is not committed. So a later run, which asks for more tokens, begins with it.
    """
    import tqdm
    train, source = writer.splits['train'], writer.source
    blocks = encode_blocks(source, writer.tokenizer, writer.split, writer.dtype, seed, writer.progress['block'])
    bar = tqdm.tqdm(total=expected, initial=writer.written(), unit=' tokens', unit_scale=True, disable=None)
    with contextlib.closing(blocks), contextlib.closing(bar):
        for encoded, position in blocks:
            finished = train.published()
            for documents in encoded:
                before = writer.written()
                writer.add(documents.result(), most)
                bar.update(writer.written() - before)
            if train.written >= most:
                return True
            writer.commit(position)
            if (now := train.published()) > finished:
                bar.write(f'{writer.folder}: {now:,} tokens to train on are finished')
    return False


def choose_tokenizer(name: str, source: Source) -> Tokenizer:
    """The tokenizer that --tokenizer names. 'chars' has the characters of the source's text. Raises InputError."""
    if name != 'chars':
        return tokenizer_by_name(name)
    characters = set()
    for document in source.again():
        characters.update(*document_parts(document))
    return Chars(sorted(characters))


# ---- a few texts -----------------------------------------------------------------------------------------------------

def write_texts(folder: str | os.PathLike, tokenizer: Tokenizer, splits: dict[str, Iterable[str]], source: str) -> None:
    """
    Write train.bin, val.bin and meta.json of texts that are in memory. On an error, none of the files changes.

    splits: 'train' and 'val' -> the texts. Each text is a document. source: a line that says what the text is.
    Raises InputError.
    """
    folder = os.path.relpath(folder)
    os.makedirs(folder, exist_ok=True)
    dtype = token_dtype(tokenizer.vocab_size)
    counts, paths = {}, {split: os.path.join(folder, f'{split}.bin') for split in splits}
    try:
        for split, texts in splits.items():
            counts[split] = 0
            with open(paths[split] + '.tmp', 'wb') as f:
                for i, text in enumerate(texts):
                    before = tokenizer.before_document(is_first=i == 0)
                    for ids in (np.array(before), tokenizer.encode_ordinary(text)):
                        ids.astype(dtype).tofile(f)
                        counts[split] += len(ids)
        for path in paths.values():
            os.replace(path + '.tmp', path)
    finally:
        for path in paths.values():
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + '.tmp')
    write_meta(folder, tokenizer, counts, source)
    for split, n in counts.items():
        print(f'{paths[split]}: {n:,} tokens')
