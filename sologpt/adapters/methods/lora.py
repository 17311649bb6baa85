"""
LoRA (https://arxiv.org/abs/2106.09685): a change of low rank beside each weight.

    y = W x + g B A x          W (out, in) frozen; A (r, in) and B (out, r) trained

g = alpha / r, and with rsLoRA (https://arxiv.org/abs/2312.03732) g = alpha / sqrt(r). B begins at zero, so that the
model begins as its base. Afterwards g B A can be added to W.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from sologpt.adapters.method import BesideLinear


class LoRA(BesideLinear):
    name = 'lora'
    mergeable, stackable, lora_plus = True, True, ('B',)
    file_ends = {'A': 'lora_A.weight', 'B': 'lora_B.weight'}
    peft_type = 'LORA'
    peft_fields = {
        'r': 'r', 'lora_alpha': 'lora_alpha', 'use_rslora': 'use_rslora', 'dropout': 'lora_dropout',
        'target_modules': 'target_modules', 'exclude_modules': 'exclude_modules',
        'layers_to_transform': 'layers_to_transform', 'rank_pattern': 'rank_pattern', 'alpha_pattern': 'alpha_pattern'}
    peft_marks = {'use_dora': False}
    # initialisations that have changed the base are not among them
    peft_allowed = {'init_lora_weights': (True, False, 'gaussian', 'eva', 'orthogonal'), 'use_dora': (True, False)}
    peft_ignored = ('megatron_core', 'qalora_group_size')

    def __init__(self, base: nn.Module, r: int, scale: float, dropout: float):
        """scale: g. dropout: of the input of A."""
        super().__init__(base)
        n_out, n_in = base.weight.shape
        self.A, self.B = self.new(r, n_in), self.new(n_out, r)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale, self.dropout = scale, nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        y, h = self.base(rows), F.linear(self.dropout(rows), self.A)
        # in place, because another pass over y would be a tenth of the whole; nothing needs what y was
        return y.addmm_(h, self.B.mT.to(y.dtype), alpha=self.scale).unflatten(0, x.shape[:-1])

    def low_rank(self):
        return self.A.detach(), self.B.detach() * self.scale

    @classmethod
    def peft_settings(cls, model_config, transposed):
        return {'bias': 'none', 'fan_in_fan_out': transposed, **cls.peft_marks}
