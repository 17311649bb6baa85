"""
LoRA (https://arxiv.org/abs/2106.09685): a change of low rank beside each weight.

    y = W x + g B A x          W (out, in) frozen; A (r, in) and B (out, r) trained

g = alpha / r, and with rsLoRA (https://arxiv.org/abs/2312.03732) g = alpha / sqrt(r). B begins at zero, so that the
model begins as its base. Afterwards g B A can be added to W.

A Linear with several targets has an A and a B for each of them, over all of its input and over the target's rows. The
matrices A are multiplied as one, below each other. So are the matrices B, as one with zeros between them: a matmul for
each target, and the sums of their gradients, would take longer.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from sologpt.adapters.method import BesideLinear, joined
from sologpt.adapters.targets import Target


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

    def __init__(self, base: nn.Module, targets: list[Target], dropout: float):
        """dropout: of the input of A."""
        super().__init__(base, targets)
        self.A = self.new(lambda target: (target.r, self.n_in))
        self.B = self.new(lambda target: (target.n_out, target.r))
        for A in self.A:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.scale = targets[0].scale
        self.other_scales = [target.scale / self.scale for target in targets[1:]]  # of the other targets, beside it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        y, h = self.base(rows), F.linear(self.dropout(rows), joined(list(self.A)))
        first, *others = self.B
        B = self.block_diagonal([first, *(B * s for B, s in zip(others, self.other_scales, strict=True))])
        # in place, because another pass over y would be a tenth of the whole; nothing needs what y was
        return y.addmm_(h, B.mT.to(y.dtype), alpha=self.scale).unflatten(0, x.shape[:-1])

    def low_ranks(self):
        return [(A.detach(), B.detach() * target.scale)
                for A, B, target in zip(self.A, self.B, self.targets, strict=True)]

    @classmethod
    def peft_settings(cls, model_config, transposed):
        return {'bias': 'none', 'fan_in_fan_out': transposed, **cls.peft_marks}
