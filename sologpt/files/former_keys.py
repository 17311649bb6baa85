"""
Keys of train.py that earlier versions had, and what stands for them today.

Several keys that only qualified another one have been folded into it, so that prune=0.5, prune_start=0.2, prune_end=0.7
became prune='0.5:0.2-0.7'. translate() does this to the config of a checkpoint. FORMER_KEYS says what to write instead
on a command line and in a config file.
"""

from decimal import Decimal
from typing import Any

from sologpt.matmuls.spec import former_matmul

FORMER_KEYS = {  # the former key -> what to write now
    'matmul_gemms': 'write --matmul=mxfp4:gemms=dgrad+wgrad',
    'matmul_keep_last': 'write --matmul=nvfp4:keep_last=2',
    'matmul_until': 'write --matmul=sparse24:until=0.5',
    'block_dropout': 'write --matmul=block_dropout:0.1',
    'block_dropout_size': 'write --matmul=block_dropout:0.1,size=64',
    'strassen_levels': 'write --matmul=strassen:2',
    'fp8_fast_accum': 'write --matmul=fp8:fast_accum=False',
    'num_virtual_tokens': 'with adapter=prompt and adapter=prefix, write --adapter_r=16',
    'prune_start': 'write --prune=0.5:0.2-0.7 (the share of zeros, from, to)',
    'prune_end': 'write --prune=0.5:0.2-0.7 (the share of zeros, from, to)',
    'reduced_precision_reduction': 'for reduced_precision_reduction=False, write --accumulate=float32',
    'allow_fp16_accumulation': 'for allow_fp16_accumulation=True, write --accumulate=float16',
    'cuda_graphs': 'for cuda_graphs=True, write --compile=cuda_graphs',
    'decay_part': 'write --schedule=wsd:0.7',
    'muon_iterations': 'write --optimizer=muon:4',
}


def translate(config: dict[str, Any]) -> dict[str, Any]:
    """
    A copy of a saved config in which today's keys stand for former ones. Without former keys it is the same: nanoGPT's
    configs have none, and neither have those that are written today.
    """
    new = {key: value for key, value in config.items() if key not in FORMER_KEYS}
    if 'matmul' in config:
        new['matmul'] = former_matmul(config)
    if not isinstance(config.get('prune', ''), str):
        new['prune'] = _translate_prune(config)
    if 'reduced_precision_reduction' in config or 'allow_fp16_accumulation' in config:
        new['accumulate'] = ('float16' if config.get('allow_fp16_accumulation') else
                             'reduced' if config.get('reduced_precision_reduction', True) else 'float32')
    if config.get('cuda_graphs'):
        new['compile'] = 'cuda_graphs'
    if config.get('schedule') == 'wsd' and config.get('decay_part', 0.5) != 0.5:
        new['schedule'] = f'wsd:{_decimal(config["decay_part"])}'
    if config.get('optimizer') == 'muon' and config.get('muon_iterations', 5) != 5:
        new['optimizer'] = f'muon:{config["muon_iterations"]}'
    if config.get('adapter') in ('prompt', 'prefix') and config.get('num_virtual_tokens'):
        new['adapter_r'] = config['num_virtual_tokens']
    return new


def _translate_prune(config):
    if not config['prune']:
        return ''
    start, end = config.get('prune_start', 0.2), config.get('prune_end', 0.7)
    return f'{_decimal(config["prune"])}:{_decimal(start)}-{_decimal(end)}'


def _decimal(number):
    """All digits of a float, and no exponent: 1e-05 -> 0.00001."""
    return format(Decimal(repr(number)), 'f')
