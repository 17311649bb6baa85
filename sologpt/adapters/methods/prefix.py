"""
Prefix tuning (https://arxiv.org/abs/2101.00190): trained keys and values before the text, in every layer.

    k, v = [k_virtual; k], [v_virtual; v]          virtual (n, 2 n_layer G hd) trained; the model is frozen

A row of `virtual` holds, layer by layer, a key and a value of all G heads of keys and values, each hd wide. The virtual
tokens begin as the keys and values of a text. Only attention sees them, so that they cost less than the tokens of a
prompt.
"""

import torch
import torch.nn as nn

from model import GPT
from sologpt.adapters.method import VirtualTokens
from sologpt.inference.contexts import Context
from sologpt.machine.devices import matmul_dtype
from sologpt.matmuls.attention import causal_mask

Tensor = torch.Tensor


class PrefixTuning(VirtualTokens):
    name = 'prefix'
    needs_mask = True
    peft_type = 'PREFIX_TUNING'
    peft_ignored = (*VirtualTokens.peft_ignored, 'encoder_hidden_size')

    @classmethod
    def new_virtual(cls, config, n):
        return nn.Parameter(torch.zeros(n, 2 * config.n_layer * config.n_kv_head * config.head_dim))

    @torch.no_grad()
    def begin_from(self, idx):
        cache = GPT.new_cache(self, 1, self.n_virtual)
        GPT.hidden(self, idx, cache)
        layers = torch.stack([z[0] for layer in cache.layers for z in (layer.k, layer.v)])  # (2L, G, P, hd)
        self.virtual.copy_(layers.permute(2, 0, 1, 3).flatten(1))

    def keys_and_values(self, batch: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """[(k, v), ...] of the layers, each (batch, G, n_virtual, hd)."""
        c = self.config
        layers = self.virtual.to(dtype).view(self.n_virtual, 2 * c.n_layer, c.n_kv_head, -1).permute(1, 2, 0, 3)
        layers = layers.unsqueeze(1).expand(-1, batch, -1, -1, -1)
        return list(zip(layers[0::2], layers[1::2], strict=True))

    def context(self, idx):
        if not self.n_virtual:
            return super().context(idx)
        return PrefixContext(self.keys_and_values(len(idx), matmul_dtype(self.virtual)))

    def new_cache(self, batch, positions):
        cache = super().new_cache(batch, positions + self.n_virtual)
        if self.n_virtual:
            before = self.keys_and_values(batch, matmul_dtype(self.virtual))
            for layer, (k, v) in zip(cache.layers, before, strict=True):
                layer.append(k, v)
        return cache

    def flops_per_token(self, block_size=None):
        return super().flops_per_token((block_size or self.config.block_size - self.n_virtual) + self.n_virtual)

    @classmethod
    def heads(cls, config):
        return config.n_kv_head

    @classmethod
    def peft_settings(cls, model_config, transposed):
        width = model_config.n_kv_head * model_config.head_dim
        return super().peft_settings(model_config, transposed) | {
            'prefix_projection': False, 'token_dim': width, 'encoder_hidden_size': width}


class PrefixContext(Context):
    """The tokens also see the prefix. What is appended does not stay: training must not overwrite anything."""

    def __init__(self, keys_and_values: list[tuple[Tensor, Tensor]]):
        """keys_and_values: (k, v) of each layer, (B, G, P, hd)."""
        self.layers = [self.Layer(k, v) for k, v in keys_and_values]
        self.length = self.layers[0].length

    def layer(self, i):
        return self.layers[i]

    class Layer(Context):
        def __init__(self, k: Tensor, v: Tensor):
            self.k, self.v, self.length = k, v, k.size(2)

        def append(self, k, v, window=None):
            k, v, T = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2), k.size(2)
            return k, v, causal_mask(T, k.size(2), k.device, window)
