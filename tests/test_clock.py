import time

import torch

from sologpt.machine import clock

CPU = torch.device('cpu')


def test_clock_stands_still(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    stopwatch = clock.StepClock(CPU)
    stopwatch.start()
    now[0] = 5.0
    assert stopwatch.lap() == 5.0 and stopwatch.total == 5.0
    stopwatch.forget()  # the first step
    now[0] = 6.0
    stopwatch.stop()
    now[0] = 100.0  # an evaluation
    stopwatch.start()
    now[0] = 102.0
    assert stopwatch.lap() == 3.0 and stopwatch.total == 3.0
    now[0] = 104.0  # steps after the last log line
    stopwatch.stop()
    assert stopwatch.total == 5.0


def test_duration():
    assert [clock.duration(s) for s in (0, 59.9, 307, 7500)] == ['0s', '59s', '5m07s', '2h05m']
