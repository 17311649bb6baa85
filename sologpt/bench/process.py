"""Scripts as processes of their own, run and timed; their command lines; and JSON files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from configurator import InputError, resolve

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TRAIN = os.path.join(ROOT, 'train.py')
_end = None  # when the time of time_limit() is over


def run_own(script: str, args: list[str]) -> str:
    """Run one of this project's scripts in the current folder. Returns what it printed. Raises InputError."""
    return run_script(None, os.path.join(ROOT, script), args)[0]


def run_script(folder: str | None, script: str, args: list[str]) -> tuple[str, float]:
    """
    Run `python script args` in `folder`; None is the current folder. Returns (what it printed, seconds). If it fails,
    raises InputError with its own error.
    """
    command = [sys.executable, script, *args]
    start, left = time.perf_counter(), None if _end is None else max(0.0, _end - time.monotonic())
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=left is not None) as child:
        try:
            printed, errors = child.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            errors = f'not done after {left:.0f} s'
        finally:
            child.kill()
            if left is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
    if child.returncode:
        lines = errors.strip().splitlines() or ['no message']
        last = next((line for line in lines if line.startswith('error: ')), lines[-1]).removeprefix('error: ')
        raise InputError(f'{last}\n  in: {os.path.basename(script)} {" ".join(args)}')
    return printed, time.perf_counter() - start


@contextlib.contextmanager
def time_limit(seconds: float):
    """
    Give all that run_script() and run_own() start inside this context so many seconds together. A script is ended with
    every process that it has started: when it is done, when the time is over, and when this process is interrupted.
    """
    global _end
    _end = time.monotonic() + seconds
    try:
        yield
    finally:
        _end = None


def run_python(arguments: list[str]) -> tuple[str, float, int]:
    """
    Run `python arguments` in the project's folder. Returns (what it printed, seconds, bytes of memory at most). Raises
    InputError if it fails.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as printed:
        child = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=printed, stderr=subprocess.PIPE)
        errors = child.stderr.read()
        _, status, used = os.wait4(child.pid, 0)
        if status:
            raise InputError(f'{(errors.decode().strip().splitlines() or ["no message"])[-1]}\n  in: {arguments}')
        seconds = time.perf_counter() - start
        printed.seek(0)
        return printed.read().decode(), seconds, used.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def flags(options: dict[str, Any]) -> list[str]:
    """The options as arguments of a command line: --key=value."""
    return [f'--{key}={value}' for key, value in options.items()]


def resolve_train(train_args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """train.py's config for these arguments, and the keys that they set, in order. Raises InputError."""
    return resolve(TRAIN, train_args)


def refuse_training(train_args: list[str]) -> None:
    """Raise InputError if there are arguments for train.py: the suite does not run it."""
    if train_args:
        raise InputError(f'{" ".join(train_args)}: this suite trains nothing, so leave that out')


def read_json(path: str) -> Any:
    """The value in a JSON file."""
    with open(path, encoding='utf-8') as f:
        return json.load(f)


def write_json(path: str, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=1)
    os.replace(path + '.tmp', path)
