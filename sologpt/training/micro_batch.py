"""The size of a micro-batch: the fastest that fits, and advice where one does not fit."""

import contextlib
from collections.abc import Callable

import torch

from configurator import InputError
from sologpt.machine import devices
from sologpt.training.forecast import Forecast


def divisors(n: int) -> list[int]:
    """The divisors of n, the largest first."""
    return [size for size in range(n, 0, -1) if n % size == 0]


class MemoryAdvice:
    """
    A context in which running out of a GPU's memory becomes an InputError that names a smaller micro-batch that fits,
    and how many more of them make the same step. It can be entered again and again.
    """

    def __init__(self, batch_size: int, accumulation: int, limit: float, forecast: Callable[[], Forecast] | None):
        """accumulation: micro-batches in a step; limit: bytes that the run may take; forecast: of the run's memory."""
        self.batch_size, self.accumulation, self.limit, self.forecast = batch_size, accumulation, limit, forecast

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if devices.is_out_of_memory(error):
            raise InputError(self._advice()) from None

    def _advice(self):
        sizes = divisors(self.batch_size)[1:]
        size, expected = next(iter(sizes), None), ', a guess'
        # an error here would hide what has happened; a forecast of training needs gradients, also in an evaluation
        with contextlib.suppress(Exception), torch.enable_grad():
            foreseen = self.forecast()
            size = max(foreseen.fitting(self.limit, sizes), default=None)
            expected = f', which is foreseen to take {foreseen.at(size).peak / 1e9:.1f} GB' if size else ''
        advice = ('use --checkpoint_activations=True, --optimizer_state=8bit, an adapter, a smaller block_size or a '
                  'smaller model')
        if size:
            advice = (f'the same step in smaller pieces is --batch_size={size} --gradient_accumulation_steps='
                      f'{self.accumulation * self.batch_size // size}{expected}')
        return f'out of GPU memory with batch_size={self.batch_size}, of {self.limit / 1e9:.1f} GB: {advice}'


def fastest(sizes: list[int], seconds: Callable[[int], float], forecast: Forecast, limit: float,
            device: torch.device) -> tuple[int, str]:
    """
    (the fastest micro-batch that fits in `limit` bytes, what was found).

    The sizes that fit are timed one after the other, each about half or twice the one before, as long as tokens per
    second rise: on a GPU from the largest down, on a CPU from the smallest up. seconds(size): of a micro-step. Raises
    InputError if none fits.
    """
    fitting = forecast.fitting(limit, sizes)
    if not fitting:
        raise InputError(f'not even batch_size=1 fits in {limit / 1e9:.1f} GB: a step would take '
                         f'{forecast.at(1).peak / 1e9:.1f} GB; use --checkpoint_activations=True, '
                         f'--optimizer_state=8bit or an adapter')
    order = sorted(fitting, reverse=device.type != 'cpu')
    speeds, tried = {}, None
    for size in order:
        if tried and max(size, tried) < 2 * min(size, tried):
            continue
        try:
            speeds[size] = size / seconds(size)
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            continue  # the forecast was wrong
        finally:
            torch.cuda.empty_cache()  # a larger size's blocks are of no use to a smaller one
        tried = size
        if speeds[size] < 1.02 * max((v for s, v in speeds.items() if s != size), default=0.0):
            break
    if not speeds:
        raise InputError(f'out of GPU memory with each batch_size of {", ".join(map(str, order))}')
    best = max(speeds, key=speeds.get)
    found = ', '.join(f'{size}: {speed / speeds[best]:.2f}' for size, speed in sorted(speeds.items()))
    return best, f'fastest of {found} (tokens per second, {best} = 1)'
