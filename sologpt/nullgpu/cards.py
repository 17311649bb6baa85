"""
Cards that the null GPU can stand for.

Sizes and bandwidths are from NVIDIA's datasheets and architecture whitepapers: T4 (Turing), A100 (GA100), RTX 3060
(GA102), RTX 40 (AD102), H100 (GH100), RTX 5090 (GB202). What follows from the compute capability is from the table of
technical specifications in the CUDA programming guide. Peaks in FLOP/s are those of sologpt/machine/peaks.py.
"""

import re
from dataclasses import dataclass

from configurator import InputError
from sologpt.machine.peaks import datasheet_flops


@dataclass(frozen=True)
class Card:
    """
    name             as torch reports it
    short            what people call it, for the command line
    capability       the compute capability: 89 is 8.9
    memory           GiB. The driver keeps some hundred MB of a real card for itself, which is not counted here
    multiprocessors  how many
    bandwidth        of the memory, in GB/s
    l2_cache         MiB
    """
    name: str
    short: str
    capability: int
    memory: float
    multiprocessors: int
    bandwidth: float
    l2_cache: int

    def environment(self) -> dict[str, str]:
        """The variables that tell the library of the null GPU which card it is."""
        threads, shared = PER_MULTIPROCESSOR[self.capability]
        values = {'CAPABILITY': self.capability, 'MEMORY': int(self.memory * 2 ** 30),
                  'MULTIPROCESSORS': self.multiprocessors, 'THREADS_PER_MULTIPROCESSOR': threads,
                  'SHARED_PER_MULTIPROCESSOR': shared * 2 ** 10,
                  'SHARED_PER_BLOCK': (shared - (self.capability >= 80)) * 2 ** 10,  # the system keeps 1 KiB of each
                  'L2_CACHE': self.l2_cache * 2 ** 20}
        return {'NULLGPU_NAME': self.name} | {f'NULLGPU_{key}': str(value) for key, value in values.items()}

    def peak(self, dtype: str, tf32: bool = True) -> float | None:
        """
        The dense peak in FLOP/s for matmuls in `dtype`, a name of torch's; None if the card does not have it.

        int8 and float8 products take half the time of 16-bit ones. GeForce cards sum 16-bit and float8 products in
        float32 at half the rate, but not those of int8, which so take a quarter. Source: the whitepapers' tables.
        """
        if dtype in ('bfloat16', 'float16', 'float32'):
            return datasheet_flops(self.name, dtype, tf32)
        half = datasheet_flops(self.name, 'float16')
        if dtype == 'int8':
            return half * (4 if 'GeForce' in self.name else 2)
        return half * 2 if dtype.startswith('float8') and self.capability >= 89 else None


# compute capability -> (threads, KiB of shared memory) of a multiprocessor
PER_MULTIPROCESSOR = {75: (1024, 64), 80: (2048, 164), 86: (1536, 100), 89: (1536, 100), 90: (2048, 228),
                      120: (1536, 100)}
CARDS = (
    Card('Tesla T4', 'T4', 75, 15, 40, 320, 4),  # 16 GB, but error correction takes 1
    Card('NVIDIA GeForce RTX 3060', 'RTX 3060', 86, 12, 28, 360, 3),
    Card('NVIDIA GeForce RTX 4060 Ti', 'RTX 4060 Ti', 89, 16, 34, 288, 32),
    Card('NVIDIA GeForce RTX 4070', 'RTX 4070', 89, 12, 46, 504, 36),
    Card('NVIDIA GeForce RTX 4090', 'RTX 4090', 89, 24, 128, 1008, 72),
    Card('NVIDIA A100-SXM4-80GB', 'A100', 80, 80, 108, 2039, 40),
    Card('NVIDIA H100 80GB HBM3', 'H100', 90, 80, 132, 3350, 50),
    Card('NVIDIA GeForce RTX 5090', 'RTX 5090', 120, 32, 170, 1792, 96))


def find_card(name: str) -> Card:
    """The card of this name, in short or as torch reports it. Raises InputError."""
    def plain(text):
        return re.sub(r'^nvidia |\b(geforce|tesla) ', '', text.strip().lower())
    for card in CARDS:
        if plain(name) in (card.short.lower(), plain(card.name)):
            return card
    raise InputError(f'card={name!r} is not known: use {", ".join(card.short for card in CARDS)}')
