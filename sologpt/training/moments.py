"""
Moments: how an optimizer keeps its running means from one step to the next.

Each class makes the kept tensor of a parameter, reads it as float32, and writes a new value into it.

Compiled updates work on rows of BLOCK elements, because then one kernel serves parameters of all sizes, and has the
blocks of 8-bit moments in its rows. A class that compiled code can use has also parts(), decode() and encode().
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sologpt.matmuls.elements import E4M3

Tensor = torch.Tensor
BLOCK = 256


def in_rows(t: Tensor) -> Tensor:
    """t as (rows, BLOCK): its own memory, or if its size is no multiple of BLOCK, a copy filled up with zeros."""
    short = -t.numel() % BLOCK
    return (F.pad(t.flatten(), (0, short)) if short else t.detach()).view(-1, BLOCK)


def out_of_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of in_rows(), in the memory of the rows: a tensor of the shape of `like`."""
    return rows.flatten()[:like.numel()].view_as(like)


def put_back(t: Tensor, rows: Tensor) -> None:
    """Give t the values of its rows. If they are t's own memory, it has them."""
    if t.numel() % BLOCK:
        t.copy_(out_of_rows(rows, t))


class Moments:
    """Moments in float32, beside the weights."""
    copied = False  # whether read() returns a copy

    def new(self, p: Tensor) -> Tensor:
        """The kept tensor of a new parameter: zeros."""
        return torch.zeros_like(p, dtype=torch.float32)

    def begin_step(self, device: torch.device) -> None:
        """Call it before the first read() of a step. device: of the parameters."""

    def finish_copies(self, device: torch.device) -> None:
        """Wait until all that was written is in the kept tensors. Call it before the CPU uses them."""

    def read(self, kept: Tensor, p: Tensor) -> Tensor:
        """The moment of parameter p, in float32, of p's shape, on p's device."""
        return kept

    def write(self, kept: Tensor, value: Tensor) -> None:
        """Keep a new value, float32. Here it is the tensor that was read, and it has been updated in place."""

    def parts(self, kept: Tensor) -> tuple[Tensor, ...]:
        """A kept tensor as compiled code takes it: tensors in rows, which may be copies."""
        return (in_rows(kept),)

    def put_back(self, kept: Tensor, parts: tuple[Tensor, ...]) -> None:
        """Keep parts that have been encoded anew."""
        put_back(kept, *parts)

    def decode(self, rows: Tensor) -> Tensor:
        """The moment, (rows, BLOCK) in float32, of its parts."""
        return rows

    def encode(self, x: Tensor, rows: Tensor) -> None:
        """Write x, (rows, BLOCK) in float32, into the parts."""
        rows.copy_(x)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU in which moments are copied back, while the next ones are on their way to it."""
    return torch.cuda.Stream(device)


class MomentsOnCPU(Moments):
    """Moments in the CPU's memory. They are copied to the parameter's device and back in each step."""
    copied = True

    def new(self, p):
        return torch.zeros(p.shape, dtype=torch.float32, device='cpu', pin_memory=p.device.type == 'cuda')

    def begin_step(self, device):
        if device.type == 'cuda':  # those of the last step have to be back
            torch.cuda.current_stream(device).wait_stream(copy_stream(device))

    def finish_copies(self, device):
        if device.type == 'cuda':
            copy_stream(device).synchronize()

    def read(self, kept, p):
        return kept.to(p.device, non_blocking=True, copy=True)

    def write(self, kept, value):
        if value.device.type != 'cuda':
            kept.copy_(value)
            return
        stream = copy_stream(value.device)
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            kept.copy_(value, non_blocking=True)
        value.record_stream(stream)  # its memory is used again only when the copy is made


@dataclass(frozen=True)
class MomentsIn8Bits(Moments):
    """
    Moments in E4M3, with a float32 scale for each BLOCK elements (8-bit optimizers: https://arxiv.org/abs/2110.02861).

    They are rounded stochastically, so that a mean can follow small changes. The kept tensor is bytes: the elements,
    then the scales.
    """
    power: int  # 2 for a second moment, which is kept as its root: that spans half as many exponents
    copied = True

    def new(self, p):
        rows = -(-p.numel() // BLOCK)
        return torch.zeros(rows * (BLOCK + 4), dtype=torch.uint8, device=p.device)

    def read(self, kept, p):
        return out_of_rows(self.decode(*_codes_and_scales(kept)), p)

    def write(self, kept, value):
        self.encode(in_rows(value), *_codes_and_scales(kept))

    def parts(self, kept):
        # As tensors of their own, though in the same memory: compiled code cannot write to views that have one storage
        # and two dtypes
        return tuple(torch.from_dlpack(part) for part in _codes_and_scales(kept))

    def put_back(self, kept, parts):
        """The parts are the kept tensor's own memory."""

    def decode(self, codes, scales):
        """codes: (rows, BLOCK), uint8; scales: (rows, 1), float32."""
        # a kernel that casts from E4M3 needs a recent GPU; eager, a cast is faster
        x = (E4M3.decode(codes) if torch.compiler.is_compiling() else codes.view(E4M3.dtype).float()) * scales
        return x.square_() if self.power == 2 else x

    def encode(self, x, codes, scales):
        x = x.sqrt() if self.power == 2 else x
        scales.copy_(x.abs().amax(1, keepdim=True).clamp(min=1e-30) / E4M3.max)
        x = E4M3.round(x / scales, torch.rand_like(x))
        if self.power == 2:  # never zero, because an update is divided by it
            x = x.clamp(min=2.0 ** (E4M3.min_exponent - E4M3.mantissa))
        if torch.compiler.is_compiling():
            codes.copy_(E4M3.codes(x))
        else:
            codes.view(E4M3.dtype).copy_(x)


def _codes_and_scales(kept):
    n = kept.numel() // (BLOCK + 4) * BLOCK
    return kept[:n].view(-1, BLOCK), kept[n:].view(torch.float32)[:, None]


MOMENTS = {  # train.py's optimizer_state -> how first and second moments are kept
    'float32': (Moments(), Moments()), '8bit': (MomentsIn8Bits(1), MomentsIn8Bits(2)),
    'cpu': (MomentsOnCPU(), MomentsOnCPU())}
