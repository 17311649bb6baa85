"""
The names by which files and users call the Linears of a model, and what an adapter has there.

Models whose architecture has a family of its own in Hugging Face's files go by that family's names, as in peft. There
one of our Linears may be several: q_proj, k_proj and v_proj are rows of our c_attn. Other models go by our names.
"""

from dataclasses import dataclass

import torch.nn as nn

from model import GPTConfig
from sologpt.files.families import FAMILIES
from sologpt.files.family import LINEARS
from sologpt.matmuls.nf4 import NF4Linear

NAMED_AS_IN = {'llama': FAMILIES['llama']}  # architecture -> a family with the names; of others they are our own


@dataclass(frozen=True)
class NamedLinear:
    """A Linear as files name it: all the rows of one of ours, or some."""
    name: str  # in files
    linear: str  # ours
    rows: slice
    block: int | None  # the number of its block; None: it is in none


@dataclass(frozen=True)
class Target:
    """Rows of a Linear that an adapter changes, and the adapter's size there."""
    name: str  # in files
    rows: slice
    r: int  # the rank, or the width of a bottleneck
    scale: float  # g: what B A x is multiplied by

    @property
    def n_out(self) -> int:
        return self.rows.stop - self.rows.start


def named_linears(model: nn.Module) -> list[NamedLinear]:
    """
    The model's Linears and embedding tables, which peft would match too, in the model's order. model: a GPT; it may be
    a skeleton.
    """
    config, found = model.config, []
    family = NAMED_AS_IN.get(config.arch)
    names = dict(family.names(config.n_layer, tied=False)) if family else {}
    for linear, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, NF4Linear)):
            in_block, begin = linear.startswith('transformer.h.'), 0
            _, block, part = linear.removeprefix('transformer.').split('.', 2) if in_block else (None, None, '')
            theirs = names.get(linear, [linear])
            sizes = config.parts_of(part) if len(theirs) > 1 else [sum(config.parts_of(part))]
            for name, n in zip(theirs, sizes, strict=True):
                found.append(NamedLinear(name, linear, slice(begin, begin + n), int(block) if in_block else None))
                begin += n
    return found


def short_names(config: GPTConfig, linears: tuple[str, ...] = LINEARS) -> list[str]:
    """What `linears`, ends of our names of a block's Linears, are in target_modules."""
    family = NAMED_AS_IN.get(config.arch)
    if family is None:
        return list(linears)
    return [name.rsplit('.', 1)[1] for linear in linears for name in family.linears(f'transformer.h.0.{linear}')]
