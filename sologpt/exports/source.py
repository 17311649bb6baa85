"""
What is exported: a model from any file, or the base of adapters, with these merged into its weights or beside it.
"""

import math
import os
from dataclasses import dataclass

import torch

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.adapters.adapter import Adapter, merge, put_adapter
from sologpt.adapters.base import load_base
from sologpt.adapters.peft_files import read_adapter
from sologpt.files.checkpoint import check_weights
from sologpt.files.companions import Companions, read_settings
from sologpt.files.families import find_family
from sologpt.files.family import LINEARS
from sologpt.files.models import read_model
from sologpt.matmuls.held import decode_base
from sologpt.matmuls.sparse24 import Sparse24
from sologpt.matmuls.spec import parse_matmul
from sologpt.tokens import data_folder
from sologpt.tokens.tokenizer import Tokenizer


@dataclass
class GivenAdapter:
    """An adapter, the folder that it lies in, and the factor by which its change of the weights is multiplied."""
    adapter: Adapter
    folder: str
    factor: float = 1.0

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.folder))

    def describe_merge(self) -> str:
        return f'{self.name} ({self.adapter.config.method}, times {self.factor:g})'


@dataclass
class ExportedModel:
    """A model that is to be exported, and adapters that are not merged into it."""
    config: GPTConfig
    weights: dict[str, torch.Tensor]  # by the names of GPT's state_dict(), those of tied weights included
    saved: dict  # what else its checkpoint holds
    source: str  # where it lies
    beside: list[GivenAdapter]
    merged: list[GivenAdapter]

    @property
    def kept(self) -> Companions:
        """The files that came along with the model from Hugging Face's format, or {}."""
        return self.saved.get('hf_files', {})

    @property
    def usual_dtype(self) -> str:
        """The dtype of weights if none is asked for: that of the files that came along, else float32."""
        settings = read_settings(self.kept, 'config.json')
        return settings.get('dtype') or settings.get('torch_dtype') or 'float32'

    def find_family(self, to: str = 'hf') -> str:
        """The name of the family that it is written as. to: see families.find_family(). Raises InputError."""
        if to == 'hf' and self.kept:
            return read_settings(self.kept, 'config.json')['model_type']
        return find_family(self.config, to)

    def find_tokenizer(self, dataset: str) -> Tokenizer:
        """
        Its tokenizer, or that of data/<dataset>. Ids that the tokenizer does not have become padding. Raises
        InputError.
        """
        text = data_folder.tokenizer_of_model(self.saved, dataset, self.config.vocab_size, self.source)
        self.config.n_ids = min(self.config.n_ids, text.vocab_size)
        return text


def read_adapters(folders: str, factors: str) -> list[GivenAdapter]:
    """
    The adapters in `folders`, which are separated by commas, each with its number among `factors`. Raises InputError.
    """
    names = [folder.strip() for folder in folders.split(',')] if folders else []
    try:
        numbers = [float(factor) for factor in factors.split(',')] if factors else [1.0] * len(names)
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise InputError(f'weights={factors!r} must be numbers, separated by commas')
    if len(numbers) != len(names):
        raise InputError(f'weights={factors!r} has {len(numbers)} of them, and adapters {len(names)}')
    return [GivenAdapter(read_adapter(name), name, factor) for name, factor in zip(names, numbers, strict=True)]


def read_exported_model(out_dir: str | None, given: list[GivenAdapter], merges: bool,
                        onto_merged: bool = False) -> ExportedModel:
    """
    The model in out_dir, or the base of the given adapters. Raises InputError.

    out_dir: a name or folder as read_model() takes it; None: where the first adapter says, without adapters 'out'.
    merges: the adapters become part of the weights. onto_merged: their base may have been merged into before.
    """
    if given:
        model, saved = load_base([one.adapter for one in given], out_dir, or_merged=onto_merged)
        source = out_dir or given[0].adapter.base
        if merges:
            merge_adapters(model, given)
        decode_base(model)
        config, weights = model.config, model.state_dict()
    else:
        source = out_dir or 'out'
        model_args, weights, saved = read_model(source)
        config = GPTConfig.from_saved(model_args)
        check_weights(GPT.skeleton(config), weights, source)
    apply_recipe(config, weights, saved, source)
    return ExportedModel(config, weights, saved, source, beside=[] if merges else given, merged=given if merges else [])


def merge_adapters(model: GPT, given: list[GivenAdapter]) -> None:
    """Add the change of each adapter, times its factor, to the weights of its base. Raises InputError."""
    for one in given:
        method = one.adapter.config.cls
        if method.depends_on_base and (one.factor != 1 or len(given) > 1):
            raise InputError(f'{one.folder} is a {method.name}, which is no sum with the weights: merge it alone, by '
                             f'weight 1')
        put_adapter(model, one.adapter, one.folder)
        merge(model, one.factor)


def apply_recipe(config: GPTConfig, weights: dict[str, torch.Tensor], saved: dict, source: str) -> None:
    """
    Replace latent weights by those that the recipe of their training makes of them. Raises InputError if other software
    cannot compute with these.
    """
    spec = parse_matmul(saved.get('matmul', ''))
    if spec is None:
        return
    if spec.name == 'ternary':
        raise InputError(f'{source} was trained with matmul=ternary, whose Linears normalise their input: only '
                         f'sample.py runs it')
    if spec.name == 'sparse24':
        for i in range(config.n_layer - spec.resolved(config.n_layer).keep_last):
            for linear in LINEARS:
                name = f'transformer.h.{i}.{linear}.weight'
                weights[name] = weights[name] * Sparse24().mask(weights[name])
