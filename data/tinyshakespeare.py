"""The text of both Shakespeare datasets: one file, downloaded once or put beside prepare.py by hand."""

import hashlib
import http.client
import os
import urllib.request

from configurator import InputError

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def read_splits(folder: str) -> dict[str, list[str]]:
    """
    {'train': [text], 'val': [text]}: the first 90% and the last 10% of the characters, as in nanoGPT.

    Reads input.txt in `folder`, after downloading it there if it is missing. Raises InputError.
    """
    path = os.path.join(folder, 'input.txt')
    if not os.path.exists(path):
        content = _download(path)
        with open(path, 'wb') as f:
            f.write(content)
    with open(path, 'rb') as f:
        content = f.read()
    _check(content, path)
    text = content.decode('utf-8')
    cut = int(len(text) * 0.9)
    return {'train': [text[:cut]], 'val': [text[cut:]]}


def _download(path):
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as e:
        raise InputError(f'{URL} cannot be reached ({getattr(e, "reason", e)}): download it where there is a network '
                         f'and put it at {path}') from None
    _check(content, URL)
    return content


def _check(content, source):
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise InputError(f'{source} is not the expected text (its SHA-256 is another): put the right one at input.txt '
                         f'beside prepare.py, or remove that file to download it')
