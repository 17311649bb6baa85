"""
How far a preparation has come: progress.json in the data folder.

    settings      what the tokens follow from: files, field, tokenizer, split, shard size, seed
    position      where in the source to go on, and how many blocks lie before it (`block`)
    tokens        how many tokens of each split are written up to there
    seen          digests of the documents that FirstTokens took for validation
    fingerprint   that of the source's files up to the position
    done          when all that was asked for is written: the tokens of each split, and whether the source is exhausted

What the token files have beyond this is cut off by the next run, which writes it again.
"""

import contextlib
import hashlib
import json
import os
import re

from configurator import InputError
from sologpt.tokens.data_folder import token_files_in_progress, write_json
from sologpt.tokens.sources import Source
from sologpt.tokens.splits import FirstTokens, SomeDocuments
from sologpt.tokens.tokenizer import Tokenizer


def settings_of(folder: str, source: Source, tokenizer: Tokenizer, split: FirstTokens | SomeDocuments,
                shard_tokens: int, seed: int) -> dict:
    """What must be the same when a preparation goes on, by the name that an error gives it."""
    return {
        'files': source.files if source.remote else _sha256([os.path.relpath(path, folder) for path in source.files]),
        '--field': source.field, '--tokenizer': _sha256(tokenizer.to_dict()),
        split.option: [type(split).__name__, vars(split)], '--shard_tokens': shard_tokens, '--seed': seed}


def open_progress(folder: str, source: Source, settings: dict, restart: bool) -> dict:
    """
    The progress of a data folder. A folder without any gets an empty one; so does every folder if `restart`.

    Raises InputError if the folder has data that was prepared from something else.
    """
    path = os.path.join(folder, 'progress.json')
    data = [found for split in ('train', 'val') for found in token_files_in_progress(folder, split)]
    if restart or not data and not os.path.exists(path):
        return _new_progress(path, data, source, settings)
    progress = _read_progress(path, folder)
    if not (any(progress['tokens'].values()) or 'done' in progress):  # nothing would be lost
        return _new_progress(path, data, source, settings)
    saved = progress['settings']
    if source.remote and _without_revisions(saved['files']) == _without_revisions(source.files):
        source.files = settings['files'] = saved['files']  # the revision of then, whatever has been published since
    other = [key for key in settings if settings[key] != saved.get(key)]
    if other:
        raise InputError(f'{folder} was prepared with other {" and ".join(other)}: give the same, or --restart, which '
                         f'removes what is there')
    if progress['fingerprint'] != source.fingerprint(progress['position']):
        raise InputError(f'{source.name} has changed since {folder} was prepared: --restart prepares it anew')
    return progress


def _new_progress(path, data, source, settings):
    """Remove the files in `data` and write an empty progress.json."""
    for name in (*data, path):
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)
    progress = {'settings': settings, 'position': [0, None], 'block': 0, 'seen': [], 'tokens': {'train': 0, 'val': 0},
                'fingerprint': source.fingerprint([0, None])}
    write_json(path, progress)
    return progress


def _read_progress(path, folder):
    """The content of progress.json. Raises InputError."""
    try:
        with open(path, encoding='utf-8') as f:
            progress = json.load(f)
        if missing := {'settings', 'tokens', 'position', 'fingerprint'} - progress.keys():
            raise KeyError(*missing)
    except FileNotFoundError:
        raise InputError(f'{folder} has data that this script did not prepare: --restart removes it') from None
    except (ValueError, KeyError, AttributeError):
        raise InputError(f'{path} is damaged: prepare the data anew, with --restart') from None
    return progress


def _sha256(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _without_revisions(files):
    return [re.sub(r'@[0-9a-f]{40}/', '/', path) for path in files]
