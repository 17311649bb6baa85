"""
What a folder of token files holds: sizes, vocabulary, documents by length, excerpts, hashes, and whether documents of
the validation are in the training text as well.

  python data/describe.py data/shakespeare
  python data/describe.py data/mine --excerpt=1000
"""

import collections
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project

from configurator import InputError, configure
from sologpt.tokens.data_folder import read_meta, token_files
from sologpt.tokens.tokenizer import eot_of, tokenizer_from_dict

excerpt = 200  # how many tokens to show of each split
folders = []
configure(globals(), files=folders)

CHUNK = 2 ** 24  # tokens read at a time
LENGTHS = (64, 256, 1024, 4096, 16384, 65536)  # documents are counted by these upper limits


class Folder:
    """A data folder: its meta data, and its tokenizer if that is at hand."""

    def __init__(self, path):
        self.path, self.meta = path, read_meta(path)
        self.dtype = np.dtype(self.meta['dtype']).newbyteorder('<')
        self.eot = self.tokenizer = None
        try:
            self.eot = eot_of(self.meta['tokenizer'])
            self.tokenizer = tokenizer_from_dict(self.meta['tokenizer'])
        except InputError as e:
            print(f'(without excerpts: {e})')

    def chunks(self, path):
        """The tokens of a file, CHUNK at a time."""
        with open(path, 'rb') as f:
            while len(chunk := np.fromfile(f, self.dtype, CHUNK)):
                yield chunk

    def documents(self, paths):
        """(number of tokens, digest) of each document of a split. The end-of-text tokens between them do not count."""
        length, digest = 0, hashlib.blake2b(digest_size=16)
        for chunk in (chunk for path in paths for chunk in self.chunks(path)):
            start = 0
            for end in np.flatnonzero(chunk == self.eot) if self.eot is not None else ():
                digest.update(chunk[start:end])
                yield length + int(end) - start, digest.digest()
                length, digest, start = 0, hashlib.blake2b(digest_size=16), int(end) + 1
            digest.update(chunk[start:])
            length += len(chunk) - start
        yield length, digest.digest()


def check_folder(path):
    """Raise InputError if there is nothing to describe, and say so if its preparation is not finished."""
    if not os.path.isdir(path):
        raise InputError(f'there is no folder {path}')
    progress = os.path.join(path, 'progress.json')
    if not os.path.exists(progress):
        if not token_files(path, 'train') and not token_files(path, 'val'):
            raise InputError(f'{path} has no token files: prepare them first')
        return
    try:
        with open(progress, encoding='utf-8') as f:
            saved = json.load(f)
        if 'done' not in saved:
            print(f'its preparation is not finished: {sum(saved["tokens"].values()):,} tokens so far')
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f'{progress} is damaged: prepare the data anew, with --restart') from None


def describe_split(folder, split, validation):
    """
    Print what a split holds. Returns its first tokens, or [] if they cannot be shown as text.

    validation: a set that takes the digests of the documents of val, which is described first.
    """
    paths = token_files(folder.path, split)
    if not paths:
        print(f'\n{split}: no files')
        return []
    used, first, size, outside = np.zeros(folder.meta['vocab_size'], bool), None, 0, 0
    hashes = {path: hashlib.sha256() for path in paths}
    for path in paths:
        for chunk in folder.chunks(path):
            size += len(chunk)
            hashes[path].update(chunk)
            ids = np.unique(chunk)
            used[ids[ids < len(used)]] = True
            outside += int((chunk >= len(used)).sum())
            first = chunk if first is None else first
    print(f'\n{split}: {size:,} tokens, {size * folder.dtype.itemsize / 1e6:,.1f} MB in {len(paths)} file'
          f'{"s" if len(paths) > 1 else ""}; {int(used.sum()):,} of the ids'
          + (f'; {outside:,} TOKENS ARE BEYOND THE VOCABULARY' if outside else ''))
    if expected := folder.meta.get('tokens', {}).get(split, size) - size:
        print(f'  meta.json says {expected:+,} tokens')
    readable = folder.tokenizer and size and not outside
    if readable:
        sample = first[:100_000].tolist()
        print(f'  {len(folder.tokenizer.to_bytes(sample)) / len(sample):.2f} bytes of text per token')
    if size:
        describe_documents(folder, split, paths, validation)
    for path in paths:
        print(f'  {os.path.basename(path)}: {os.path.getsize(path):,} bytes, sha256 {hashes[path].hexdigest()}')
    return first if readable else []


def describe_documents(folder, split, paths, validation):
    """Print how many documents a split has, by length, and how many documents of train are in `validation`."""
    counts, tokens, again, n = collections.Counter(), collections.Counter(), [0, 0], 0
    for length, digest in folder.documents(paths):
        if not length:
            continue
        n += 1
        group = next((most for most in LENGTHS if length <= most), None)
        counts[group] += 1
        tokens[group] += length
        if split == 'val':
            validation.add(digest)
        elif digest in validation:
            again[0] += 1
            again[1] += length
    if folder.eot is None:
        print('  the tokenizer has no end of text: where documents end is not known')
    elif n:
        total = sum(tokens.values())
        print(f'  {n:,} document{"s" if n > 1 else ""}, {total / n:,.0f} tokens in the mean; by length:')
        for most in (*LENGTHS, None):
            if counts[most]:
                print(f'    {f"up to {most:,}" if most else "more":>14}: {counts[most] / n:6.1%} of the documents, '
                      f'{tokens[most] / total:6.1%} of the tokens')
        if split == 'train':
            print(f'  {again[0]:,} of them ({again[1]:,} tokens) are documents of val as well')


if len(folders) != 1:
    raise InputError(f'name one folder, such as data/shakespeare, not {len(folders)}')
check_folder(folders[0])
folder, validation = Folder(folders[0]), set()
tokenizer = ' '.join(str(folder.meta['tokenizer'][key]) for key in ('kind', 'name') if key in folder.meta['tokenizer'])
print(f'{folder.path}: {folder.meta.get("source", "no source given")}\n'
      f'tokenizer {tokenizer}, {folder.meta["vocab_size"]:,} ids in {folder.meta["dtype"]}')
excerpts = {split: describe_split(folder, split, validation)[:max(0, excerpt)] for split in ('val', 'train')}
for split, ids in excerpts.items():
    if len(ids):
        print(f'\n{"-" * 40} {split} {"-" * 40}\n{folder.tokenizer.decode(ids.tolist())}')
