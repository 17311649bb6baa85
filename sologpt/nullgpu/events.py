"""
The log of a dry run: a JSON object per line, in the order in which things were asked of the device.

The field 'event' names one of the classes below, and the other fields are its attributes:

  {"event": "launch", "kind": "triton", "name": "triton_poi_fused_add_0", "grid": [96, 1, 1], "block": [128, 1, 1],
   "shared": 0, "registers": 32, "stack": 0, "graph": 0}
  {"event": "op", "kind": "triton", "name": "triton_poi_fused_add_0", "bytes": 50331648, "flops": 0, "dtype": "",
   "covers": 1}

The library writes all of them but Op and Mark, which are from child.py. An Op comes after the events that it caused.
"""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A kernel was launched. Its registers and its stack, in bytes per thread, are known of Triton's kernels alone."""
    kind: str  # 'aten' (torch's own, with those of its attention), 'triton', or 'cudnn'
    name: str  # torch's own are mangled C++ names
    grid: tuple[int, ...] = (1, 1, 1)
    block: tuple[int, ...] = (1, 1, 1)
    shared: int = 0  # bytes of a block that the launch asks for
    registers: int = 0
    stack: int = 0  # registers that were spilled, and arrays with computed indices
    graph: int = 0  # the graph that is being captured; 0: none, the kernel runs now


@dataclass(frozen=True)
class Gemm:
    """A matmul of cuBLAS in column-major order, (m, k) @ (k, n). a, b, d: the dtypes of the operands and the result."""
    layout: str  # of a and b: 'T' is transposed, 'N' is not
    m: int
    n: int
    k: int
    batch: int
    a: str
    b: str
    d: str
    tf32: bool  # float32 operands are rounded to TF32
    accumulates: bool  # the product is added to what is there
    refused: str  # why cuBLAS does not have it on this card; '': it does


@dataclass(frozen=True)
class Memcpy:
    bytes: int
    direction: str  # 'host_to_device', 'device_to_host', 'device_to_device' or 'host_to_host'
    is_async: bool
    pinned: bool  # the memory of the host, if it takes part

    @property
    def waits(self) -> bool:
        """Whether the program waits for the device: until all that came before in the stream is done."""
        return self.direction == 'device_to_host' and not (self.is_async and self.pinned)


@dataclass(frozen=True)
class Memset:
    bytes: int


@dataclass(frozen=True)
class Sync:
    """The program waits for the device."""
    what: str  # 'device', 'stream' or 'event'


@dataclass(frozen=True)
class Malloc:
    """torch's allocator asks for memory of the device."""
    bytes: int
    granted: bool


@dataclass(frozen=True)
class Free:
    bytes: int


@dataclass(frozen=True)
class Capture:
    """The capture of a graph begins or ends. What comes between runs when the graph is launched."""
    begins: bool
    graph: int  # its number, from 1


@dataclass(frozen=True)
class GraphLaunch:
    graph: int


@dataclass(frozen=True)
class Refusal:
    """A call that CUDA would refuse, or that the null GPU does not implement."""
    call: str
    reason: str


@dataclass(frozen=True)
class Op:
    """
    An operation of torch, or a Triton kernel that Inductor has made, and what it costs.

    bytes   that it reads and writes, each tensor counted once
    flops   of attention alone: those of matmuls are in their Gemm
    dtype   of attention's operands
    covers  how many events before this one it has caused
    """
    kind: str  # 'triton', 'attention' or 'aten'
    name: str
    bytes: int
    flops: int
    dtype: str
    covers: int


@dataclass(frozen=True)
class Mark:
    """
    A moment of the training loop. peak: the most bytes so far that torch's allocator has handed out.
    """
    what: str  # 'backward_begin', 'backward_end', 'update_begin', 'update_end' (of the optimizer's step) or 'end'
    peak: int


Event = Launch | Gemm | Memcpy | Memset | Sync | Malloc | Free | Capture | GraphLaunch | Refusal | Op | Mark
EVENTS = {'launch': Launch, 'gemm': Gemm, 'memcpy': Memcpy, 'memset': Memset, 'sync': Sync, 'malloc': Malloc,
          'free': Free, 'capture': Capture, 'graph_launch': GraphLaunch, 'refusal': Refusal, 'op': Op, 'mark': Mark}
WORK = (Launch, Gemm, Memcpy, Memset, Op)  # what a graph can hold


def parse_events(text: str) -> list[Event]:
    """The events of a log."""
    events = []
    for line in text.splitlines():
        fields = json.loads(line)
        event = EVENTS[fields.pop('event')]
        events.append(event(**{key: tuple(value) if isinstance(value, list) else value
                               for key, value in fields.items()}))
    return events


def replay_graphs(events: list[Event]) -> list[Event]:
    """
    The events with each launch of a graph replaced by the work that was captured in it, and without the captures. What
    the program itself did while it captured, such as to allocate, happened then.
    """
    graphs, graph, replayed = {}, 0, []
    for event in events:
        if isinstance(event, Capture):
            graph = event.graph if event.begins else 0
            graphs.setdefault(event.graph, [])
        elif isinstance(event, GraphLaunch):
            replayed += graphs.get(event.graph, [])
        elif graph and isinstance(event, WORK):
            graphs[graph].append(event)
        else:
            replayed.append(event)
    return replayed
