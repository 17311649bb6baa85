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


class Bottleneck(BesideLinear):
    name, default_r = 'bottleneck', 64
    default_targets = ('attn.c_proj', 'mlp.c_proj')
    file_ends = {'D': 'adapter_down.weight', 'c': 'adapter_down.bias', 'U': 'adapter_up.weight', 'e': 'adapter_up.bias'}
    peft_type, known_to_peft = 'BOTTLENECK', False
    peft_fields = {'r': 'r', 'target_modules': 'target_modules', 'layers_to_transform': 'layers_to_transform'}

    def __init__(self, base: nn.Module, r: int, scale: float, dropout: float):
        """r: the width between the two layers. scale and dropout have no effect."""
        super().__init__(base)
        n = base.weight.shape[0]
        self.D, self.c, self.U, self.e = self.new(r, n), self.new(r), self.new(n, r), self.new(n)
        nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.base(x)
        return h + F.linear(F.gelu(F.linear(h, self.D, self.c)), self.U, self.e)

    def delta(self):
        raise InputError('adapter=bottleneck is not linear: it cannot be merged into the weights')
