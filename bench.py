"""
Measure: one suite at a time, each a file in bench/.

  python bench.py --suite=speed --peer=../nanoGPT

speed   this trainer and another that follows nanoGPT's command line and log (nanoGPT itself is one), in turn on the
        same token files: ms per iteration, tokens per second, val loss, and tokens per second of sampling
"""

import importlib
import json
import os
import time

import hardware
from configurator import InputError, configure

# ----------------------------------------------------------------------------------------------------------------------
suite = 'speed'  # a file in bench/
peer = ''  # the folder of the other trainer, with data/shakespeare_char prepared in it
runs = 3  # of each program, in turn
dest = ''  # where the figures are written as JSON; '': results/<suite>.json
# ----------------------------------------------------------------------------------------------------------------------
config, given = configure(globals())

if not os.path.exists(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'bench', f'{suite}.py')):
    raise InputError(f'there is no suite {suite!r} in bench/')
dest = dest or os.path.join('results', f'{suite}.json')
if not os.path.isdir(os.path.dirname(dest) or '.'):
    raise InputError(f'dest={dest}: there is no such folder')
if runs < 1:
    raise InputError(f'runs={runs} must be at least 1')
started = time.strftime('%Y-%m-%d')
figures = importlib.import_module(f'bench.{suite}').measure(config)
with open(dest, 'w', encoding='utf-8') as f:
    command = ' '.join(['python bench.py', *(f'--{key}={config[key]}' for key in config if key in given)])
    json.dump({'command': command, 'date': started, **hardware.versions(), 'figures': figures}, f, indent=1)
print(f'written to {dest}')
