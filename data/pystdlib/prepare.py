"""
The source of the running Python's standard library, as bytes. Needs no network.

  python data/pystdlib/prepare.py

Every 20th file is for validation, so that no text is in both splits. Tests and site-packages are left out.
"""

import os
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project

from configurator import InputError, configure
from sologpt.tokens.corpus import write_texts
from sologpt.tokens.tokenizer import Bytes

configure(globals())

LEFT_OUT = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'lib2to3',
            'encodings', 'pydoc_data'}  # tables rather than code


def source_files(place):
    """The paths of Python's source files in a folder and its subfolders, in a fixed order."""
    paths = []
    for folder, folders, files in os.walk(place):
        folders[:] = sorted(f for f in folders if f not in LEFT_OUT)
        paths += [os.path.join(folder, f) for f in sorted(files) if f.endswith('.py')]
    return paths


def texts(paths):
    for path in paths:
        with open(path, encoding='utf-8', errors='ignore') as f:
            yield f.read()


stdlib = sysconfig.get_path('stdlib')
paths = source_files(stdlib)
if len(paths) < 100:
    raise InputError(f'only {len(paths)} source files in {stdlib}: this Python comes without its source; '
                     f'use data/text/prepare.py with a text of your own')
val = paths[::20]
train = sorted(set(paths) - set(val))
version = '.'.join(map(str, sys.version_info[:3]))
write_texts(Path(__file__).parent, Bytes(), {'train': texts(train), 'val': texts(val)},
            source=f'standard library of Python {version}, {len(paths)} files')
