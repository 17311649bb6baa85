"""
Many low-rank adapters over one model, a row of the batch each (Punica, https://arxiv.org/abs/2310.18547).
"""

import torch
import torch.nn as nn

from configurator import InputError


class Batched(nn.Module):
    """In the place of a Linear: to each row of a batch is added what a low-rank adapter of its own, or none, adds."""

    def __init__(self, base, slots, r, dtype):
        super().__init__()
        n_out, n_in = base.weight.shape
        self.base, self.A, self.B = base, None, None
        options = {'dtype': dtype, 'device': base.weight.device}
        self.slots_A, self.slots_B = torch.zeros(slots, n_in, r, **options), torch.zeros(slots, r, n_out, **options)

    def forward(self, x):
        y = self.base(x)
        return torch.baddbmm(y, torch.bmm(x.to(self.A.dtype), self.A), self.B)


class Bank:
    """
    Low-rank adapters over one model, each in a slot: rows of a batch choose among them, and slot 0 is the model alone.
    To load another adapter into a slot, or to choose anew for as many rows, changes values alone: nothing is compiled
    again, and the model's weights are never touched.
    """

    def __init__(self, model, adapters, dtype):
        """adapters: of each its low-rank matrices, name of a Linear -> (A, B); dtype: that of matmuls."""
        self.r = max(len(A) for matrices in adapters for A, _ in matrices.values())
        names = dict.fromkeys(name for matrices in adapters for name in matrices)
        self.parts = {name: Batched(model.get_submodule(name), len(adapters) + 1, self.r, dtype) for name in names}
        for name, part in self.parts.items():
            model.set_submodule(name, part)
        for slot, matrices in enumerate(adapters, 1):
            self.load(slot, matrices)
        self.select([0])

    def load(self, slot, matrices):
        """Put an adapter into a slot; rows that have chosen the slot keep what was there until the next select()."""
        if not matrices.keys() <= self.parts.keys():
            raise InputError(f'the adapter has {min(matrices.keys() - self.parts.keys())}, which none of those had '
                             f'that the bank was made for')
        rank = max(len(A) for A, _ in matrices.values())
        if rank > self.r:
            raise InputError(f'the adapter has rank {rank}, the bank room for {self.r}')
        for name, part in self.parts.items():
            part.slots_A[slot], part.slots_B[slot] = 0, 0
            if name in matrices:
                A, B = matrices[name]
                part.slots_A[slot, :, :len(A)], part.slots_B[slot, :len(A)] = A.mT, B.mT

    def select(self, slots):
        """slots: for each row of the batches to come the slot of its adapter."""
        for part in self.parts.values():
            chosen = part.slots_A[slots], part.slots_B[slots]
            if part.A is not None and part.A.shape == chosen[0].shape:
                part.A.copy_(chosen[0])
                part.B.copy_(chosen[1])
            else:
                part.A, part.B = chosen
