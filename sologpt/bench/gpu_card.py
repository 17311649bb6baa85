"""What a device is: its name and versions, how fast it multiplies and copies, and what nvidia-smi says about it."""

import json
import platform
import subprocess
from typing import Any

import torch

from sologpt.bench.gpu_session import Session
from sologpt.machine import clock, devices, peaks


def read_card(session: Session, keys: dict) -> dict:
    """The facts of print_card(), read in a process of its own."""
    return session.child('gpu_card', f'print_card({f"{session.device}"!r}, {session.dtype!r}, {session.small})')


def print_card(name: str, dtype: str, small: bool) -> None:
    """Print, as JSON, what the device is, and how fast a large matmul and a copy are."""
    device = devices.find_device(name)
    devices.prepare_device(device)
    flops = peaks.matmul_flops(device, devices.DTYPES[dtype])
    found = card_facts(device) | {'matmul_tflops': flops / 1e12}
    source = torch.ones(2 ** 24 if small else 2 ** 31, dtype=torch.uint8, device=device)
    dest = torch.empty_like(source)
    found['copy_gb_per_s'] = 2 * source.numel() / 1e9 / clock.shortest_seconds(lambda: dest.copy_(source), device)
    if device.type == 'cuda':
        a = torch.randn(8192, 8192, device=device, dtype=devices.DTYPES[dtype])
        for _ in range(int(2 * flops / (2 * 8192 ** 3))):  # two seconds, which are queued
            a @ a
        found['busy'] = read_nvidia_smi(torch.cuda.get_device_properties(device))
    print(json.dumps(found))


def card_facts(device: torch.device) -> dict[str, Any]:
    """The device's name and the versions of the software; of a GPU also capability, memory in GB, and nvidia-smi's."""
    facts = {'name': devices.device_name(device), 'torch': torch.__version__, 'cuda': torch.version.cuda,
             'python': platform.python_version(), 'system': platform.platform(terse=True)}
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        facts |= {'capability': list(torch.cuda.get_device_capability(device)), 'triton': _triton_version(),
                  'memory_gb': properties.total_memory / 1e9, 'multiprocessors': properties.multi_processor_count,
                  'cudnn': torch.backends.cudnn.version(), 'idle': read_nvidia_smi(properties)}
    return facts


def _triton_version():
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def read_nvidia_smi(properties) -> dict[str, str]:
    """
    Driver, clocks in MHz, power in W and temperature in C of one card, as nvidia-smi says; {} if it does not.
    properties: torch's, of the card.
    """
    asked = 'uuid,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu'
    try:
        printed = subprocess.run(['nvidia-smi', f'--query-gpu={asked}', '--format=csv,noheader,nounits'],
                                 capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    cards = [dict(zip(asked.split(','), line.split(', '), strict=False)) for line in printed.splitlines()]
    return next((card for card in cards if f'{properties.uuid}' in card.pop('uuid')), {})
