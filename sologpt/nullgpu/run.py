"""
Runs a script on a GPU that computes nothing: the CUDA build of torch runs as it does on the card, compiles its kernels
for it, and hands out its memory. No kernel is executed. Every value that a kernel would compute is zero.

    dry = run_script(find_card('RTX 4070'), '.', 'train.py', ['config/quickstart.py', '--device=cuda'])
    dry.training_steps()[2].micro_steps[1]  # the events of a micro-step

docs/check-a-gpu.md says what can be learned from it, and what cannot.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import torch

from sologpt.nullgpu.build import build_library, cache_folder
from sologpt.nullgpu.cards import Card
from sologpt.nullgpu.events import Event, Gemm, Launch, Malloc, Mark, Memcpy, Refusal, Sync, parse_events, replay_graphs

CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'child.py')


@dataclass(frozen=True)
class TrainingStep:
    """
    The events of a step: of each micro-step up to the end of its backward, and of the update, from there to the end of
    the optimizer's step. What a loop does after that, such as its log line, is in the next step's first micro-step.
    """
    micro_steps: list[list[Event]]
    update: list[Event]


@dataclass(frozen=True)
class DryRun:
    card: Card
    returncode: int
    stdout: str
    stderr: str
    events: list[Event]

    @property
    def peak(self) -> int:
        """The most bytes that torch's allocator had handed out at the end of a backward or an update."""
        return max((event.peak for event in self.events if isinstance(event, Mark)), default=0)

    @property
    def refusals(self) -> list[str]:
        """What CUDA or cuBLAS would have refused."""
        return [f'{event.call}: {event.reason}' for event in self.events if isinstance(event, Refusal)] + [
            f'matmul: {event.refused}' for event in self.events if isinstance(event, Gemm) and event.refused]

    @property
    def out_of_memory(self) -> bool:
        """Whether the script failed because the memory of the card was used up."""
        return self.returncode != 0 and any(isinstance(event, Malloc) and not event.granted for event in self.events)

    def training_steps(self) -> list[TrainingStep]:
        """The steps in order. Graphs that are launched are replaced by what is in them."""
        return split_steps(replay_graphs(self.events))


def split_steps(events: list[Event]) -> list[TrainingStep]:
    """
    The steps of a run. A step ends with the last update before the next backward, because an optimizer may consist of
    several.
    """
    steps, micro_steps, update, since = [], [], None, []
    for event in events:
        what = event.what if isinstance(event, Mark) else ''
        if what == 'backward_begin' and update is not None:
            steps.append(TrainingStep(micro_steps, update))
            micro_steps, update = [], None
        since.append(event)
        if what == 'backward_end':
            micro_steps.append(since)
            since = []
        elif what == 'update_end':
            update = (update or []) + since
            since = []
    return steps + ([TrainingStep(micro_steps, update)] if update is not None else [])


def launches(events: list[Event], kind: str = '') -> list[Launch]:
    """The launches, or those of a kind: 'aten', 'triton' or 'cudnn'."""
    return [event for event in events if isinstance(event, Launch) and kind in ('', event.kind)]


def gemms(events: list[Event]) -> list[Gemm]:
    return [event for event in events if isinstance(event, Gemm)]


def waits(events: list[Event]) -> list[Event]:
    """The moments in which the program waits for the device."""
    return [event for event in events if isinstance(event, Sync) or isinstance(event, Memcpy) and event.waits]


def _binary(card):
    """The compute capability of the kernels in torch's libraries that the card runs: of its own, or the next below."""
    names = torch._C._cuda_getArchFlags().split()  # such as sm_80
    compiled_for = [int(name.removeprefix('sm_')) for name in names if name[-1].isdigit()]
    return max((arch for arch in compiled_for if arch <= card.capability), default=card.capability)


def run_script(card: Card, folder: str, script: str, args: list[str], seconds: float | None = None) -> DryRun:
    """
    Run `python script args` in `folder` with `card` as its GPU, and return what happened, also if the script failed.

    The script may be another project's. seconds: it is ended after so long. Raises InputError if the null GPU cannot be
    built, and subprocess.TimeoutExpired.
    """
    library = build_library()
    with tempfile.TemporaryDirectory() as temporary:
        log = os.path.join(temporary, 'log')
        environment = os.environ | card.environment() | {
            'NULLGPU_LOG': log, 'NULLGPU_BINARY': str(_binary(card)),
            'LD_PRELOAD': os.path.join(library, 'libcuda.so.1'), 'TRITON_LIBCUDA_PATH': library,
            'LD_LIBRARY_PATH': ':'.join(filter(None, [library, os.environ.get('LD_LIBRARY_PATH')])),
            'CUDA_VISIBLE_DEVICES': '0', 'TORCHINDUCTOR_COMPILE_THREADS': '1', 'TORCHINDUCTOR_BENCHMARK_KERNEL': '1',
            # kept apart from the kernels of real runs: what was chosen by timing is worth nothing here
            'TORCHINDUCTOR_CACHE_DIR': os.path.join(cache_folder(), 'inductor'),
            'TRITON_CACHE_DIR': os.path.join(cache_folder(), 'triton')}
        ran = subprocess.run([sys.executable, CHILD, script, *args], cwd=folder, env=environment, capture_output=True,
                             text=True, timeout=seconds)
        text = ''
        if os.path.exists(log):
            with open(log, encoding='utf-8') as f:
                text = f.read()
    return DryRun(card, ran.returncode, ran.stdout, ran.stderr, parse_events(text))
