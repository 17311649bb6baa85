"""
Prompt tuning (https://arxiv.org/abs/2104.08691): trained embeddings before the text, as if it had begun with them.

    x = [virtual; wte[idx]]          virtual (n, n_embd) trained; the model is frozen

The virtual tokens begin as the embeddings of a text. They pass through all of the model, so that they cost as much as
tokens do.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from sologpt.adapters.method import VirtualTokens
from sologpt.matmuls.elementwise import RMS_EPS


class PromptTuning(VirtualTokens):
    name = 'prompt'
    peft_type = 'PROMPT_TUNING'
    peft_ignored = (*VirtualTokens.peft_ignored, 'prompt_tuning_init', 'prompt_tuning_init_text',
                    'tokenizer_name_or_path', 'tokenizer_kwargs')

    @classmethod
    def new_virtual(cls, config, n):
        return nn.Parameter(torch.zeros(n, config.n_embd))

    @torch.no_grad()
    def begin_from(self, idx):
        self.virtual.copy_(self.transformer.wte(idx)[0])

    def hidden(self, idx, context=None):
        context = context or self.context(idx)
        if context.length or not self.n_virtual:
            return super().hidden(idx, context)
        x = self.transformer.wte(idx)
        virtual = self.virtual.to(x.dtype).expand(len(idx), -1, -1)
        return self.contextual(torch.cat([virtual, x], dim=1), context)[:, self.n_virtual:]

    def new_cache(self, batch, positions):
        return super().new_cache(batch, positions + self.n_virtual)

    def flops_per_token(self, block_size=None):
        T = block_size or self.config.block_size - self.n_virtual
        head = self.lm_head.weight.numel() * 4
        return (super().flops_per_token(T + self.n_virtual) - head) * (T + self.n_virtual) / T + head

    @classmethod
    def tensors_for_family(cls, tensors, config):
        if not config.embd_norm:
            return tensors
        # other families have no norm after the embedding: it has become part of their table
        return {name: F.rms_norm(t.float(), t.shape[1:], eps=RMS_EPS) for name, t in tensors.items()}
