"""
A roofline over the log of a dry run: how long a card has to take at least, by its datasheet.

A kernel takes the time of its FLOPs at the card's peak, or of its bytes at the bandwidth of the memory, whichever is
longer. The milliseconds of a part of a step are the sum over its kernels. This is a model. A real card does not reach
its peaks, and it takes time to launch; on the other hand the cache can save it some bytes. Use it to compare programs
on the same card and to see what takes how much. It does not say how fast a card is.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sologpt.nullgpu.cards import Card
from sologpt.nullgpu.events import Event, Gemm, Launch, Memcpy, Memset, Op

BYTES = {'float64': 8, 'float32': 4, 'int32': 4, 'float16': 2, 'bfloat16': 2, 'float8_e4m3fn': 1, 'float8_e5m2': 1,
         'int8': 1, 'float4_e2m1fn': 0.5}
KINDS = ('GEMM', 'attention', 'Triton', 'ATen')  # ATen: torch's own kernels for all the rest


@dataclass(frozen=True)
class Work:
    """
    What is done by one operation, or by one GEMM of it.

    kind      one of KINDS
    launches  of kernels; a GEMM counts as one
    dtype     that its FLOPs are in
    """
    kind: str
    name: str
    launches: int
    flops: int
    bytes: float
    dtype: str = 'float32'
    tf32: bool = False

    def seconds(self, card: Card) -> float:
        """The least time by the card's datasheet."""
        peak = card.peak(self.dtype, self.tf32) or card.peak('float32', False)
        return max(self.flops / peak, self.bytes / (1e9 * card.bandwidth))


def gemm_work(gemm: Gemm) -> Work:
    """Each operand is read once, and the result is written; it is also read if it is added to."""
    moved = (gemm.m * gemm.k * BYTES[gemm.a] + gemm.k * gemm.n * BYTES[gemm.b] +
             gemm.m * gemm.n * BYTES[gemm.d] * (1 + gemm.accumulates))
    name = f'{gemm.layout} {gemm.m} x {gemm.n} x {gemm.k}' + (f' x {gemm.batch} times' if gemm.batch > 1 else '')
    return Work('GEMM', f'{name}, {gemm.a} to {gemm.d}', 1, 2 * gemm.m * gemm.n * gemm.k * gemm.batch,
                moved * gemm.batch, gemm.a, gemm.tf32)


def list_work(events: list[Event]) -> list[Work]:
    """
    The work of these events. An operation that multiplies consists of its GEMMs; its other kernels count as launches
    without bytes. A launch that belongs to no operation does too.
    """
    work, waiting = [], []
    for event in events:
        if not isinstance(event, Op):
            waiting.append(event)
            continue
        first = max(0, len(waiting) - event.covers)  # the operation may have begun before these events
        work += _loose_work(waiting[:first]) + _op_work(event, waiting[first:])
        waiting = []
    return work + _loose_work(waiting)


def _loose_work(events):
    return ([gemm_work(event) for event in events if isinstance(event, Gemm)] +
            [Work('Triton' if event.kind == 'triton' else 'ATen', event.name, 1, 0, 0)
             for event in events if isinstance(event, Launch)])


def _op_work(op, events):
    launches = sum(isinstance(event, Launch) for event in events)
    if op.kind == 'triton':
        return [Work('Triton', op.name, launches, 0, op.bytes)]
    if op.kind == 'attention':
        return [Work('attention', op.name, launches, op.flops, op.bytes, op.dtype)]
    if any(isinstance(event, Gemm) for event in events):
        return _loose_work(events)
    copies = [e for e in events if isinstance(e, Memcpy) and e.direction == 'device_to_device' or isinstance(e, Memset)]
    return [Work('ATen', op.name, launches + len(copies), 0, op.bytes)] if launches or copies else []


@dataclass(frozen=True)
class Sum:
    launches: int
    gigabytes: float
    tflop: float
    milliseconds: float  # modelled

    def to_json(self) -> dict:
        return {'launches': self.launches, 'gb': self.gigabytes, 'tflop': self.tflop,
                'modelled_ms': self.milliseconds}


def add_up(work: Iterable[Work], card: Card) -> Sum:
    work = list(work)
    return Sum(sum(w.launches for w in work), sum(w.bytes for w in work) / 1e9, sum(w.flops for w in work) / 1e12,
               1000 * sum(w.seconds(card) for w in work))


def by_kind(work: list[Work], card: Card) -> dict[str, Sum]:
    """Kind -> its sum; 'all' is the last."""
    return {kind: add_up((w for w in work if w.kind == kind), card) for kind in KINDS} | {'all': add_up(work, card)}


def by_name(work: list[Work], card: Card) -> list[tuple[str, str, Sum]]:
    """(kind, name, sum) of all work of that name. What takes longest is first."""
    named = {}
    for w in work:
        named.setdefault((w.kind, w.name), []).append(w)
    sums = [(*key, add_up(same, card)) for key, same in named.items()]
    return sorted(sums, key=lambda entry: -entry[2].milliseconds)
