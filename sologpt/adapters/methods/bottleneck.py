"""
Bottleneck adapters (https://arxiv.org/abs/1902.00751): two small layers after each projection into the residual stream.

    h = W x
    y = h + U gelu(D h + c) + e          D (r, out), c (r), U (out, r) and e (out) trained

U and e begin at zero, so that the model begins as its base. The change is not linear: it cannot be added to W. peft
does not have these adapters; their files have peft's form, with a type of their own.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import InputError
from sologpt.adapters.method import BesideLinear
from sologpt.adapters.targets import Target


class Bottleneck(BesideLinear):
    name, default_r = 'bottleneck', 64
    default_targets = ('attn.c_proj', 'mlp.c_proj')
    file_ends = {'D': 'adapter_down.weight', 'c': 'adapter_down.bias', 'U': 'adapter_up.weight', 'e': 'adapter_up.bias'}
    peft_type, known_to_peft = 'BOTTLENECK', False
    peft_fields = {'r': 'r', 'target_modules': 'target_modules', 'layers_to_transform': 'layers_to_transform'}

    def __init__(self, base: nn.Module, targets: list[Target], dropout: float):
        """A target's r is the width between the two layers. Its scale and dropout have no effect."""
        super().__init__(base, targets)
        self.D, self.c = self.new(lambda target: (target.r, target.n_out)), self.new(lambda target: target.r)
        self.U, self.e = self.new(lambda target: (target.n_out, target.r)), self.new(lambda target: target.n_out)
        for D in self.D:
            nn.init.kaiming_uniform_(D, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def change(i, h):
            return h + F.linear(F.gelu(F.linear(h, self.D[i], self.c[i])), self.U[i], self.e[i])
        return self.changed(self.base(x), change)

    def deltas(self):
        raise InputError('adapter=bottleneck is not linear: it cannot be merged into the weights')
