"""The text that both Shakespeare datasets are made of: one file from the web, or put in its place by hand."""

import hashlib
import http.client
import os
import urllib.request

from configurator import InputError

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def splits(folder):
    """{'train': [text], 'val': [text]}: nanoGPT's division, 90 % and 10 % of the characters. Raises InputError."""
    path = os.path.join(folder, 'input.txt')
    if not os.path.exists(path):
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as e:
            raise InputError(f'{URL} cannot be reached ({getattr(e, "reason", e)}): download it where there is a '
                             f'network and put it at {path}') from None
        _check(content, URL)
        with open(path, 'wb') as f:
            f.write(content)
    with open(path, 'rb') as f:
        content = f.read()
    _check(content, path)
    text = content.decode('utf-8')
    cut = int(len(text) * 0.9)
    return {'train': [text[:cut]], 'val': [text[cut:]]}


def _check(content, source):
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise InputError(f'{source} is not the expected text (its SHA-256 is another): put the right one at input.txt '
                         f'beside prepare.py, or remove that file to download it')
