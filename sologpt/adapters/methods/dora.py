"""
DoRA (https://arxiv.org/abs/2402.09353): LoRA, and the rows of the merged weight have trained lengths.

    y = m * (W + g B A) x / |W + g B A|          A (r, in), B (out, r) and m (out) trained

|...| (out) are the lengths of the rows, which count as constants in the backward, as the paper proposes. m begins as
the lengths of W's rows, so that the model begins as its base.
"""

import torch
import torch.nn as nn

from sologpt.adapters.method import BesideLinear
from sologpt.adapters.methods.lora import LoRA
from sologpt.machine.devices import matmul_dtype


class DoRA(LoRA):
    name, exported_as = 'dora', 'dora'
    depends_on_base, stackable = True, False
    file_ends = LoRA.file_ends | {'m': 'lora_magnitude_vector'}
    peft_marks = {'use_dora': True}

    def __init__(self, base: nn.Module, r: int, scale: float, dropout: float):
        super().__init__(base, r, scale, dropout)
        self.register_buffer('base_squared', base.weight.detach().float().square().sum(1), persistent=False)
        self.m = nn.Parameter(self.base_squared.sqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        factor = self.m / self.lengths()
        bias = self.base.bias  # stays outside of the product
        y = y * factor if bias is None else torch.addcmul(bias * (1 - factor), y, factor)
        return y.to(matmul_dtype(x))

    @torch.no_grad()
    def lengths(self) -> torch.Tensor:
        """
        The lengths of the merged weight's rows, (out), without making that weight: the square root of
        |W|^2 + 2 g W A^T . B + g^2 B A A^T . B, row by row.
        """
        with torch.autocast(self.A.device.type, enabled=False):
            A, B = self.A, self.B * self.scale
            mixed = self.base.weight.float() @ A.mT
            return (self.base_squared + ((2 * mixed + B @ (A @ A.mT)) * B).sum(1)).clamp(min=1e-20).sqrt()

    def delta(self):
        weight = self.base.weight.float()
        merged = weight + self.scale * self.B @ self.A
        return merged * (self.m / merged.norm(dim=1).clamp(min=1e-10))[:, None] - weight

    low_rank = BesideLinear.low_rank  # its change of the weight has full rank

    def family_tensors(self):
        return *LoRA.low_rank(self), {'lora_magnitude_vector': self.m.detach()}
