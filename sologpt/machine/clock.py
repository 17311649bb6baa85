"""
Time on a device: the seconds of training steps, and the shortest of several runs.
"""

import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


class StepClock:
    """
    Counts the seconds that a device spends in training steps. It stands still between stop() and start(), while the run
    evaluates and saves.
    """

    def __init__(self, device: torch.device):
        self.device, self.total = device, 0.0
        self._lapped = 0.0  # the total at the last lap
        self._since: float | None = None  # when it was started; None: it stands still

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Wait for the device, and add the seconds since start() to the total."""
        if self._since is not None:
            synchronize(self.device)
            self.total += time.perf_counter() - self._since
            self._since = None

    def seconds(self) -> float:
        """The total so far, without waiting for the device."""
        return self.total + (0.0 if self._since is None else time.perf_counter() - self._since)

    def lap(self) -> float:
        """The seconds since the last lap."""
        self.stop()
        lap, self._lapped = self.total - self._lapped, self.total
        self.start()
        return lap

    def forget(self) -> None:
        """Begin again at zero: the seconds so far were warm-up."""
        self.total = self._lapped = 0.0
        if self._since is not None:
            self._since = time.perf_counter()


def duration(seconds: float) -> str:
    """Seconds as '2h05m', '5m07s' or '42s'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h{minutes:02d}m' if hours else f'{minutes}m{seconds:02d}s' if minutes else f'{seconds}s'


def shortest_seconds(run: Callable[[], Any], device: torch.device, budget: float = 0.3) -> float:
    """
    The seconds of the fastest call of run() within `budget` seconds, after one call that warms up.

    The fastest is what the device can do. Other programs on the machine only make a call slower.
    """
    run()
    seconds, end = [], time.perf_counter() + budget
    while not seconds or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
