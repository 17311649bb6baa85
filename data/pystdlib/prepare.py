"""
The source of the running Python's standard library, as bytes: needs no network.

  python data/pystdlib/prepare.py

Every 20th file is for validation, so that no text is in both splits. Tests and site-packages are left out.
"""

import argparse
import os
import sys
import sysconfig

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, '..', '..'))

from configurator import InputError, report_errors  # noqa: E402
from sologpt.tokens.corpus import write  # noqa: E402
from sologpt.tokens.tokenizer import Bytes  # noqa: E402

report_errors()
argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
LEFT_OUT = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'lib2to3',
            'encodings', 'pydoc_data'}  # tables rather than code

stdlib = sysconfig.get_path('stdlib')
paths = []
for folder, folders, files in os.walk(stdlib):
    folders[:] = sorted(f for f in folders if f not in LEFT_OUT)
    paths += [os.path.join(folder, f) for f in sorted(files) if f.endswith('.py')]
if len(paths) < 100:
    raise InputError(f'only {len(paths)} source files in {stdlib}: this Python comes without its source; '
                     f'use data/text/prepare.py with a text of your own')


def texts(chosen):
    for path in chosen:
        with open(path, encoding='utf-8', errors='ignore') as f:
            yield f.read()


val = paths[::20]
train = sorted(set(paths) - set(val))
version = '.'.join(map(str, sys.version_info[:3]))
write(here, Bytes(), {'train': texts(train), 'val': texts(val)},
           source=f'standard library of Python {version}, {len(paths)} files')
