"""A model as model.pt2, an archive of torch.export, which runs without this project."""

import os
from dataclasses import replace

import torch
import torch.nn as nn

from configurator import InputError
from model import GPT, GPTConfig
from sologpt.exports.source import ExportedModel
from sologpt.files.safetensors_files import cast_weights
from sologpt.machine.devices import DTYPES
from sologpt.tokens import tokenizer_files


class Logits(nn.Module):
    """A GPT as a function: input_ids, (batch, length) int64 -> logits of all positions, (batch, length, ids)."""

    def __init__(self, model: GPT):
        super().__init__()
        self.gpt = model
        head = model.lm_head.weight = nn.Parameter(model.lm_head.weight[:model.config.n_ids].clone())
        if model.config.tied:
            model.transformer.wte.weight = head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.gpt.lm_head(self.gpt.hidden(input_ids))


def build_logits(config: GPTConfig, weights: dict[str, torch.Tensor], dtype: str) -> Logits:
    """A model with these weights, in dtype, as a function without gradients."""
    model = GPT.skeleton(replace(config, attn_backend='causal'))
    model.load_state_dict(cast_weights(weights, DTYPES[dtype]), assign=True)
    return Logits(model).eval().requires_grad_(False)


def export_arguments(config: GPTConfig, source: str) -> tuple[tuple, dict]:
    """(an example of input_ids, which of its dimensions vary), as torch's exporters take them. Raises InputError."""
    if config.block_size < 2:
        raise InputError(f'{source} has block_size=1: a program for texts of any length needs at least 2')
    length = torch.export.Dim('length', max=config.block_size)
    return (torch.zeros(2, 2, dtype=torch.int64),), {'input_ids': {0: torch.export.Dim('batch'), 1: length}}


def write_torch_program(exported: ExportedModel, folder: str, dtype: str, dataset: str) -> str:
    """Write model.pt2 and the tokenizer. Returns what they are, in words. Raises InputError."""
    config = exported.config
    example, varies = export_arguments(config, exported.source)
    text = exported.find_tokenizer(dataset)
    logits = build_logits(config, exported.weights, dtype)
    tokenizer_files.write_tokenizer(folder, text, config.block_size)
    torch.export.save(torch.export.export(logits, example, dynamic_shapes=varies), os.path.join(folder, 'model.pt2'))
    return f'model.pt2 of torch {torch.__version__}, in {dtype}'
