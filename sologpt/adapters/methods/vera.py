"""
VeRA (https://arxiv.org/abs/2310.11454): as LoRA, but the two matrices are random, and all Linears share them.

    y = W x + b * B0 (d * A0 x)          b (out) and d (r) trained; A0 (r, in) and B0 (out, r) random and frozen

Two vectors are trained in the place of two matrices. b begins at zero, so that the model begins as its base. A0 and B0
have the size of the widest Linears; others take a part of them.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from sologpt.adapters.method import BesideLinear


class Projection(nn.Module):
    """A0, (r, in), and B0, (out, r), of the widest Linears: the same random numbers as peft's."""

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

    def __init__(self, base: nn.Module, projection: Projection, dropout: float):
        """dropout: of the input of A0."""
        super().__init__(base)
        self.projection = projection  # one module, which all share
        self.n_out, self.n_in = base.weight.shape
        self.b, self.d = self.new(self.n_out), self.new(len(projection.A), value=0.1)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def beside(cls, linears, sizes, dropout, seed):
        widest_in, widest_out = (max(linear.weight.shape[i] for linear in linears.values()) for i in (1, 0))
        r, _ = next(iter(sizes.values()))
        projection = Projection(r, widest_in, widest_out, seed)
        return {name: cls(linear, projection, dropout) for name, linear in linears.items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(self.dropout(x), self.projection.A[:, :self.n_in]) * self.d
        z = F.linear(h, self.projection.B[:self.n_out])
        return torch.addcmul(self.base(x), z, self.b.to(z.dtype))

    def flops_per_token(self):
        return 4 * len(self.d) * (self.n_in + self.n_out)

    def low_rank(self):
        A, B = self.projection.A[:, :self.n_in], self.projection.B[:self.n_out]
        return A * self.d.detach()[:, None], B * self.b.detach()[:, None]

    def file_tensors(self, name):
        shared = {f'base_model.vera_{half}': (self.projection, half) for half in 'AB'}
        return super().file_tensors(name) | shared

    @classmethod
    def peft_settings(cls, model_config, transposed):
        return {'bias': 'none', 'fan_in_fan_out': transposed, 'save_projection': True}
