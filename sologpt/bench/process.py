"""Scripts with nanoGPT's command line, run and timed: this project's, and a peer's in its own folder."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

from configurator import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_end = None  # of time_limit()


def own(script, args):
    """One of this project's scripts, in the current folder: what it printed. Raises InputError."""
    return run(None, os.path.join(ROOT, script), args)[0]


def run(folder, script, args):
    """`python script args` in `folder`: (what it printed, seconds). Raises InputError with its error if it fails."""
    command = [sys.executable, script, *args]
    start, left = time.perf_counter(), None if _end is None else max(0.0, _end - time.monotonic())
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=left is not None) as child:
        try:
            printed, said = child.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            said = f'not done after {left:.0f} s'
        finally:
            child.kill()
            if left is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
    if child.returncode:
        lines = said.strip().splitlines() or ['no message']
        last = next((line for line in lines if line.startswith('error: ')), lines[-1]).removeprefix('error: ')
        raise InputError(f'{last}\n  in: {os.path.basename(script)} {" ".join(args)}')
    return printed, time.perf_counter() - start


@contextlib.contextmanager
def time_limit(seconds):
    """
    Within it, all that run() and own() start has so many seconds together, and is ended with every process that it has
    started: when it is done, when its time is over, and when this process is interrupted.
    """
    global _end
    _end = time.monotonic() + seconds
    try:
        yield
    finally:
        _end = None


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
        raise InputError(f'peer={folder!r}: give the folder of another trainer with its train.py, such as '
                         f'--peer=../nanoGPT')
    return os.path.abspath(folder)


def write_json(path, value):
    """Whole or not at all."""
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=1)
    os.replace(path + '.tmp', path)


def flags(options):
    return [f'--{key}={value}' for key, value in options.items()]
