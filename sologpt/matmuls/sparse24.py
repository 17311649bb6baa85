"""
2:4 sparsity of a matrix and of its transpose (https://arxiv.org/abs/2102.08124).

Hardware for sparse matmuls takes matrices with at most two numbers other than zero in each four along a row. A mask by
blocks of 4 x 4, with two ones in every row and in every column, fits both y = x w^T and dx = g w.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from sologpt.matmuls.formats import Encoded

Tensor = torch.Tensor


def _patterns() -> Tensor:
    """The 90 matrices of 4 x 4 zeros and ones with two ones in every row and column, as (90, 16)."""
    rows = [row for row in itertools.product((0.0, 1.0), repeat=4) if sum(row) == 2]
    return torch.tensor([sum(choice, ()) for choice in itertools.product(rows, repeat=4)
                         if all(sum(column) == 2 for column in zip(*choice, strict=True))])


PATTERNS = _patterns()


@dataclass(frozen=True)
class Sparse24:
    """
    The format that keeps 8 elements of each 4 x 4 block as they are, and sets the others to zero: of the 90 patterns
    the one whose magnitudes have the largest sum.
    """

    kept: ClassVar[bool] = True  # for the backward, because to find the mask again takes longer
    significant_bits: ClassVar[int] = 24  # as many as float32 has: the elements are not rounded

    @property
    def mT(self) -> 'Sparse24':
        return self

    def encode(self, x: Tensor, times: Tensor | None = None) -> Encoded:
        """x * times, (R, C); times: (1, C) or None."""
        x = x if times is None else x * times
        return Encoded(x * self.mask(x), None)

    def mask(self, x: Tensor) -> Tensor:
        """(R, C) -> (R, C) bool: what is kept. Incomplete blocks count as if they were filled up with zeros."""
        (R, C), patterns = x.shape, PATTERNS.to(x.device)
        size = F.pad(x.detach().abs().float(), (0, -C % 4, 0, -R % 4))
        blocks = size.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).permute(1, 3, 0, 2).flatten(2).flatten(0, 1)
        best = (patterns @ blocks).max(0).indices  # over (90, blocks); argmax is slower
        mask = patterns.bool()[best].view(*(n // 4 for n in size.shape), 4, 4)
        return mask.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:R, :C]
