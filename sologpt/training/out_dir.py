"""The folder that a run writes to: one run at a time owns it, and what an earlier one left there is kept."""

import atexit
import contextlib
import json
import os
import socket
import time

import filelock

from configurator import InputError

LEFT_BY_A_RUN = ('ckpt.pt', 'best.pt', 'log.jsonl', 'adapter_config.json', 'adapter_model.safetensors')


class OutDir:
    """
    A run's folder. Only its owner may write there: another run is refused until this one ends, however it ends, because
    the lock is the operating system's.
    """

    def __init__(self, path: str):
        """Make the folder and own it, before anything of the run is computed. Raises InputError if that cannot be."""
        self.path = path
        self._holder = os.path.join(path, '.run.json')
        made = not os.path.isdir(path)
        try:
            os.makedirs(path, exist_ok=True)
            # one lock for a path in a process, so that runs one after the other in it can own the folder in turn
            self._lock = filelock.FileLock(os.path.join(path, '.run.lock'), timeout=0, is_singleton=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise InputError(f'out_dir={path!r} belongs to a run that goes on ({self._who()}): wait for it, stop it, '
                             f'or choose another out_dir') from None
        except OSError as e:
            raise InputError(f'out_dir={path!r} cannot be written: {e.strerror}') from None
        except NotImplementedError:
            print(f'the file system of {path} has no locks: a second run there would not be noticed')
            return
        self._made = made
        with open(self._holder, 'w', encoding='utf-8') as f:
            json.dump({'pid': os.getpid(), 'host': socket.gethostname(), 'since': time.strftime('%Y-%m-%d %H:%M')}, f)
        atexit.register(self.release)

    def _who(self):
        try:
            with open(self._holder, encoding='utf-8') as f:
                return 'process {pid} on {host}, since {since}'.format_map(json.load(f))
        except (OSError, ValueError, KeyError, TypeError):
            return 'it does not say which'

    def set_aside(self) -> list[str]:
        """Rename what an earlier run left to *.old, so that a new one cannot destroy it. Returns the names."""
        found = [name for name in LEFT_BY_A_RUN if os.path.exists(os.path.join(self.path, name))]
        for name in found:
            os.replace(os.path.join(self.path, name), os.path.join(self.path, name + '.old'))
        return found

    def release(self) -> None:
        """Let another run own the folder. If this run made it and wrote nothing, it is removed."""
        if not self._lock.is_locked:
            return
        for name in (self._holder, self._lock.lock_file):
            with contextlib.suppress(OSError):
                os.remove(name)
        self._lock.release(force=True)
        if self._made:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(self.path)


def same_folder(a: str, b: str) -> bool:
    """Whether two paths lead to one folder."""
    return os.path.realpath(a) == os.path.realpath(b)
