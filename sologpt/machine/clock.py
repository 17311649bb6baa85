"""
Time on a device: the seconds of training steps, the shortest of several runs.
"""

import time

import torch


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


class StepClock:
    """Seconds that a device spends in training steps; it stands still while the run evaluates and saves."""

    def __init__(self, device):
        self.device, self.total, self._lapped, self._since = device, 0.0, 0.0, None

    def start(self):
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self):
        if self._since is not None:
            synchronize(self.device)
            self.total += time.perf_counter() - self._since
            self._since = None

    def seconds(self):
        """The total so far, without waiting for the device."""
        return self.total + (0.0 if self._since is None else time.perf_counter() - self._since)

    def lap(self):
        """Seconds since the last lap."""
        self.stop()
        lap, self._lapped = self.total - self._lapped, self.total
        self.start()
        return lap

    def forget(self):
        """The seconds so far were warm-up: they do not count."""
        self.total = self._lapped = 0.0
        if self._since is not None:
            self._since = time.perf_counter()


def duration(seconds):
    """'2h05m', '5m07s', '42s'"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h{minutes:02d}m' if hours else f'{minutes}m{seconds:02d}s' if minutes else f'{seconds}s'


def shortest_seconds(run, device, budget=0.3):
    """The shortest of as many runs as `budget` seconds hold: what the device can do, whatever else it is doing."""
    run()
    seconds, end = [], time.perf_counter() + budget
    while not seconds or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
