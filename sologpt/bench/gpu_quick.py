"""
The first contact with a GPU: every path that the project takes on one, once, at a tiny size, in about two minutes.

`python bench.py --suite=gpu --quick=True` prints the card, and a line for each row: OK, failed or skipped, with the
reason. A row compares what this device computes with what the CPU does. It measures no speed. On a CPU it runs the
rows that exist there.

Rows share a process, because starting one and importing torch takes longer than a row. A row that ends its process,
that takes too long, or after which the device does not work any more, costs that process alone: the other rows go on
in a new one.
"""

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time

import torch

from configurator import InputError
from sologpt.bench import process
from sologpt.bench.gpu_card import card_facts
from sologpt.bench.gpu_quick_lab import Lab, Wrong, write_text
from sologpt.bench.gpu_quick_rows import LANES, Row, list_rows
from sologpt.bench.gpu_session import caches_in, terminating
from sologpt.machine import clock, devices

LIMIT = 120  # seconds that a row may take, with the start of its process
CALL = 'from sologpt.bench import gpu_quick; gpu_quick.run_rows'  # what a process of rows runs
MARK = '@row '  # begins a line that a process says of a row
BROKEN = 3  # exit status of a process whose device does not work any more


def measure(config: dict, train_args: list[str], picture: str) -> dict:
    """What became of each row: name -> {'result', 'seconds', and 'reason' unless it is OK}. Raises InputError."""
    options, given = process.resolve_train(train_args)
    if other := [key for key in given if key != 'device']:
        raise InputError(f'{other[0]}: the quick check sets the keys of training itself, except device')
    device = devices.find_device(options['device'])
    chosen = _choose(config['recipes'])
    card = card_facts(device)
    print('\n'.join(card_lines(card)), flush=True)
    start, found = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder, terminating(), caches_in(folder):
        write_text(os.path.join(folder, 'tokens'))
        for name, outcome in _outcomes(f'{device}', folder, chosen, time.time() + 60 * config['minutes']):
            found[name] = outcome
            print(row_line(name, outcome), flush=True)
    found = {row.name: found[row.name] for row in chosen}
    print(summary_line(found, time.perf_counter() - start))
    return {'card': card, 'rows': found}


def _choose(wanted):
    """The rows whose names contain one of the words in a list separated by commas; '': all."""
    words, rows = list(filter(None, wanted.split(','))), list_rows()
    if unknown := [word for word in words if not any(word in row.name for row in rows)]:
        raise InputError(f'recipes: no row of the quick check has {unknown[0]!r} in its name')
    return [row for row in rows if not words or any(word in row.name for word in words)]


# ---- what is printed -------------------------------------------------------------------------------------------------

def card_lines(card: dict) -> list[str]:
    """The first lines: what card_facts() says."""
    lines = [card['name']]
    if 'capability' in card:
        lines[0] += (f', compute capability {".".join(map(str, card["capability"]))}, {card["memory_gb"]:.1f} GB, '
                     f'{card["multiprocessors"]} multiprocessors')
        lines.append(f'driver {card["idle"].get("driver_version", "unknown")}, CUDA {card["cuda"]}, '
                     f'cuDNN {card["cudnn"]}')
    return [*lines, f'torch {card["torch"]}, Triton {card.get("triton") or "none"}, Python {card["python"]}, '
                    f'{card["system"]}']


def row_line(name: str, outcome: dict) -> str:
    """The line of a row."""
    reason = f': {outcome["reason"]}' if 'reason' in outcome else ''
    return f'{name:42} {outcome["result"]}{reason} ({outcome["seconds"]:.1f} s)'


def summary_line(found: dict, seconds: float) -> str:
    """The last line."""
    counts = collections.Counter(outcome['result'] for outcome in found.values())
    parts = ', '.join(f'{counts[result]} {result}' for result in ('OK', 'failed', 'skipped'))
    return f'{len(found)} rows: {parts}; {clock.duration(seconds)}'


# ---- processes -------------------------------------------------------------------------------------------------------

def _outcomes(device, folder, rows, end):
    """Yields (name, outcome) of each row, as they come. end: the time() from which on no further row begins."""
    coming, children = queue.Queue(), []
    for lane in LANES:
        if names := [row.name for row in rows if row.lane == lane]:
            lane_folder = os.path.join(folder, lane.replace(' ', '-'))
            os.makedirs(lane_folder)
            threading.Thread(target=_run_lane, args=(device, lane_folder, names, end, coming, children),
                             daemon=True).start()
    try:
        for _ in rows:
            yield coming.get()
    finally:
        for child in children:
            _kill(child)


def _run_lane(device, folder, names, end, coming, children):
    """Put (name, outcome) of each of a lane's rows into `coming`. Where a process has ended, a new one goes on."""
    left, said, errors = list(names), os.path.join(folder, 'said'), os.path.join(folder, 'errors')
    while left and time.time() < end:
        call = f'{CALL}({device!r}, {folder!r}, {left!r}, {end!r})'
        with open(said, 'w') as out, open(errors, 'w') as err:  # not pipes: what a child has started may hold them
            child = subprocess.Popen([sys.executable, '-c', call], cwd=process.ROOT, stdout=out, stderr=err,
                                     start_new_session=True)
        children.append(child)
        reason = _read_rows(child, said, left, end, coming)
        _kill(child)
        if reason and left:
            with open(errors, encoding='utf-8', errors='replace') as f:
                last = (f.read().strip().splitlines() or ['no message'])[-1]
            coming.put((left.pop(0), {'result': 'failed', 'reason': f'{reason}: {last[:200]}', 'seconds': 0.0}))
    for name in left:
        coming.put((name, {'result': 'skipped', 'reason': 'no time was left', 'seconds': 0.0}))


def _read_rows(child, said, left, end, coming):
    """
    Take what a child says of its rows out of `left` and put it into `coming`, until the child has ended. Returns why it
    ended within a row or before its first; None if it ended as it should.
    """
    last = time.monotonic()
    with open(said, encoding='utf-8') as f:
        while True:
            status = child.poll()
            for line in f.read().splitlines():
                if line.startswith(MARK):
                    coming.put((left.pop(0), json.loads(line.removeprefix(MARK))))
                    last = time.monotonic()
            if status is not None:
                break
            if time.monotonic() - last > LIMIT:
                return f'not done after {LIMIT} s'
            time.sleep(0.05)
    if status == BROKEN or not left or time.time() > end:
        return None
    return f'its process ended with {signal.Signals(-status).name if status < 0 else f"status {status}"}'


def _kill(child):
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError, AttributeError):  # Windows has no process groups
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.wait()


# ---- in a process of rows --------------------------------------------------------------------------------------------

def run_rows(device_name: str, folder: str, names: list[str], end: float) -> None:
    """
    Run these rows, one after the other, and print the outcome of each as a line of JSON after MARK. Ends the process
    with status BROKEN if the device does not work any more after a row that has failed.
    """
    device = devices.find_device(device_name)
    devices.prepare_device(device)
    lab = Lab(device, folder, os.path.join(os.path.dirname(folder), 'tokens'))
    rows = {row.name: row for row in list_rows()}
    for name in names:
        if time.time() > end:
            return
        outcome = run_row(rows[name], lab)
        print(MARK + json.dumps(outcome), flush=True)
        if outcome['result'] == 'failed' and not _works(device):
            sys.exit(BROKEN)


def run_row(row: Row, lab: Lab) -> dict:
    """The outcome of a row, as in measure()."""
    start, outcome = time.perf_counter(), {'result': 'OK'}
    try:
        if reason := row.skip(lab):
            outcome = {'result': 'skipped', 'reason': reason}
        else:
            row.run(lab).check()
    except Exception as e:  # whatever it is, the other rows are still run
        words = str(e) if isinstance(e, (InputError, Wrong)) else f'{type(e).__name__}: {e}'
        outcome = {'result': 'failed', 'reason': ' '.join(words.split())[:300]}
    return outcome | {'seconds': time.perf_counter() - start}


def _works(device):
    """Whether a device still computes: an illegal access to memory ends all that a process can do with a GPU."""
    try:
        torch.ones(8, device=device).sum().item()
    except Exception:
        return False
    return not torch.distributed.is_initialized()
