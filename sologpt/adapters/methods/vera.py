"""
VeRA (https://arxiv.org/abs/2310.11454): as LoRA, but the two matrices are random, and all Linears share them.

    y = W x + b * B0 (d * A0 x)          b (out) and d (r) trained; A0 (r, in) and B0 (out, r) random and frozen

Two vectors are trained in the place of two matrices. b begins at zero, so that the model begins as its base. A0 and B0
have the size of the widest targets; others take a part of them, from the first row on.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from sologpt.adapters.method import BesideLinear
from sologpt.adapters.targets import Target


class Projection(nn.Module):
    """A0, (r, in), and B0, (out, r), of the widest targets: the same random numbers as peft's."""

    def __init__(self, r: int, n_in: int, n_out: int, seed: int):
        super().__init__()
        generator = torch.Generator('cpu').manual_seed(seed)
        for name, shape in (('A', (r, n_in)), ('B', (n_out, r))):
            bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(shape[1])
            self.register_buffer(name, torch.empty(shape, device='cpu').uniform_(-bound, bound, generator=generator))


class VeRA(BesideLinear):
    name, default_r = 'vera', 256
    mergeable, stackable = True, True
    file_ends = {'b': 'vera_lambda_b', 'd': 'vera_lambda_d'}
    peft_type = 'VERA'
    peft_fields = {'r': 'r', 'dropout': 'vera_dropout', 'target_modules': 'target_modules',
                   'layers_to_transform': 'layers_to_transform', 'projection_prng_key': 'projection_prng_key'}
    peft_ignored = ('d_initial', 'init_weights', 'save_projection')

    def __init__(self, base: nn.Module, targets: list[Target], dropout: float, projection: Projection):
        """dropout: of the input of A0."""
        super().__init__(base, targets)
        self.projection = projection  # one module, which all share
        self.b, self.d = self.new(lambda target: target.n_out), self.new(lambda target: target.r, value=0.1)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def beside(cls, linears, targets, dropout, seed):
        every = [target for of_linear in targets.values() for target in of_linear]
        widest_in = max(linear.weight.shape[1] for linear in linears.values())
        projection = Projection(every[0].r, widest_in, max(target.n_out for target in every), seed)
        return {name: cls(linear, targets[name], dropout, projection) for name, linear in linears.items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(self.dropout(x), self.projection.A[:, :self.n_in])

        def change(i, y):
            z = F.linear(h * self.d[i], self.projection.B[:self.targets[i].n_out])
            return torch.addcmul(y, z, self.b[i].to(z.dtype))
        return self.changed(self.base(x), change)

    def flops_per_token(self):
        return 4 * self.targets[0].r * (self.n_in + sum(target.n_out for target in self.targets))

    def low_ranks(self):
        A = self.projection.A[:, :self.n_in]
        return [(A * d.detach()[:, None], self.projection.B[:len(b)] * b.detach()[:, None])
                for b, d in zip(self.b, self.d, strict=True)]

    def file_tensors(self):
        shared = {f'base_model.vera_{half}': (self.projection, half) for half in 'AB'}
        return super().file_tensors() | shared

    @classmethod
    def peft_settings(cls, model_config, transposed):
        return {'bias': 'none', 'fan_in_fan_out': transposed, 'save_projection': True}
