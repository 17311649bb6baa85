"""Scripts with nanoGPT's command line, run and timed: this project's, and a peer's in its own folder."""

import os
import subprocess
import sys
import tempfile
import time

from configurator import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def own(script, args):
    """One of this project's scripts, in the current folder: what it printed. Raises InputError."""
    return run(None, os.path.join(ROOT, script), args)[0]


def run(folder, script, args):
    """`python script args` in `folder`: (what it printed, seconds). Raises InputError with its error if it fails."""
    command = [sys.executable, script, *args]
    start = time.perf_counter()
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ['no message'])[-1].removeprefix('error: ')
        raise InputError(f'{last}\n  in: {os.path.basename(script)} {" ".join(args)}')
    return ran.stdout, time.perf_counter() - start


def python(arguments):
    """(what it printed, seconds, most bytes of memory) of a Python process. Raises InputError if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as printed:
        child = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=printed, stderr=subprocess.PIPE)
        said = child.stderr.read()
        _, status, used = os.wait4(child.pid, 0)
        if status:
            raise InputError(f'{(said.decode().strip().splitlines() or ["no message"])[-1]}\n  in: {arguments}')
        seconds = time.perf_counter() - start
        printed.seek(0)
        return printed.read().decode(), seconds, used.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def check_peer(folder):
    """The absolute path of another trainer's folder. Raises InputError if there is none."""
    if not folder or not os.path.exists(os.path.join(folder, 'train.py')):
        raise InputError(f'peer={folder!r}: give the folder of another trainer, with its train.py')
    return os.path.abspath(folder)


def flags(options):
    return [f'--{key}={value}' for key, value in options.items()]
