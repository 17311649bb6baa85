"""A device, and times of something that is run on it again and again."""

import statistics
import time
from collections.abc import Callable

import torch

from sologpt.machine import clock, devices

SECONDS, REPEATS = 2.0, 20  # a time is the median of as many runs as fit, and of at least one


def prepare_device(config: dict) -> torch.device:
    """The device of train.py's config, set up as for a run. Raises InputError."""
    device = devices.find_device(config['device'])
    devices.prepare_device(device, config['tf32'], config['accumulate'])
    return device


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, until the device is done."""
    clock.synchronize(device)
    start = time.perf_counter()
    run()
    clock.synchronize(device)
    return time.perf_counter() - start


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    """The median ms of at least one run, after one that warms up."""
    run()
    times, end = [], time.perf_counter() + SECONDS
    while not times or len(times) < REPEATS and time.perf_counter() < end:
        times.append(1000 * timed(run, device))
    return statistics.median(times)


def median_seconds_in_turn(runs: dict[str, Callable[[], object]], times: int, device: torch.device) -> dict[str, float]:
    """Name -> median seconds, of so many calls in turn. Two more of each warm up."""
    seconds = {name: [] for name in runs}
    for _ in range(times + 2):
        for name, run in runs.items():
            seconds[name].append(timed(run, device))
    return {name: statistics.median(found[2:]) for name, found in seconds.items()}
