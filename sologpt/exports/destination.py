"""The folder that is exported to: it appears when all of it has been written, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from configurator import InputError


def check_destination(dest: str) -> None:
    """Raises InputError unless `dest` can be made, or is an empty folder."""
    if not dest:
        raise InputError('dest is empty: name the folder to write')
    if os.path.lexists(dest) and not (os.path.isdir(dest) and not os.listdir(dest)):
        raise InputError(f'dest={dest} is there already: choose a new or an empty folder')


@contextlib.contextmanager
def new_folder(dest: str) -> Iterator[str]:
    """
    The path of a folder to write to, dest.partial, which becomes `dest` at the end of the with block. An error removes
    it. Raises InputError if it cannot be written.
    """
    partial = os.path.normpath(dest) + '.partial'
    try:
        shutil.rmtree(partial, ignore_errors=True)  # an export that was killed may have left it
        os.makedirs(partial)
        yield partial
        if os.path.isdir(dest):
            os.rmdir(dest)
        os.replace(partial, dest)
    except OSError as e:
        raise InputError(f'dest={dest!r} cannot be written: {e.strerror or e}') from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
