"""
Peaks: how fast a device can multiply, from its datasheet or measured.
"""

import re

import torch

from sologpt.machine import clock, devices

# Dense peaks in TFLOP/s from the vendors' datasheets: (float32, TF32, bfloat16, float16), None where the hardware has
# no such units. Products of 16-bit numbers are summed in float32. A pattern has to match the whole name of the device,
# without its vendor, so that an "A40" is not an "RTX A4000", and a laptop's 4070 is not a desktop's.
_PEAK_TFLOPS = {
    r'V100-SXM2-\d+GB': (15.7, None, None, 125), r'V100-PCIE-\d+GB': (14, None, None, 112),
    r'T4': (8.1, None, None, 65),
    r'A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe': (19.5, 156, 312, 312),
    r'A30': (10.3, 82, 165, 165), r'A40': (37.4, 74.8, 149.7, 149.7), r'A10': (31.2, 62.5, 125, 125),
    r'A10G': (35, 35, 70, 70), r'RTX A6000': (38.7, 77.4, 154.8, 154.8), r'RTX A5000': (27.8, 55.6, 111.1, 111.1),
    r'RTX A4000': (19.2, 38.3, 76.7, 76.7),
    r'L4': (30.3, 60, 121, 121), r'L40': (90.5, 90.5, 181, 181), r'L40S': (91.6, 183, 362, 362),
    r'RTX 6000 Ada Generation': (91.1, 182, 364, 364),
    r'RTX PRO 6000 Blackwell (Workstation|Server) Edition': (126, 252, 504, 504),
    r'RTX PRO 6000 Blackwell Max-Q Workstation Edition': (110, 219, 439, 439),
    r'H100 80GB HBM3|H200|GH200 (480|144G HBM3e|120GB).*': (67, 494.7, 989.4, 989.4),
    r'H100 PCIe': (51, 378, 756, 756), r'H100 NVL|H200 NVL': (60, 418, 835, 835), r'H20': (44, 74, 148, 148),
    r'B200': (80, 1125, 2250, 2250), r'GB200|GB300': (80, 1250, 2500, 2500),
    r'B300 SXM6 AC': (75, 1125, 2250, 2250),
    r'MI250X( / MI250)?': (24, None, 191.5, 191.5), r'MI300X|MI325X': (163, 654, 1307, 1307),
    r'RTX 2080 Ti': (13.4, None, None, 53.8),
}
# GeForce cards sum in float32 at half their 16-bit rate: bfloat16 = 2 x float32, and TF32 = float32.
_PEAK_TFLOPS |= {f'RTX {name}': (half / 2, half / 2, half, half) for name, half in {
    '3060': 25.5, '3060 Ti': 32.4, '3070': 40.6, '3070 Ti': 43.5, '3080': 59.5, '3080 12GB': 61.3, '3080 Ti': 68.2,
    '3090': 71, '3090 Ti': 80,
    '4060': 30.2, '4060 Ti': 44.1, '4070': 58.3, '4070 SUPER': 71.0, '4070 Ti': 80.2, '4070 Ti SUPER': 88.2,
    '4080': 97.5, '4080 SUPER': 104, '4090': 165.2, '4090 D': 147.1,
    '5060': 38.4, '5060 Ti': 47.4, '5070': 61.7, '5070 Ti': 87.9, '5080': 112.6, '5090': 209.5}.items()}


def datasheet_flops(name: str, dtype: str, tf32: bool = True) -> float | None:
    """
    The dense peak, in FLOP/s, of the device called `name` for matmuls in `dtype`; None if the table does not have it.
    tf32: float32 matmuls may use TF32.
    """
    name = re.sub(r'^(NVIDIA|AMD) |\b(GeForce|Tesla|Instinct) ', '', name)
    for pattern, (fp32, tf32_peak, bf16, fp16) in _PEAK_TFLOPS.items():
        if re.fullmatch(pattern, name.strip()):
            peak = {'float32': tf32_peak if tf32 and tf32_peak else fp32, 'bfloat16': bf16, 'float16': fp16}[dtype]
            return peak and peak * 1e12
    return None


def find_peak(device: torch.device, dtype: str, override: float | None = None,
              tf32: bool = True) -> tuple[float, str]:
    """
    (FLOP/s that MFU is measured against, where the figure comes from).

    It is `override` if that is given, else a known GPU's datasheet peak, else the measured rate of a large matmul.
    """
    if override:
        return override, 'as given by peak_flops'
    measured = matmul_flops(device, devices.DTYPES[dtype])
    listed = datasheet_flops(_exact_name(device), dtype, tf32) if device.type == 'cuda' else None
    if listed:
        return listed, f'datasheet, dense {dtype}; a large matmul reaches {measured / 1e12:.1f} here'
    return measured, f'a large {dtype} matmul, measured now; no datasheet figure for this device'


def _exact_name(device):
    """The device's name, with its memory where two cards share a name and differ in speed."""
    name = devices.device_name(device)
    if name.endswith('RTX 3080') and torch.cuda.get_device_properties(device).multi_processor_count == 70:
        return f'{name} 12GB'
    return name


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s of a large matmul, measured now: the largest of 8192, 4096, ... whose matrices fit on a GPU."""
    n = {'cuda': 8192, 'cpu': 1024}.get(device.type, 4096)
    while True:
        try:
            rate = _square_matmul_flops(n, device, dtype)
            break
        except Exception as error:
            if not devices.is_out_of_memory(error) or n <= 1024:
                raise
        n //= 2
    if device.type == 'cuda':  # so that these matrices do not count as the run's memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return rate


def _square_matmul_flops(n, device, dtype):
    a = devices.random_matrix(n, device, dtype)
    return 2 * n ** 3 / clock.shortest_seconds(lambda: a @ a, device)
