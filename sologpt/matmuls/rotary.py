"""
Rotary positions (https://arxiv.org/abs/2104.09864): how fast each pair of dimensions turns, and the turning.

The pair (i, i + hd/2) of a query or key is turned by position * frequency i, which is 1 / base^(2i/hd). A scaling makes
frequencies lower, so that a model takes in longer texts than those it was first trained on. Pairs are ordered as in
Hugging Face's models. A scaling is a dict with config.json's keys:

    {'rope_type': 'linear', 'factor': 4.0}      all frequencies divided by the factor
    {'rope_type': 'llama3', 'factor': ..., 'low_freq_factor': ..., 'high_freq_factor': ...,
     'original_max_position_embeddings': ...}   low frequencies divided by it, high ones kept
    {'rope_type': 'yarn', 'factor': ...}        the same by the number of turns, and longer queries and keys
    {'rope_type': 'dynamic', 'factor': ...}     nothing changes up to block_size, and no more positions are taken
"""

import math
from collections.abc import Callable

import torch
import torch.nn as nn

from configurator import InputError
from sologpt.machine.devices import matmul_dtype

Tensor = torch.Tensor
Rotation = tuple[Tensor, Tensor]  # (cos, sin) of the positions, each (T, 1, hd)


def frequencies(head_dim: int, base: float, scaling: dict | None = None) -> tuple[Tensor, float]:
    """
    ((hd/2,) float32 on the CPU, the radians per position of each pair; the factor of cos and sin). Raises InputError
    for a scaling that is not known or not complete.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device='cpu')
    plain = 1.0 / base ** (pairs / head_dim)
    if scaling is None:
        return plain, 1.0
    kind = scaling.get('rope_type')
    if kind not in SCALINGS:
        raise InputError(f'rope_scaling has rope_type={kind!r}; known are {", ".join(SCALINGS)}')
    try:
        return SCALINGS[kind](plain, base, scaling)
    except KeyError as e:
        raise InputError(f'rope_scaling={scaling} has no {e.args[0]}') from None


def _linear(plain, base, scaling):
    return plain / scaling['factor'], 1.0


def _dynamic(plain, base, scaling):
    return plain, 1.0


def _llama3(plain, base, scaling):
    """Llama 3.1's, as Hugging Face's transformers has it: between the two limits it goes over evenly."""
    factor, low, high, trained = (scaling[key] for key in ('factor', 'low_freq_factor', 'high_freq_factor',
                                                           'original_max_position_embeddings'))
    turns = trained * plain / (2 * math.pi)  # in the texts of the first training
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * ((1 - kept) / factor + kept), 1.0


def _yarn(plain, base, scaling):
    """YaRN (https://arxiv.org/abs/2309.00071), section 3.2 and 3.4."""
    factor, trained, head_dim = scaling['factor'], scaling['original_max_position_embeddings'], 2 * len(plain)

    def pair_that_turns(n):
        return head_dim * math.log(trained / (n * 2 * math.pi)) / (2 * math.log(base))
    first, last = pair_that_turns(scaling.get('beta_fast') or 32), pair_that_turns(scaling.get('beta_slow') or 1)
    if scaling.get('truncate', True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = ((torch.arange(len(plain), device='cpu') - first) / max(last - first, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / factor * ramp, _yarn_magnitude(factor, scaling)


def _yarn_magnitude(factor, scaling):
    def magnitude(scale=1.0):
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
    if scaling.get('attention_factor') is not None:
        return scaling['attention_factor']
    if scaling.get('mscale') and scaling.get('mscale_all_dim'):
        return magnitude(scaling['mscale']) / magnitude(scaling['mscale_all_dim'])
    return magnitude()


# a new scaling is a row here: (the plain frequencies, the base, the scaling) -> what frequencies() returns
SCALINGS: dict[str, Callable] = {'linear': _linear, 'dynamic': _dynamic, 'llama3': _llama3, 'yarn': _yarn}


def rotation(positions: Tensor, radians: Tensor, magnitude: float, dtype: torch.dtype) -> Rotation:
    """
    positions: (T,); radians, magnitude: as frequencies() returns them -> what rotate() takes, in dtype.

    The angles are in float32: in 16 bits, neighbouring positions of a long text would be one.
    """
    is_compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return (rotation_once if is_compiled else _rotation)(positions, radians, magnitude, dtype)


def _rotation(positions, radians, magnitude, dtype):
    angles = torch.outer(positions.float(), radians.float())[:, None]
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


# torch.compile would compute every cos and sin again in each block, for all heads, forward and backward
@torch.library.custom_op('sologpt::rotation', mutates_args=())
def rotation_once(positions: Tensor, radians: Tensor, magnitude: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """rotation(), as one operation."""
    return _rotation(positions, radians, magnitude, dtype)


@rotation_once.register_fake
def _(positions, radians, magnitude, dtype):
    shape = len(positions), 1, 2 * len(radians)
    return radians.new_empty(shape, dtype=dtype), radians.new_empty(shape, dtype=dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """x: (B, T, H, hd), queries or keys -> the same, turned by their positions."""
    cos, sin = by
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


def unturned(x: Tensor, by: None) -> Tensor:
    """Stands in the place of rotate() where positions are learned."""
    return x


class NoRotation(nn.Module):
    """Stands in Rotary's place where positions are learned."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x, context):
        return None


class Rotary(nn.Module):
    """How much queries and keys are turned: computed once for all blocks."""

    def __init__(self, config):
        super().__init__()
        # on the CPU even where the weights are on the meta device, until they are loaded
        radians, self.magnitude = frequencies(config.head_dim, config.rope_base, config.rope_scaling)
        self.register_buffer('radians', radians, persistent=False)
        self.config = config

    def forward(self, x, context):
        """x: (B, T, n_embd), of the T positions after the context's -> what rotate() takes."""
        positions = context.positions(x.size(1), self.config.block_size, x.device)
        return rotation(positions, self.radians, self.magnitude, matmul_dtype(x))
