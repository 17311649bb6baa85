"""
Computing with adapters: their low-rank matrices, the sum of several, and the adapter of a base in another family.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.adapters.adapter import Adapter, parts, put_adapter
from sologpt.adapters.config import AdapterConfig
from sologpt.adapters.method import PREFIX
from sologpt.adapters.methods.lora import LoRA
from sologpt.adapters.targets import NAMED_AS_IN, short_names
from sologpt.files.family import Family

Tensor = torch.Tensor


def low_rank_matrices(model_config: GPTConfig, adapter: Adapter, source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """
    Our name of a Linear -> (A, B), (r, in) and (out, r): the adapter changes that Linear's weight by B A. Raises
    InputError, which names `source`, if the adapter is not such a product.
    """
    return {name: part.low_rank() for name, part in _low_rank_parts(model_config, adapter, source)}


def _low_rank_parts(model_config, adapter, source):
    if adapter.config.cls.adds_tokens:
        raise InputError(f'{source}: virtual tokens change no weights: they cannot be stacked, nor share a batch')
    return _parts_of(model_config, adapter, source)


def _parts_of(model_config, adapter, source):
    """parts() of a model with the adapter."""
    skeleton = GPT.skeleton(model_config)
    put_adapter(skeleton, adapter, source)
    return parts(skeleton)


def stack(model_config: GPTConfig, adapters: list[Adapter], weights: list[float], sources: list[str]) -> Adapter:
    """
    One LoRA adapter that changes the base by the sum of the adapters' changes times the weights, exactly: their ranks
    add up. sources: where the adapters are from. Raises InputError if one is not a product of two small matrices.
    """
    stacked = {}  # by names in files
    for adapter, weight, source in zip(adapters, weights, sources, strict=True):
        for _, part in _low_rank_parts(model_config, adapter, source):
            for target, (A, B) in zip(part.targets, part.low_ranks(), strict=True):
                As, Bs = stacked.setdefault(target.name, ([], []))
                As.append(A)
                Bs.append(weight * B)
    stacked = {name: (torch.cat(As), torch.cat(Bs, dim=1)) for name, (As, Bs) in stacked.items()}
    ranks = {name: len(A) for name, (A, _) in stacked.items()}
    r, everywhere = max(ranks.values()), short_names(model_config)
    all_of_them = len(ranks) == len(everywhere) * model_config.n_layer
    other = {name: rank for name, rank in ranks.items() if rank != r}
    config = AdapterConfig(LoRA.name, r=r, lora_alpha=float(r), rank_pattern=other,
                           target_modules=everywhere if all_of_them else list(ranks),
                           alpha_pattern={name: float(rank) for name, rank in other.items()})
    tensors = {f'{PREFIX}{name}.{end}': matrix for name, pair in stacked.items()
               for end, matrix in zip(LoRA.file_ends.values(), pair, strict=True)}
    return replace(adapters[0], config=config, tensors=tensors)


def for_family(model_config: GPTConfig, adapter: Adapter, family: Family, source: str) -> Adapter:
    """
    The adapter for its base as `family` has it. Where the family cuts a Linear, low-rank adapters are cut, too. All
    parts get one rank and alpha = r, which all software understands. Raises InputError if the adapter cannot be so.
    """
    cls = adapter.config.cls
    if not cls.known_to_peft:
        raise InputError(f'{source} is a {cls.name}, which peft does not have')
    if family.transposed or family.arch in NAMED_AS_IN:  # the names are the same
        return adapter
    if cls.adds_tokens:
        return replace(adapter, tensors=cls.tensors_for_family(adapter.tensors, model_config))
    found = {name: part.family_tensors() for name, part in _parts_of(model_config, adapter, source)}
    r, tensors, targets = max(len(A) for A, _, _ in found.values()), {}, []
    for name, (A, B, vectors) in found.items():
        theirs, factor, pad = family.linears(name), family.factor(name, model_config), r - len(A)
        targets += theirs
        for target, rows in zip(theirs, torch.arange(len(B)).chunk(len(theirs)), strict=True):
            tensors |= {f'{PREFIX}{target}.lora_A.weight': F.pad(A, (0, 0, 0, pad)),
                        f'{PREFIX}{target}.lora_B.weight': F.pad(B[rows] * factor, (0, pad)),
                        **{f'{PREFIX}{target}.{end}': vector[rows] * factor for end, vector in vectors.items()}}
    kinds = sorted({target.rsplit('.', 1)[1] for target in targets})
    everywhere = len(targets) == len(kinds) * model_config.n_layer
    config = AdapterConfig(cls.exported_as, r=r, lora_alpha=float(r), target_modules=kinds if everywhere else targets)
    return replace(adapter, config=config, tensors=tensors)
