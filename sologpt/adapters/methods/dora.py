"""
DoRA (https://arxiv.org/abs/2402.09353): LoRA, and the rows of the merged weight have trained lengths.

    y = m * (W + g B A) x / |W + g B A|          A (r, in), B (out, r) and m (out) trained

|...| (out) are the lengths of the rows, which count as constants in the backward, as the paper proposes. m begins as
the lengths of W's rows, so that the model begins as its base.
"""

import torch
import torch.nn as nn

from sologpt.adapters.method import BesideLinear, joined
from sologpt.adapters.methods.lora import LoRA
from sologpt.adapters.targets import Target
from sologpt.machine.devices import matmul_dtype


class DoRA(LoRA):
    name, exported_as = 'dora', 'dora'
    depends_on_base, stackable = True, False
    file_ends = LoRA.file_ends | {'m': 'lora_magnitude_vector'}
    peft_marks = {'use_dora': True}

    def __init__(self, base: nn.Module, targets: list[Target], dropout: float):
        super().__init__(base, targets, dropout)
        self.register_buffer('base_squared', base.weight.detach().float().square().sum(1), persistent=False)
        self.m = nn.ParameterList(nn.Parameter(self.base_squared[target.rows].sqrt()) for target in targets)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        factors = [m / length for m, length in zip(self.m, self.lengths(), strict=True)]
        factor = joined(self.in_rows(factors, factors[0].new_ones))
        bias = self.base.bias  # stays outside of the product
        y = y * factor if bias is None else torch.addcmul(bias * (1 - factor), y, factor)
        return y.to(matmul_dtype(x))

    @torch.no_grad()
    def lengths(self) -> list[torch.Tensor]:
        """
        The lengths of the merged weight's rows, (n_out) for each target, without making that weight: the square root of
        |W|^2 + 2 g W A^T . B + g^2 B A A^T . B, row by row.
        """
        found, weight = [], self.base.weight  # an NF4Linear decodes it
        with torch.autocast(weight.device.type, enabled=False):
            for A, B, target in zip(self.A, self.B, self.targets, strict=True):
                B = B * target.scale
                mixed = weight[target.rows].float() @ A.mT
                squared = self.base_squared[target.rows] + ((2 * mixed + B @ (A @ A.mT)) * B).sum(1)
                found.append(squared.clamp(min=1e-20).sqrt())
        return found

    def deltas(self):
        found, whole = [], self.base.weight
        for A, B, m, target in zip(self.A, self.B, self.m, self.targets, strict=True):
            weight = whole[target.rows].float()
            merged = weight + target.scale * B @ A
            found.append(merged * (m / merged.norm(dim=1).clamp(min=1e-10))[:, None] - weight)
        return found

    low_ranks = BesideLinear.low_ranks  # its change of the weight has full rank

    def family_tensors(self):
        [(A, B)] = LoRA.low_ranks(self)
        return A, B, {'lora_magnitude_vector': self.m[0].detach()}
