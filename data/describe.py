"""
What a folder of token files holds: sizes, vocabulary, documents by length, excerpts, hashes, and whether documents of
the validation are in the training text as well.

  python data/describe.py data/NAME [--excerpt=200]
"""

import argparse
import collections
import hashlib
import json
import os
import sys

import numpy as np

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, '..'))

from configurator import InputError, report_errors  # noqa: E402
from sologpt.tokens.data_folder import paths_of, read_meta  # noqa: E402
from sologpt.tokens.tokenizer import eot_of, from_dict  # noqa: E402

CHUNK = 2 ** 24  # tokens read at a time
LENGTHS = (64, 256, 1024, 4096, 16384, 65536)  # up to which documents are counted together

report_errors()
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('folder', help='such as data/shakespeare')
parser.add_argument('--excerpt', type=int, default=200, help='tokens shown of each split (%(default)s)')
args = parser.parse_args()
if not os.path.isdir(args.folder):
    raise InputError(f'there is no folder {args.folder}')
splits = {split: paths_of(args.folder, split) for split in ('train', 'val')}
progress = os.path.join(args.folder, 'progress.json')
if os.path.exists(progress):
    try:
        with open(progress, encoding='utf-8') as f:
            saved = json.load(f)
        if 'done' not in saved:
            print(f'its preparation is not finished: {sum(saved["tokens"].values()):,} tokens so far')
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f'{progress} is damaged: prepare the data anew, with --restart') from None
elif not any(splits.values()):
    raise InputError(f'{args.folder} has no token files: prepare them first')


def chunks(path):
    with open(path, 'rb') as f:
        while len(chunk := np.fromfile(f, dtype, CHUNK)):
            yield chunk


def documents(paths):
    """(tokens, digest) of each document of a split; the end-of-text tokens between them belong to none."""
    length, digest = 0, hashlib.blake2b(digest_size=16)
    for chunk in (chunk for path in paths for chunk in chunks(path)):
        start = 0
        for end in np.flatnonzero(chunk == eot) if eot is not None else ():
            digest.update(chunk[start:end])
            yield length + int(end) - start, digest.digest()
            length, digest, start = 0, hashlib.blake2b(digest_size=16), int(end) + 1
        digest.update(chunk[start:])
        length += len(chunk) - start
    yield length, digest.digest()


meta = read_meta(args.folder)
dtype, tokenizer, eot = np.dtype('<u2' if meta['dtype'] == 'uint16' else '<u4'), None, None
try:
    eot = eot_of(meta['tokenizer'])
    tokenizer = from_dict(meta['tokenizer'])
except InputError as e:
    print(f'(without excerpts: {e})')
described = ' '.join(str(meta['tokenizer'][key]) for key in ('kind', 'name') if key in meta['tokenizer'])
print(f'{args.folder}: {meta.get("source", "no source given")}\n'
      f'tokenizer {described}, {meta["vocab_size"]:,} ids in {meta["dtype"]}')
excerpts, validation = {}, set()
for split, paths in reversed(splits.items()):
    if not paths:
        print(f'\n{split}: no files')
        continue
    used, first, size, outside = np.zeros(meta['vocab_size'], bool), None, 0, 0
    hashes = {path: hashlib.sha256() for path in paths}
    for path in paths:
        for chunk in chunks(path):
            size += len(chunk)
            hashes[path].update(chunk)
            ids = np.unique(chunk)
            used[ids[ids < len(used)]] = True
            outside += int((chunk >= len(used)).sum())
            first = chunk if first is None else first
    print(f'\n{split}: {size:,} tokens, {size * dtype.itemsize / 1e6:,.1f} MB in {len(paths)} file'
          f'{"s" if len(paths) > 1 else ""}; {int(used.sum()):,} of the ids'
          + (f'; {outside:,} TOKENS ARE BEYOND THE VOCABULARY' if outside else ''))
    if expected := meta.get('tokens', {}).get(split, size) - size:
        print(f'  meta.json says {expected:+,} tokens')
    if tokenizer and size and not outside:
        sample = first[:100_000].tolist()
        print(f'  {len(tokenizer.to_bytes(sample)) / len(sample):.2f} bytes of text per token')
        excerpts[split] = tokenizer.decode(first[:max(0, args.excerpt)].tolist())
    if size:
        counts, tokens, again, n = collections.Counter(), collections.Counter(), [0, 0], 0
        for length, digest in documents(paths):
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
        total = sum(tokens.values())
    if size and eot is None:
        print('  the tokenizer has no end of text: where documents end is not known')
    elif size and n:
        print(f'  {n:,} document{"s" if n > 1 else ""}, {total / n:,.0f} tokens in the mean; by length:')
        for most in (*LENGTHS, None):
            if counts[most]:
                print(f'    {f"up to {most:,}" if most else "more":>14}: {counts[most] / n:6.1%} of the documents, '
                      f'{tokens[most] / total:6.1%} of the tokens')
        if split == 'train':
            print(f'  {again[0]:,} of them ({again[1]:,} tokens) are documents of val as well')
    for path in paths:
        print(f'  {os.path.basename(path)}: {os.path.getsize(path):,} bytes, sha256 {hashes[path].hexdigest()}')
for split, excerpt in excerpts.items():
    print(f'\n{"-" * 40} {split} {"-" * 40}\n{excerpt}')
