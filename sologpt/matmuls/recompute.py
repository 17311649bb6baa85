"""
Activation checkpointing: what a block keeps for the backward, and what it computes again there.

Each function is called as recompute(function, *args) and returns function(*args).
"""

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten._int_mm.default,
            aten._scaled_mm.default, aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default}


def keep_all(function, *args):
    """Nothing is computed again."""
    return function(*args)


def keep_inputs(function, *args):
    """Only the inputs are kept: a third more FLOPs, the least memory."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False)


def keep_products(function, *args):
    """The results of matmuls and attention are kept, and what lies between them is computed again."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, context_fn=_keep_products)


def _keep_products():
    return create_selective_checkpoint_contexts(
        lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if op in PRODUCTS
        else CheckpointPolicy.PREFER_RECOMPUTE)


RECOMPUTE = {False: keep_all, True: keep_inputs, 'selective': keep_products}  # by train.py's checkpoint_activations
