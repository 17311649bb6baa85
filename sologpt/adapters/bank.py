"""
Many low-rank adapters over one model, one for each row of the batch (Punica, https://arxiv.org/abs/2310.18547).
"""

import torch
import torch.nn as nn

from configurator import InputError

Tensor = torch.Tensor


class Batched(nn.Module):
    """
    Stands in the place of a Linear, which is its `base`: each row of a batch gets what its own low-rank adapter adds.

    slots_A: (slots, in, r), slots_B: (slots, r, out), all adapters; A, B: those that the rows have chosen.
    """

    def __init__(self, base: nn.Module, slots: int, r: int, dtype: torch.dtype):
        super().__init__()
        n_out, n_in = base.weight.shape
        self.base, self.A, self.B = base, None, None
        options = {'dtype': dtype, 'device': base.weight.device}
        self.slots_A, self.slots_B = torch.zeros(slots, n_in, r, **options), torch.zeros(slots, r, n_out, **options)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, in), of as many rows as have chosen -> (B, T, out)."""
        y = self.base(x)
        return torch.baddbmm(y, torch.bmm(x.to(self.A.dtype), self.A), self.B)


class Bank:
    """
    Low-rank adapters over one model, each in a slot. Rows of a batch choose slots; slot 0 is the model alone.

    To load another adapter into a slot, or to choose anew for as many rows, changes values only: nothing is compiled
    again, and the model's weights are never touched.
    """

    def __init__(self, model: nn.Module, adapters: list[dict[str, tuple[Tensor, Tensor]]], dtype: torch.dtype):
        """adapters: for each the name of a Linear -> (A, B), (r, in) and (out, r). dtype: of matmuls."""
        self.ranks = {}  # name of a Linear -> the largest rank there
        for name, (A, _) in (item for matrices in adapters for item in matrices.items()):
            self.ranks[name] = max(self.ranks.get(name, 0), len(A))
        self.parts = {name: Batched(model.get_submodule(name), len(adapters) + 1, r, dtype)
                      for name, r in self.ranks.items()}
        for name, part in self.parts.items():
            model.set_submodule(name, part)
        for slot, matrices in enumerate(adapters, 1):
            self.load(slot, matrices)
        self.select([0])

    def load(self, slot: int, matrices: dict[str, tuple[Tensor, Tensor]]) -> None:
        """
        Put an adapter into a slot. Rows that have chosen the slot keep what was there until the next select(). Raises
        InputError if the bank has no room for the adapter.
        """
        for name, (A, _) in matrices.items():
            if name not in self.parts:
                raise InputError(f'the adapter has {name}, which none of the adapters had that the bank was made for')
            if len(A) > self.ranks[name]:
                raise InputError(f'the adapter has rank {len(A)} at {name}, but the bank has room for '
                                 f'{self.ranks[name]}')
        for name, part in self.parts.items():
            part.slots_A[slot], part.slots_B[slot] = 0, 0
            if name in matrices:
                A, B = matrices[name]
                part.slots_A[slot, :, :len(A)], part.slots_B[slot, :len(A)] = A.mT, B.mT

    def select(self, slots: list[int]) -> None:
        """Choose the slot of each row of the batches to come."""
        for part in self.parts.values():
            chosen = part.slots_A[slots], part.slots_B[slots]
            if part.A is not None and part.A.shape == chosen[0].shape:
                part.A.copy_(chosen[0])
                part.B.copy_(chosen[1])
            else:
                part.A, part.B = chosen
