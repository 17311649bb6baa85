import torch
from linears import apart

from sologpt.matmuls.accumulators import accumulated, split_bfloat16


def test_a_short_accumulator_loses_digits_and_several_products_regain_them():
    torch.manual_seed(0)
    a, b = torch.rand(4, 4096), torch.rand(4, 4096)
    exact = a.double() @ b.double().T
    worst = {name: ((found.double() - exact) / exact).abs().max().item() for name, found in {
        'fp16': accumulated(a, b, torch.float16), 'bf16': accumulated(a, b, torch.bfloat16),
        'fp16 by 128': accumulated(a, b, torch.float16, 128),
        'fp32': accumulated(a, b, torch.float32, 64),
        'x1': split_bfloat16(a, b, 1), 'x3': split_bfloat16(a, b, 3),
        'x6': split_bfloat16(a, b, 6)}.items()}
    assert worst['bf16'] > 0.5 > worst['fp16'] > 0.01 > worst['fp16 by 128'] > 1e-4
    assert worst['x1'] > 1e-5 > worst['x3'] and max(worst['x3'], worst['x6'], worst['fp32']) < 1e-6
    spread = a * torch.exp2(torch.randint(-4, 5, a.shape))  # x6 is there for the last digits
    x3, x6 = (apart(split_bfloat16(spread.double().float(), b, n).double(), spread.double() @ b.double().T)
              for n in (3, 6))
    assert x6 <= x3
