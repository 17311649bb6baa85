"""What ends a run before its last step: a signal, the wall clock, a loss that is not finite."""

import math
import signal
import time

import torch

from configurator import InputError
from sologpt.machine import processes


class Stop:
    """
    Asks a run to end at the boundary of a step.

    The first Ctrl-C or SIGTERM sets `requested`; the second one ends the process at once. `out_of_time()` is true after
    max_minutes of wall-clock time.
    """

    def __init__(self, max_minutes: float, master: bool):
        self.requested, self.master = False, master
        self.deadline = time.perf_counter() + 60 * max_minutes if max_minutes else math.inf

    def listen(self) -> None:
        """Take over the process's signals."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._take)

    def _take(self, signum, frame):
        self.requested = True
        signal.signal(signum, signal.SIG_DFL)
        if self.master:
            print('\nstopping after this step (once more: at once)', flush=True)

    def by_signal(self) -> bool:
        """Whether any process was asked to stop; the same answer in all of them."""
        return processes.any_process(self.requested)

    def out_of_time(self) -> bool:
        """Whether max_minutes are over; the same answer in all processes."""
        return self.deadline < math.inf and processes.any_process(time.perf_counter() > self.deadline)


class FiniteWatch:
    """Remembers, on the device and without waiting for it, the first step whose loss or gradient was not finite."""

    def __init__(self, device: torch.device, report, out_dir: str):
        """report: the run's Report, which is closed as failed."""
        self.first_bad = torch.full((), math.inf, device=device)
        self.report, self.out_dir = report, out_dir

    def add(self, finite: torch.Tensor, iter_num: int) -> None:
        """finite: a bool scalar of the step iter_num."""
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=iter_num))

    def check(self, iter_num: int, val_loss: float = 0.0) -> None:
        """Raises InputError if a loss or gradient of any process was not finite. Waits for the device."""
        first = processes.least(self.first_bad).item()
        bad = iter_num if not math.isfinite(val_loss) else int(first) if math.isfinite(first) else None
        if bad is not None:
            self.report.close(failed=True)
            raise InputError(f'the loss or its gradient is not finite at iter {bad}: stopped; a checkpoint in '
                             f'{self.out_dir} is from before. Try a lower learning_rate, a longer warm-up, or '
                             f'dtype=float32')
