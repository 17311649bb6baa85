"""
Products on their own, outside of a Linear: how far off sums are by their accumulator and by Strassen's algorithm, and
what inference with ternary weights takes.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from sologpt.bench.timing import median_ms
from sologpt.machine import devices
from sologpt.matmuls import products, recipes, ternary
from sologpt.matmuls.accumulators import accumulated, split_bfloat16
from sologpt.matmuls.elements import BYTE
from sologpt.matmuls.formats import Encoded


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact| / |exact|, by the Frobenius norm. exact: in float64, on the CPU."""
    return ((found.detach().cpu().double() - exact).norm() / exact.norm()).item()


def accumulator_errors() -> dict[str, float]:
    """
    Accumulator -> worst relative error of sums of 4096 positive products. Accumulators have fewer bits than float32, or
    float32 is made of products of numbers that were split into bfloat16 ones.
    """
    a, b = torch.rand(2, 64, 4096, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double().mT
    found = {
        'float32': accumulated(a, b, torch.float32),
        'float16': accumulated(a, b, torch.float16),
        'bfloat16': accumulated(a, b, torch.bfloat16),
        'float16, 128 products at once': accumulated(a, b, torch.float16, chunk=128),
        **{f'float32 out of {n} bfloat16 product{"s" * (n > 1)}': split_bfloat16(a, b, n) for n in (1, 3, 6)}}
    errors = {name: ((y.double() - exact).abs() / exact).max().item() for name, y in found.items()}
    print('\nworst relative error of sums of 4096 positive products, by accumulator:')
    for name, error in errors.items():
        print(f'  {name:36} {error:8.1e}')
    return errors


def strassen_errors(device: torch.device) -> dict[str, list[float]]:
    """Dtype -> relative error, for 0 to 3 levels, of a product of Gaussian matrices that were rounded to that dtype."""
    a, b = torch.randn(2, 1024, 1024, generator=torch.Generator().manual_seed(0))
    errors = {}
    print("\nerror of Strassen's algorithm at 1024 x 1024, by levels:" + ''.join(f' {n:>8}' for n in range(4)))
    for name in ('float32', 'bfloat16'):
        dtype = devices.DTYPES[name]
        x, w = (Encoded(t.to(device, dtype), None) for t in (a, b))
        exact = a.to(dtype).double() @ b.to(dtype).double().mT
        errors[name] = [relative_error(products.strassen_product(x, w, dtype, dtype, levels), exact)
                        for levels in range(4)]
        print(f'  {name:53}' + ''.join(f' {error:8.1e}' for error in errors[name]))
    return errors


def ternary_inference(device: torch.device, width: int) -> dict:
    """Form of the weights -> ms of a width x width Linear in inference, for one token and for 64, and their bytes."""
    torch.manual_seed(0)
    linear = nn.Linear(width, width, bias=False, device=device)
    w, scale = recipes.TERNARY.encode(linear.weight.detach())
    packed, planes, by_row = ternary.PackedTernary(linear), ternary.bit_planes(w), recipes.per('row', BYTE)
    bfloat16 = linear.weight.detach().bfloat16()
    forms = {  # name -> (what it computes, bytes of the weights, the most tokens)
        'float32': (linear, 4 * w.numel(), 64),
        'bfloat16': (lambda x: F.linear(x.bfloat16(), bfloat16), 2 * w.numel(), 64),
        'ternary in int8': (lambda x: products.int8_product(by_row.encode(x), Encoded(w, scale), None, x.dtype),
                            w.numel(), 64),
        'ternary in 2 bits': (packed, packed.packed.numel(), 64),
        'ternary in bit planes': (lambda x: ternary.bitplane_matmul(by_row.encode(x).values, planes),
                                  w.numel() // 4, 1)}
    figures = {'width': width, 'rows': {}}
    print(f'\ninference, width {width:,}: ms    1 token 64 tokens {"bytes":>12}')
    for name, (run, size, most) in forms.items():
        ms = {}
        for tokens in (1, 64) if most == 64 else (1,):
            x = torch.randn(tokens, width, device=device)
            with torch.inference_mode():
                ms[tokens] = median_ms(functools.partial(run, x), device)
        figures['rows'][name] = {'ms': ms, 'bytes': size}
        print(f'  {name:28} {ms[1]:8.3f} {f"{ms[64]:.3f}" if 64 in ms else "":>9} {size:12,}')
    return figures
